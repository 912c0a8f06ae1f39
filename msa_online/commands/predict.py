# SPDX-License-Identifier: Apache-2.0
"""`msa-online predict`: predict from clips or text."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from feature_extractors import Clip, ClipError, FeatureCache
from feature_extractors.clip import REMEDIES, printable
from msa_online.commands.json_output import write_json
from msa_online.corpora.cache_filling import progress_bar, usable_cores
from msa_online.corpora.validation import why_not_writable
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.pipeline_inputs import Sample, files_in
from msa_online.pipeline_workers import predict_in_processes
from msa_online.results_file import (
    ERROR,
    ResultsError,
    ResultsFile,
    Row,
    model_digest,
    require_format,
    result_key,
    row_of,
    write_rows,
)
from msa_online.timeline import WINDOW, Timeline, draw_timeline, exceeds_reach, predict_timeline
from msa_online.training.config_reader import import_plugins
from msa_online.transcription import Transcriber, transcriber_of
from msa_online.user_errors import UnfinishedError

PLOTS = (".png", ".svg", ".pdf")
LONGEST_BAR = 16
LONGEST_TEXT = 300
PERCENT = ".1%"
LEGEND_OF_SCORES = "prediction = score with nothing seen + the Shapley values"
LEGEND_OF_CLASSES = "prediction = its probability with nothing seen + the Shapley values"


def run(options: Namespace, console: Console) -> None:
    """Predict for clips, or for text only."""
    import_plugins(options.plugin, "--plugin")
    _require_consistent(options)
    results_file = ResultsFile(Path(options.out)) if options.out else None
    transcriber = transcriber_of(options.transcribe, options.language, FeatureCache())
    samples = _samples(options)
    if results_file:
        with MSAPipeline.from_pretrained(options.model, transcribe=transcriber) as pipeline:
            _print_notes(pipeline, samples)
            _write_results(pipeline, samples, results_file, options, console)
        return
    results: list[Prediction | Timeline | ClipError] = []
    broken = 0
    stopped = None
    pipeline = MSAPipeline.from_pretrained(options.model, transcribe=transcriber)
    _print_notes(pipeline, samples)
    with pipeline, closing(_predictions(pipeline, samples, options)) as predictions:
        for result in predictions:
            if isinstance(result, ClipError):
                broken += 1
                if not options.skip_broken:
                    stopped = result
                    break
            results.append(result)
    timelines = [result for result in results if isinstance(result, Timeline)]
    if options.timeline and timelines:
        _write(options.timeline, lambda path: write_rows(path, [*_window_rows(timelines)]))
    if options.plot and timelines:
        _write(
            options.plot, lambda path: draw_timeline(timelines[0], path, pipeline.model.config.label_range)
        )
    if options.json and results:
        write_json([_as_json(result) for result in results], "-", console)
    elif results:
        for line in prediction_lines(results):
            console.print(Text(printable(line)), soft_wrap=True)
    if stopped is not None:
        if len(samples) == 1:
            raise stopped
        raise UnfinishedError(
            f"{stopped} (stopped here: {len(results):,} of {len(samples):,} predicted; --skip-broken goes on "
            "with the other clips)"
        )
    if broken:
        raise UnfinishedError(f"{broken:,} of {len(samples):,} clips cannot be used, as listed")


def _require_consistent(options: Namespace) -> None:
    """Check the options that need or exclude others, and that what they name can be written."""
    if options.workers and not options.out:
        options.refuse("--workers needs --out")
    if options.step and options.step > (options.window or WINDOW):
        options.refuse(f"--step {options.step:g} is longer than a window of {options.window or WINDOW:g} s")
    given = [name for name in ("window", "timeline", "plot") if getattr(options, name)]
    if given and options.text:
        options.refuse(
            f"--{given[0]} with --text: a transcript of the whole clip has no times; give --texts with a row "
            "for each part (file_name, text, start, end), or leave --text out"
        )
    if options.out and given[-1:] not in ([], ["window"]):
        options.refuse(f"--{given[-1]} is for single clips; of a folder, --out FILE.jsonl has all windows")
    if options.plot and len(options.clips) != 1:
        options.refuse("--plot needs exactly one clip")
    if options.timeline:
        require_format(Path(options.timeline))
    if options.plot and Path(options.plot).suffix not in PLOTS:
        options.refuse(f"--plot {options.plot}: end its name with {', '.join(PLOTS)}")
    for name in filter(None, (options.timeline, options.plot)):
        if reason := "it is a folder" if Path(name).is_dir() else why_not_writable(Path(name)):
            options.refuse(f"{name} cannot be written: {reason}")


def _print_notes(pipeline: MSAPipeline, samples: Sequence[Sample | ClipError]) -> None:
    """Print how these clips differ from those that the model was trained on.

    It may have read whole dialogues, or transcripts of a recogniser where clips have no text now.
    """
    if pipeline.model.config.dialogue_turns is not None:
        line = "note: the model was trained on whole dialogues; here each clip is a dialogue of one"
        Console(stderr=True).print(line, soft_wrap=True)
    trained = (pipeline.model.config.trained_on or {}).get("transcripts")
    if not trained or pipeline.transcriber is not None:
        return
    if without := sum(isinstance(each, Sample) and each.text is None for each in samples):
        name, language = trained["model"], trained["language"]
        command = f"--transcribe {name}" + (f" --language {language}" if language else "")
        missing = f"{without:,} of {len(samples):,} clips have no text"
        line = f"note: {missing}; the model was trained with {command}"
        Console(stderr=True).print(Text(printable(line)), soft_wrap=True)


def _write(name: str, write: Callable[[Path], None]) -> None:
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror})") from error


def _window_rows(timelines: Sequence[Timeline]) -> Iterator[Row]:
    return (window.to_row() for timeline in timelines for window in timeline.windows)


def _is_divided(pipeline: MSAPipeline, sample: Sample, options: Namespace) -> bool:
    """Whether a clip is predicted in windows: on request, or if the model does not reach to its end.

    A transcript has no times, so clips with one are not divided, and neither are parts of clips.
    """
    clip = sample.source
    if clip is None or sample.text or (clip.start, clip.end) != (None, None):
        return False
    if options.window or options.timeline or options.plot:
        return True
    try:
        return exceeds_reach(pipeline, clip)
    except ClipError:  # found again when the clip is read
        return False


def _window_and_step(options: Namespace) -> dict[str, float]:
    seconds = options.window or WINDOW
    return {"seconds": seconds, "step": options.step or seconds / 2}


def _timeline(pipeline: MSAPipeline, sample: Sample, options: Namespace) -> Timeline | ClipError:
    try:
        return predict_timeline(pipeline, sample.source, **_window_and_step(options))
    except ClipError as error:
        return error


def _samples(options: Namespace) -> list[Sample | ClipError]:
    """What to predict for; broken rows of tables as errors."""
    paths = [Path(clip) for clip in options.clips]
    if options.text and options.texts:
        options.refuse("--text and --texts are both given: give one of them")
    if options.text:
        if folders := [path for path in paths if path.is_dir()]:
            options.refuse(f"--text for the folder {folders[0]}: give --texts with a table of transcripts")
        if paths and len(paths) != len(options.text):
            options.refuse(
                f"{len(paths)} clips but {len(options.text)} --text: give one for each clip, or none at all"
            )
        clips = [Clip(path) for path in paths] or [None] * len(options.text)
        if not paths and options.out:
            options.refuse("--out needs clips")
        samples = [Sample(*pair) for pair in zip(clips, options.text, strict=True)]
    elif not paths:
        options.refuse("nothing to predict: give clips, or --text alone")
    else:
        samples = files_in(
            paths, Path(options.texts) if options.texts else None, options.transcribe is not None
        )
    given = {"region": tuple(options.region) if options.region else None, "audio_track": options.audio_track}
    given = {name: value for name, value in given.items() if value is not None}
    return [
        sample
        if isinstance(sample, ClipError) or sample.source is None
        else replace(sample, source=replace(sample.source, **given))
        for sample in samples
    ]


def _predictions(
    pipeline: MSAPipeline, samples: Sequence[Sample | ClipError], options: Namespace
) -> Iterator[Prediction | Timeline | ClipError]:
    """Predictions for samples in their order, and the errors of broken rows after them."""
    usable = [sample for sample in samples if isinstance(sample, Sample)]
    divided = [_is_divided(pipeline, sample, options) for sample in usable]
    whole = [sample for sample, is_divided in zip(usable, divided, strict=True) if not is_divided]
    try:
        predictions = pipeline.stream([each.source for each in whole], [each.text for each in whole])
    except ValueError as error:  # nothing to predict from: a text without any visible character
        options.refuse(str(error))
    for sample, is_divided in zip(usable, divided, strict=True):
        yield _timeline(pipeline, sample, options) if is_divided else next(predictions)
    yield from (sample for sample in samples if isinstance(sample, ClipError))


def _write_results(
    pipeline: MSAPipeline,
    samples: Sequence[Sample | ClipError],
    file: ResultsFile,
    options: Namespace,
    console: Console,
) -> None:
    """Predict for all clips that have no row in a file yet, and write it.

    Raises:
        UnfinishedError: Some clips cannot be used; their rows have the errors.
    """
    cache = FeatureCache()
    model = model_digest(pipeline.model, pipeline.processor)
    rows: dict[int, Row] = {}
    keys: list[str | None] = []
    divided: set[int] = set()
    for index, sample in enumerate(samples):
        if isinstance(sample, ClipError):
            keys.append(None)
            rows[index] = row_of(sample, str(sample.path), None)
            continue
        if _is_divided(pipeline, sample, options):
            divided.add(index)
        windows = _window_and_step(options) if index in divided else None
        keys.append(_key(sample, model, cache, windows, pipeline.transcriber))
        if keys[index] in file.rows:
            rows[index] = file.rows[keys[index]] | {"clip": sample.name}
    kept = sum(not row.get(ERROR) for row in rows.values())
    left = [index for index in range(len(samples)) if index not in rows]
    predictions = _in_any_order(pipeline, samples, left, divided, cache, options)
    try:
        with closing(predictions), progress_bar() as progress:
            for index, result in progress.track(predictions, len(left), description="predicting"):
                rows[index] = _row(samples[index], result, keys[index], file)
                file.add(rows[index])
    except KeyboardInterrupt:
        raise UnfinishedError(
            f"interrupted after {len(rows):,} of {len(samples):,} clips, which are kept in {file.journal}: "
            "the same command continues"
        ) from None
    finally:
        file.close()
    ordered = [rows[index] for index in range(len(samples))]
    file.finish(ordered)
    broken = sum(bool(row.get(ERROR)) for row in ordered)
    console.print(
        Text(f"{printable(file.path)}: {len(ordered):,} clips, {kept:,} of them from an earlier run"),
        soft_wrap=True,
    )
    if broken:
        raise UnfinishedError(
            f"{broken:,} of {len(ordered):,} clips cannot be used: see the column {ERROR} of {file.path}"
        )


def _in_any_order(
    pipeline: MSAPipeline,
    samples: Sequence[Sample | ClipError],
    indices: Sequence[int],
    divided: set[int],
    cache: FeatureCache,
    options: Namespace,
) -> Iterator[tuple[int, Prediction | Timeline | ClipError]]:
    """The index and result of each sample: first of whole clips, then of those in windows."""
    whole = [index for index in indices if index not in divided]
    workers = options.workers or usable_cores()
    chosen = [samples[index] for index in whole]
    with closing(predict_in_processes(pipeline, chosen, cache, workers)) as predictions:
        for place, result in predictions:
            yield whole[place], result
    for index in indices:
        if index in divided:
            yield index, _timeline(pipeline, samples[index], options)


def _row(
    sample: Sample, result: Prediction | Timeline | ClipError, key: str | None, file: ResultsFile
) -> Row:
    """The row of a sample; JSON has the windows of a divided clip, the other formats their number."""
    shown = result.overall if isinstance(result, Timeline) else result
    heard = None if isinstance(shown, ClipError) else shown.transcript
    text = heard.text if heard else sample.text
    part = {"start": sample.source.start, "end": sample.source.end, "text": text}
    if not isinstance(result, Timeline):
        return row_of(result, sample.name, key, **part)
    windows = [*_window_rows([result])] if file.path.suffix == ".jsonl" else len(result.windows)
    return row_of(result.overall, sample.name, key, **part) | {"windows": windows}


def _key(
    sample: Sample,
    model: str,
    cache: FeatureCache,
    windows: dict[str, float] | None,
    transcriber: Transcriber | None,
) -> str | None:
    """Key of the prediction for a sample; None if its file cannot be read."""
    clip = sample.source
    try:
        content = cache.file_digest(clip.path)
    except ClipError:
        return None
    choices = {"window": [clip.start, clip.end], "region": clip.region, "track": clip.audio_track}
    if transcriber is not None and sample.text is None:
        choices["transcriber"] = transcriber.identity
    return result_key(model, content, text=sample.text, windows=windows, **choices)


def _as_json(result: Prediction | Timeline | ClipError) -> dict[str, Any]:
    if isinstance(result, ClipError):
        return {"clip": str(result.path), "error": _reason(result)}
    return result.to_dict()


def _reason(error: ClipError) -> str:
    return f"{error.detail}; {REMEDIES[error.problem]}"


def prediction_lines(results: Sequence[Prediction | Timeline | ClipError]) -> list[str]:
    """Predictions for the terminal, each as the sum of its baseline and the contribution of each modality.

    Names of clips are on lines of their own, so that none is broken; the other lines are short. The bars of
    all clips have one scale.
    """
    overall = [result.overall if isinstance(result, Timeline) else result for result in results]
    predictions = [result for result in overall if isinstance(result, Prediction)]
    added = [abs(value) for one in predictions for value in one.contributions.values()]
    lines = []
    for result, shown in zip(results, overall, strict=True):
        if isinstance(shown, ClipError):
            lines += [f"{printable(shown.path)}: error", f"  {_reason(shown)}", ""]
        else:
            windows = _lines_of_windows(result) if isinstance(result, Timeline) else []
            lines += [*_lines_of(shown, max(added, default=0.0)), *windows, ""]
    if predictions:
        lines.append(LEGEND_OF_SCORES if predictions[0].label is None else LEGEND_OF_CLASSES)
    return lines


def _lines_of(one: Prediction, largest: float) -> list[str]:
    of_scores = one.label is None
    calibrated = "" if one.confidence is None else ", calibrated"
    answer = (
        f"{one.score:+.3f}"
        if of_scores
        else f"{printable(one.label)} ({one.probabilities[one.label]:{PERCENT}}{calibrated})"
    )
    certain = one.interval
    unit = ".3f" if of_scores else PERCENT
    lines = [
        f"{printable(one.clip or '(text only)')}: {answer}",
        *([f"  {certain.level:.0%} interval {certain.low:+.3f} to {certain.high:+.3f}"] if certain else []),
        *([] if one.baseline is None else [f"  {'nothing seen':<12} {one.baseline:>+8{unit}}"]),
    ]
    for name, value in one.contributions.items():
        if name in one.missing:
            lines.append(f"  {name:<12} {'0':>8}  {one.missing[name]}")
        else:
            lines.append(f"  {name:<12} {value:>+8{unit}}  {_bar(value, largest)}".rstrip())
    if one.transcript is not None and one.transcript.text:
        heard = printable(_shortened(one.transcript.text))
        lines.append(f"  heard by {one.transcript.model}: {heard}")
    lines += [f"  read of {name + ':':<8} {what}" for name, what in one.cut.items()]
    lines += [f"  found: {finding}" for finding in one.findings]
    return lines + ([f"  warning: {one.warning}"] if one.warning else [])


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def _lines_of_windows(timeline: Timeline) -> list[str]:
    """Where a recording is lowest and highest; in classification, how often each class is predicted."""
    windows = timeline.windows
    if timeline.overall.label is not None:
        counts = Counter(window.prediction.label for window in windows)
        return [f"  {count:,} windows: {printable(name)}" for name, count in counts.most_common()]
    ordered = sorted(windows, key=lambda window: window.prediction.score)
    return [
        f"  {which:<12} {window.prediction.score:>+8.3f}  at {window.start:.1f} to {window.end:.1f} s"
        for which, window in (("lowest", ordered[0]), ("highest", ordered[-1]))
    ]


def _bar(value: float, largest: float) -> str:
    """A bar of plus or minus signs, with a length relative to the largest contribution of all clips."""
    return ("+" if value > 0 else "-") * (round(LONGEST_BAR * abs(value) / largest) if largest else 0)
