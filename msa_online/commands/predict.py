# SPDX-License-Identifier: Apache-2.0
"""`msa-online predict`: predict from clips or text."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
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
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.pipeline_inputs import Sample, files_in
from msa_online.pipeline_workers import predict_in_processes
from msa_online.results_file import ERROR, ResultsFile, Row, model_digest, result_key, row_of
from msa_online.training.config_reader import import_plugins
from msa_online.user_errors import UnfinishedError

LONGEST_BAR = 16
PERCENT = ".1%"
LEGEND_OF_SCORES = "prediction = score with nothing seen + the Shapley values"
LEGEND_OF_CLASSES = "prediction = its probability with nothing seen + the Shapley values"


def run(options: Namespace, console: Console) -> None:
    """Predict for clips, or for text only."""
    import_plugins(options.plugin, "--plugin")
    if options.workers and not options.out:
        options.refuse("--workers needs --out")
    results_file = ResultsFile(Path(options.out)) if options.out else None
    samples = _samples(options)
    if results_file:
        with MSAPipeline.from_pretrained(options.model) as pipeline:
            _write_results(pipeline, samples, results_file, options.workers or usable_cores(), console)
        return
    results: list[Prediction | ClipError] = []
    broken = 0
    stopped = None
    pipeline = MSAPipeline.from_pretrained(options.model)
    with pipeline, closing(_predictions(pipeline, samples, options)) as predictions:
        for result in predictions:
            if isinstance(result, ClipError):
                broken += 1
                if not options.skip_broken:
                    stopped = result
                    break
            results.append(result)
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
        samples = files_in(paths, Path(options.texts) if options.texts else None)
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
) -> Iterator[Prediction | ClipError]:
    """Predictions for samples in their order, and the errors of broken rows after them."""
    usable = [sample for sample in samples if isinstance(sample, Sample)]
    try:
        predictions = pipeline.stream([each.source for each in usable], [each.text for each in usable])
    except ValueError as error:  # nothing to predict from: a text without any visible character
        options.refuse(str(error))
    yield from predictions
    yield from (sample for sample in samples if isinstance(sample, ClipError))


def _write_results(
    pipeline: MSAPipeline,
    samples: Sequence[Sample | ClipError],
    file: ResultsFile,
    workers: int,
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
    for index, sample in enumerate(samples):
        key = _key(sample, model, cache)
        keys.append(key)
        if isinstance(sample, ClipError):
            rows[index] = row_of(sample, str(sample.path), None)
        elif key in file.rows:
            rows[index] = file.rows[key] | {"clip": sample.name}
    kept = len(rows)
    left = [index for index in range(len(samples)) if index not in rows]
    predictions = predict_in_processes(pipeline, [samples[index] for index in left], cache, workers)
    try:
        with closing(predictions), progress_bar() as progress:
            for place, result in progress.track(predictions, len(left), description="predicting"):
                index = left[place]
                sample = samples[index]
                window = {"start": sample.source.start, "end": sample.source.end, "text": sample.text}
                rows[index] = row_of(result, sample.name, keys[index], **window)
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


def _key(sample: Sample | ClipError, model: str, cache: FeatureCache) -> str | None:
    """Key of the prediction for a sample; None if its file cannot be read."""
    if isinstance(sample, ClipError):
        return None
    clip = sample.source
    try:
        content = cache.file_digest(clip.path)
    except ClipError:
        return None
    choices = {"window": [clip.start, clip.end], "region": clip.region, "track": clip.audio_track}
    return result_key(model, content, text=sample.text, **choices)


def _as_json(result: Prediction | ClipError) -> dict[str, Any]:
    if isinstance(result, Prediction):
        return result.to_dict()
    return {"clip": str(result.path), "error": _reason(result)}


def _reason(error: ClipError) -> str:
    return f"{error.detail}; {REMEDIES[error.problem]}"


def prediction_lines(results: Sequence[Prediction | ClipError]) -> list[str]:
    """Predictions for the terminal, each as the sum of its baseline and the contribution of each modality.

    Names of clips are on lines of their own, so that none is broken; the other lines are short. The bars of
    all clips have one scale.
    """
    predictions = [result for result in results if isinstance(result, Prediction)]
    added = [abs(value) for one in predictions for value in one.contributions.values()]
    lines = []
    for result in results:
        if isinstance(result, ClipError):
            lines += [f"{printable(result.path)}: error", f"  {_reason(result)}", ""]
        else:
            lines += [*_lines_of(result, max(added)), ""]
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
        f"  {'nothing seen':<12} {one.baseline:>+8{unit}}",
    ]
    for name, value in one.contributions.items():
        if name in one.missing:
            lines.append(f"  {name:<12} {'0':>8}  {one.missing[name]}")
        else:
            lines.append(f"  {name:<12} {value:>+8{unit}}  {_bar(value, largest)}".rstrip())
    lines += [f"  read of {name + ':':<8} {what}" for name, what in one.cut.items()]
    lines += [f"  found: {finding}" for finding in one.findings]
    return lines + ([f"  warning: {one.warning}"] if one.warning else [])


def _bar(value: float, largest: float) -> str:
    """A bar of plus or minus signs, with a length relative to the largest contribution of all clips."""
    return ("+" if value > 0 else "-") * (round(LONGEST_BAR * abs(value) / largest) if largest else 0)
