# SPDX-License-Identifier: Apache-2.0
"""The three modalities, the conditions of evaluation, and the sequence type of the model."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MODALITIES = ("text", "audio", "vision")
"""Names and order of the modalities; `modality_present` has one column for each, in this order."""

CONDITIONS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "audio": ("audio",),
    "vision": ("vision",),
    "text+audio": ("text", "audio"),
    "text+vision": ("text", "vision"),
    "audio+vision": ("audio", "vision"),
    "text+audio+vision": MODALITIES,
}
"""The seven conditions of evaluation: which modalities the model sees (docs/methods/protocols.md)."""

COMPLETE = "text+audio+vision"

NOTHING = "nothing"
"""Name of the set without any modality, which is not a condition of evaluation."""

VISIBLE_SETS: dict[str, tuple[str, ...]] = {NOTHING: (), **CONDITIONS}
"""Every set of modalities that a clip can show, by name."""

MISSING_RATES = "imr"
"""Name of the extra condition of a run with missing rates: each sample under its fixed mask."""


@dataclass(frozen=True)
class ModalitySequence:
    """States of one modality of a batch, as encoders return and heads read them.

    A sample without this modality has `present` False, an empty mask and zero values. So readers need no
    special case, and hidden values cannot leak.

    Attributes:
        values: States, `(batch, time, width)`; zero wherever `mask` is False.
        mask: Which steps are observed, `(batch, time)` bool.
        present: Which samples have this modality, `(batch,)` bool.
        spans: Of a recognised text: when the word of each token is spoken, `(batch, tokens, 2, 2)` float; see
            `text_spans` of `MSAModel.forward`. None if no word of the batch has a time.
        dialogue: Number of the dialogue that each sample is a turn of, `(batch,)` int64; None without
            dialogues.
        turn: Place of each sample in its dialogue, `(batch,)` int64, from 0.
        speaker: Number of the speaker of each sample within its dialogue, `(batch,)` int64.
    """

    values: Tensor
    mask: Tensor
    present: Tensor
    spans: Tensor | None = None
    dialogue: Tensor | None = None
    turn: Tensor | None = None
    speaker: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "ModalitySequence":
        """Wrap states `(batch, time, width)`; a sample is present if any step of its `mask` is valid."""
        return cls(_masked(values, mask), mask, mask.any(dim=1))

    def with_values(self, values: Tensor) -> "ModalitySequence":
        """The same steps with other states `(batch, time, width)`, for example the output of a layer.

        Steps that are not observed are set to zero, because a linear layer, for example, leaves its bias
        there. Use this instead of `dataclasses.replace`, which keeps such values.
        """
        return replace(self, values=_masked(values, self.mask))

    def to(self, device: torch.device, non_blocking: bool = False) -> "ModalitySequence":
        """The same sequence on another device; Accelerate calls this between parts on several devices."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def only(self, present: Tensor) -> "ModalitySequence":
        """The same sequence; samples are hidden where `present` `(batch,)` bool is False."""
        visible = ModalitySequence.of(self.values, self.mask & present.unsqueeze(-1))
        spans = self.spans
        if spans is not None:
            spans = torch.where(present[:, None, None, None], spans, torch.nan)
        return replace(visible, spans=spans, dialogue=self.dialogue, turn=self.turn, speaker=self.speaker)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Set states `(batch, time, width)` to zero where `mask` `(batch, time)` is False, even NaN."""
    return torch.where(mask.unsqueeze(-1), values, 0.0)
