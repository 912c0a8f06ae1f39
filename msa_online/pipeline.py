# SPDX-License-Identifier: Apache-2.0
"""MSAPipeline: predictions for media files."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from feature_extractors import (
    Clip,
    ClipError,
    ClipExtent,
    ClipFeatures,
    ExtractionSettings,
    FaceExtractor,
    FeatureCache,
    RawClip,
    Upload,
    extract,
)
from feature_extractors.extraction import measure
from feature_extractors.face import close_face_extractor_of, face_extractor_of
from feature_extractors.transcript import Transcript
from msa_online.confidence import Confidence, Interval, set_name
from msa_online.corpora.prepared_corpus import LACKS
from msa_online.evaluation.attribution import Attribution
from msa_online.evaluation.attribution import attribute as attribution_of
from msa_online.evaluation.attribution import predict as outputs_of
from msa_online.evaluation.conditions import DIVERGED, UndefinedScoreError
from msa_online.hub import CheckpointError, load_checkpoint
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel
from msa_online.pipeline_inputs import Sample, is_lazy, sample_of, samples_of
from msa_online.processing_msa import MSAProcessor, UnknownTokens
from msa_online.transcription import Transcriber, transcriber_of

BATCH_SIZE = 16  # clips in one forward pass
FROM_NOTHING = "no text, sound or face: this is the model's baseline, independent of the clip"

HIDDEN = "hidden from the model"

FROM_UNKNOWN = "the tokenizer knows no word of the text: every such text gets this prediction"


@dataclass(frozen=True)
class Prediction:
    """Prediction for one clip, and the contribution of each modality.

    The score (in classification, the probability of `label`) equals `baseline` plus the sum of
    `contributions`, up to rounding in fp32. The contributions are Shapley values ((2.7) of
    docs/methods/pase.md): what a modality adds, averaged over all orders in which the modalities can be
    added. They show what moves the prediction, not what makes it correct.

    Attributes:
        clip: The file, or None for arrays and for text only.
        score: Predicted label of a regression, in the units of the training labels, not clipped to their
            range; None in classification.
        label: Most probable class; None in regression.
        probabilities: Probability of each class, summing to one, calibrated if `confidence` is given; empty
            in regression.
        modalities: Modalities that the prediction uses.
        missing: Reason for each modality that was not used.
        baseline: The score, or the probability of `label`, without any modality; None if contributions were
            not asked for.
        contributions: What each modality adds to the baseline, in the same unit, by name; exactly 0 for a
            missing modality. Empty if they were not asked for.
        cut: For each modality that is read only in part, how much was read: "first 30.0 of 182.4 s".
        warning: Set if all modalities are missing, so that the prediction does not depend on the clip, or if
            it rests on a text of unknown words alone; else None.
        findings: What makes the clip doubtful although it is used: "several faces", "still picture", "audio
            track 2 of 2", "text: 3 of 12 tokens unknown".
        interval: Range of a score that contains 90 % of the labels of such clips (docs/using_a_checkpoint.md,
            "Confidence"); None in classification, and if the checkpoint has none for these modalities.
        confidence: Calibrated probability of `label`; None in regression, and if the checkpoint has no
            temperature for these modalities.
        transcript: What a recogniser heard, if it was asked to transcribe; None if the text was given.
    """

    clip: str | None
    score: float | None
    label: str | None
    probabilities: dict[str, float]
    modalities: tuple[str, ...]
    missing: dict[str, str]
    baseline: float | None
    contributions: dict[str, float]
    cut: dict[str, str] = field(default_factory=dict)
    warning: str | None = None
    findings: tuple[str, ...] = ()
    interval: Interval | None = None
    confidence: float | None = None
    transcript: Transcript | None = None

    @property
    def transcribed(self) -> bool:
        """Whether the prediction uses a text that a machine made."""
        return self.transcript is not None and "text" in self.modalities

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain data, ready for JSON; with `transcribed`."""
        return {**asdict(self), "transcribed": self.transcribed}


