# SPDX-License-Identifier: Apache-2.0
"""BALM: calibrated features and rebalanced gradients for any head, under missing rates (CVPR 2026).

"BALM: A Model-Agnostic Framework for Balanced Multimodal Learning under Imbalanced Missing Rates", arXiv
2603.19718. Numbers of equations like (3.8) and of choices like B5 are those of docs/methods/balm.md.
"""

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
PAPER = (
    "Nguyen, Pham, Le, Nguyen: BALM: A Model-Agnostic Framework for Balanced Multimodal Learning under "
    "Imbalanced Missing Rates, CVPR 2026, https://arxiv.org/abs/2603.19718"
)


class FeatureCalibration(Calibrator):
    """FCM: scales the channels of each modality by gates computed from a descriptor of all modalities.

        x_glob = ReLU(F [mean_t x_text; mean_t x_audio; mean_t x_vision])         (3.1), (3.2)
        x^_m   = 2 sigmoid(F_m x_glob) x_m                                        (3.3)

    The gates start at 1, which leaves the features unchanged (B1). An absent modality is zero in the
    descriptor and stays absent (B3).

    Relations: `RebalancingModulator` is the other half of the method; each works without the other.

    Args:
        widths: Width of each modality's states.
        descriptor_size: Width of x_glob; by default a quarter of the sum of all widths, as published.

    Raises:
        ValueError: `descriptor_size` is below 1.
    """

    paper = PAPER

    def __init__(self, widths: Mapping[str, int], *, descriptor_size: int | None = None) -> None:
        super().__init__(widths)
        if descriptor_size is not None and descriptor_size < 1:
            raise ValueError(f"descriptor_size={descriptor_size} must be at least 1")
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
    """Gates in (0, 2), initialised to 1 for every input.

    Args:
        inputs: Width of the input.
        channels: Number of gates.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, inputs))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all gates to 1."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Gates `(batch, channels)` of states `(batch, inputs)`."""
        return 2 * torch.sigmoid(F.linear(states, self.weight, self.bias))


