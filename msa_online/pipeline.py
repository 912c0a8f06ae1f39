# SPDX-License-Identifier: Apache-2.0
"""MSAPipeline: predictions for media files."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from feature_extractors import (
    Clip,
    ClipError,
    ClipExtent,
    ClipFeatures,
    FaceExtractor,
    FeatureCache,
    extract,
)
from feature_extractors.clip import NO_AUDIO, NO_FACE, NO_VIDEO, SILENT_AUDIO
from msa_online.evaluation.attribution import Attribution, attribute
from msa_online.evaluation.conditions import DIVERGED, UndefinedScoreError
from msa_online.hub import CheckpointError, load_checkpoint
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor, UnknownTokens, clean_text

REASONS = {"audio": (NO_AUDIO, SILENT_AUDIO), "vision": (NO_VIDEO, NO_FACE)}
"""Findings for which a modality is missing."""

BATCH_SIZE = 16  # clips in one forward pass
FROM_NOTHING = "no text, sound or face: this is the model's baseline, independent of the clip"

FROM_UNKNOWN = "the tokenizer knows no word of the text: every such text gets this prediction"


@dataclass(frozen=True)
class Prediction:
    """Prediction for one clip, and the contribution of each modality.

    The score (in classification, the probability of `label`) equals `baseline` plus the sum of
    `contributions`, up to rounding in fp32. The contributions are Shapley values ((2.7) of
    docs/methods/pase.md): what a modality adds, averaged over all orders in which the modalities can be
    added. They show what moves the prediction, not what makes it correct.

    Attributes:
        clip: The file, or None for text only.
        score: Predicted label of a regression, in the units of the training labels, not clipped to their
            range; None in classification.
        label: Most probable class; None in regression.
        probabilities: Probability of each class, summing to one; empty in regression.
        modalities: Modalities that the prediction uses.
        missing: Reason for each modality that was not used.
        baseline: The score, or the probability of `label`, without any modality.
        contributions: What each modality adds to the baseline, in the same unit, by name; exactly 0 for a
            missing modality.
        cut: For each modality that is read only in part, how much was read: "first 30.0 of 182.4 s".
        warning: Set if all modalities are missing, so that the prediction does not depend on the clip, or if
            it rests on a text of unknown words alone; else None.
        findings: What makes the clip doubtful although it is used: "several faces", "still picture", "audio
            track 2 of 2", "text: 3 of 12 tokens unknown".
    """

    clip: str | None
    score: float | None
    label: str | None
    probabilities: dict[str, float]
    modalities: tuple[str, ...]
    missing: dict[str, str]
    baseline: float
    contributions: dict[str, float]
    cut: dict[str, str] = field(default_factory=dict)
    warning: str | None = None
    findings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain data, ready for JSON."""
        return asdict(self)


