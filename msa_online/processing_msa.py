# SPDX-License-Identifier: Apache-2.0
"""MSAProcessor: converts a clip and its transcript to model inputs; saved and loaded with the model."""

import dataclasses
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from feature_extractors import ClipExtent, ClipFeatures, ExtractionSettings, clip_of_arrays
from feature_extractors.audio import HOP_MS, NUM_MELS, WINDOW_MS
from feature_extractors.extraction import measure
from feature_extractors.face import face_extractor_of
from feature_extractors.transcript import Transcript
from msa_online.front_ends import (
    face_size,
    longest_sound,
    picture_inputs,
    restore_extractor,
    restore_image_processor,
    sound_inputs,
)
from msa_online.modalities import MODALITIES

MAX_TEXT_TOKENS = 128
MAX_AUDIO_SECONDS = 30.0
SPECIAL_TOKENS = 8  # upper bound of the special tokens added to a text
FRAME_GAP = 4.0
"""Clips with more seconds per sampled frame than this are reported to have few frames: with the default of
eight frames, clips longer than 32 s. Utterances of the usual corpora last 1 to 10 s."""
LOST_SOUND = 0.1  # seconds; codecs pad sound by less


@dataclass(frozen=True)
class InputLimits:
    """Limits on what a model reads of a clip.

    Attributes:
        max_text_tokens: Longest token sequence, special tokens included.
        max_audio_seconds: Longest sound, in seconds.
        tokenizer: Counts tokens. Without it, words are counted, which are fewer, so that some truncated texts
            are missed.
    """

    max_text_tokens: int = MAX_TEXT_TOKENS
    max_audio_seconds: float = MAX_AUDIO_SECONDS
    tokenizer: PreTrainedTokenizerBase | None = None

    def cut(self, extent: ClipExtent, text: str | None) -> dict[str, "Cut"]:
        """The modalities of a clip that the model reads only in part; empty if it reads all."""
        cuts = {}
        if (length := self._text_length(text or "")) > self.max_text_tokens:
            of = f"tokens of {length:,} words" if self.tokenizer is None else f"of {length:,} tokens"
            cuts["text"] = Cut(f"{self.max_text_tokens:,} {of}", length)
        if extent.sound > self.max_audio_seconds + LOST_SOUND:
            seconds = f"first {self.max_audio_seconds:.1f} of {extent.sound:.1f} s"
            cuts["audio"] = Cut(seconds, extent.sound)
        if extent.frames and extent.seconds / extent.frames > FRAME_GAP:
            frames = f"{extent.frames} frame{'s' * (extent.frames != 1)}"
            cuts["vision"] = Cut(f"{frames} over {extent.seconds:.1f} s", extent.seconds)
        return cuts

    def is_heard(self, extent: ClipExtent) -> bool:
        """Whether the part of the sound that the model reads is audible."""
        return extent.sound > 0 and extent.audible_from < self.max_audio_seconds

    def _text_length(self, text: str) -> int:
        text = clean_text(text)
        if self.tokenizer is None:
            return len(text.split())
        if len(text.encode()) + SPECIAL_TOKENS <= self.max_text_tokens:
            return 0  # every token has a byte or more; tokenizing all texts would take seconds
        return len(token_ids(self.tokenizer, text))

    def unknown(self, texts: Sequence[str | None]) -> list["UnknownTokens"]:
        """Count the unknown tokens of each text; without a tokenizer, all counts are zero."""
        if self.tokenizer is None or self.tokenizer.unk_token_id is None:
            return [UnknownTokens(0, 0)] * len(texts)
        cleaned = [clean_text(text) for text in texts]
        ids = (token_ids(self.tokenizer, text, special=False) if text else [] for text in cleaned)
        unknown = self.tokenizer.unk_token_id
        return [UnknownTokens(each.count(unknown), len(each)) for each in ids]


