# SPDX-License-Identifier: Apache-2.0
"""MSAPipeline: one clip in, one prediction out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from msa_online.evaluation.attribution import Attribution, attribute
from msa_online.evaluation.conditions import DIVERGED, UndefinedScoreError
from msa_online.hub import CheckpointError, load_checkpoint
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

TOGETHER = 16  # clips in one forward pass
FROM_NOTHING = "no text, sound or face: the model's baseline, whatever the clip is"


@dataclass(frozen=True)
class Prediction:
    """What the model predicts for one clip, and how much each modality contributes.

    What is shared out is the score, or in classification the probability of `label`. It equals `baseline`
    plus the sum of `contributions`, up to rounding in fp32. The contributions are Shapley values
    (METHODS 2.7): what a modality adds, averaged over all orders in which the modalities may come in. They
    say what moves this prediction, not what makes it right.

    Attributes:
        clip: The file, or None for text alone.
        score: Predicted label of a regression, in the units of the training labels and not cut to their
            range; None in classification.
        label: Most probable class; None in regression.
        probabilities: Probability of each class, summing to one; empty in regression.
        modalities: Modalities the prediction rests on.
        missing: For each modality that was not used, why.
        baseline: The score, or the probability of `label`, when the model sees nothing.
        contributions: What each modality adds to the baseline, in the same unit, by name; exactly 0 for one
            that is missing.
        cut: For each modality that is read in part only, how much of it was read: "first 30.0 of 182.4 s".
        warning: Why the prediction says nothing about this clip: all modalities are missing. None otherwise.
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

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain data, ready for JSON."""
        return asdict(self)


class MSAPipeline:
    """Raw media to prediction, with the extraction the model was trained on.

    Args:
        model: A trained model.
        processor: The processor saved with it.
        device: Where to run; a GPU when there is one.
        cache: Store of extracted features; None extracts every time.
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
        """Open a checkpoint folder or Hub repository.

        Raises:
            CheckpointError: It is no checkpoint of this project, or its model takes no clips.
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
            clips: A media file, a `Clip` with a window, None for text alone, or a list of these. Sound files
                are legal.
            text: The transcript: one string for one clip, a list as long as `clips` for a list. None means
                that the transcript is missing.
            skip_broken: In a list, put the `ClipError` of a clip that cannot be used in its place, instead of
                raising it.

        Returns:
            One `Prediction`, or a list for lists.

        Raises:
            ClipError: A file is missing, broken or no media.
            ValueError: Neither a clip nor a text is given, a list meets a single value, the lists differ in
                length, or a value is of another kind.
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
        """Predict for any number of clips, in order, with the memory that a few of them take.

        Args:
            clips: As a list for `__call__`; None for texts alone.
            text: As a list for `__call__`; None if all transcripts are missing.

        Returns:
            An iterator over a `Prediction`, or the `ClipError` that says why there is none, for each clip.

        Raises:
            ValueError: As `__call__`.
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
                if len(waiting) == TOGETHER:
                    yield from self._predict(waiting)
                    waiting = []
            yield from self._predict(waiting)

    @torch.inference_mode()
    def _predict(self, samples: Sequence[tuple[Clip | None, ClipFeatures, str | None]]) -> list[Prediction]:
        if not samples:
            return []
        clips, features, texts = zip(*samples, strict=True)
        batch = self.processor(features, texts).to(self.device)
        said = attribute(self.model, batch)
        if not said.outputs.isfinite().all():
            raise UndefinedScoreError(f"the predictions of this model are not finite; {DIVERGED}")
        present = batch["modality_present"]
        return [
            self._prediction(*samples[row], present[row].tolist(), said.of_sample(row))
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
        said: Attribution,
    ) -> Prediction:
        config = self.model.config
        outputs = said.outputs.tolist()
        classes = [] if config.is_regression else [config.id2label[number] for number in range(len(outputs))]
        extent = ClipExtent.of(features, self.processor.settings.hop_ms)
        used = tuple(name for name, there in zip(MODALITIES, present, strict=True) if there)
        return Prediction(
            clip=None if clip is None else str(clip.path),
            score=None if classes else outputs[0],
            label=classes[said.predicted.item()] if classes else None,
            probabilities=dict(zip(classes, outputs, strict=True)) if classes else {},
            modalities=used,
            missing={name: _why_missing(name, clip, features) for name in MODALITIES if name not in used},
            baseline=said.baseline.item(),
            contributions=dict(zip(MODALITIES, said.contributions.tolist(), strict=True)),
            cut={name: cut.description for name, cut in self.processor.limits.cut(extent, text).items()},
            warning=None if used else FROM_NOTHING,
        )


def _pairs(clips: Any, text: Any) -> list[tuple[Clip | None, str | None]]:
    """Clips and their transcripts side by side, checked."""
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
        if clip is None and not (transcript or "").strip():
            raise ValueError("nothing to predict from: give a clip, a text, or both")
    return [
        (None if clip is None else as_clip(clip), transcript)
        for clip, transcript in zip(clips, text, strict=True)
    ]


def as_clip(source: str | Path | Clip) -> Clip:
    """A `Clip` as it is, or the whole of a media file."""
    return source if isinstance(source, Clip) else Clip(Path(source))


def _why_missing(name: str, clip: Clip | None, features: ClipFeatures) -> str:
    if name == "text":
        return "no transcript given"
    if clip is None:
        return "no clip given"
    reasons = {"audio": ("no audio stream", "silent audio"), "vision": ("no video stream", "no face")}[name]
    return next((finding for finding in features.findings if finding in reasons), "nothing found")
