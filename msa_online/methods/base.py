# SPDX-License-Identifier: Apache-2.0
"""Base classes of the balancing methods: head, gradient modulator, calibrator."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import Parameter

from msa_online.modalities import MODALITIES, ModalitySequence


@dataclass
class HeadOutput:
    """The output of a head.

    Attributes:
        logits: Fused prediction, `(batch, outputs)`.
        modality_logits: Prediction of each modality alone, `(batch, outputs)` each. It must not depend on any
            other modality. Empty if the head has none.
        features: State of each modality that the fusion reads, `(batch, width)` each. These are the tensors
            themselves, not copies. They may depend on other modalities.
        fused: Input of the last layer of the fused prediction, `(batch, width)`.
        losses: Unweighted loss terms by name, scalars; empty without labels.
        fused_valid: False in a stage that does not train the fused prediction.
        diagnostics: Detached scalars for the log; their names contain a slash, like "energy/text".
    """

    logits: Tensor
    modality_logits: dict[str, Tensor]
    features: dict[str, Tensor]
    fused: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    fused_valid: bool = True
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class SampleStore(Protocol):
    """What a head keeps for each training sample; saved in the state of a run, never in a checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        """State that a resumed run needs to continue exactly."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class BalancingHead(nn.Module):
    """Maps three sequences to a prediction and named losses. Each method is one subclass in its own file.

    A subclass takes `widths` (width of each modality's states) and `num_labels` (outputs; 1 is regression),
    then its hyper-parameters as keywords with defaults. `hidden_size` must be one of them. The keywords are
    the `head_kwargs` of the configuration. docs/adding_a_method.md states the full contract of a head, and
    tests/methods/test_contract.py checks it.

    Attributes:
        stages: Names of the training stages in the order they run.
        loss_names: Names of all loss terms the head may return; `loss_weights` may name these.
        teachers: Maps a stage to the earlier stage whose best model, frozen, is its teacher.
        fuses: Modalities that the fused prediction is computed from; other visible ones change nothing.
        keeps_samples: Whether it keeps a `SampleStore`. Its `forward` then takes `index` too: the position of
            each sample in its split, `(batch,)` int64, or None.
        samples: The store, made by `start_training`; None before that, and in heads without one.
        paper: Reference of the paper, for model cards: authors, title, year, address; empty without one.
        text_layer: Layer of the text encoder after which `shift_text` acts, 0 for its embeddings; None for a
            head that reads encoded states only.
        needs_word_times: Whether it aligns by the times of words, which recognised texts alone have.
    """

    stages: tuple[str, ...] = ("train",)
    loss_names: tuple[str, ...] = ("task",)
    teachers: Mapping[str, str] = MappingProxyType({})
    fuses: tuple[str, ...] = MODALITIES
    keeps_samples: bool = False
    samples: SampleStore | None = None
    paper: str = ""
    text_layer: int | None = None
    needs_word_times: bool = False

    def shift_text(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Change token states inside the text encoder, for heads with a `text_layer`.

        Args:
            sequences: Audio and vision as encoded, states `(batch, time, width)`; under "text" the token
                states after the layer.

        Returns:
            The new token states, `(batch, tokens, width)`; unchanged where audio and vision are absent.
        """
        raise TypeError(f"{type(self).__name__} defines no shift_text")

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
            teacher: What `teach` of the frozen teacher returned for these samples, `(batch, ...)`; None in a
                stage without a teacher.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def teach(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Compute the targets for a later stage of training with this head frozen, `(batch, ...)`.

        The targets of a modality must depend on that modality only. They are computed once for each sample
        and must stay valid whichever modalities are hidden from the student.
        """
        raise TypeError(f"{type(self).__name__} defines no teach")

    def start_stage(self, name: str) -> None:
        """Enter the training stage `name`; heads with one stage need not override this.

        A new head starts in the last of its `stages`, the one that predicts.
        """

    def start_epoch(self, elapsed: float) -> None:
        """Begin an epoch; `elapsed` is the share of the current stage's epochs before it, in [0, 1)."""

    def weights_problem(self, weights: Mapping[str, float]) -> str | None:
        """Why `weights` of the losses cannot be meant, with the remedy; None if they can.

        A run calls it before it reads its data, for a head with one output, and again when the classes are
        known. It refuses for example a weight of 0 that leaves a part untrained which another loss reads.
        """
        return None

    def start_training(self, labels: Tensor) -> None:
        """Make the store of the training samples, from their labels `(samples,)`, before the first epoch."""

    def end_step(self, taken: bool) -> None:
        """Update running state after the optimizer has stepped, or, with `taken` False, skipped a step.

        A head with running state collects values in the forward passes of a step. It updates its state here,
        and only if the step was taken. So the state does not depend on gradient accumulation, and values that
        are not finite never enter it.
        """

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Parameters of the head that process one modality alone, up to the fusion.

        The sets are disjoint; all other parameters are shared. Gradient modulators act on these parameters
        and on the encoder of the modality. The predictors behind `modality_logits` do not belong to them: a
        predictor that is slowed down would underrate its modality.
        """
        return {name: [] for name in MODALITIES}


class Calibrator(nn.Module):
    """Rescales the sequences between encoders and head. This base class is the identity.

    Args:
        widths: Width of each modality's states.

    Attributes:
        paper: Reference of the paper, for model cards; empty without one.
    """

    paper: str = ""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()

    def forward(self, sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Map sequences to sequences of the same shapes; absent modalities stay absent."""
        return sequences


@dataclass(frozen=True)
class ModulationContext:
    """Input of `GradientModulator.modulate`, which runs once per optimizer step.

    Attributes:
        modality_parameters: Parameters of each modality. The sets are disjoint and leave out shared ones.
        statistics: Scalars by name: what `observe` returned, the losses and the head's diagnostics, averaged
            over the micro-batches of the step and over the ranks, and what `measure` returned. They are equal
            on all ranks.
        stage: Name of the training stage.
        epoch: Epochs finished since the start of the run.
        step: Optimizer steps taken since the start of the run.
        seed: Seed of the run. Noise must come from a generator seeded by (seed, step), so that all ranks draw
            the same.
    """

    modality_parameters: Mapping[str, list[Parameter]]
    statistics: Mapping[str, float]
    stage: str
    epoch: int
    step: int
    seed: int


@dataclass(frozen=True)
class Modulation:
    """Result of `GradientModulator.modulate`.

    Attributes:
        rates: Factor on the learning rate of each modality's parameters in this step; 1 where not named.
        log: Numbers for the log, by names like "coefficient/audio".
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    log: Mapping[str, float] = field(default_factory=dict)


class GradientModulator:
    """Changes gradients once per optimizer step. This base class changes none ("identity").

    `observe` runs on every forward pass, `measure` on the accumulated gradients. Both return scalars and
    change nothing; the loop copies all scalars to the host in one transfer. `modulate` then acts: after
    backward, synchronisation and unscaling, before clipping and the optimizer step (docs/methods/numerics.md,
    "Order of a step"). A step with gradients that are not finite is skipped and never reaches `modulate`.

    Attributes:
        modalities: Modalities whose parameters it acts on.
        epochs: First and last epoch in which it acts, from 0; None for all.
        needs_modality_logits: Whether it compares the modalities by their own predictions.
        differentiates_features: Whether `observe` or `extra_losses` differentiates by the head's features,
            which a compiled model does not allow.
        paper: Reference of the paper, for model cards; empty without one.
    """

    modalities: tuple[str, ...] = ()
    epochs: tuple[int, int] | None = None
    needs_modality_logits: bool = False
    differentiates_features: bool = False
    paper: str = ""

    def acts_in(self, epoch: int) -> bool:
        """Whether `epoch`, counted from 0, lies in `epochs`; both ends are included."""
        return self.epochs is None or self.epochs[0] <= epoch <= self.epochs[1]

    def attach(self, model: nn.Module, features: Mapping[str, int], fused: int) -> None:
        """Add the layers that only this modulator trains to `model.probes`, by modality.

        Args:
            model: The model, before it is wrapped and before its optimizer is made.
            features: Width of each modality's `HeadOutput.features`.
            fused: Width of `HeadOutput.fused`.
        """

    def leave_out(self, names: Collection[str]) -> None:
        """Stop acting on modalities that no training sample has; called once, after `attach`."""
        self.modalities = tuple(name for name in self.modalities if name not in names)

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Detached scalars of a micro-batch by name, from its `MSAOutput` and its labels `(batch,)`.

        Return means, not sums: the loop averages them over the micro-batches of the step, weighted by size.
        """
        return {}

    def extra_losses(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms by name, to add to those of the head.

        Names with a slash are detached scalars for the log and are added to nothing.
        """
        return {}

    def measure(self, modality_parameters: Mapping[str, list[Parameter]]) -> dict[str, Tensor]:
        """Scalars of the accumulated, unscaled gradients, by name."""
        return {}

    def modulate(self, context: ModulationContext) -> Modulation | None:
        """Change `p.grad` in place, or return factors for the learning rates; None changes nothing."""

    def on_validation(self, score: float) -> bool | None:
        """Receive the validation score that selects the best epoch; higher is better.

        Returns:
            True if a phase starts that trains differently from the next epoch on. The search for the best
            epoch, the patience and the decay of the learning rates then restart.
        """

    def on_patience_end(self) -> bool:
        """Patience would end the stage: start the next phase instead, if there is one.

        Returns:
            Whether a phase starts, as in `on_validation`.
        """
        return False

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs to continue exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