@dataclass(frozen=True)
class UnknownTokens:
    """How many tokens of a text are unknown to the tokenizer.

    Attributes:
        unknown: Unknown tokens.
        tokens: All tokens, special ones left out.
    """

    unknown: int
    tokens: int

    @property
    def all_unknown(self) -> bool:
        """Whether no token of the text is known: the model then only learns that there is a text."""
        return 0 < self.tokens == self.unknown

    @property
    def description(self) -> str:
        """The figures in words: "3 of 12 tokens unknown"."""
        return f"{self.unknown:,} of {self.tokens:,} tokens unknown"


def clean_text(text: str | None) -> str:
    """A transcript without invisible characters at its ends; "" if it shows nothing.

    Spaces, control characters, byte-order and direction marks, zero-width characters and variation selectors
    are invisible, and so is a combining mark without a letter. Lone surrogates become the replacement
    character, because tokenizers refuse them.
    """
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not any(map(_is_visible, text)):
        return ""
    begin = next(place for place, character in enumerate(text) if not _is_format(character))
    end = next(place for place in range(len(text), 0, -1) if not _is_format(text[place - 1]))
    return text[begin:end]


BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800\ufffc"
"""Fillers of Hangul, the blank of Braille, and the place of an embedded object: letters without a shape."""


def _is_visible(character: str) -> bool:
    """Whether a character has a shape of its own; reserved ones have none."""
    code = ord(character)
    is_reserved = (
        0xE0000 <= code <= 0xE0FFF or code & 0xFFFE == 0xFFFE or code in (0x2065, *range(0xFFF0, 0xFFF9))
    )
    return not (
        _is_format(character)
        or unicodedata.category(character)[0] == "M"
        or character in BLANK_LETTERS
        or is_reserved
    )


