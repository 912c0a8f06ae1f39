# SPDX-License-Identifier: Apache-2.0
"""How the score of a study depends on single settings: variants that change one number, drawn over it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msa_online.evaluation.tables import HEADLINES, selection_metric
from msa_online.studies.comparison import GROUPS
from msa_online.studies.study import Study, StudyRun

DRAWN = ("all", "incomplete", "only", "imr")  # of GROUPS, as far as all variants have them


def sweeps(study: Study, runs: Sequence[StudyRun]) -> dict[str, dict[float, str]]:
    """Variants that change one number only, by the key and the number, in ascending order.

    A key needs two of them. The variant without changes, if there is one, joins with its own value.

    Args:
        study: The study. One with `settings` has no sweeps: its curves are drawn over the settings.
        runs: Its finished runs.
    """
    finished = {run.variant: run for run in runs}
    variants = {} if study.settings else {name: study.variants[name] for name in finished}
    found: dict[str, dict[float, str]] = {}
    for variant, changes in variants.items():
        if len(changes) == 1:
            (key,) = changes
            value = _value_of(finished[variant], key)  # a number also where YAML reads 1e-3 as text
            if _is_number(value):
                found.setdefault(key, {})[value] = variant
    found = {key: points for key, points in found.items() if len(points) > 1}
    for unchanged in [variant for variant, changes in variants.items() if not changes][:1]:
        for key, points in found.items():
            value = _value_of(finished[unchanged], key)
            if _is_number(value):
                points.setdefault(value, unchanged)
    return {key: dict(sorted(points.items())) for key, points in found.items()}


def draw_sensitivity(
    compared: Mapping[str, Mapping[str, Any]],
    swept: Mapping[str, Mapping[float, str]],
    split: str,
    target: Path,
) -> None:
    """Draw a panel for each swept setting: the score at its values, with the deviation over the seeds.

    Args:
        compared: Mean and deviation of every score by variant, from `compare`.
        swept: Variants by setting and value, from `sweeps`.
        split: Split that was scored.
        target: The picture.
    """
    from matplotlib.figure import Figure  # takes a second

    shown = [compared[variant] for points in swept.values() for variant in points.values()]
    groups = [group for group in DRAWN if all(figures[group] for figures in shown)]
    metric = selection_metric("mae" in shown[0][groups[0]])
    columns = min(4, len(swept))
    rows = -(-len(swept) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(swept) :]:
        axis.remove()
    for axis, (key, points) in zip(axes.flat, swept.items(), strict=False):
        values = [f"{value:g}" for value in points]
        for group in groups:
            spreads = [compared[variant][group][metric] for variant in points.values()]
            means = [spread["mean"] for spread in spreads]
            deviations = [spread["std"] or 0.0 for spread in spreads]
            label = GROUPS[group].format(HEADLINES[metric])
            axis.errorbar(values, means, deviations, marker="o", markersize=3, capsize=2, label=label)
        axis.set_xlabel(key, fontsize="small")
    axes[0, 0].set_ylabel(f"{HEADLINES[metric]}, {split}")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(target, dpi=110)


def _value_of(run: StudyRun, key: str) -> Any:
    """Value of a key in the configuration of a run; None where it is not set."""
    value: Any = run.arguments.to_dict()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
