# SPDX-License-Identifier: Apache-2.0
"""MSAPipeline: one clip in, one prediction out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from feature_extractors import Clip, ClipFeatures, FaceExtractor, FeatureCache, extract
from msa_online.evaluation.shares import Attribution, attribute
from msa_online.hub import CheckpointError, load_checkpoint
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor


@dataclass(frozen=True)
class Prediction:
    """What the model says of one clip, and which modality says how much of it.

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
    """

    clip: str | None
    score: float | None
    label: str | None
    probabilities: dict[str, float]
    modalities: tuple[str, ...]
    missing: dict[str, str]
    baseline: float
    contributions: dict[str, float]

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
                f"{source}: the model takes features made elsewhere ({widths}), not clips: score it with "
                "`msa-online evaluate` on such features; to predict from clips, train with "
                "model.text_encoder in place of model.feature_widths"
            )
        return cls(model, processor, device=device)

    def __call__(
        self,
        clips: str | Path | Clip | None | Sequence[str | Path | Clip | None] = None,
        text: str | None | Sequence[str | None] = None,
    ) -> Prediction | list[Prediction]:
        """Predict for one clip, or for several at once.

        Args:
            clips: A media file, a `Clip` with a window, None for text alone, or a list of these. Sound files
                are legal.
            text: What is said: one string, or a list as long as `clips`. None means the transcript is
                missing.

        Returns:
            One `Prediction`, or a list for lists.

        Raises:
            ClipError: A file is missing, broken or no media.
            ValueError: Neither a clip nor a text is given, or the lists differ in length.
        """
        if single := not isinstance(clips, list | tuple) and not isinstance(text, list | tuple):
            clips, text = [clips], [text]
        clips = list(clips) if isinstance(clips, list | tuple) else [clips] * len(text)
        text = list(text) if isinstance(text, list | tuple) else [text] * len(clips)
        if len(clips) != len(text):
            raise ValueError(
                f"{len(clips)} clips but {len(text)} texts: give one text (or None) for each clip"
            )
        for clip, transcript in zip(clips, text, strict=True):
            if clip is None and not (transcript or "").strip():
                raise ValueError("nothing to predict from: give a clip, a text, or both")
        predictions = self._predict([None if clip is None else as_clip(clip) for clip in clips], text)
        return predictions[0] if single else predictions

    @torch.inference_mode()
    def _predict(self, clips: list[Clip | None], texts: list[str | None]) -> list[Prediction]:
        features = self._extract(clips)
        batch = self.processor(features, texts).to(self.device)
        said = attribute(self.model, batch)
        present = batch["modality_present"]
        return [
            self._prediction(clips[row], features[row], present[row].tolist(), said.of_sample(row))
            for row in range(len(clips))
        ]

    def _extract(self, clips: list[Clip | None]) -> list[ClipFeatures]:
        settings = self.processor.settings
        if all(clip is None for clip in clips):
            return [ClipFeatures.absent(settings) for _ in clips]
        with FaceExtractor(settings) as faces:
            return [self._features(clip, faces) for clip in clips]

    def _features(self, clip: Clip | None, faces: FaceExtractor) -> ClipFeatures:
        settings = self.processor.settings
        if clip is None:
            return ClipFeatures.absent(settings)
        return self.cache.get(clip, settings, faces) if self.cache else extract(clip, settings, faces)

    def _prediction(
        self, clip: Clip | None, features: ClipFeatures, present: list[bool], said: Attribution
    ) -> Prediction:
        config = self.model.config
        outputs = said.outputs.tolist()
        classes = [] if config.is_regression else [config.id2label[number] for number in range(len(outputs))]
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
        )


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