def _is_format(character: str) -> bool:
    """Whether a character is a space, or controls how others are shown."""
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp")


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None, special: bool = True
) -> list[int]:
    """Token ids of a transcript, in which names of special tokens, like "[MASK]", are ordinary words.

    Args:
        tokenizer: The tokenizer.
        text: A cleaned transcript.
        max_length: Longest sequence, special tokens included; None cuts nothing.
        special: Put special tokens around the text.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(
        text,
        split_special_tokens=True,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        verbose=False,
        **cut,
    )
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    unknown = tokenizer.unk_token_id
    reserved = set(tokenizer.all_special_ids) - {unknown}
    if unknown is None or reserved.isdisjoint(ids):
        return ids
    # some vocabularies find the names of their special tokens even in split text
    return [
        unknown if token in reserved and not mark else token for token, mark in zip(ids, added, strict=True)
    ]


@dataclass(frozen=True)
class Cut:
    """A modality of a clip that exceeds a limit.

    Attributes:
        description: What is read, and of how much: "first 30.0 of 182.4 s".
        length: Full length, in tokens (or words) or seconds.
    """

    description: str
    length: float


class MSAProcessor(ProcessorMixin):
    """Converts extracted features and transcripts to a batch of tensors for the model.

    It contains all that is needed to recompute the inputs of a checkpoint from raw media: the tokenizer, the
    extraction settings, and the front-ends of pretrained audio and vision encoders.

    Args:
        tokenizer: Tokenizer of the text encoder.
        extraction: Fields of `ExtractionSettings`, as a plain dict. Without `face_size`, crops have the size
            that the image processor resizes to, or 96 pixels.
        max_text_tokens: Longest token sequence; longer transcripts are truncated.
        max_audio_seconds: Longest sound, in seconds; longer sound is truncated. At most what the feature
            extractor takes: 30 s for Whisper, 10.24 s for the Audio Spectrogram Transformer.
        audio_feature_extractor: Feature extractor of the audio encoder, as an object of transformers or its
            saved form; None for the log-mel spectrogram of `feature_extractors`.
        image_processor: Image processor of the vision encoder, likewise; None leaves the crops as they are.

    Raises:
        ValueError: A setting is out of range, or a front-end is unknown or wants sound at another rate.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        extraction: dict[str, Any],
        max_text_tokens: int = MAX_TEXT_TOKENS,
        max_audio_seconds: float = MAX_AUDIO_SECONDS,
        audio_feature_extractor: FeatureExtractionMixin | dict[str, Any] | None = None,
        image_processor: BaseImageProcessor | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self.audio_feature_extractor = restore_extractor(audio_feature_extractor)
        self.image_processor = restore_image_processor(image_processor)
        given = {"face_size": face_size(self.image_processor), **_without_spectrogram(extraction)}
        self.extraction = dataclasses.asdict(ExtractionSettings(**given))
        self.max_text_tokens = max_text_tokens
        self.max_audio_seconds = min(max_audio_seconds, longest_sound(self.audio_feature_extractor))

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that transformers stores for us; the others may be None, and are fields of our own file."""
        return ["tokenizer"]

    @cached_property
    def settings(self) -> ExtractionSettings:
        """Extraction settings of this model."""
        return ExtractionSettings(**self.extraction)

    @property
    def limits(self) -> InputLimits:
        """Limits on what the model reads of a clip."""
        return InputLimits(self.max_text_tokens, self.max_audio_seconds, self.tokenizer)

    def tokenize(self, text: str) -> Tensor:
        """Token ids of a transcript, `(tokens,)` int64, at least one.

        An empty transcript becomes the special tokens, or token 0 if the tokenizer adds none.
        """
        ids = token_ids(self.tokenizer, clean_text(text), self.max_text_tokens)
        return at_least_one(torch.tensor(ids, dtype=torch.int64))

    def encode(
        self, features: ClipFeatures | None, text: str | None, modalities: Collection[str] = MODALITIES
    ) -> dict[str, Tensor]:
        """Inputs of one sample, before padding.

        A modality is absent without a transcript, without sound in the part that is read, or without a face
        in any frame. It becomes one step of zeros (text: the special tokens) with `modality_present` False.

        Args:
            features: The extracted clip; None if it has neither sound nor pictures.
            text: The transcript.
            modalities: Modalities to make inputs of.

        Returns:
            `text_input_ids` `(tokens,)`, `audio_values` `(steps, width)` (`(samples,)` for encoders of
            waveforms), `vision_values` `(frames, height, width, 3)` uint8 (with an image processor
            `(frames, 3, height, width)` float32), `vision_blendshapes` `(frames, 52)`, `vision_mask`
            `(frames,)` and `modality_present` `(3,)`.
        """
        features = ClipFeatures.absent(self.settings) if features is None else features
        text = clean_text(text)
        is_heard = self.limits.is_heard(ClipExtent.of(features))
        present = {"text": bool(text), "audio": is_heard, "vision": features.has_face}
        inputs = {"modality_present": torch.tensor([present[name] for name in MODALITIES])}
        if "text" in modalities:
            inputs["text_input_ids"] = self.tokenize(text)
        if "audio" in modalities:
            inputs["audio_values"] = at_least_one(self._sound(features) if is_heard else self._no_sound)
        if "vision" in modalities:
            frames = len(features.face_crops) if present["vision"] else 0
            pictures = picture_inputs(features, self.image_processor)[:frames]
            inputs["vision_values"] = at_least_one(torch.from_numpy(pictures))
            inputs["vision_blendshapes"] = at_least_one(torch.from_numpy(features.blendshapes[:frames]))
            inputs["vision_mask"] = at_least_one(torch.from_numpy(features.face_found[:frames]))
        return inputs

    def _sound(self, features: ClipFeatures) -> Tensor:
        return torch.from_numpy(sound_inputs(features, self.max_audio_seconds, self.audio_feature_extractor))

    @cached_property
    def _no_sound(self) -> Tensor:
        return self._sound(ClipFeatures.absent(self.settings))

    def word_spans(self, text: str | None, transcript: Transcript | None, extent: ClipExtent) -> Tensor:
        """When the word of each token is spoken, `(tokens, 2, 2)` float32; `text_spans` of the model.

        Start and end are shares of the sound that is read, then counted in frames. NaN where they are
        unknown: for special tokens, for a text that no recogniser made, and with a tokenizer that does not
        tell where its tokens are in the text.

        Args:
            text: The transcript.
            transcript: What a recogniser heard, if `text` is its text.
            extent: Amount of each modality in the clip.
        """
        text = clean_text(text)
        spans = torch.full((len(self.tokenize(text)), 2, 2), torch.nan)
        if transcript is None or transcript.text != text or not self.tokenizer.is_fast:
            return spans
        encoded = self.tokenizer(
            text,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
            truncation=True,
            max_length=self.max_text_tokens,
        )
        sound = min(extent.sound, self.max_audio_seconds)
        scales = torch.tensor(
            [
                1 / sound if sound > 0 else torch.nan,
                extent.frames / extent.seconds if extent.frames else torch.nan,
            ]
        )
        places = transcript.places()
        for token, (begin, end) in enumerate(encoded["offset_mapping"]):
            inside = [min(end, last) - max(begin, first) for first, last in places]
            if begin < end and inside and max(inside) > 0:
                word = transcript.words[inside.index(max(inside))]
                spans[token] = torch.tensor([word.start, word.end]) * scales[:, None]
        return spans

    def pad(self, samples: Sequence[dict[str, Tensor]]) -> BatchFeature:
        """Pad samples from `encode` to the batch that `MSAModel.forward` documents.

        A sample may have `<modality>_states` and `<modality>_states_mask` in place of a modality's inputs.
        """
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
        batch = {
            key: pad_sequence(values, batch_first=True)
            for key, values in columns.items()
            if key not in ("text_input_ids", "text_spans")
        }
        if spans := columns.get("text_spans"):
            batch["text_spans"] = pad_sequence(spans, batch_first=True, padding_value=torch.nan)
        if ids := columns.get("text_input_ids"):
            padding = self.tokenizer.pad_token_id or 0  # some have none; it is masked
            batch["text_input_ids"] = pad_sequence(ids, batch_first=True, padding_value=padding)
            batch["text_mask"] = mask_of(ids)
        if "audio_values" in columns:
            batch["audio_mask"] = mask_of(columns["audio_values"])
        return BatchFeature(batch)

    def __call__(
        self,
        features: Sequence[ClipFeatures] | None = None,
        text: str | Sequence[str | None] | None = None,
        *,
        audio: Any = None,
        sampling_rate: int | None = None,
        frames: Any = None,
        images: Any = None,
        transcripts: Sequence[Transcript | None] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Batch of model inputs for transcripts with extracted clips, or with arrays of sound and pictures.

        Args:
            features: Extracted clips, in place of `audio` and `frames`.
            text: Transcripts; one string or None for one clip.
            audio: Sound of one clip as in `clip_of_arrays`. For several clips, lists of the same length of
                all that is given; None in a list where a clip has nothing.
            sampling_rate: Samples per second of all `audio`.
            frames: Pictures of one clip as in `clip_of_arrays`, or a list for several clips.
            images: Another name of `frames`, as processors in transformers have it.
            transcripts: For `features`: what a recogniser heard, for texts that it made. If any has times of
                words, the batch has `text_spans`.
            return_tensors: Only "pt" exists.

        Raises:
            ValueError: The lists differ in length, or an array has a wrong shape, type or range.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f'return_tensors is {return_tensors!r}: only "pt" exists')
        if frames is not None and images is not None:
            raise ValueError("frames and images are two names of one thing: give one of them")
        frames = images if frames is None else frames
        if features is None:
            features, text = self._features_of_arrays(text, audio, sampling_rate, frames)
        elif audio is not None or frames is not None:
            raise ValueError("features contain sound and pictures: give them, or audio and frames")
        text = [None] * len(features) if text is None else text
        samples = [self.encode(*pair) for pair in zip(features, text, strict=True)]
        if any(each is not None and each.words for each in transcripts or ()):
            for sample, *rest in zip(samples, text, transcripts, features, strict=True):
                sample["text_spans"] = self.word_spans(*rest[:2], ClipExtent.of(rest[2]))
        return self.pad(samples)

    def _features_of_arrays(
        self, text: Any, audio: Any, sampling_rate: int | None, frames: Any
    ) -> tuple[list[ClipFeatures], list[str | None]]:
        several = isinstance(text, list | tuple) or _holds_several(audio, 1) or _holds_several(frames, 4)
        columns = {"text": text, "audio": audio, "frames": frames}
        if several:
            given = {name: values for name, values in columns.items() if values is not None}
            lengths = {
                name: len(values) for name, values in given.items() if isinstance(values, list | tuple)
            }
            if len(lengths) < len(given) or len(set(lengths.values())) > 1:
                raise ValueError("for several clips give lists of one length: of text, audio and frames")
            columns = {name: given.get(name, [None] * min(lengths.values())) for name in columns}
        else:
            columns = {name: [value] for name, value in columns.items()}
        features = [
            self.extract_arrays(sound, sampling_rate, pictures)
            for sound, pictures in zip(columns["audio"], columns["frames"], strict=True)
        ]
        return features, list(columns["text"])

    def extract_arrays(self, audio: Any, sampling_rate: int | None, frames: Any) -> ClipFeatures:
        """Features of one clip from arrays, as `extract` makes them from a file; errors as in `__call__`."""
        if audio is None and frames is None:
            return ClipFeatures.absent(self.settings)
        raw = clip_of_arrays(self.settings, audio, sampling_rate, frames)
        return measure(raw, self.settings, face_extractor_of(self, self.settings))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors in a batch."""
        return [
            *("text_input_ids", "text_mask", "audio_values", "audio_mask"),
            *("vision_values", "vision_blendshapes", "vision_mask", "modality_present"),
        ]