class MSAPipeline:
    """Predicts from raw media, with the extraction settings of training.

    MediaPipe is opened at the first clip and stays open. To free it, call `close` or use a `with` block:

        with MSAPipeline.from_pretrained("runs/mine") as pipeline:
            prediction = pipeline("clip.mp4")

    Args:
        model: A trained model.
        processor: The processor saved with it.
        device: Device of the model; by default a GPU if there is one. A model with a device map stays where
            it is.
        cache: Cache of extracted features, or its folder; None extracts every time.
        transcribe: Recogniser that makes the text of clips without one, or its name, as in `Transcriber`.
            Clips with `text=""` are not transcribed. None transcribes none.
        language: Code of the spoken language for a recogniser given by name.

    Raises:
        TranscriptionError: The recogniser cannot be used, or there is a language without the name of one.
        ValueError: `device` is given for a model with a device map.
    """

    def __init__(
        self,
        model: MSAModel,
        processor: MSAProcessor,
        device: str | torch.device | None = None,
        cache: FeatureCache | str | Path | None = None,
        transcribe: Transcriber | str | None = None,
        language: str | None = None,
    ) -> None:
        is_placed = getattr(model, "hf_device_map", None) is not None
        if is_placed and device is not None:
            raise ValueError("the model has a device map: leave out device, or load it without device_map")
        if not is_placed:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = model.device
        self.model = model.eval()
        self.processor = processor
        self.confidence = Confidence.of(model.config.confidence)
        self.cache = FeatureCache(cache) if isinstance(cache, str | Path) else cache
        self.transcriber = transcriber_of(transcribe, language, self.cache)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        cache: FeatureCache | str | Path | None = None,
        transcribe: Transcriber | str | None = None,
        language: str | None = None,
    ) -> "MSAPipeline":
        """Load a checkpoint folder or Hub repository.

        Args:
            source: The folder or the name of the repository.
            device: As in `MSAPipeline`.
            revision: Branch, tag or commit of the repository.
            token: Access token of a private repository; by default that of `hf auth login`.
            dtype: Type of the weights, such as "bfloat16"; by default fp32.
            device_map: Devices of the parts as in transformers, such as "auto", in place of `device`.
            cache: As in `MSAPipeline`.
            transcribe: As in `MSAPipeline`.
            language: As in `MSAPipeline`.

        Raises:
            CheckpointError: It is not a checkpoint of this project, or its model does not take clips.
            ValueError: Both `device` and `device_map` are given.
        """
        if device is not None and device_map is not None:
            raise ValueError("device and device_map are both given: give one of them")
        model, processor = load_checkpoint(
            source, revision=revision, token=token, dtype=dtype, device_map=device_map
        )
        if processor is None:
            widths = ", ".join(f"{name} {width}" for name, width in model.config.widths.items())
            raise CheckpointError(
                f"{source}: the model takes precomputed features ({widths}), not clips: score it with "
                "`msa-online evaluate` on such features; to predict from clips, train with "
                "model.text_encoder in place of model.feature_widths"
            )
        return cls(model, processor, device, cache, transcribe, language)

    def __enter__(self) -> "MSAPipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free MediaPipe; the pipeline can still be used and then opens it again."""
        close_face_extractor_of(self.processor)

    def __call__(
        self,
        clips: Any = None,
        text: str | None | Iterable[str | None] = None,
        *,
        audio: Any = None,
        sampling_rate: int | None = None,
        frames: Any = None,
        start: float | None = None,
        end: float | None = None,
        skip_broken: bool = False,
        batch_size: int = BATCH_SIZE,
        attribute: bool = True,
    ) -> Prediction | list[Prediction | ClipError] | Iterator[Prediction | ClipError]:
        """Predict for one clip, or for several at once.

        Args:
            clips: A media file (path, bytes, or a file opened in binary mode; audio files are allowed), a
                `Clip`, None for text only; or a list or an iterator of these. An item can also be a dict with
                the names of the arguments of one clip: "clip", "text", "audio", "sampling_rate", "frames",
                "start", "end".
            text: The transcript: one string for one clip, or as many as `clips`. None means that there is no
                transcript; a pipeline with `transcribe` then makes one.
            audio: Sound of one clip in place of a file, as in `clip_of_arrays`.
            sampling_rate: Samples per second of `audio`.
            frames: Pictures of one clip in place of a file, (frames, height, width, 3) uint8 RGB.
            start: Start of the part of one file that is read, in seconds.
            end: End of that part.
            skip_broken: For a clip of several that cannot be used, return the `ClipError` in its place
                instead of raising it.
            batch_size: Clips in one forward pass.
            attribute: Compute the contributions of the modalities. Without them the head runs once, not eight
                times.

        Returns:
            One `Prediction`; a list for a list; an iterator for an iterator.

        Raises:
            ClipError: A file is missing, broken or not a media file.
            ValueError: There is neither a clip nor a text, several values are combined with a single one,
                their numbers differ, or a value has a wrong type or shape. Of an iterator, raised when the
                item is reached.
            UndefinedScoreError: The model's predictions are not finite.
            TranscriptionError: The recogniser failed.
        """
        parts = {"audio": audio, "sampling_rate": sampling_rate, "frames": frames, "start": start, "end": end}
        options = {"batch_size": batch_size, "attribute": attribute}
        if not any(isinstance(each, list | tuple) or is_lazy(each) for each in (clips, text)):
            sample = sample_of(self.processor.settings, clips, text, **parts)
            return next(_unless_broken(self._stream([sample], **options)))
        if given := [name for name, value in parts.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} of several clips: give a dict for each clip")
        results = self.stream(clips, text, **options)
        results = results if skip_broken else _unless_broken(results)
        return results if is_lazy(clips) or is_lazy(text) else list(results)

    def stream(
        self,
        clips: Iterable[Any] | None,
        text: Iterable[str | None] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        attribute: bool = True,
    ) -> Iterator[Prediction | ClipError]:
        """Predict for any number of clips, in order, with constant memory; it may be abandoned at any time.

        Args:
            clips: List or iterator of clips as for `__call__`; None for texts only.
            text: List or iterator of texts as for `__call__`; None if all transcripts are missing.
            batch_size: As in `__call__`.
            attribute: As in `__call__`.

        Returns:
            An iterator with a `Prediction` for each clip, or a `ClipError` if the clip cannot be used.

        Raises:
            ValueError: As in `__call__`.
        """
        return self._stream(samples_of(clips, text, self.processor.settings), batch_size, attribute)

    def _stream(
        self, samples: Iterable[Sample], batch_size: int, attribute: bool
    ) -> Iterator[Prediction | ClipError]:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
        return self._results(samples, batch_size, attribute)

    def _results(
        self, samples: Iterable[Sample], batch_size: int, attribute: bool
    ) -> Iterator[Prediction | ClipError]:
        waiting: list[tuple[Sample, ClipFeatures]] = []
        for sample in samples:
            try:
                waiting.append((sample, self.extract(sample)))
            except ClipError as error:
                yield from self.predict(waiting, attribute)
                yield error
                waiting = []
            if len(waiting) == batch_size:
                yield from self.predict(waiting, attribute)
                waiting = []
        yield from self.predict(waiting, attribute)

    @torch.inference_mode()
    def predict(
        self,
        samples: Sequence[tuple[Sample, ClipFeatures]],
        attribute: bool = True,
        hidden: Collection[str] = (),
    ) -> list[Prediction]:
        """Predict for samples that are extracted, in one forward pass; errors as in `__call__`.

        Args:
            samples: The samples and their features.
            attribute: As in `__call__`.
            hidden: Modalities that the model must not use, although the samples may have them.
        """
        if not samples:
            return []
        if "text" not in hidden:
            samples = [(self._with_text(*pair), pair[1]) for pair in samples]
        features, texts = [each for _, each in samples], [sample.text for sample, _ in samples]
        transcripts = [sample.transcript for sample, _ in samples]
        batch = self.processor(features, texts, transcripts=transcripts).to(self.device)
        for name in hidden:
            batch["modality_present"][:, MODALITIES.index(name)] = False
        attribution = (attribution_of if attribute else outputs_of)(self.model, batch)
        if not attribution.outputs.isfinite().all():
            raise UndefinedScoreError(f"the predictions of this model are not finite; {DIVERGED}")
        present = batch["modality_present"].tolist()
        return [
            self._prediction(*pair, present[row], attribution.of_sample(row), hidden)
            for row, pair in enumerate(samples)
        ]

    def _with_text(self, sample: Sample, features: ClipFeatures) -> Sample:
        """The sample with a transcript, if it has no text and there is a recogniser."""
        if self.transcriber is None or sample.text is not None or sample.source is None:
            return sample
        heard = self.transcriber(features)
        return replace(sample, text=heard.text, transcript=heard)

    def extract(self, sample: Sample) -> ClipFeatures:
        """Features of a sample, from the cache if it has them.

        Raises:
            ClipError: The clip cannot be used.
        """
        settings, source = self.processor.settings, sample.source
        if source is None:
            return ClipFeatures.absent(settings)
        faces = face_extractor_of(self.processor, settings)
        if isinstance(source, RawClip):
            return measure(source, settings, faces)
        with source.on_disk() if isinstance(source, Upload) else nullcontext(source) as clip:
            return self._extract_clip(clip, settings, faces)

    def _extract_clip(self, clip: Clip, settings: ExtractionSettings, faces: FaceExtractor) -> ClipFeatures:
        """Features of a clip, of the audio track of training if the clip names none and has this one."""
        trained_track = (self.model.config.trained_on or {}).get("audio_track")
        if clip.audio_track is None and trained_track is not None:
            try:
                return self._extract_clip(replace(clip, audio_track=trained_track), settings, faces)
            except ClipError as error:
                if error.problem != "no such track":
                    raise
        return self.cache.get(clip, settings, faces) if self.cache else extract(clip, settings, faces)

    def _prediction(
        self,
        sample: Sample,
        features: ClipFeatures,
        present: list[bool],
        attribution: Attribution,
        hidden: Collection[str],
    ) -> Prediction:
        config, text = self.model.config, sample.text
        outputs = attribution.outputs.tolist()
        classes = [] if config.is_regression else [config.id2label[number] for number in range(len(outputs))]
        extent = ClipExtent.of(features)
        (unknown,) = self.processor.limits.unknown([text])
        used = tuple(name for name, is_present in zip(MODALITIES, present, strict=True) if is_present)
        confidence = self.confidence
        is_calibrated = confidence is not None and set_name(used) in confidence.temperatures
        return Prediction(
            clip=sample.name,
            score=None if classes else outputs[0],
            label=classes[attribution.predicted.item()] if classes else None,
            probabilities=dict(zip(classes, outputs, strict=True)) if classes else {},
            modalities=used,
            missing={
                name: HIDDEN
                if name in hidden
                else _why_missing(name, sample, features, self.processor.max_audio_seconds)
                for name in MODALITIES
                if name not in used
            },
            baseline=None if attribution.baseline is None else attribution.baseline.item(),
            contributions={}
            if attribution.contributions is None
            else dict(zip(MODALITIES, attribution.contributions.tolist(), strict=True)),
            cut={
                name: cut.description
                for name, cut in self.processor.limits.cut(extent, text).items()
                if name not in hidden
            },
            warning=_warning(used, unknown),
            findings=(
                *(each for each in features.findings if each not in chain(*LACKS.values())),
                *([f"text: {unknown.description}"] if unknown.unknown and "text" in used else []),
                *(
                    [f"transcript: {doubt}"]
                    if (doubt := sample.transcript and sample.transcript.doubt)
                    else []
                ),
            ),
            interval=confidence and confidence.interval(outputs[0], used, config.label_range),
            confidence=max(outputs) if is_calibrated else None,
            transcript=sample.transcript,
        )


def _unless_broken(results: Iterator[Prediction | ClipError]) -> Iterator[Prediction]:
    """The same results up to the first `ClipError`, which is raised."""
    for result in results:
        if isinstance(result, ClipError):
            raise result
        yield result


def _warning(used: tuple[str, ...], unknown: UnknownTokens) -> str | None:
    """Why the prediction says nothing about the clip, if it does not."""
    if not used:
        return FROM_NOTHING
    return FROM_UNKNOWN if used == ("text",) and unknown.all_unknown else None


def _why_missing(name: str, sample: Sample, features: ClipFeatures, max_audio_seconds: float) -> str:
    if name == "text" and sample.transcript is not None:
        return f"no speech found by {sample.transcript.model}"
    if name == "text":
        return "no transcript given" if sample.text is None else "empty text"
    if sample.source is None:
        return "no clip given"
    if name == "audio" and features.has_audio:
        return (
            f"silent in the first {max_audio_seconds:g} s, which are read; the sound starts at "
            f"{features.audible_from:.1f} s: give start and end of the part to read"
        )
    return next((finding for finding in features.findings if finding in LACKS[name]), "nothing found")