class RebalancingModulator(GradientModulator):
    """GRM: speeds up lagging modalities and aligns their gradients with the task.

        D_m     = KL(fused prediction, probe of m), mean over the samples that have m         (3.5), (3.6)
        Delta_m = decrease of D_m since the last step                                         (3.7)
        kappa_m = 1 - Delta_m / sum Delta;   grad <- rho kappa_m grad                         (3.8)
        L_mod   = 1/|M| [ sum |kappa_m| - sum kappa_m cos_m ],  kappa of the last step        (3.9)

    M holds the modalities that occur in training (B15). A modality that no sample of a step has keeps its
    coefficient and its divergence, and the others are rebalanced (B16).

    cos_m compares, for each sample, the gradients of the task loss and of the probe's own loss by z_m, the
    state of m that the fusion reads. Probes read z_m detached. They do not affect encoders or clipping, and
    published checkpoints do not contain them.

    Losses, weighted (3.10): `probe`, which trains the probes; `balm`, tau L_mod. Recorded beside them:
    `cosine/<modality>`, the cos_m of L_mod, from the second step on.

    Deviations and readings: progress is smoothed, because otherwise batch noise alone makes coefficients
    negative (B5). The paper's equation of L_mod is unavailable; ours has the form of CGGM, its ancestor, and
    compares gradients by z_m, not weights (B7, B8).

    Relations: `FeatureCalibration` is the other half of the method; each works without the other.

    Args:
        modalities: Modalities to rebalance.
        strength: rho; 1.5 keeps the mean coefficient of three modalities at 1 (B6).
        spatial_weight: tau, weight of L_mod.
        progress: What a modality's progress lowers. "kl", the divergence of the probe's distribution from the
            fused one; "mse", their squared distance (BALM-M); "errors", the share of samples that the probe
            gets wrong (3.14), which with `mod_form` "cggm" is CGGM.
        guard: "smooth", or "none" as printed (B5).
        spatial: "latent", or "off" (BALM-D).
        mod_form: "cggm", or "abs" as in the published code: sum |kappa_m cos_m| (B8).
        epochs: First and last epoch in which coefficients act, from 0; None for all. L_mod and the probes
            are active in every epoch.
        apply: "gradient" as published, "lr", or "off" (BALM-S).

    Raises:
        ValueError: A setting is out of range.
    """

    paper = PAPER

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
        check_choice("progress", progress, (*DIVERGENCES, "errors"))
        check_choice("guard", guard, ("smooth", "none"))
        check_choice("spatial", spatial, ("latent", "off"))
        check_choice("mod_form", mod_form, ("cggm", "abs"))
        check_choice("apply", apply, (*APPLICATIONS, "off"))
        if not 0 < strength < math.inf:
            raise ValueError(f"strength={strength} must be above 0")
        if not 0 <= spatial_weight < math.inf:
            raise ValueError(f"spatial_weight={spatial_weight} must be at least 0")
        self.modalities = tuple(modalities)
        self.epochs = None if epochs is None else tuple(epochs)
        self.strength, self.spatial_weight = strength, spatial_weight
        self.progress, self.guard = progress, guard
        self.spatial, self.mod_form, self.apply = spatial, mod_form, apply
        self.differentiates_features = spatial == "latent" and spatial_weight > 0
        self.divergences: dict[str, float] | None = None  # those of the last step, or running means
        self.kappa: dict[str, float] | None = None

    def attach(self, model: nn.Module, features: Mapping[str, int], fused: int) -> None:
        """Add a probe for each modality to the model; its hidden layer has the width of the fused state."""
        outputs = model.config.num_labels
        model.probes.update(
            {
                name: nn.Sequential(nn.Linear(features[name], fused), nn.ReLU(), nn.Linear(fused, outputs))
                for name in self.modalities
            }
        )
        self.probes = model.probes

    def leave_out(self, names: Collection[str]) -> None:
        """Stop rebalancing these modalities and remove their probes."""
        for name in set(names).intersection(self.modalities):
            del self.probes[name]
        super().leave_out(names)

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Divergence of each probe from the fused prediction, and share of samples with its modality.

        Both are means over the whole micro-batch; a sample without the modality counts as zero.
        """
        statistics = {}
        for name in self.modalities:
            fused, alone = in_fp32(output.logits.detach()), in_fp32(output.probe_logits[name].detach())
            present = output.present[name] & output.fused_valid
            if self.progress == "errors":
                distance = wrong(alone, labels)
            else:
                distance = DIVERGENCES[self.progress](fused, alone)
            statistics[f"divergence/{name}"] = (distance * present).mean()
            statistics[f"observed/{name}"] = present.float().mean()
        return statistics

    def extra_losses(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """The loss of the probes, and tau L_mod with the coefficients of the last step."""
        probe_loss = loss_alone(output.probe_logits, labels, output.present)
        spatial = torch.zeros_like(probe_loss)
        if self.kappa and output.fused_valid and self.spatial == "latent" and self.spatial_weight:
            cosines = self._cosines(output, labels)
            spatial = self.spatial_weight * self._spatial_loss(cosines)
            logged = {f"cosine/{name}": value.detach() for name, value in cosines.items()}
        else:
            logged = {}
        return {"probe": probe_loss, "balm": spatial, **logged}

    def _cosines(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """cos_m of (3.9) on the gradients by z_m, a mean over the samples with m; probes are constants."""
        states = [output.of_head.features[name] for name in self.modalities]
        # gradient of the sum over samples: that of the mean could underflow in half precision
        loss = output.of_head.losses["task"] * len(labels)
        task_gradients = torch.autograd.grad(loss, states, create_graph=True)
        cosines = {}
        for name, state, task_gradient in zip(self.modalities, states, task_gradients, strict=True):
            state = in_fp32(state.detach()).requires_grad_()
            probe_loss = task_loss(self.probes[name](state), labels) * len(labels)
            (probe_gradient,) = torch.autograd.grad(probe_loss, state)
            cosine = F.cosine_similarity(in_fp32(task_gradient), probe_gradient, dim=-1)
            cosines[name] = mean_where(cosine, output.present[name])
        return cosines

    def _spatial_loss(self, cosines: Mapping[str, Tensor]) -> Tensor:
        """L_mod (3.9) from the cosines of the modalities."""
        terms = torch.stack([self.kappa[name] * cosine for name, cosine in cosines.items()])
        if self.mod_form == "abs":
            return terms.abs().mean()
        return sum(abs(value) for value in self.kappa.values()) / len(terms) - terms.mean()

    def modulate(self, context: ModulationContext) -> Modulation:
        """Update kappa from the divergences of the step, and scale each modality by rho kappa."""
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
        """Divergences and kappa of the last step."""
        return {"divergences": self.divergences, "kappa": self.kappa}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore divergences and kappa."""
        self.divergences, self.kappa = state["divergences"], state["kappa"]