NUMBERS = ("dialogue", "turn", "speaker", "labels", "index")
"""Keys with one number a sample."""


class MSADataCollator:
    """Pads samples to a batch with labels: the `data_collator` of `transformers.Trainer`, or a `collate_fn`.

    Args:
        processor: `MSAProcessor`, or `FeatureProcessor` for precomputed features.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch of tensors that `MSAModel.forward` takes.

        Args:
            samples: What `MSAProcessor.encode` returns, as tensors or nested lists, optionally with `labels`
                (a number), and with `index`, `dialogue`, `turn` and `speaker` (integers).
        """
        columns = {key: [torch.as_tensor(sample[key]) for sample in samples] for key in samples[0]}
        plain = {key: torch.stack(columns.pop(key)) for key in NUMBERS if key in columns}
        inputs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {**self.processor.pad(inputs), **plain}


def _without_spectrogram(extraction: dict[str, Any]) -> dict[str, Any]:
    """Settings of extraction without those of the spectrogram, which earlier versions saved among them.

    Raises:
        ValueError: The spectrogram differs from ours.
    """
    for name, ours in (("num_mels", NUM_MELS), ("window_ms", WINDOW_MS), ("hop_ms", HOP_MS)):
        if (value := extraction.get(name, ours)) != ours:
            raise ValueError(f"extraction.{name} is {value!r}: this version has {ours} only; train again")
    return {key: value for key, value in extraction.items() if key not in ("num_mels", "window_ms", "hop_ms")}


def _holds_several(values: Any, dimensions: int) -> bool:
    """Whether a list has one array of so many dimensions or more, or None, for each clip."""
    if not isinstance(values, list | tuple) or not len(values):
        return False
    return any(value is None or np.ndim(value) >= dimensions for value in values)


def at_least_one(values: Tensor) -> Tensor:
    """`values` `(time, ...)`, or one step of zeros if it is empty: no sequence in a batch may be empty."""
    return values if len(values) else values.new_zeros(1, *values.shape[1:])


def mask_of(sequences: Sequence[Tensor]) -> Tensor:
    """Valid steps of sequences `(time, ...)` padded to the longest, `(batch, longest)` bool."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
