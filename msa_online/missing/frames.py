# SPDX-License-Identifier: Apache-2.0
"""Missing words, sounds and faces at given rates (docs/methods/protocols.md)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from msa_online.encoders.pretrained import EncoderError
from msa_online.front_ends import HOP, average_sound
from msa_online.missing.modalities import InputMask
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

FRAME_RATES = tuple(tenths / 10 for tenths in range(10))
"""The rates of a sweep."""

LEVELS = ("input", "feature")
"""Where positions are dropped: before or after the encoders."""

VALIDATION_RATE = 0.5
"""The rate of validation in training with dropped frames."""


class FrameDrop:
    """Drops positions of samples at a given rate, independent of batch, worker and process.

    A position is dropped if its uniform random number is below the rate. The numbers of a sample depend on
    seed, split, sample id, modality and rate only. So the modalities are independent of each other, unlike in
    LNLN's code.

    Args:
        ids: Id of each sample; `index` in a batch refers to this list.
        stand_ins: Replacements of dropped inputs, from `stand_ins_of`; not needed if only states are dropped.
        split: Name of the split.
        seed: Seed of the random numbers.
        nested: Use the same numbers at all rates. A higher rate then drops what a lower one drops, and more:
            the curve over the rates is smoother, but its points are dependent.
    """

    def __init__(
        self,
        ids: Sequence[str],
        stand_ins: Mapping[str, Tensor],
        *,
        split: str,
        seed: int = 1111,
        nested: bool = False,
    ) -> None:
        self.ids = ids
        self.stand_ins = stand_ins
        self.split = split
        self.seed = seed
        self.nested = nested

    def from_inputs(self, batch: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Drop positions of a batch with the inputs of `MSAModel.forward` and `index`.

        Clips: a dropped token becomes the unknown token (never the first and last token of a sample); a
        dropped audio step (10 ms of a waveform) becomes the average of speech; a dropped frame counts as a
        frame without a face, so a sample can lose vision altogether. Features: a dropped step becomes the
        mean. Dropped tokens, audio steps and features are still attended.
        """
        dropped = {
            name: self.dropped(batch["index"], name, droppable(batch, name), rate, together(batch, name))
            for name in MODALITIES
        }
        return drop_positions(batch, dropped, self.stand_ins)

    def from_states(
        self, sequences: Mapping[str, ModalitySequence], index: Tensor, rate: float
    ) -> dict[str, ModalitySequence]:
        """Set dropped states of encoded sequences to zero; they are still attended. `index` is `(batch,)`."""
        kept = {
            name: ~self.dropped(index, name, sequence.mask, rate).unsqueeze(-1)
            for name, sequence in sequences.items()
        }
        return {
            name: sequence.with_values(sequence.values * kept[name]) for name, sequence in sequences.items()
        }

    def dropped(self, index: Tensor, name: str, among: Tensor, rate: float, joined: int = 1) -> Tensor:
        """Which positions of modality `name` are dropped, `(batch, time)` bool; a subset of `among`.

        So many neighbours as `joined` are dropped or kept together.
        """
        key = () if self.nested else (rate,)
        numbers = uniform(
            ((self.seed, self.split, self.ids[sample], name, *key) for sample in index.tolist()),
            among.shape[1],
            joined,
        )
        return (numbers < rate).to(among.device) & among


