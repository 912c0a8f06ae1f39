# SPDX-License-Identifier: Apache-2.0
"""What every balancing method is made of: a head, a gradient modulator, a calibrator."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from msa_online.modalities import MODALITIES, ModalitySequence


@dataclass
class HeadOutput:
    """The output of a head.

    Attributes:
        logits: Fused prediction, `(batch, outputs)`.
        modality_logits: Prediction of each modality alone, `(batch, outputs)` each: no other modality may
            change it. Empty if the head has none.
        features: State of each modality that the fused prediction is computed from, `(batch, width)` each,
            as the tensors the fusion reads, not as copies. It may depend on another modality.
        fused: State the fused prediction is computed from by the last layer, `(batch, width)`.
        losses: Loss terms by name, unweighted scalars; empty without labels.
        fused_valid: False in a stage that does not train the fused prediction yet.
        diagnostics: Detached scalars for the log, by names with a slash, like "energy/text".
    """

    logits: Tensor
    modality_logits: dict[str, Tensor]
    features: dict[str, Tensor]
    fused: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    fused_valid: bool = True
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class BalancingHead(nn.Module):
    """Three sequences in, a prediction and named losses out. A method is one subclass, in a file of its own.

    A subclass takes `widths` (width of each modality's states) and `num_labels` (outputs; 1 is regression),
    then its hyper-parameters as keywords with defaults, `hidden_size` among them: they are the `head_kwargs`
    of the configuration. docs/adding_a_method.md lists all that a head promises, and
    tests/methods/test_contract.py checks it.

    Attributes:
        stages: Names of the training stages in the order they run.
        loss_names: Names of all loss terms it may return; `loss_weights` may name these.
        teachers: The stage whose best model, frozen, teaches in a later stage, by that later stage.
    """

    stages: tuple[str, ...] = ("train",)
    loss_names: tuple[str, ...] = ("task",)
    teachers: Mapping[str, str] = MappingProxyType({})

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences.

        Args:
            sequences: One per modality, states `(batch, time, width)`; time differs between modalities.
            labels: `(batch,)`, float for regression and int64 for classification; without them no loss is
                computed.
            teacher: Output of the frozen teacher's `teach` for these samples, `(batch, ...)`; None in a stage
                without a teacher.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def teach(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Targets that this head, frozen, gives a later stage of training, `(batch, ...)`.

        What it returns for a modality must depend on that modality only: it is computed once for each sample
        and has to hold whatever is hidden from the student.
        """
        raise TypeError(f"{type(self).__name__} defines no teach")

    def start_stage(self, name: str) -> None:
        """Enter the training stage `name`; heads with one stage need nothing here.

        A new head is in the last of its `stages`, where it predicts.
        """

    def end_step(self, taken: bool) -> None:
        """The optimizer has stepped, or (`taken` False) skipped a step; for heads that keep running state.

        A head collects in the forward passes of a step and updates its state here, if the step was taken:
        then accumulation changes nothing, and values that are not finite stay out.
        """

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Parameters of the head that bring one modality alone to the fusion, disjoint; the rest is shared.

        Gradient modulators act on them and on the encoder of the modality. The predictors behind
        `modality_logits` are not among them: slowed down, they would rate their modality too low.
        """
        return {name: [] for name in MODALITIES}


class Calibrator(nn.Module):
    """Rescales the sequences between encoders and head; this base leaves them as they are.

    Args:
        widths: Width of each modality's states.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()

    def forward(self, sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Map sequences to sequences of the same shapes, absent modalities staying absent."""
        return sequences


@dataclass(frozen=True)
class ModulationContext:
    """What a modulator may know at the one point of a step where gradients are whole.

    Attributes:
        modality_parameters: Parameters that belong to each modality, disjoint; shared ones are in none.
        statistics: What `observe` saw, the losses and the head's diagnostics, averaged over the micro-batches
            of the step and over the ranks, and what `measure` found, by name: the same numbers on every rank.
        stage: Name of the training stage.
        epoch: Epochs finished since the start of the run.
        step: Optimizer steps taken since the start of the run.
        seed: Seed of the run: noise must come from a generator seeded by (seed, step), the same on all ranks.
    """

    modality_parameters: Mapping[str, list[Parameter]]
    statistics: Mapping[str, float]
    stage: str
    epoch: int
    step: int
    seed: int


@dataclass(frozen=True)
class Modulation:
    """What a modulator did to a step.

    Attributes:
        rates: Factor on the learning rate of each modality's parameters in this step; 1 where not named.
        log: Numbers worth recording, by names like "coefficient/audio".
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    log: Mapping[str, float] = field(default_factory=dict)


class GradientModulator:
    """Changes gradients once per optimizer step; this base changes none ("identity").

    `observe` sees every forward pass and `measure` the whole gradients; both answer with scalars and change
    nothing, and the loop brings all of them to the host at once. `modulate` then acts: after backward,
    synchronisation and unscaling, before clipping and the step (METHODS 8.1). A step whose gradients are not
    finite is skipped whole and never reaches it.

    Attributes:
        modalities: Modalities whose parameters it acts on.
        epochs: First and last epoch in which it acts, from 0; None for all.
        needs_modality_logits: It compares the modalities by their own predictions.
        differentiates_features: `observe` or `extra_losses` takes gradients by what the head reports, which a
            compiled model does not offer.
    """

    modalities: tuple[str, ...] = ()
    epochs: tuple[int, int] | None = None
    needs_modality_logits: bool = False
    differentiates_features: bool = False

    def acts_in(self, epoch: int) -> bool:
        """Epoch number `epoch`, from 0, lies in its window; first and last are in."""
        return self.epochs is None or self.epochs[0] <= epoch <= self.epochs[1]

    def attach(self, model: nn.Module, features: Mapping[str, int], fused: int) -> None:
        """Put what is trained for the modulator alone into `model.probes`, by modality.

        Args:
            model: The model, before it is wrapped and before its optimizer is made.
            features: Width of what the head reports of each modality.
            fused: Width of the state its prediction is read from.
        """

    def leave_out(self, names: Collection[str]) -> None:
        """Stop acting on modalities that no training sample has; called once, after `attach`."""
        self.modalities = tuple(name for name in self.modalities if name not in names)

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Detached scalars of a micro-batch, from its `MSAOutput` and its labels `(batch,)`, by name.

        The loop averages them over the micro-batches of the step, weighted by size: return means, not sums.
        """
        return {}

    def extra_losses(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Loss terms to add to the head's, by name, already weighted."""
        return {}

    def measure(self, modality_parameters: Mapping[str, list[Parameter]]) -> dict[str, Tensor]:
        """Scalars of the whole, unscaled gradients, by name."""
        return {}

    def modulate(self, context: ModulationContext) -> Modulation | None:
        """Change `p.grad` in place, or the learning rates of the step; None changes nothing."""

    def on_validation(self, score: float) -> None:
        """See the validation score of an epoch, by which the best epoch is chosen; higher is better."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
