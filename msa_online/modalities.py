# SPDX-License-Identifier: Apache-2.0
"""The three modalities and the one shape in which they travel through the model."""

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
"""The seven conditions of evaluation: which modalities the model may see (METHODS 7.3)."""

COMPLETE = "text+audio+vision"

MISSING_RATES = "imr"
"""Name of the results of a run that hides modalities at given rates, each sample under its fixed mask; they
stand beside those under the seven conditions."""


@dataclass(frozen=True)
class ModalitySequence:
    """One modality of a batch on its way from encoder to head.

    Absence is data: a sample without this modality has `present` False, an empty mask and zero values, so no
    reader of a sequence needs a branch for it and nothing hidden can leak.

    Attributes:
        values: States, `(batch, time, width)`; zero wherever `mask` is False.
        mask: Which steps are observed, `(batch, time)` bool.
        present: Which samples have this modality, `(batch,)` bool.
    """

    values: Tensor
    mask: Tensor
    present: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "ModalitySequence":
        """Wrap states `(batch, time, width)`; a sample is present when any step of its `mask` is valid."""
        return cls(_masked(values, mask), mask, mask.any(dim=1))

    def with_values(self, values: Tensor) -> "ModalitySequence":
        """The same steps with other states `(batch, time, width)`, for example the output of a layer.

        Steps that are not observed become zero, whatever `values` holds there: a linear layer leaves its bias
        in them. Use this and not `dataclasses.replace`, which keeps such values.
        """
        return replace(self, values=_masked(values, self.mask))

    def only(self, present: Tensor) -> "ModalitySequence":
        """The same sequence with the samples hidden where `present` `(batch,)` bool is False."""
        mask = self.mask & present.unsqueeze(-1)
        return ModalitySequence.of(self.values, mask)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """States `(batch, time, width)` with zeros where `mask` `(batch, time)` is False, even for NaN."""
    return torch.where(mask.unsqueeze(-1), values, 0.0)
