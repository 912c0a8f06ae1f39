# SPDX-License-Identifier: Apache-2.0
"""Audio and vision on the steps of the text: each token gets the mean of the states during its word."""

import torch
from torch import Tensor

from msa_online.modalities import ModalitySequence

ALIGNMENTS = ("even", "words")
"""How the time of a token is found: all take equally long, or by the times of recognised words."""


def token_grid(text: ModalitySequence) -> Tensor:
    """Steps of the fusion, `(batch, tokens)` bool: those of the text, or one step where it is absent."""
    first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0
    return text.mask | (first & ~text.present.unsqueeze(-1))


def word_steps(text: ModalitySequence, name: str, sequence: ModalitySequence) -> Tensor | None:
    """When the word of each token is spoken, in steps of another modality, for `resample`.

    Args:
        text: The text, with `spans`.
        name: "audio" or "vision".
        sequence: States of that modality `(batch, time, width)`.

    Returns:
        Start and end `(batch, tokens, 2)`, NaN where unknown; None if no word has a time.
    """
    if text.spans is None:
        return None
    if name == "vision":  # one step a frame
        return text.spans[:, :, 1]
    return text.spans[:, :, 0] * _length(sequence)[:, None, None]


def resample(sequence: ModalitySequence, grid: Tensor, spans: Tensor | None = None) -> ModalitySequence:
    """Average a sequence over the time of each token.

    Without times, all tokens take equally long: adaptive average pooling with masks. Token j of n covers the
    steps from floor(j T / n) to ceil((j + 1) T / n), T being the last observed step. A token with a time
    covers all steps that its word touches, at least one. Only observed steps are averaged.

    Args:
        sequence: States `(batch, time, width)`.
        grid: Valid tokens, `(batch, tokens)` bool.
        spans: Start and end of each token's word in steps, `(batch, tokens, 2)`; NaN for tokens without a
            time. None if no token has one.

    Returns:
        States `(batch, tokens, width)`; a token without an observed step is masked out.
    """
    steps = torch.arange(sequence.mask.shape[1], device=grid.device)
    length = _length(sequence)[:, None]  # T of each sample
    count = grid.sum(dim=1, keepdim=True).clamp(min=1)
    place = grid.cumsum(dim=1) - 1  # j
    start = place * length // count
    stop = -(-(place + 1) * length // count)
    if spans is not None:
        known = spans.isfinite().all(dim=-1)
        begin, end = spans.nan_to_num().unbind(dim=-1)
        first = begin.floor().long()
        start = torch.where(known, first, start)
        stop = torch.where(known, torch.maximum(end.ceil().long(), first + 1), stop)
    covered = (steps >= start.unsqueeze(-1)) & (steps < stop.unsqueeze(-1))
    covered &= sequence.mask.unsqueeze(1) & grid.unsqueeze(-1)  # (batch, tokens, time)
    observed = covered.sum(dim=-1, keepdim=True)
    weights = covered.to(sequence.values.dtype) / observed.clamp(min=1)  # sums would overflow in fp16
    values = weights @ sequence.values
    return ModalitySequence(values, observed.squeeze(-1) > 0, sequence.present)


def _length(sequence: ModalitySequence) -> Tensor:
    """Number of steps up to the last observed one, `(batch,)`."""
    steps = torch.arange(sequence.mask.shape[1], device=sequence.mask.device)
    return torch.where(sequence.mask, steps + 1, 0).amax(dim=1)
