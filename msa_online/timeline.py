# SPDX-License-Identifier: Apache-2.0
"""Predictions along a recording of any length: one for each of many overlapping windows."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from feature_extractors import Clip
from feature_extractors.clip import kind_of
from feature_extractors.decoding import media_seconds
from feature_extractors.extraction import extract_windows
from feature_extractors.face import face_extractor_of
from feature_extractors.transcript import Transcript
from msa_online.modalities import MODALITIES
from msa_online.pipeline import BATCH_SIZE, FROM_NOTHING, MSAPipeline, Prediction
from msa_online.pipeline_inputs import Sample
from msa_online.processing_msa import FRAME_GAP, LOST_SOUND

WINDOW = 5.0
"""Seconds of a window; the clips of most corpora are as long."""

STEP = 2.5
"""Seconds from the start of a window to that of the next."""

TICKS = (30, 60, 120, 300, 600, 1200, 3600)
"""Seconds between the marks on the axis of long recordings."""

TimedWord = tuple[float, float, str]
"""Start and end of a word in seconds from the start of the file, and the word."""


@dataclass(frozen=True)
class WindowPrediction:
    """The prediction for one window.

    Attributes:
        start: Start in seconds from the start of the file.
        end: End of the window.
        text: Words spoken in it; None if no words were given.
        prediction: The prediction.
    """

    start: float
    end: float
    text: str | None
    prediction: Prediction

    def to_row(self) -> dict[str, Any]:
        """The window as plain data: clip, start, end, text, and the fields of the prediction."""
        fields = self.prediction.to_dict()
        return {"clip": fields.pop("clip"), "start": self.start, "end": self.end, "text": self.text, **fields}


@dataclass(frozen=True)
class Timeline:
    """Predictions along a recording.

    Attributes:
        windows: The windows in order.
        overall: Mean over the windows that show anything, weighted by their length; see `mean_of_windows`.
    """

    windows: tuple[WindowPrediction, ...]
    overall: Prediction

    def to_dict(self) -> dict[str, Any]:
        """The overall prediction as plain data, with a list of the windows."""
        windows = [window.to_row() for window in self.windows]
        return {**self.overall.to_dict(), "windows": windows}


def exceeds_reach(pipeline: MSAPipeline, clip: Clip) -> bool:
    """Whether a model would read only a part of a clip, because it is too long.

    Raises:
        ClipError: The clip cannot be used.
    """
    processor = pipeline.processor
    sound, frames = processor.max_audio_seconds + LOST_SOUND, processor.settings.num_frames
    return media_seconds(clip) > min(sound, FRAME_GAP * frames)


def predict_timeline(
    pipeline: MSAPipeline,
    clip: Clip,
    *,
    seconds: float = WINDOW,
    step: float = STEP,
    words: Sequence[TimedWord] | None = None,
    batch_size: int = BATCH_SIZE,
    hidden: Collection[str] = (),
) -> Timeline:
    """Predict along a recording; it is decoded once, and memory does not grow with its length.

    Args:
        pipeline: The model.
        clip: The recording, of any length.
        seconds: Length of a window.
        step: Seconds from the start of a window to that of the next.
        words: Spoken words with their times; a window has those whose middle lies in it. None takes those of
            the pipeline's recogniser, if it has one.
        batch_size: Windows in one forward pass.
        hidden: Modalities that the model must not use.

    Raises:
        ClipError: The clip cannot be used.
        TranscriptionError: The recogniser failed, or gives no times of words.
        UndefinedScoreError: The model's predictions are not finite.
        ValueError: `seconds` or `step` is not positive, or `step` is longer than a window.
    """
    if not 0 < step <= seconds:
        raise ValueError(f"a step of {step:g} s with windows of {seconds:g} s: give 0 < step <= window")
    listens = words is None and pipeline.transcriber is not None and "text" not in hidden
    heard = pipeline.transcriber.recording(clip) if listens else None
    windows = tuple(_windows(pipeline, clip, seconds, step, heard or words, batch_size, hidden))
    return Timeline(windows, mean_of_windows(windows, str(clip.path), heard))


def _windows(
    pipeline: MSAPipeline,
    clip: Clip,
    seconds: float,
    step: float,
    words: Transcript | Sequence[TimedWord] | None,
    batch_size: int,
    hidden: Collection[str],
) -> Iterator[WindowPrediction]:
    settings = pipeline.processor.settings
    faces = face_extractor_of(pipeline.processor, settings)
    with closing(extract_windows(clip, settings, faces, seconds, step)) as extracted:
        while batch := list(islice(extracted, batch_size)):
            samples = [(_sample(part, words, clip.start or 0.0), features) for part, features in batch]
            predictions = pipeline.predict(samples, hidden=hidden)
            for (sample, _), prediction in zip(samples, predictions, strict=True):
                yield WindowPrediction(sample.source.start, sample.source.end, sample.text, prediction)


def _sample(window: Clip, words: Transcript | Sequence[TimedWord] | None, origin: float) -> Sample:
    """A window with the words spoken in it; the times of a transcript count from `origin` in the file."""
    if words is None:
        return Sample(window, None)
    if isinstance(words, Transcript):
        heard = words.between(window.start - origin, window.end - origin)
        return Sample(window, heard.text, heard)
    text = " ".join(word for start, end, word in words if window.start <= (start + end) / 2 < window.end)
    return Sample(window, text)


def mean_of_windows(
    windows: Sequence[WindowPrediction], clip: str, transcript: Transcript | None = None
) -> Prediction:
    """One prediction for a recording: the mean of its windows, weighted by their length.

    Windows without text, sound and face say nothing about the recording and are left out, unless there are no
    others. Scores, probabilities, baselines and contributions are averaged alike, so baseline and
    contributions still add up to the score. In classification the label is the most probable class on
    average; baseline and contributions, which belong to the class of their window, are then left out. The
    mean has no interval and no confidence, because overlapping windows are no independent samples.
    """
    telling = [window for window in windows if window.prediction.modalities]
    counted = telling or list(windows)
    weights = [window.end - window.start for window in counted]
    total = sum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total

    each = [window.prediction for window in counted]
    first = each[0]
    probabilities = {name: mean(one.probabilities[name] for one in each) for name in first.probabilities}
    is_score = first.label is None
    used = tuple(name for name in MODALITIES if any(name in one.modalities for one in each))
    lost = len(windows) - len(counted)
    about = f"mean of {len(counted):,} windows" + (
        f"; {lost:,} with nothing in them left out" if lost else ""
    )
    return Prediction(
        clip=clip,
        score=mean(one.score for one in each) if is_score else None,
        label=None if is_score else max(probabilities, key=probabilities.get),
        probabilities=probabilities,
        modalities=used,
        missing={name: _most_frequent(each, name) for name in MODALITIES if name not in used},
        baseline=mean(one.baseline for one in each) if is_score else None,
        contributions={name: mean(one.contributions[name] for one in each) for name in MODALITIES}
        if is_score
        else {},
        warning=None if telling else FROM_NOTHING,
        findings=(about, *_counted_findings(windows)),
        transcript=transcript,
    )


def _most_frequent(predictions: Sequence[Prediction], name: str) -> str:
    return Counter(one.missing[name] for one in predictions).most_common(1)[0][0]


def _counted_findings(windows: Sequence[WindowPrediction]) -> list[str]:
    counts = Counter(kind_of(finding) for window in windows for finding in window.prediction.findings)
    return [f"{finding} (in {count:,} window{'s' * (count > 1)})" for finding, count in counts.items()]


def draw_timeline(
    timeline: Timeline, target: Path | BinaryIO, label_range: Sequence[float] | None = None
) -> None:
    """Draw score and contributions over time.

    Args:
        timeline: What is drawn.
        target: The picture, whose format follows from its suffix; or an open file, which gets a PNG.
        label_range: Smallest and largest label, which the axis of scores shows; None fits it to the scores.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    windows = timeline.windows
    middles = [(window.start + window.end) / 2 for window in windows]
    series: Mapping[str, list[float]]
    if timeline.overall.label is None:
        title, series = "score", {"score": [window.prediction.score for window in windows]}
    else:
        names = list(timeline.overall.probabilities)
        title = "probability"
        series = {name: [window.prediction.probabilities[name] for window in windows] for name in names}
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    for name, values in series.items():
        upper.plot(middles, values, label=name, color="black" if len(series) == 1 else None, linewidth=1.6)
    if timeline.overall.score is not None:
        upper.axhline(timeline.overall.score, color="grey", linestyle="--", linewidth=1, label="overall")
    upper.set_ylabel(title)
    values = [value for line in series.values() for value in line]
    low, high = (
        (0.0, 1.0) if timeline.overall.label is not None else label_range or (min(values), max(values))
    )
    margin = 0.05 * (high - low) or 0.1
    upper.set_ylim(min(low, *values) - margin, max(high, *values) + margin)
    upper.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for name, color in zip(MODALITIES, ("#2a6fbb", "#d9822b", "#3a923a"), strict=True):
        if name not in timeline.overall.modalities:
            continue
        values = [window.prediction.contributions[name] for window in windows]
        lower.plot(middles, values, label=name, color=color, linewidth=1.4)
    lower.axhline(0, color="grey", linewidth=0.8)
    lower.set_ylabel("contribution")
    lower.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    long = middles[-1] > 180
    lower.set_xlabel("time in minutes:seconds" if long else "time in seconds")
    if long:
        spacing = next((each for each in TICKS if middles[-1] <= 12 * each), TICKS[-1])
        lower.xaxis.set_major_locator(MultipleLocator(spacing))
        lower.xaxis.set_major_formatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}")
    empty = [window for window in windows if not window.prediction.modalities]
    for window in empty:
        upper.axvspan(window.start, window.end, color="0.93", linewidth=0, zorder=0)
    heading = Path(timeline.overall.clip).name.replace("$", r"\$")
    upper.set_title(heading + (" (grey: nothing seen or heard)" if empty else ""), fontsize=10)
    figure.savefig(target, dpi=120)
