# SPDX-License-Identifier: Apache-2.0
"""One epoch of training: the order of a step that mixed precision, accumulation and modulators allow."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from msa_online.balancing import GradientModulator, ModulationContext
from msa_online.data.missing import Hiding
from msa_online.modeling_msa import MSAModel
from msa_online.training.teacher import Teacher


@dataclass
class Progress:
    """How far a run has come; saved with it.

    Attributes:
        step: Optimizer steps taken.
        skipped: Steps skipped because a gradient was not finite.
        history: One record of losses and validation metrics for each epoch.
    """

    step: int = 0
    skipped: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the record."""
        vars(self).update(state)


@dataclass
class TrainingLoop:
    """What a run trains with, all of it prepared by Accelerate where it has to be.

    Attributes:
        accelerator: Devices, precision, accumulation and processes.
        model: The model as Accelerate wrapped it.
        optimizer: Its optimizer as Accelerate wrapped it.
        scheduler: Learning-rate schedule, stepped once per optimizer step taken.
        modulator: Changes gradients at the one legal place.
        hiding: Hides modalities of training samples.
        clip_norm: Largest gradient norm.
        seed: Seed of the run.
        measure_gradients: Record the gradient norm of each loss in the first step of every epoch.
        teacher: Whom the stage is taught by.
        progress: How far the run has come.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    modulator: GradientModulator
    hiding: Hiding
    clip_norm: float
    seed: int
    measure_gradients: bool = False
    teacher: Teacher = field(default_factory=Teacher)
    progress: Progress = field(default_factory=Progress)

    @property
    def bare_model(self) -> MSAModel:
        """The model without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def train_epoch(self, loader: DataLoader, *, stage: str, epoch: int, title: str) -> dict[str, float]:
        """Train one epoch.

        Args:
            loader: Prepared loader of the training split.
            stage: Name of the training stage.
            epoch: Epochs finished before this one.
            title: What the progress bar says.

        Returns:
            Mean of every loss and diagnostic over the epoch's finite steps, by name; `loss` is the weighted
            sum of the losses, names with a slash are diagnostics.
        """
        self.model.train()
        self.hiding.start_epoch(epoch)
        sums: dict[str, float] = defaultdict(float)
        taken = 0
        self._gradient_norms: dict[str, float] = {}
        bar = tqdm(
            total=len(loader), desc=title, leave=False, disable=not self.accelerator.is_local_main_process
        )
        window: list[dict[str, Tensor]] = []
        for number, batch in enumerate(loader):
            with self.accelerator.accumulate(self.model):
                seen = self.teacher.join(self.hiding.hide(batch))
                window.append(self._forward_backward(seen, self.measure_gradients and number == 0))
                if self.accelerator.sync_gradients:
                    losses = self._step(window, stage, epoch)
                    window = []
                    taken += bool(losses)
                    for name, value in losses.items():
                        sums[name] += value
                    shown = {name: f"{value:.3f}" for name, value in losses.items() if "/" not in name}
                    bar.set_postfix(shown, refresh=False)
            bar.update()
        bar.close()
        return {name: total / taken for name, total in sums.items()} | self._gradient_norms

    def _forward_backward(self, batch: Mapping[str, Tensor], measure: bool) -> dict[str, Tensor]:
        """Losses and diagnostics of a micro-batch, detached; gradients are left on the parameters."""
        output = self.model(**batch)
        if measure:
            self._measure(output.losses)
        self.modulator.observe(output, batch["labels"])
        extra = self.modulator.extra_losses(output, batch["labels"])
        loss = output.loss + sum(extra.values())
        self.accelerator.backward(loss)
        named = {"loss": loss, **output.losses, **extra, **output.diagnostics}
        return {name: value.detach().float() for name, value in named.items()}

    def _measure(self, losses: Mapping[str, Tensor]) -> None:
        """Note the norm of the gradient that each loss alone, unweighted, would give."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
            self._gradient_norms[f"gradient/{name}"] = norm.item()

    def _step(self, window: list[dict[str, Tensor]], stage: str, epoch: int) -> dict[str, float]:
        """Unscale once, modulate, clip, step (METHODS 8.1); skip everything on a non-finite gradient.

        Returns:
            Losses averaged over the accumulation window and the ranks; empty for a skipped step.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [parameter for parameter in self.bare_model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        names = list(window[0])
        losses = torch.stack([torch.stack([micro[name] for name in names]) for micro in window]).mean(dim=0)
        losses = self.accelerator.reduce(losses, reduction="mean")
        # the step's one host sync
        norm_value, *values = torch.cat([norm.reshape(1).to(losses), losses]).tolist()
        if not math.isfinite(norm_value):
            self._skip()
            return {}
        if coefficients := self.modulator.modulate(self._context(stage, epoch)):
            norm = get_total_norm([parameter.grad for parameter in parameters])
        clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        record = dict(zip(names, values, strict=True))
        self._log({**record, "gradient_norm": norm_value}, coefficients)
        return record

    def _skip(self) -> None:
        """Drop the gradients; GradScaler lowers its scale in the step it is asked to skip."""
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.skipped += 1

    def _context(self, stage: str, epoch: int) -> ModulationContext:
        return ModulationContext(
            modality_parameters=self.bare_model.modality_parameters(),
            stage=stage,
            epoch=epoch,
            step=self.progress.step,
            seed=self.seed,
            reduce=lambda values: self.accelerator.reduce(values, reduction="mean"),
        )

    def _log(self, record: Mapping[str, float], coefficients: Mapping[str, Tensor]) -> None:
        rates = self.scheduler.get_last_lr()
        values = {f"train/{name}": value for name, value in record.items()}
        values |= {f"learning_rate/{number}": rate for number, rate in enumerate(rates)}
        values |= {f"coefficient/{name}": float(value) for name, value in coefficients.items()}
        self.accelerator.log(values, step=self.progress.step)
