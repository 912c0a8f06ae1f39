# SPDX-License-Identifier: Apache-2.0
"""One epoch of training, with mixed precision, accumulation and gradient modulation."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from msa_online.batching import BucketBatchSampler
from msa_online.methods import GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import gradients_of
from msa_online.missing.modalities import InputMask
from msa_online.modeling_msa import PROBES, MSAModel
from msa_online.training.optimizer import scaled_rates
from msa_online.training.teacher import Teacher


@dataclass
class Progress:
    """Progress of a run; saved with its state.

    Attributes:
        step: Optimizer steps taken.
        skipped: Steps skipped because a gradient was not finite.
        seconds: Time of training and validation, summed over the parts of a resumed run.
        history: One record of losses and validation metrics for each epoch.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the record."""
        vars(self).update(state)


@dataclass
class TrainingLoop:
    """Trains epochs; model, optimizer and loaders are prepared by Accelerate.

    Attributes:
        accelerator: Devices, precision, accumulation and processes.
        model: The wrapped model.
        optimizer: The wrapped optimizer.
        scheduler: Learning-rate schedule, stepped once per optimizer step taken.
        modulator: Changes gradients once per optimizer step.
        input_mask: Hides modalities of training samples.
        clip_norm: Largest gradient norm.
        seed: Seed of the run.
        measure_gradients: Record the gradient norm of each loss in the first step of every epoch.
        measure_modalities: Record the gradient norm of the parameters of each modality in every step.
        teacher: Teacher of the current stage.
        progress: Progress of the run.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    modulator: GradientModulator
    input_mask: InputMask
    clip_norm: float
    seed: int
    measure_gradients: bool = False
    measure_modalities: bool = False
    teacher: Teacher = field(default_factory=Teacher)
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def bare_model(self) -> MSAModel:
        """The model without wrappers such as DDP and torch.compile; unwrapping it costs a tenth of a step."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train_epoch(self, loader: DataLoader, *, stage: str, epoch: int, title: str) -> dict[str, float]:
        """Train one epoch.

        Micro-batches of a step may differ in size. Each is weighted by its number of samples, so that losses
        and gradients are means over all samples of the step.

        Args:
            loader: Prepared loader of the training split, with batches from a `BucketBatchSampler`.
            stage: Name of the training stage.
            epoch: Epochs finished before this one.
            title: Title of the progress bar.

        Returns:
            Mean of every loss and diagnostic over the epoch's finite steps, by name; `loss` is the weighted
            sum of the losses, names with a slash are diagnostics of the head or the modulator.
        """
        self.model.train()
        self.input_mask.start_epoch(epoch)
        steps: dict[str, list[float]] = defaultdict(list)
        self._gradient_norms: dict[str, float] = {}
        bar = tqdm(
            total=len(loader), desc=title, leave=False, disable=not self.accelerator.is_local_main_process
        )
        window: list[MicroBatch] = []
        for (number, batch), weight in zip(enumerate(loader), self._weights(loader), strict=True):
            with self.accelerator.accumulate(self.model):
                seen = self.teacher.join(self.input_mask.apply(batch))
                if weight == 0:  # a placeholder for an empty micro-batch: running state must not see it
                    seen["modality_present"] = torch.zeros_like(seen["modality_present"])
                measure = self.measure_gradients and number == 0
                window.append(self._forward_backward(seen, weight, measure))
                if self.accelerator.sync_gradients:
                    record = self._step(window, stage, epoch)
                    window = []
                    for name, value in record.items():
                        steps[name].append(value)
                    shown = {name: f"{value:.3f}" for name, value in record.items() if "/" not in name}
                    bar.set_postfix(shown, refresh=False)
            bar.update()
        bar.close()
        return {name: fmean(values) for name, values in steps.items()} | self._gradient_norms

    def _weights(self, loader: DataLoader) -> Iterator[float]:
        """Weight of each micro-batch of this process: its size divided by the mean size in its step.

        Accumulation and DDP average gradients over micro-batches whatever their sizes; this corrects it.
        """
        sampler = loader.batch_sampler
        if not isinstance(sampler, BucketBatchSampler):  # Accelerate's shard of it
            sampler = sampler.batch_sampler
        for sizes in sampler.step_sizes():
            for mine in sizes[self.accelerator.process_index :: self.accelerator.num_processes]:
                yield mine * len(sizes) / sum(sizes)

    def _forward_backward(self, batch: Mapping[str, Tensor], weight: float, measure: bool) -> "MicroBatch":
        """Run forward and backward of a micro-batch; returns its losses and diagnostics, detached."""
        output = self.model(**batch, output_internals=True)
        if measure:
            self._measure(output.losses)
        observed = self.modulator.observe(output, batch["labels"])
        extra = self.modulator.extra_losses(output, batch["labels"])
        loss = output.loss + sum(value for name, value in extra.items() if "/" not in name)
        self.accelerator.backward(weight * loss)
        reported = {"loss": loss, **output.losses, **extra, **output.diagnostics}
        return MicroBatch(_detached(reported), _detached(observed), weight)

    def _measure(self, losses: Mapping[str, Tensor]) -> None:
        """Record the gradient norm of each unweighted loss."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for name, loss in losses.items():
            if not loss.requires_grad:
                self._gradient_norms[f"gradient/{name}"] = 0.0
                continue
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
            self._gradient_norms[f"gradient/{name}"] = norm.item()

    def _step(self, window: Sequence["MicroBatch"], stage: str, epoch: int) -> dict[str, float]:
        """Unscale once, modulate, clip, step; skip the whole step if a gradient is not finite.

        docs/methods/numerics.md, "Order of a step", has the reasons.

        Returns:
            Losses and diagnostics averaged over the accumulation window and the ranks, and the log of the
            modulator; empty for a skipped step.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [parameter for parameter in self._clipped if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        probe_norm = get_total_norm(gradients_of(self.bare_model.probes.parameters()))
        whole = {"gradient_norm": norm, "probe_norm": probe_norm, **self.modulator.measure(self._owned)}
        by_modality = self._modality_norms() if self.measure_modalities else {}
        values = self._fetch(window, whole | by_modality)
        record = {name: values[name] for name in (*window[0].reported, *by_modality)}
        if not math.isfinite(values["gradient_norm"] + values["probe_norm"]):
            self._skip()
            return {}
        modulation = self.modulator.modulate(
            ModulationContext(
                modality_parameters=self._owned,
                statistics=values,
                stage=stage,
                epoch=epoch,
                step=self.progress.step,
                seed=self.seed,
            )
        )
        if modulation is None:
            modulation = Modulation()
        else:
            norm = get_total_norm([parameter.grad for parameter in parameters])
        clip_grads_with_norm_(parameters, self.clip_norm, norm)
        with scaled_rates(self.optimizer, modulation.rates):
            self.optimizer.step()
        self.bare_model.head.end_step(taken=True)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        record |= modulation.log
        self._log({**record, "gradient_norm": values["gradient_norm"]})
        return record

    def _modality_norms(self) -> dict[str, Tensor]:
        return {
            f"modality_gradient/{name}": get_total_norm(gradients_of(parameters))
            for name, parameters in self._owned.items()
        }

    def _fetch(self, window: Sequence["MicroBatch"], whole: Mapping[str, Tensor]) -> dict[str, float]:
        """Copy all scalars of a step to the host, in one synchronisation.

        Args:
            window: Scalars of its micro-batches; their weighted means over the window and the ranks are
                returned.
            whole: Scalars of the accumulated gradients, equal on all ranks.
        """
        names = [*window[0].reported, *window[0].observed]
        means = torch.stack([micro.values() for micro in window]).mean(dim=0)
        means = self.accelerator.reduce(means, reduction="mean")
        of_gradients = torch.stack([value.to(means) for value in whole.values()])
        return dict(zip([*names, *whole], torch.cat([means, of_gradients]).tolist(), strict=True))

    def _skip(self) -> None:
        """Drop the gradients; the step then only lets GradScaler lower its scale."""
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        self.bare_model.head.end_step(taken=False)
        self.progress.skipped += 1

    @cached_property
    def _owned(self) -> dict[str, list[Parameter]]:
        return self.bare_model.modality_parameters()

    @cached_property
    def _clipped(self) -> list[Parameter]:
        named = self.bare_model.named_parameters()
        return [parameter for name, parameter in named if not name.startswith(PROBES)]

    def _log(self, record: Mapping[str, float]) -> None:
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        values = {f"train/{name}": value for name, value in record.items()}
        values |= {f"learning_rate/{name}": rate for name, rate in rates.items()}
        self.accelerator.log(values, step=self.progress.step)


@dataclass(frozen=True)
class MicroBatch:
    """Detached scalars of one forward pass.

    Attributes:
        reported: Losses and diagnostics.
        observed: Statistics of the modulator.
        weight: Its size divided by the mean size of the micro-batches of the step.
    """

    reported: dict[str, Tensor]
    observed: dict[str, Tensor]
    weight: float

    def values(self) -> Tensor:
        """All scalars, weighted; the reported ones first."""
        return self.weight * torch.stack([*self.reported.values(), *self.observed.values()])


def _detached(scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float() for name, value in scalars.items()}
