# SPDX-License-Identifier: Apache-2.0
"""BALM: calibrated features and rebalanced gradients for any head, under missing rates; METHODS 3."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import loss_alone, mean_where, task_loss
from msa_online.layers.modules import masked_mean
from msa_online.layers.precision import in_fp32
from msa_online.methods.base import Calibrator, GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import APPLICATIONS, apply_coefficients, check_modalities, check_window
from msa_online.modalities import MODALITIES, ModalitySequence

DECAY = 0.9  # of the running divergences
TINY = 1e-8  # beside sums of Python floats


class FeatureCalibration(Calibrator):
    """FCM: scales the channels of each modality by what a descriptor of all modalities says (3.1 - 3.3).

        x_glob = ReLU(F [mean_t x_text; mean_t x_audio; mean_t x_vision])
        x^_m   = 2 sigmoid(F_m x_glob) x_m

    The gates start at 1 and leave every feature as it is. An absent modality is zero in the descriptor and
    stays absent.

    Args:
        widths: Width of each modality's states.
        descriptor_size: Width of x_glob; a quarter of all widths together by default, as published.

    Raises:
        ValueError: `descriptor_size` is below 1.
    """

    def __init__(self, widths: Mapping[str, int], *, descriptor_size: int | None = None) -> None:
        super().__init__(widths)
        if descriptor_size is not None and descriptor_size < 1:
            raise ValueError(f"descriptor_size={descriptor_size}: at least 1")
        total = sum(widths.values())
        size = descriptor_size or -(-total // 4)
        self.describe = nn.Linear(total, size)
        self.gates = nn.ModuleDict({name: OpenGate(size, width) for name, width in widths.items()})

    def forward(self, sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Scale states `(batch, time, width)` by gates in (0, 2), one for each sample and channel."""
        pooled = torch.cat([masked_mean(sequences[name]) for name in self.gates], dim=-1)
        descriptor = F.relu(self.describe(pooled))  # (batch, descriptor)
        return {
            name: sequence.with_values(sequence.values * self.gates[name](descriptor).unsqueeze(1))
            for name, sequence in sequences.items()
        }


class OpenGate(nn.Module):
    """Gates in (0, 2) that start at 1, whatever they read.

    Args:
        inputs: Width of what they read.
        channels: How many there are.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, inputs))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with all gates at 1."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Gates `(batch, channels)` of states `(batch, inputs)`."""
        return 2 * torch.sigmoid(F.linear(states, self.weight, self.bias))


