# SPDX-License-Identifier: Apache-2.0
"""Compare variants over several seeds: mean and standard deviation of the scores of their runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from feature_extractors.clip import printable
from msa_online.evaluation.conditions import LABELS
from msa_online.evaluation.significance import Difference, difference_in_error
from msa_online.evaluation.tables import HEADLINES, Results, as_markdown, format_metric, format_share
from msa_online.modalities import COMPLETE, CONDITIONS, MISSING_RATES, MODALITIES

DIFFERENCES_LEGEND = (
    "Negative is better than the reference. The interval is a bootstrap over clips, which are paired, and "
    "over runs; * excludes zero. p clips: permutation of the errors of single clips (are these trained "
    "models equal?). p runs: exact permutation of whole runs (are the ways of training equal?), with the "
    "least value that so many runs can give. No correction for the number of comparisons."
)

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
    return as_table(*_cells(compared), title, LEGEND)


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, legend: str) -> Table:
    """Cells as a table for the terminal; the first column is a name, the others are numbers."""
    table = Table(title=Text(title), title_justify="left", caption=legend, caption_justify="left")
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(Text(printable(row[0])), *row[1:])
    return table


def comparison_page(compared: Mapping[str, Mapping[str, Any]], title: str, notes: Sequence[str]) -> str:
    """The comparison as a Markdown page, with `notes` below the table."""
    return "\n\n".join([f"# {title}", as_markdown(*_cells(compared)), LEGEND, *notes]) + "\n"


def clip_errors(predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Error of a run on each clip `(clips,)`, by the groups of `GROUPS` that have predictions.

    The error is the absolute error, or 1 for a wrong class. `incomplete` is the mean over the six incomplete
    conditions.

    Args:
        predictions: As `read_predictions` returns them.
    """
    errors = condition_errors(predictions)
    if MISSING_RATES not in errors and len(errors) == 1:
        return {"only": next(iter(errors.values()))}
    incomplete = [errors[name] for name in CONDITIONS if name != COMPLETE]
    return {
        "all": errors[COMPLETE],
        "incomplete": np.mean(incomplete, axis=0),
        **({"imr": errors[MISSING_RATES]} if MISSING_RATES in errors else {}),
    }


def condition_errors(predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Error of a run on each clip `(clips,)` by condition: absolute, or 1 for a wrong class.

    Args:
        predictions: As `read_predictions` returns them.
    """
    labels = predictions[LABELS]
    errors = {
        name: np.abs(logits[:, 0] - labels) if logits.shape[1] == 1 else logits.argmax(axis=1) != labels
        for name, logits in predictions.items()
        if name != LABELS
    }
    return {name: each.astype(float) for name, each in errors.items()}


def differences(
    errors: Mapping[str, Sequence[Mapping[str, np.ndarray]]], reference_of: Mapping[str, str]
) -> dict[str, dict[str, Difference]]:
    """Difference in error between each variant and its reference, by variant and group.

    Args:
        errors: `clip_errors` of the runs of each variant.
        reference_of: Reference of each variant; a variant without one, or that is its own, is left out.
    """
    found: dict[str, dict[str, Difference]] = {}
    for variant, runs in errors.items():
        reference = reference_of.get(variant)
        if reference == variant or reference not in errors:
            continue
        others = errors[reference]
        found[variant] = {
            group: difference_in_error(
                np.stack([run[group] for run in runs]), np.stack([run[group] for run in others])
            )
            for group in runs[0]
            if all(group in run for run in (*runs, *others))
        }
    return found


def differences_table(
    found: Mapping[str, Mapping[str, Difference]], metric: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of `differences` in `metric`, "mae" or "accuracy" (as an error)."""
    groups = [group for group in GROUPS if any(group in each for each in found.values())]
    heading = HEADLINES[metric] if metric == "mae" else "error %"
    header = ["variant"]
    for group in groups:
        header += [GROUPS[group].format(heading), "95 % interval", "p clips", "p runs"]
    rows = []
    for variant, by_group in found.items():
        if not by_group:  # a model of one condition beside one of all
            continue
        row = [variant]
        for group in groups:
            row += _difference_cells(by_group.get(group), 1 if metric == "mae" else 100)
        rows.append(row)
    return header, rows


def _difference_cells(difference: Difference | None, scale: int) -> list[str]:
    if difference is None:
        return ["-"] * 4
    mean, low, high = (f"{scale * getattr(difference, name):+.3f}" for name in ("mean", "low", "high"))
    over_runs = "-"
    if difference.p_runs is not None:
        over_runs = f"{difference.p_runs:.3f} (least {difference.p_runs_least:.3f})"
    mark = "*" if difference.beyond_chance else ""
    return [f"{mean}{mark}", f"{low} to {high}", f"{difference.p_clips:.4f}", over_runs]


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
