# SPDX-License-Identifier: Apache-2.0
"""Tables of results, for the terminal and for Markdown."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feature_extractors.clip import printable
from msa_online.confidence import Confidence
from msa_online.modalities import CONDITIONS, MISSING_RATES, MODALITIES, VISIBLE_SETS

HEADLINES = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_has0": "Acc-2 Has0",
    "acc2_non0": "Acc-2 Non0",
    "f1_non0": "F1 Non0",
    "acc7": "Acc-7",
    "acc3_sims": "Acc-3 SIMS",
    "acc5_sims": "Acc-5 SIMS",
    "accuracy": "Accuracy",
    "f1_weighted": "F1 weighted",
    "f1_macro": "F1 macro",
}
"""Metrics shown in tables, with their column titles; `metrics.METRIC_TITLES` has the full names."""

CONFIDENCE_TITLES = {
    "samples": "clips",
    "coverage": "coverage %",
    "width": "mean width",
    "accuracy": "accuracy %",
    "confidence": "mean confidence %",
    "ece": "ECE %",
    "ece_before": "ECE before %",
}
"""Measures of `measure_confidence` with their column titles."""

LEGEND = "Has0: negative vs non-negative; Non0: negative vs positive, zero labels left out; F1 by support"
IN_UNITS_OF_THE_LABEL = ("mae", "corr")

UNLIMITED = 10_000  # columns, if the output is not a terminal

Results = Mapping[str, Mapping[str, float]]
"""Metrics by name, by condition."""


def selection_metric(is_regression: bool) -> str:
    """Key of the metric that selects the best epoch and leads the tables."""
    return "mae" if is_regression else "f1_weighted"


class PlainConsole(Console):
    """Prints names, labels and texts of users as they are.

    Rich's markup and emoji codes are off. Control characters and stray bytes are escaped, so that a name
    cannot move the cursor or change colours.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text to print."""
        return super().render_str(printable_lines(text), **options)


def printable_lines(text: str) -> str:
    """Text in which all but line breaks can be printed: control characters and stray bytes are escaped."""
    return "\n".join(map(printable, text.split("\n")))


def open_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """The console of a command: as wide as the terminal, or unlimited if the output is not a terminal.

    For a file or a pipe, rich uses 80 columns by default, and cuts file names to fit. The environment
    variable COLUMNS sets the width in any case.
    """
    console = PlainConsole(quiet=quiet, stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED
    return console


def show(table: Table, console: Console) -> None:
    """Print a table; title and caption have separate lines, because rich cuts them to the table's width."""
    bare = copy(table)
    bare.title = bare.caption = None
    if table.title:
        console.print(Text(printable(str(table.title))), style="table.title", soft_wrap=True)
    console.print(bare)
    if table.caption:
        console.print(Text(str(table.caption)), style="table.caption")


def conditions_table(results: Results, title: str) -> Table:
    """Table for the terminal: results under each modality condition."""
    return _table(
        {condition: results[condition] for condition in conditions_in_order(results)}, "modalities", title
    )


def classes_table(results: Mapping[str, Results], metric: str, title: str) -> Table:
    """Table for the terminal: one metric of each class under each condition, in percent.

    Args:
        results: Metrics by name, by class, by condition.
        metric: "f1" or "f1_binary".
        title: Title of the table.
    """
    conditions = conditions_in_order(results)
    table = Table(title=Text(title), title_justify="left")
    table.add_column("class")
    for name in ("samples", *conditions):
        table.add_column(name, justify="right")
    for label, of_class in results[conditions[-1]].items():
        scores = (format_metric(metric, results[condition][label][metric]) for condition in conditions)
        table.add_row(Text(printable(label)), f"{of_class['samples']:,}", *scores)
    return table


def frame_rates_table(results: Results, title: str) -> Table:
    """Table for the terminal: results of `evaluate_frame_rates`."""
    return _table(results, "missing", title)


def conditions_in_order(results: Results) -> list[str]:
    """The conditions of `results`, from one modality to all.

    A configuration saved as JSON sorts them alphabetically.
    """
    return [condition for condition in (*CONDITIONS, MISSING_RATES) if condition in results]