class RebalancingModulator(GradientModulator):
    """GRM: speeds up lagging modalities and aligns their gradients with the task (3.5 - 3.10).

        D_m     = divergence of a probe's prediction from the fused one, mean over the samples that have m
        Delta_m = what D_m fell by since the last step
        kappa_m = share of the progress that is not m's;  grad <- rho kappa_m grad
        L_mod   = 1/|M| [ sum |kappa_m| - sum kappa_m cos_m ],  kappa of the step before

    M holds the modalities that occur in training (METHODS A31). A step whose samples all lack one of them
    keeps its coefficient and its divergence, and rebalances the others.

    cos_m compares, sample by sample, the gradients of the task loss and of the probe's own loss by z_m, the
    state of m as the fusion reads it. Probes read z_m detached: they change neither encoders nor clipping,
    and are in no published checkpoint.

    Deviations (METHODS 3.3, A13): progress is smoothed, because batch noise alone would otherwise turn
    coefficients negative (`guard`); the paper's equations of the spatial term are unavailable, the form
    is that of its ancestor CGGM (`mod_form`), on gradients by z_m and not on weights.

    Args:
        modalities: Modalities to rebalance.
        strength: rho; 1.5 leaves the mean coefficient of three modalities at 1.
        spatial_weight: tau, of L_mod.
        progress: "kl" of the fused from the probe's distribution, or "mse" of predictions (BALM-M).
        guard: "smooth", or "none" as printed.
        spatial: "latent", or "off" (BALM-D).
        mod_form: "cggm", or "abs" as in the published code: sum |kappa_m cos_m|.
        epochs: First and last epoch in which coefficients act, from 0; None for all. L_mod and the probes
            go on throughout.
        apply: "gradient" as published, "lr", or "off" (BALM-S).

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[str] = MODALITIES,
        strength: float = 1.4,
        spatial_weight: float = 0.3,
        progress: str = "kl",
        guard: str = "smooth",
        spatial: str = "latent",
        mod_form: str = "cggm",
        epochs: Sequence[int] | None = None,
        apply: str = "gradient",
    ) -> None:
        check_modalities(modalities)
        check_window(epochs)
        check_choice("progress", progress, tuple(DIVERGENCES))
        check_choice("guard", guard, ("smooth", "none"))
        check_choice("spatial", spatial, ("latent", "off"))
        check_choice("mod_form", mod_form, ("cggm", "abs"))
        check_choice("apply", apply, (*APPLICATIONS, "off"))
        if not 0 < strength < math.inf:
            raise ValueError(f"strength={strength}: above 0")
        if not 0 <= spatial_weight < math.inf:
            raise ValueError(f"spatial_weight={spatial_weight}: at least 0")
        self.modalities = tuple(modalities)
        self.epochs = None if epochs is None else tuple(epochs)
        self.strength, self.spatial_weight = strength, spatial_weight
        self.progress, self.guard = progress, guard
        self.spatial, self.mod_form, self.apply = spatial, mod_form, apply
        self.differentiates_features = spatial == "latent" and spatial_weight > 0
        self.divergences: dict[str, float] | None = None  # of the last step, or running
        self.kappa: dict[str, float] | None = None

    def attach(self, model: nn.Module, features: Mapping[str, int], fused: int) -> None:
        """Give the model a probe for each modality: a hidden layer as wide as what the prediction reads."""
        outputs = model.config.num_labels
        model.probes.update(
            {
                name: nn.Sequential(nn.Linear(features[name], fused), nn.ReLU(), nn.Linear(fused, outputs))
                for name in self.modalities
            }
        )
        self.probes = model.probes

    def leave_out(self, names: Collection[str]) -> None:
        """Rebalance the other modalities only, and drop the probes of these."""
        for name in set(names).intersection(self.modalities):
            del self.probes[name]
        super().leave_out(names)

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Divergence of each probe from the fused prediction, and the share of samples with its modality.

        Both are means over the whole micro-batch: a sample without the modality counts as zero.
        """
        statistics = {}
        for name in self.modalities:
            fused, alone = in_fp32(output.logits.detach()), in_fp32(output.probe_logits[name].detach())
            present = output.present[name] & output.fused_valid
            statistics[f"divergence/{name}"] = (DIVERGENCES[self.progress](fused, alone) * present).mean()
            statistics[f"observed/{name}"] = present.float().mean()
        return statistics

    def extra_losses(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """What trains the probes, and tau L_mod under the coefficients of the step before."""
        of_probes = loss_alone(output.probe_logits, labels, output.present)
        spatial = torch.zeros_like(of_probes)
        if self.kappa and output.fused_valid and self.spatial == "latent" and self.spatial_weight:
            spatial = self.spatial_weight * self._spatial_loss(output, labels)
        return {"probe": of_probes, "balm": spatial}

    def _spatial_loss(self, output: Any, labels: Tensor) -> Tensor:
        """L_mod (3.9) on the gradients by z_m, those of the probes held fixed."""
        states = [output.of_head.features[name] for name in self.modalities]
        # of the sum over samples, so that half precision does not lose the gradient of a mean
        wanted = torch.autograd.grad(output.of_head.losses["task"] * len(labels), states, create_graph=True)
        terms = []
        for name, state, of_task in zip(self.modalities, states, wanted, strict=True):
            state = in_fp32(state.detach()).requires_grad_()
            missed = task_loss(self.probes[name](state), labels) * len(labels)
            (of_probe,) = torch.autograd.grad(missed, state)
            cosine = F.cosine_similarity(in_fp32(of_task), of_probe, dim=-1)
            terms.append(self.kappa[name] * mean_where(cosine, output.present[name]))
        cosines = torch.stack(terms)
        if self.mod_form == "abs":
            return cosines.abs().mean()
        return sum(abs(value) for value in self.kappa.values()) / len(terms) - cosines.mean()

    def modulate(self, context: ModulationContext) -> Modulation:
        """Take the divergences of the step, and scale each modality by its share of the others' progress."""
        shares = {name: context.statistics[f"observed/{name}"] for name in self.modalities}
        found = {
            name: context.statistics[f"divergence/{name}"] / share for name, share in shares.items() if share
        }
        if found:
            equal = dict.fromkeys(self.modalities, 1 - 1 / len(self.modalities))
            self.kappa, self.divergences = rebalance(
                found, self.divergences or {}, self.kappa or equal, self.guard
            )
        log = {f"divergence/{name}": value for name, value in found.items()}
        coefficients = dict.fromkeys(self.modalities, 1.0)
        rates: dict[str, float] = {}
        if self.kappa and self.acts_in(context.epoch) and self.apply != "off":
            coefficients = {name: self.strength * value for name, value in self.kappa.items()}
            rates = apply_coefficients(coefficients, context, apply=self.apply, noise=0.0)
        return Modulation(rates, log | {f"coefficient/{name}": c for name, c in coefficients.items()})

    def state_dict(self) -> dict[str, Any]:
        """Divergences and coefficients of the last step."""
        return {"divergences": self.divergences, "kappa": self.kappa}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.divergences, self.kappa = state["divergences"], state["kappa"]


def rebalance(
    found: Mapping[str, float], before: Mapping[str, float], kappa: Mapping[str, float], guard: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Coefficients kappa from the divergences of a step, and what the next step compares with (3.8).

    1 - kappa_m is the share of m in the progress. A modality without samples in the step keeps its share;
    the others divide the rest by what they gained. All kappa add up to |M| - 1.

    Args:
        found: D_m of this step, at least 0, of each modality that a sample of the step has.
        before: D_m that earlier steps left; empty in the first.
        kappa: Coefficients of all modalities before this step; 1 - 1 / |M| each in the first.
        guard: "smooth" compares running means, counts losses of ground as no progress, and draws shares half
            way to equal ones: kappa in [0, 1]. "none" is the printed form, which can be negative or large.
    """
    free = 1 - sum(1 - value for name, value in kappa.items() if name not in found)
    if guard == "none":
        progress = {name: before[name] - value if name in before else value for name, value in found.items()}
        total = sum(progress.values())
        fresh = {name: (total - free * value) / (total + TINY) for name, value in progress.items()}
        return {**kappa, **fresh}, {**before, **found}
    running = {
        name: DECAY * before[name] + (1 - DECAY) * value if name in before else value
        for name, value in found.items()
    }
    least = 1e-3 * sum(running.values()) / len(found) + 1e-12
    gained = {name: max(before.get(name, value) - value, 0.0) + least for name, value in running.items()}
    total = sum(gained.values())
    fresh = {name: 1 - free * (0.5 * value / total + 0.5 / len(found)) for name, value in gained.items()}
    return {**kappa, **fresh}, {**before, **running}


def kl_from_fused(fused: Tensor, alone: Tensor) -> Tensor:
    """KL(fused || alone) of each sample, `(batch, outputs)` to `(batch,)` (3.6).

    A score s stands for the two-point distribution (sigmoid(-s), sigmoid(s)).
    """
    of_fused, of_alone = (_log_probabilities(logits) for logits in (fused, alone))
    return (of_fused.exp() * (of_fused - of_alone)).sum(dim=-1)


def squared_distance(fused: Tensor, alone: Tensor) -> Tensor:
    """Mean squared distance of a sample's distributions, `(batch, outputs)` to `(batch,)` (BALM-M)."""
    of_fused, of_alone = (_log_probabilities(logits).exp() for logits in (fused, alone))
    return (of_fused - of_alone).square().mean(dim=-1)


DIVERGENCES = {"kl": kl_from_fused, "mse": squared_distance}


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[-1] > 1:
        return logits.log_softmax(dim=-1)
    return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)