class FramesAt(InputMask):
    """Drops inputs of every sample at one rate, always the same positions.

    Args:
        drop: Selects the positions.
        rate: Share of positions to drop, in [0, 1).
    """

    def __init__(self, drop: FrameDrop, rate: float) -> None:
        self.drop = drop
        self.rate = rate

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop positions of a batch with `FrameDrop.from_inputs`."""
        return self.drop.from_inputs(batch, self.rate)


class FrameDropout(InputMask):
    """Drops inputs of training samples at random rates, so that the model learns to predict without them.

    In every epoch each modality of each sample is complete with probability 1/2; otherwise its rate is drawn
    from U(0, 1). The dropped positions depend on seed, epoch, sample id and modality only.

    Args:
        ids: Id of each training sample; `index` in a batch refers to this list.
        stand_ins: Replacements of dropped inputs, from `stand_ins_of`.
        seed: Seed of the run.
    """

    def __init__(self, ids: Sequence[str], stand_ins: Mapping[str, Tensor], seed: int) -> None:
        self.ids = ids
        self.stand_ins = stand_ins
        self.seed = seed
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Use new random numbers for epoch number `epoch`."""
        self.epoch = epoch

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop positions of a batch, as in `FrameDrop.from_inputs`."""
        dropped = {}
        for name in MODALITIES:
            among = droppable(batch, name)
            samples = (self.ids[sample] for sample in batch["index"].tolist())
            keys = [(self.seed, "train", self.epoch, sample, name) for sample in samples]
            first, second = uniform(keys, 2).unbind(dim=1)
            rates = torch.where(first < 0.5, 0.0, second).unsqueeze(1)
            numbers = uniform(keys, among.shape[1], together(batch, name), skip=2)
            dropped[name] = (numbers < rates).to(among.device) & among
        return drop_positions(batch, dropped, self.stand_ins)


def uniform(keys: Iterable[tuple], count: int, joined: int = 1, skip: int = 0) -> Tensor:
    """For each key, `count` uniform random numbers in [0, 1), `(keys, count)` float64.

    A smaller `count` returns a prefix of a larger one, so padding does not change the numbers. So many
    neighbours as `joined` have the same number. The first `skip` numbers of a key are left out.
    """
    seeds = (np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), "<u4") for key in keys)
    drawn = skip - (-count // joined)
    numbers = np.stack([np.random.default_rng(seed).random(drawn)[skip:] for seed in seeds])
    return torch.from_numpy(numbers).repeat_interleave(joined, dim=1)[:, :count]


def together(batch: Mapping[str, Tensor], name: str) -> int:
    """How many neighbouring inputs of modality `name` are one position: 10 ms of a waveform, else one."""
    is_waveform = f"{name}_values" in batch and batch[f"{name}_values"].ndim == 2
    return HOP if is_waveform else 1


def droppable(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """Which positions of modality `name` may be dropped from a batch, `(batch, time)` bool.

    These are all valid positions; of tokens, all but the first and the last, which delimit the text.
    """
    valid = batch[f"{name}_mask"]
    if f"{name}_input_ids" not in batch:
        return valid
    place = valid.cumsum(dim=1)
    return valid & (place > 1) & (place < place[:, -1:])


def drop_positions(
    batch: Mapping[str, Tensor], dropped: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Drop the positions `dropped` `(batch, time)` bool of each modality from a batch.

    They are replaced by the modality's stand-in, or masked if it has none.
    """
    changed = dict(batch)
    for name, positions in dropped.items():
        if name in stand_ins:
            key = f"{name}_input_ids" if f"{name}_input_ids" in batch else f"{name}_values"
            values = batch[key]
            where = positions.reshape(*positions.shape, *[1] * (values.ndim - 2))
            changed[key] = torch.where(where, stand_ins[name].to(values), values)
        else:
            changed[f"{name}_mask"] = batch[f"{name}_mask"] & ~positions
    return changed


def stand_ins_of(model: MSAModel, processor: MSAProcessor | None) -> dict[str, Tensor]:
    """Replacements of dropped inputs of a model, by modality.

    Clips: the unknown token, and the average audio input in speech, which the convolutional encoder initially
    maps to zero. Vision has none: models know frames without a face. Precomputed features: their mean,
    `(width,)`, which the encoder maps to zero.

    Raises:
        EncoderError: The tokenizer has no unknown token.
    """
    if processor is None:
        return {name: model.encoders[name].mean for name in MODALITIES}
    unknown = processor.tokenizer.unk_token_id
    if unknown is None:
        raise EncoderError(
            f"the tokenizer of {model.config.text_encoder} has no unknown token to replace words by; drop "
            "states instead: --frame-rates feature"
        )
    sound = average_sound(processor.audio_feature_extractor)
    return {"text": torch.tensor(unknown), "audio": torch.tensor(sound)}
