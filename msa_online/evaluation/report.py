# SPDX-License-Identifier: Apache-2.0
"""Tables of results, for the terminal and for Markdown."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from msa_online.modalities import CONDITIONS

HEADLINES = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_has0": "Acc-2 Has0",
    "acc2_non0": "Acc-2 Non0",
    "f1_non0": "F1 Non0",
    "acc7": "Acc-7",
    "accuracy": "Accuracy",
    "f1_weighted": "F1 weighted",
    "f1_macro": "F1 macro",
}
"""The metrics a table shows, and how it heads them; `metrics.METRIC_TITLES` has their full names."""

LEGEND = "Has0: negative vs non-negative; Non0: negative vs positive, zero labels left out; F1 by support"
IN_UNITS_OF_THE_LABEL = ("mae", "corr")

Results = Mapping[str, Mapping[str, float]]
"""Metrics by name, by condition."""


def conditions_table(results: Results, title: str) -> Table:
    """Results under each modality condition as a table for the terminal."""
    columns = _headlines(results)
    caption = LEGEND if "acc2_has0" in columns else None
    # Text: brackets in a path are no markup
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("modalities", no_wrap=True)
    for name in columns:
        table.add_column(HEADLINES[name], justify="right")
    for condition in _in_order(results):
        table.add_row(condition, *(format_metric(name, results[condition][name]) for name in columns))
    return table


def markdown_table(results: Results) -> str:
    """Results under each modality condition as a Markdown table."""
    columns = _headlines(results)
    rows = [
        ["modalities", *(HEADLINES[name] for name in columns)],
        ["---", *("---:" for _ in columns)],
        *(
            [condition, *(format_metric(name, results[condition][name]) for name in columns)]
            for condition in _in_order(results)
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def epoch_line(
    title: str, losses: Mapping[str, float], metrics: Mapping[str, float], *, best: bool, skipped: int
) -> str:
    """One line on a finished epoch: training losses, validation metrics, whether it is the best so far."""
    trained = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
    validated = " ".join(f"{name} {format_metric(name, metrics[name])}" for name in _headlines({"": metrics}))
    notes = ("  best so far" if best else "") + (f"  {skipped} steps skipped" if skipped else "")
    return f"{title}  train: {trained}  valid: {validated}{notes}"


def format_metric(name: str, value: float) -> str:
    """A metric as the field prints it: shares in percent with two decimals, the rest with three."""
    return f"{value:.3f}" if name in IN_UNITS_OF_THE_LABEL else f"{100 * value:.2f}"


def _in_order(results: Results) -> list[str]:
    """The conditions from one modality to all; a configuration saved as JSON sorts them by letter."""
    return [condition for condition in CONDITIONS if condition in results]


def _headlines(results: Results) -> list[str]:
    known = next(iter(results.values()))
    return [name for name in HEADLINES if name in known]
