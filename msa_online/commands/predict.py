# SPDX-License-Identifier: Apache-2.0
"""`msa-online predict`: predict from clips or text."""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from feature_extractors import Clip, ClipError
from feature_extractors.clip import REMEDIES, printable
from msa_online.commands.json_output import write_json
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.training.config_reader import import_plugins
from msa_online.user_errors import UnfinishedError

LONGEST_BAR = 16
PERCENT = ".1%"
LEGEND_OF_SCORES = "prediction = score with nothing seen + the Shapley values"
LEGEND_OF_CLASSES = "prediction = its probability with nothing seen + the Shapley values"


def run(options: Namespace, console: Console) -> None:
    """Predict for clips, or for text only."""
    import_plugins(options.plugin, "--plugin")
    texts = options.text or [None] * len(options.clips)
    region = tuple(options.region) if options.region else None
    clips = [Clip(Path(clip), region=region, audio_track=options.audio_track) for clip in options.clips]
    clips = clips or [None] * len(texts)
    if not clips:
        options.refuse("nothing to predict: give clips, or --text alone")
    if len(clips) != len(texts):
        options.refuse(f"{len(clips)} clips but {len(texts)} --text: give one for each clip, or none at all")
    results: list[Prediction | ClipError] = []
    broken = 0
    stopped = None
    pipeline = MSAPipeline.from_pretrained(options.model)
    try:
        predictions = pipeline.stream(clips, texts)
    except ValueError as error:  # nothing to predict from: a text without any visible character
        options.refuse(str(error))
    with pipeline, closing(predictions):
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
        if len(clips) == 1:
            raise stopped
        raise UnfinishedError(
            f"{stopped} (stopped here: {len(results):,} of {len(clips):,} predicted; --skip-broken goes on "
            "with the other clips)"
        )
    if broken:
        raise UnfinishedError(f"{broken:,} of {len(clips):,} clips cannot be used, as listed")


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
