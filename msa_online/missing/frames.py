# SPDX-License-Identifier: Apache-2.0
"""Words, stretches of sound and faces that are missing at given rates (METHODS 7.4)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from msa_online.encoders.audio import TYPICAL_LOG_MEL
from msa_online.encoders.text import TextEncoderError
from msa_online.missing.modalities import InputMask
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

FRAME_RATES = tuple(tenths / 10 for tenths in range(10))
"""The rates of a sweep."""

LEVELS = ("input", "feature")
"""Where positions are dropped: before the encoders, or after them."""

VALIDATION_RATE = 0.5
"""The rate at which the epochs of training with dropped frames are judged."""


class FrameDrop:
    """Drops positions of samples at a rate, alike in every batch, worker and process.

    A position is dropped where its own uniform number lies below the rate. The numbers of a sample follow
    from seed, split, sample id, modality and rate, and from nothing else: modalities are independent of each
    other, which they are not in LNLN's code (METHODS A21).

    Args:
        ids: Id of each sample, in the order that `index` in a batch counts in.
        stand_ins: What takes the place of dropped inputs, as `stand_ins_of` gives it; not needed where only
            states are dropped.
        split: Name of the split.
        seed: Another seed is another draw.
        nested: Use the same numbers at all rates, so that a higher rate drops what a lower one does and more:
            the curve over the rates becomes smoother, its points dependent.
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
        """The batch, as `MSAModel.forward` documents it and with its `index`, without what is dropped.

        Of clips, a dropped token becomes the unknown token, but for the first and the last of a sample; a
        dropped step of sound becomes average sound; a face is treated as not found in its frame, so that
        a sample can lose all of them and with them its vision. Of features, a dropped step becomes the mean.
        Dropped tokens, sounds and features are still attended.
        """
        dropped = {
            name: self.dropped(batch["index"], name, droppable(batch, name), rate) for name in MODALITIES
        }
        return without(batch, dropped, self.stand_ins)

    def from_states(
        self, sequences: Mapping[str, ModalitySequence], index: Tensor, rate: float
    ) -> dict[str, ModalitySequence]:
        """Encoded sequences with dropped states set to zero and still attended; `index` is `(batch,)`."""
        kept = {
            name: ~self.dropped(index, name, sequence.mask, rate).unsqueeze(-1)
            for name, sequence in sequences.items()
        }
        return {
            name: sequence.with_values(sequence.values * kept[name]) for name, sequence in sequences.items()
        }

    def dropped(self, index: Tensor, name: str, among: Tensor, rate: float) -> Tensor:
        """Which positions of modality `name` are dropped, `(batch, time)` bool, `among` those given so."""
        key = () if self.nested else (rate,)
        numbers = uniform(
            ((self.seed, self.split, self.ids[sample], name, *key) for sample in index.tolist()),
            among.shape[1],
        )
        return (numbers < rate).to(among.device) & among


class FramesAt(InputMask):
    """Drops inputs of every sample at one rate, the same ones whenever it is asked.

    Args:
        drop: Decides which.
        rate: Share of positions to be dropped, in [0, 1).
    """

    def __init__(self, drop: FrameDrop, rate: float) -> None:
        self.drop = drop
        self.rate = rate

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch without what `FrameDrop.from_inputs` drops from it."""
        return self.drop.from_inputs(batch, self.rate)


class FrameDropout(InputMask):
    """Drops inputs of training samples at rates of their own, so that the model learns to do with a part.

    In every epoch each modality of each sample stays whole with probability 1/2, and else has a rate drawn
    from U(0, 1). What is dropped depends on seed, epoch, sample id and modality alone.

    Args:
        ids: Id of each training sample, in the order that `index` in a batch counts in.
        stand_ins: What takes the place of dropped inputs, as `stand_ins_of` gives it.
        seed: Seed of the run.
    """

    def __init__(self, ids: Sequence[str], stand_ins: Mapping[str, Tensor], seed: int) -> None:
        self.ids = ids
        self.stand_ins = stand_ins
        self.seed = seed
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Draw anew for epoch number `epoch`."""
        self.epoch = epoch

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch without what is dropped from it, as `FrameDrop.from_inputs` does it."""
        dropped = {}
        for name in MODALITIES:
            among = droppable(batch, name)
            samples = (self.ids[sample] for sample in batch["index"].tolist())
            numbers = uniform(
                ((self.seed, "train", self.epoch, sample, name) for sample in samples), 2 + among.shape[1]
            )
            rates = torch.where(numbers[:, :1] < 0.5, 0.0, numbers[:, 1:2])
            dropped[name] = (numbers[:, 2:] < rates).to(among.device) & among
        return without(batch, dropped, self.stand_ins)


def uniform(keys: Iterable[tuple], count: int) -> Tensor:
    """For each key its own `count` uniform numbers in [0, 1), `(keys, count)` float64.

    Fewer numbers of a key are the beginning of more of them, so that padding does not change a draw.
    """
    seeds = (np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), "<u4") for key in keys)
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(count) for seed in seeds]))


def droppable(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """Which positions of modality `name` may be dropped from a batch, `(batch, time)` bool.

    All valid ones, but of tokens not the first and the last, which mark the ends of the text.
    """
    valid = batch[f"{name}_mask"]
    if f"{name}_input_ids" not in batch:
        return valid
    place = valid.cumsum(dim=1)
    return valid & (place > 1) & (place < place[:, -1:])


def without(
    batch: Mapping[str, Tensor], dropped: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The batch without the positions `dropped` `(batch, time)` bool, by modality.

    A modality with a stand-in has it in their place; of one without, they are masked.
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
    """What takes the place of dropped inputs of a model, by modality.

    Of clips the unknown token, and the average log-mel power of speech, which the audio front-end starts out
    to map to zero. Faces need none: a frame without a face is nothing new to the model. Of features made
    elsewhere their mean, `(width,)`, which their front-end maps to zero.

    Raises:
        TextEncoderError: The tokenizer has no unknown token.
    """
    if processor is None:
        return {name: model.encoders[name].mean for name in MODALITIES}
    unknown = processor.tokenizer.unk_token_id
    if unknown is None:
        raise TextEncoderError(
            f"the tokenizer of {model.config.text_encoder} has no unknown token to put in place of words; "
            "score with states missing instead: --frame-rates feature"
        )
    return {"text": torch.tensor(unknown), "audio": torch.tensor(TYPICAL_LOG_MEL[0])}
