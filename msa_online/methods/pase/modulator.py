# SPDX-License-Identifier: Apache-2.0
"""The modulator of PaSE: slows down the modalities with the largest Shapley values (AAAI 2026).

Numbers of equations like (2.8) and of choices like P9 are those of docs/methods/pase.md.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import task_loss
from msa_online.layers.precision import in_fp32
from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.methods.base import GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import APPLICATIONS, apply_coefficients
from msa_online.methods.pase.head import PAIRS, TINY, TRANSPORTS, PaSEHead
from msa_online.modalities import MODALITIES, ModalitySequence

LOSSES = tuple("loss/" + ("+".join(sorted(subset)) or "none") for subset in SUBSETS)
RHO = 0.6  # of (2.10)
STATE_NAMES = (
    "balancing",
    "best_score",
    "waited",
    "validated",
    "stage",
    "epoch",
    "steps",
    "measured",
    "contributions",
    "coefficients",
)


class ShapleyModulator(GradientModulator):
    """SGM: after a validation plateau, slows each modality the more it contributes.

        psi_m = Shapley value of m for the utility u(S) of subsets S of the modalities      (2.7), (2.10)
        phi_m = exp(min psi / psi_m - 1), psi clamped and normalised; in (1/e, 1]           (2.8)
        grad <- phi_m grad                in the second phase                               (2.9)

    The utility is measured in every `interval`-th step and averaged over an epoch. The coefficients of an
    epoch come from the last epoch before it that was measured. Contributions are recorded in both phases.
    Each stage of the head starts in the first phase, because stages have different validation scores. With
    the second phase the search for the best epoch, patience and learning-rate decay restart, and its best
    epoch is published (P9).

    u is either "task": l(s(none), y) - l(s(S), y) on the training batch, with the encoders run once and
    absent modalities as in prediction; or "prototype", that of the published code: computed from the
    transport between the prototypes of pairs and from their variance. "prototype" falls with every modality
    that joins, so it does not measure how useful a modality is (2.10).

    Deviations and readings: exact values over all subsets, not sampled orders, and the utility "task" (P17).
    Everything that belongs to a modality is scaled, in every step (P8). The second phase starts at a
    validation plateau (P9). Only modalities that occur in training form subsets: a modality that never occurs
    would have the smallest contribution, zero, and slow all others equally (P20).

    Relations: `PaSEHead` is the other half of the method; each works without the other.

    Args:
        utility: "task"; or "prototype", which needs the head `pase`.
        apply: "gradient" as published, "lr", or "off", which records contributions and changes nothing.
        switch: "plateau" starts the second phase when validation no longer improves, "fixed" after `latest`
            epochs. Either starts it when the patience of the run or the stage would end the training.
        warmup: Epochs in which a plateau does not start the second phase yet.
        patience: Epochs without improvement that count as a plateau.
        min_delta: Smallest improvement that counts, relative to the best score.
        latest: Epochs after which the second phase starts in any case.
        interval: Steps between two measurements of the utility.

    Raises:
        ValueError: A setting is out of range.
    """

    modalities = MODALITIES
    paper = PaSEHead.paper

    def __init__(
        self,
        *,
        utility: str = "task",
        apply: str = "gradient",
        switch: str = "plateau",
        warmup: int = 5,
        patience: int = 5,
        min_delta: float = 1e-3,
        latest: int = 20,
        interval: int = 10,
    ) -> None:
        check_choice("utility", utility, ("task", "prototype"))
        check_choice("apply", apply, (*APPLICATIONS, "off"))
        check_choice("switch", switch, ("plateau", "fixed"))
        for name, value, least in (
            ("warmup", warmup, 0),
            ("patience", patience, 1),
            ("min_delta", min_delta, 0),
            ("latest", latest, 0),
            ("interval", interval, 1),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.utility, self.apply, self.switch = utility, apply, switch
        self.warmup, self.patience, self.min_delta, self.latest = warmup, patience, min_delta, latest
        self.interval = interval
        self._start_first_phase()
        self.stage: str | None = None
        self.epoch, self.steps = 0, 0
        self.measured: list[list[float]] = []  # of this epoch
        self.contributions: dict[str, float] = {}
        self.coefficients: dict[str, float] = {}  # 1 where not named

    def attach(self, model: nn.Module, features: Mapping[str, int], fused: int) -> None:
        """Keep the model, to evaluate subsets of its modalities.

        Raises:
            ValueError: The utility needs prototypes and the head has none.
        """
        if self.utility == "prototype" and not isinstance(model.head, PaSEHead):
            raise ValueError(
                f"utility=prototype needs model.head=pase, not {model.config.head}, which has no prototypes: "
                "set training.modulator_kwargs.utility=task"
            )
        self.model = model

    @torch.no_grad()
    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Task loss with each subset of the modalities, in every `interval`-th step."""
        if self.utility != "task" or self.steps % self.interval or not output.fused_valid:
            return {}
        training = self.model.training
        self.model.eval()  # no dropout, as in prediction; prototypes do not collect
        losses = {
            name: self._loss(output.sequences, subset, labels)
            for name, subset in zip(LOSSES, SUBSETS, strict=True)
            if subset in self._subsets
        }
        self.model.train(training)
        return losses

    def _loss(
        self, sequences: Mapping[str, ModalitySequence], subset: frozenset[str], labels: Tensor
    ) -> Tensor:
        seen = {
            name: sequence.with_values(in_fp32(sequence.values)).only(sequence.present & (name in subset))
            for name, sequence in sequences.items()
        }
        return task_loss(self.model.decide(seen).logits, labels)

    def modulate(self, context: ModulationContext) -> Modulation:
        """Collect the utilities of the step; in the second phase, scale each modality by phi."""
        if self.stage not in (None, context.stage):
            self._start_first_phase()
        self.stage = context.stage
        if context.epoch != self.epoch:
            self._refresh(context.epoch)
        utilities = self._utilities(context.statistics) if self.steps % self.interval == 0 else []
        if utilities and all(map(math.isfinite, utilities)):
            self.measured.append(utilities)
        self.steps += 1
        coefficients = dict.fromkeys(self.modalities, 1.0)
        rates: dict[str, float] = {}
        if self.balancing and self.apply != "off":
            coefficients |= self.coefficients
            rates = apply_coefficients(coefficients, context, apply=self.apply, noise=0.0)
        return Modulation(
            rates,
            {
                **{f"contribution/{name}": value for name, value in self.contributions.items()},
                **{f"coefficient/{name}": value for name, value in coefficients.items()},
                "phase/balancing": float(self.balancing),
            },
        )

    def _start_first_phase(self) -> None:
        self.balancing = self.latest == 0
        self.best_score, self.waited, self.validated = -math.inf, 0, 0

    def _utilities(self, statistics: Mapping[str, float]) -> list[float]:
        """Utilities in the order of `_subsets`; empty in a stage without a fused prediction."""
        if self.utility == "prototype":
            return [prototype_utility(subset, statistics) for subset in self._subsets]
        return [statistics[LOSSES[0]] - statistics[loss] for loss in LOSSES if loss in statistics]

    @property
    def _subsets(self) -> list[frozenset[str]]:
        """Subsets of the modalities that occur in training, from none to all."""
        return [subset for subset in SUBSETS if subset.issubset(self.modalities)]

    def _refresh(self, epoch: int) -> None:
        """Compute contributions and coefficients from the measurements of the finished epoch."""
        if self.measured:
            means = torch.tensor(self.measured, dtype=torch.float64).mean(dim=0)
            shares = shapley_values(dict(zip(self._subsets, means, strict=True)), self.modalities)
            self.contributions = {name: share.item() for name, share in shares.items()}
            self.coefficients = equilibrium(self.contributions)
        self.epoch, self.measured = epoch, []

    def on_validation(self, score: float) -> bool:
        """Detect the plateau; once started, the second phase lasts to the end of the stage."""
        self.validated += 1
        margin = self.min_delta * abs(self.best_score) if math.isfinite(self.best_score) else 0.0
        if score > self.best_score + margin:
            self.best_score, self.waited = score, 0
        else:
            self.waited += 1
        plateau = self.validated > self.warmup and self.waited >= self.patience
        due = self.validated >= self.latest or (self.switch == "plateau" and plateau)
        return due and self.on_patience_end()

    def on_patience_end(self) -> bool:
        """Start the second phase, if it has not started; measuring alone is no phase of training."""
        starts, self.balancing = not self.balancing, True
        return starts and self.apply != "off"

    def state_dict(self) -> dict[str, Any]:
        """Phase, plateau, measurements and coefficients."""
        return {name: getattr(self, name) for name in STATE_NAMES}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)


def equilibrium(contributions: Mapping[str, float]) -> dict[str, float]:
    """Coefficients phi (2.8) from Shapley values psi: 1 for the smallest; all 1 if none is above 0 (P12)."""
    if max(contributions.values()) <= 0:
        return dict.fromkeys(contributions, 1.0)
    clamped = {name: max(value, TINY) for name, value in contributions.items()}
    total = sum(clamped.values())
    shares = {name: value / total for name, value in clamped.items()}
    least = min(shares.values())
    return {name: math.exp((least + TINY) / (share + TINY) - 1) for name, share in shares.items()}


def prototype_utility(subset: frozenset[str], statistics: Mapping[str, float]) -> float:
    """Utility of the published code (2.10), from diagnostics of the head; 0 for the empty subset.

    u(S) = rho / (1 + sum of L_inter over pairs in S) + (1 - rho) / (1 + sum of V over S)
    """
    if not subset:
        return 0.0
    transport = sum(
        statistics[name] for name, pair in zip(TRANSPORTS, PAIRS, strict=True) if subset.issuperset(pair)
    )
    spread = sum(statistics[f"spread/{name}"] for name in subset)
    return RHO / (1 + transport) + (1 - RHO) / (1 + spread)
