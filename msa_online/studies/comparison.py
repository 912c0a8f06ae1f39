# SPDX-License-Identifier: Apache-2.0
"""Compare variants over several seeds: mean and standard deviation of the scores of their runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from feature_extractors.clip import printable
from msa_online.evaluation.tables import HEADLINES, Results, as_markdown, format_metric, format_share
from msa_online.modalities import COMPLETE, CONDITIONS, MISSING_RATES, MODALITIES

COMPARED = ("mae", "corr", "acc2_non0", "accuracy", "f1_weighted")
"""The metrics shown in a comparison, if the task has them."""

LEGEND = (
    "Mean ± standard deviation over the seeds (n - 1 in its denominator; none for one seed). "
    "Incomplete: mean over the six conditions in which modalities are missing. "
    "Percent of a modality: its share in the prediction, by mean absolute Shapley value."
)

GROUPS = {
    "all": "{}",
    "incomplete": "{} incomplete",
    "only": "{} in its condition",
    "imr": "{} at its missing rates",
    "shares": "{} %",
}
"""Groups of compared values, with their headings: metrics with all modalities, as a mean over the six
incomplete conditions, under the only condition of a model, or at its missing rates; shares of modalities."""


@dataclass(frozen=True)
class RunScore:
    """Scores of one finished run on one split.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        conditions: Metrics under each modality condition.
        shares: Share of each modality in the prediction, from `modality_shares`; empty if not measured.
    """

    variant: str
    seed: int
    conditions: Results
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """All compared values by group (see `GROUPS`) and name; groups that were not measured are empty."""
        only = next(iter(self.conditions.values())) if len(self.conditions) == 1 else {}
        complete = {} if only else self.conditions[COMPLETE]
        incomplete = [
            self.conditions[name] for name in CONDITIONS if name != COMPLETE and name in self.conditions
        ]
        return {
            "all": dict(complete),
            "incomplete": {name: _mean([metrics[name] for metrics in incomplete]) for name in complete},
            "only": dict(only),
            "imr": dict(self.conditions.get(MISSING_RATES, {})),
            "shares": {name: self.shares[name] for name in MODALITIES if name in self.shares},
        }


def compare(scores: Sequence[RunScore]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of every value over the seeds, by variant in the order of appearance.

    Returns:
        For each variant its `seeds`, and for each of `GROUPS` the `mean` and `std` (None for one seed) of
        each value.
    """
    compared = {}
    for variant in dict.fromkeys(score.variant for score in scores):
        runs = [score for score in scores if score.variant == variant]
        figures = [run.figures for run in runs]
        compared[variant] = {"seeds": [run.seed for run in runs]} | {
            group: {
                name: _spread([each[group][name] for each in figures if name in each[group]])
                for name in names
            }
            for group, names in figures[0].items()
        }
    return compared


def comparison_table(compared: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """The comparison as a table for the terminal."""
    header, rows = _cells(compared)
    table = Table(title=Text(title), title_justify="left", caption=LEGEND, caption_justify="left")
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(Text(printable(row[0])), *row[1:])
    return table


def comparison_page(compared: Mapping[str, Mapping[str, Any]], title: str, notes: Sequence[str]) -> str:
    """The comparison as a Markdown page, with `notes` below the table."""
    return "\n\n".join([f"# {title}", as_markdown(*_cells(compared)), LEGEND, *notes]) + "\n"


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {"mean": _mean(values), "std": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are defined; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells(compared: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison; missing values are dashes."""
    known = {(group, name) for figures in compared.values() for group in GROUPS for name in figures[group]}
    columns = [
        (group, name) for group in GROUPS for name in (*COMPARED, *MODALITIES) if (group, name) in known
    ]
    header = [
        "variant",
        "seeds",
        *(GROUPS[group].format(HEADLINES.get(name, name)) for group, name in columns),
    ]
    rows = [
        [variant, str(len(figures["seeds"]))]
        + [_cell(group, name, figures[group].get(name)) for group, name in columns]
        for variant, figures in compared.items()
    ]
    return header, rows


def _cell(group: str, name: str, spread: Mapping[str, float | None] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "-"
    shown = [value for value in (spread["mean"], spread["std"]) if value is not None]
    return " ±".join(
        format_share(value) if group == "shares" else format_metric(name, value) for value in shown
    )