def _table(results: Results, heading: str, title: str) -> Table:
    columns = _headlines(results)
    caption = LEGEND if "acc2_has0" in columns else None
    # Text: brackets in a path are not markup
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column(heading, no_wrap=True)
    for name in columns:
        table.add_column(HEADLINES[name], justify="right")
    for case, metrics in results.items():
        table.add_row(case, *(format_metric(name, metrics[name]) for name in columns))
    return table


def markdown_table(results: Results) -> str:
    """Results under each modality condition as a Markdown table."""
    columns = _headlines(results)
    return as_markdown(
        ["modalities", *(HEADLINES[name] for name in columns)],
        [
            [condition, *(format_metric(name, results[condition][name]) for name in columns)]
            for condition in conditions_in_order(results)
        ],
    )


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table: the first column is left-aligned, the others right-aligned."""
    ruler = ["---", *("---:" for _ in header[1:])]
    escaped = (list(map(markdown_text, row)) for row in (header, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([first, f"| {' | '.join(ruler)} |", *others])


def markdown_text(text: object) -> str:
    """A name, label or text of a user in Markdown: one line without links, emphasis, HTML or more cells."""
    return re.sub(r"([\\`*<|]|(?<=\])[(\[:])", r"\\\1", printable(str(text)))


def confidence_table(confidence: Confidence, measured: Results, title: str) -> Table:
    """Table for the terminal: what was fitted for each set of modalities, and how it measured."""
    table = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(_confidence_header(confidence, measured)):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in _confidence_rows(confidence, measured):
        table.add_row(*row)
    return table


def confidence_markdown(confidence: Confidence, measured: Results) -> str:
    """The same as a Markdown table."""
    return as_markdown(_confidence_header(confidence, measured), _confidence_rows(confidence, measured))


def _confidence_header(confidence: Confidence, measured: Results) -> list[str]:
    fitted = "half-width" if confidence.half_widths else "temperature"
    return ["modalities", "fitted on", fitted, *(CONFIDENCE_TITLES[name] for name in _measures(measured))]


def _confidence_rows(confidence: Confidence, measured: Results) -> list[list[str]]:
    rows = []
    for name in (*VISIBLE_SETS, MISSING_RATES):
        count, value = confidence.samples.get(name), confidence.fitted.get(name)
        if count is None and name not in measured:
            continue
        values = measured.get(name, {})
        rows.append(
            [
                name,
                "" if count is None else f"{count:,}",
                "" if value is None else f"{value:.3f}",
                *(_format_measure(one, values.get(one)) for one in _measures(measured)),
            ]
        )
    return rows


def _measures(measured: Results) -> list[str]:
    known = next(iter(measured.values()), {})
    return [name for name in CONFIDENCE_TITLES if name in known]


def _format_measure(name: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if name == "samples":
        return f"{value:,}"
    return f"{value:.3f}" if name == "width" else format_share(value)


def shares_table(shares: Mapping[str, float], title: str) -> Table:
    """Table for the terminal: shares of the modalities, from `modality_shares`."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("modality")
    table.add_column("share %", justify="right")
    table.add_column("mean contribution", justify="right")
    for name in MODALITIES:
        table.add_row(name, format_share(shares[name]), f"{shares[f'mean/{name}']:+.3f}")
    return table


def epoch_line(
    title: str, losses: Mapping[str, float], metrics: Mapping[str, float], *, best: bool, skipped: int
) -> str:
    """One line about a finished epoch: training losses, validation metrics, whether it is the best so far.

    Diagnostics, whose names have a slash ("energy/text"), are left out; the tracker and the history have
    them.
    """
    trained = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if "/" not in name)
    validated = " ".join(f"{name} {format_metric(name, metrics[name])}" for name in _headlines({"": metrics}))
    notes = ("  best so far" if best else "") + (f"  {skipped} steps skipped" if skipped else "")
    return f"{title}  train: {trained}  valid: {validated}{notes}"


def format_metric(name: str, value: float | None) -> str:
    """Format a metric as papers do: fractions in percent with two decimals, the others with three."""
    if value is None:  # NaN in a record
        return "nan"
    return f"{value:.3f}" if name in IN_UNITS_OF_THE_LABEL else f"{100 * value:.2f}"


def format_share(value: float) -> str:
    """Format a share of the prediction in percent with one decimal."""
    return f"{100 * value:.1f}"


def _headlines(results: Results) -> list[str]:
    known = next(iter(results.values()))
    return [name for name in HEADLINES if name in known]