class MSAPipeline:
    """Predicts from raw media, with the extraction settings of training.

    Args:
        model: A trained model.
        processor: The processor saved with it.
        device: Device of the model; by default a GPU if there is one.
        cache: Cache of extracted features; None extracts every time.
    """

    def __init__(
        self,
        model: MSAModel,
        processor: MSAProcessor,
        device: str | torch.device | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.processor = processor
        self.cache = cache

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device | None = None) -> "MSAPipeline":
        """Load a checkpoint folder or Hub repository.

        Raises:
            CheckpointError: It is not a checkpoint of this project, or its model does not take clips.
        """
        model, processor = load_checkpoint(source)
        if processor is None:
            widths = ", ".join(f"{name} {width}" for name, width in model.config.widths.items())
            raise CheckpointError(
                f"{source}: the model takes precomputed features ({widths}), not clips: score it with "
                "`msa-online evaluate` on such features; to predict from clips, train with "
                "model.text_encoder in place of model.feature_widths"
            )
        return cls(model, processor, device=device)

    def __call__(
        self,
        clips: str | Path | Clip | None | Sequence[str | Path | Clip | None] = None,
        text: str | None | Sequence[str | None] = None,
        *,
        skip_broken: bool = False,
    ) -> Prediction | list[Prediction | ClipError]:
        """Predict for one clip, or for several at once.

        Args:
            clips: A media file, a `Clip` with a window, None for text only, or a list of these. Audio files
                are allowed.
            text: The transcript: one string for one clip, or a list as long as `clips`. None means that there
                is no transcript.
            skip_broken: For a clip of a list that cannot be used, return the `ClipError` in its place instead
                of raising it.

        Returns:
            One `Prediction`, or a list for lists.

        Raises:
            ClipError: A file is missing, broken or not a media file.
            ValueError: There is neither a clip nor a text, a list is combined with a single value, the lists
                differ in length, or a value has a wrong type.
            UndefinedScoreError: The model's predictions are not finite.
        """
        if not isinstance(clips, list | tuple) and not isinstance(text, list | tuple):
            return self([clips], [text])[0]
        results = []
        for result in self.stream(clips, text):
            if isinstance(result, ClipError) and not skip_broken:
                raise result
            results.append(result)
        return results

    def stream(
        self, clips: Sequence[str | Path | Clip | None] | None, text: Sequence[str | None] | None = None
    ) -> Iterator[Prediction | ClipError]:
        """Predict for any number of clips, in order, with constant memory.

        Args:
            clips: List of clips as for `__call__`; None for texts only.
            text: List of texts as for `__call__`; None if all transcripts are missing.

        Returns:
            An iterator with a `Prediction` for each clip, or a `ClipError` if the clip cannot be used.

        Raises:
            ValueError: As in `__call__`.
        """
        return self._stream(_pairs(clips, text))

    def _stream(self, pairs: Sequence[tuple[Clip | None, str | None]]) -> Iterator[Prediction | ClipError]:
        waiting: list[tuple[Clip | None, ClipFeatures, str | None]] = []
        with ExitStack() as stack:
            faces = None
            if any(clip is not None for clip, _ in pairs):
                faces = stack.enter_context(FaceExtractor(self.processor.settings))
            for clip, text in pairs:
                try:
                    waiting.append((clip, self._features(clip, faces), text))
                except ClipError as error:
                    yield from self._predict(waiting)
                    yield error
                    waiting = []
                if len(waiting) == BATCH_SIZE:
                    yield from self._predict(waiting)
                    waiting = []
            yield from self._predict(waiting)

    @torch.inference_mode()
    def _predict(self, samples: Sequence[tuple[Clip | None, ClipFeatures, str | None]]) -> list[Prediction]:
        if not samples:
            return []
        clips, features, texts = zip(*samples, strict=True)
        batch = self.processor(features, texts).to(self.device)
        attribution = attribute(self.model, batch)
        if not attribution.outputs.isfinite().all():
            raise UndefinedScoreError(f"the predictions of this model are not finite; {DIVERGED}")
        present = batch["modality_present"]
        return [
            self._prediction(*samples[row], present[row].tolist(), attribution.of_sample(row))
            for row in range(len(clips))
        ]

    def _features(self, clip: Clip | None, faces: FaceExtractor | None) -> ClipFeatures:
        settings = self.processor.settings
        if clip is None:
            return ClipFeatures.absent(settings)
        return self.cache.get(clip, settings, faces) if self.cache else extract(clip, settings, faces)

    def _prediction(
        self,
        clip: Clip | None,
        features: ClipFeatures,
        text: str | None,
        present: list[bool],
        attribution: Attribution,
    ) -> Prediction:
        config = self.model.config
        outputs = attribution.outputs.tolist()
        classes = [] if config.is_regression else [config.id2label[number] for number in range(len(outputs))]
        extent = ClipExtent.of(features, self.processor.settings.hop_ms)
        (unknown,) = self.processor.limits.unknown([text])
        used = tuple(name for name, is_present in zip(MODALITIES, present, strict=True) if is_present)
        return Prediction(
            clip=None if clip is None else str(clip.path),
            score=None if classes else outputs[0],
            label=classes[attribution.predicted.item()] if classes else None,
            probabilities=dict(zip(classes, outputs, strict=True)) if classes else {},
            modalities=used,
            missing={
                name: _why_missing(name, clip, text, features, self.processor.max_audio_seconds)
                for name in MODALITIES
                if name not in used
            },
            baseline=attribution.baseline.item(),
            contributions=dict(zip(MODALITIES, attribution.contributions.tolist(), strict=True)),
            cut={name: cut.description for name, cut in self.processor.limits.cut(extent, text).items()},
            warning=_warning(used, unknown),
            findings=(
                *(each for each in features.findings if each not in chain(*REASONS.values())),
                *([f"text: {unknown.description}"] if unknown.unknown else []),
            ),
        )


def _pairs(clips: Any, text: Any) -> list[tuple[Clip | None, str | None]]:
    """Validate clips and transcripts, and pair them."""
    lists = (list, tuple)
    if clips is None and isinstance(text, lists):
        clips = [None] * len(text)
    if text is None and isinstance(clips, lists):
        text = [None] * len(clips)
    if not isinstance(clips, lists):
        raise ValueError(f"one clip but a list of {len(text)} texts: give a list of clips, or one text")
    if not isinstance(text, lists):
        raise ValueError(
            f"a list of {len(clips)} clips but one text: give a list with one text (or None) for each clip"
        )
    if len(clips) != len(text):
        raise ValueError(f"{len(clips)} clips but {len(text)} texts: give one text (or None) for each clip")
    for number, (clip, transcript) in enumerate(zip(clips, text, strict=True), start=1):
        if not isinstance(clip, str | Path | Clip | None):
            raise ValueError(f"clip {number} is {clip!r}: give a path, a Clip, or None")
        if not isinstance(transcript, str | None):
            raise ValueError(f"text {number} is {transcript!r}: give a string, or None if there is none")
        if clip is None and not clean_text(transcript):
            raise ValueError("nothing to predict from: give a clip, a text, or both")
    return [
        (None if clip is None else as_clip(clip), transcript)
        for clip, transcript in zip(clips, text, strict=True)
    ]


def as_clip(source: str | Path | Clip) -> Clip:
    """A `Clip` as it is, or a media file without a window as a `Clip`."""
    return source if isinstance(source, Clip) else Clip(Path(source))


def _warning(used: tuple[str, ...], unknown: UnknownTokens) -> str | None:
    """Why the prediction says nothing about the clip, if it does not."""
    if not used:
        return FROM_NOTHING
    return FROM_UNKNOWN if used == ("text",) and unknown.all_unknown else None


def _why_missing(
    name: str, clip: Clip | None, text: str | None, features: ClipFeatures, max_audio_seconds: float
) -> str:
    if name == "text":
        return "no transcript given" if text is None else "empty text"
    if clip is None:
        return "no clip given"
    if name == "audio" and features.has_audio:
        return (
            f"silent in the first {max_audio_seconds:g} s, which are read; the sound starts at "
            f"{features.audible_from:.1f} s: give start and end of the part to read"
        )
    return next((finding for finding in features.findings if finding in REASONS[name]), "nothing found")