def rebalance(
    found: Mapping[str, float], before: Mapping[str, float], kappa: Mapping[str, float], guard: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Coefficients kappa from the divergences of a step (3.8), and the divergences for the next step.

    1 - kappa_m is the share of m in the progress. A modality without samples in the step keeps its share;
    the others divide the rest in proportion to their progress. All kappa sum to |M| - 1.

    Args:
        found: D_m of this step, at least 0, of each modality that a sample of the step has.
        before: D_m of earlier steps; empty in the first.
        kappa: Coefficients of all modalities before this step; 1 - 1 / |M| each in the first.
        guard: "smooth" compares running means, counts a rise as no progress, and averages each share with an
            equal share, so that kappa is in [0, 1] (B5). "none" is the printed form; its kappa can be
            negative or large.

    Returns:
        kappa of all modalities, and D_m to pass as `before` in the next step.
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
    # keeps the shares defined without progress (B5)
    least = 1e-3 * sum(running.values()) / len(found) + 1e-12
    gained = {name: max(before.get(name, value) - value, 0.0) + least for name, value in running.items()}
    total = sum(gained.values())
    fresh = {name: 1 - free * (0.5 * value / total + 0.5 / len(found)) for name, value in gained.items()}
    return {**kappa, **fresh}, {**before, **running}


def kl_from_fused(fused: Tensor, alone: Tensor) -> Tensor:
    """KL(fused || alone) of each sample, `(batch, outputs)` to `(batch,)` (3.6).

    A score s is taken as the two-point distribution (sigmoid(-s), sigmoid(s)).
    """
    log_fused, log_alone = (_log_probabilities(logits) for logits in (fused, alone))
    return (log_fused.exp() * (log_fused - log_alone)).sum(dim=-1)


def squared_distance(fused: Tensor, alone: Tensor) -> Tensor:
    """Mean squared distance of a sample's distributions, `(batch, outputs)` to `(batch,)` (BALM-M)."""
    p_fused, p_alone = (_log_probabilities(logits).exp() for logits in (fused, alone))
    return (p_fused - p_alone).square().mean(dim=-1)


def wrong(alone: Tensor, labels: Tensor) -> Tensor:
    """1 for each sample that is misjudged, else 0; `(batch, outputs)` and `(batch,)` to `(batch,)` (3.14).

    Of a score, whether its sign differs from that of the label; 0 counts as negative.
    """
    if alone.shape[-1] > 1:
        return (alone.argmax(dim=-1) != labels).to(alone.dtype)
    return ((alone.squeeze(-1) > 0) != (labels > 0)).to(alone.dtype)


DIVERGENCES = {"kl": kl_from_fused, "mse": squared_distance}


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[-1] > 1:
        return logits.log_softmax(dim=-1)
    return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)
