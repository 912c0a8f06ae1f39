# SPDX-License-Identifier: Apache-2.0
"""Where the runs of a study stopped, whether they converged, and their learning curves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from msa_online.evaluation.tables import selection_metric
from msa_online.modalities import MODALITIES
from msa_online.studies.study import StudyRun
from msa_online.training.yaml_reader import ConfigurationError

LAST_TENTH = 0.9
"""A run that ends at its limit has not converged if its best epoch is after this share of the last stage."""

COLUMNS = ("seed", "epochs", "best epoch", "stopped by", "steps", "minutes", "parameters")
FUSED, ALONE = "task", "unimodal"  # training losses: of the fused prediction; before a stage trains that
LINES = ("-", "--")
PROBE = "probe"
DIAGNOSED = {
    "share": "share of the prediction",
    PROBE: "score of a linear probe",
    "modality_gradient": "gradient norm",
}
"""Diagnostics that are drawn, by the prefix of their names."""


@dataclass(frozen=True)
class RunEnd:
    """Where a finished run stopped.

    Attributes:
        run: The run.
        epochs: Epochs trained in all stages.
        offered: Largest number of epochs of all stages.
        best: Best epoch on validation, counted from 1 over all stages.
        reason: "patience", or "limit" if the last stage used all its epochs.
        converged: False if the run ended at its limit with its best epoch in the last tenth of the last
            stage.
    """

    run: StudyRun
    epochs: int
    offered: int
    best: int
    reason: str
    converged: bool

    @classmethod
    def of(cls, run: StudyRun) -> "RunEnd":
        """The end of a finished run, from its record and its history."""
        epochs = [entry["stage"] for entry in history_of(run)]
        training = run.arguments.training
        limits = [stage.epochs for stage in training.stages or ()] or [training.epochs]
        in_last, best = epochs.count(epochs[-1]), run.record["epoch"]
        limited = in_last >= limits[-1]
        late = best - (len(epochs) - in_last) > LAST_TENTH * in_last
        return cls(
            run=run,
            epochs=len(epochs),
            offered=sum(limits),
            best=best,
            reason="limit" if limited else "patience",
            converged=not (limited and late),
        )

    @property
    def cells(self) -> list[str]:
        """A row of the table, with the columns `COLUMNS` after the variant."""
        effort = self.run.record.get("effort", {})
        parameters = self.run.record.get("parameters", {})
        return [
            self.run.variant,
            str(self.run.seed),
            f"{self.epochs} of {self.offered}",
            str(self.best),
            self.reason if self.converged else f"{self.reason}, not converged",
            f"{effort['steps']:,}" if "steps" in effort else "-",
            f"{60 * effort['hours']:.1f}" if "hours" in effort else "-",
            f"{parameters['all']:,}" if parameters else "-",
        ]

    @property
    def figures(self) -> dict[str, Any]:
        """The same as plain data."""
        values = {name: getattr(self, name) for name in ("epochs", "offered", "best", "reason", "converged")}
        return {"variant": self.run.variant, "seed": self.run.seed, **values}


def history_of(run: StudyRun) -> list[dict[str, Any]]:
    """Losses and validation metrics of every epoch of a finished run.

    Raises:
        ConfigurationError: The file is missing or damaged.
    """
    path = run.folder / "history.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}): delete {run.folder}, and the study makes the run again"
        ) from error


def warnings_of(ends: Sequence[RunEnd]) -> list[str]:
    """One line for each variant with runs that have not converged."""
    lines = []
    for variant in dict.fromkeys(end.run.variant for end in ends):
        unfinished = [end for end in ends if end.run.variant == variant and not end.converged]
        if unfinished:
            seeds = ", ".join(str(end.run.seed) for end in unfinished)
            bests = ", ".join(str(end.best) for end in unfinished)
            lines.append(
                f"warning: {variant} (seed {seeds}) ended at its limit of {unfinished[0].offered} epochs, "
                f"best epoch {bests}: it has not converged, and a comparison shows who learns faster; offer "
                "more epochs"
            )
    return lines


def draw_learning_curves(ends: Sequence[RunEnd], target: Path) -> None:
    """Draw the loss by epoch, with a panel for each variant and a colour for each seed.

    Training is solid, validation dashed; a vertical line is the best epoch. The loss is that of the fused
    prediction. In stages that do not train it, it is the loss of the modalities' own predictions: their sum
    in training, their mean in validation.
    """
    from matplotlib.figure import Figure  # takes a second

    variants = list(dict.fromkeys(end.run.variant for end in ends))
    columns = min(4, len(variants))
    rows = -(-len(variants) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(variants) :]:
        axis.remove()
    for axis, variant in zip(axes.flat, variants, strict=False):
        for number, end in enumerate(end for end in ends if end.run.variant == variant):
            history = history_of(end.run)
            trained = {
                entry["epoch"]: entry["losses"].get(FUSED, entry["losses"].get(ALONE)) for entry in history
            }
            validated = {entry["epoch"]: entry["valid"].get("loss") for entry in history}
            for curve, line in zip((trained, validated), LINES, strict=True):
                points = {epoch: value for epoch, value in curve.items() if value is not None}
                axis.plot(list(points), list(points.values()), line, color=f"C{number % 10}", linewidth=1)
            axis.axvline(end.best, color=f"C{number % 10}", linestyle=":", linewidth=1)
        axis.set_title(variant, fontsize="small")
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
    figure.savefig(target, dpi=110)


def draw_diagnostics(ends: Sequence[RunEnd], target: Path) -> bool:
    """Draw what `training.diagnostics` measured by epoch; returns whether a run measured anything.

    There is a row for each variant and a column for each diagnostic, a colour for each modality and a line
    for each seed. Dashed in the column of the probes: the best validation score of the models that were
    trained on one modality alone (`training.condition`), mean over the seeds.
    """
    from matplotlib.figure import Figure  # takes a second

    measured = {}
    for end in ends:
        values = [entry["losses"] for entry in history_of(end.run)]
        names = {name for each in values for name in each if name.partition("/")[0] in DIAGNOSED}
        if names and end.run.arguments.training.condition is None:
            measured.setdefault(end.run.variant, []).append((values, names))
    if not measured:
        return False
    alone = _scores_alone(ends)
    recorded = {name.partition("/")[0] for runs in measured.values() for _, names in runs for name in names}
    shown = [kind for kind in DIAGNOSED if kind in recorded]
    figure = Figure(figsize=(3.6 * len(shown), 2.5 * len(measured)), layout="constrained")
    axes = figure.subplots(len(measured), len(shown), squeeze=False)
    for row, (variant, runs) in zip(axes, measured.items(), strict=True):
        for axis, kind in zip(row, shown, strict=True):
            for number, modality in enumerate(MODALITIES):
                for run, (values, _) in enumerate(runs):
                    points = {
                        epoch: value
                        for epoch, each in enumerate(values, start=1)
                        if (value := each.get(f"{kind}/{modality}")) is not None
                    }
                    label = modality if run == 0 and points else None
                    axis.plot(
                        list(points), list(points.values()), color=f"C{number}", linewidth=1, label=label
                    )
                if kind == PROBE and modality in alone:
                    axis.axhline(alone[modality], color=f"C{number}", linestyle="--", linewidth=1)
            axis.set_title(f"{variant}: {DIAGNOSED[kind]}", fontsize="small")
            axis.set_xlabel("epoch")
            if axis.get_legend_handles_labels()[1]:  # some variants measured less than others
                axis.legend(fontsize="x-small")
    figure.savefig(target, dpi=110)
    return True


def _scores_alone(ends: Sequence[RunEnd]) -> dict[str, float]:
    """Best validation score of the models trained on one modality alone, by modality, mean over the seeds."""
    scores: dict[str, list[float]] = {}
    for end in ends:
        if (condition := end.run.arguments.training.condition) in MODALITIES:
            metrics = history_of(end.run)[end.best - 1]["valid"]
            scores.setdefault(condition, []).append(metrics[selection_metric("mae" in metrics)])
    return {modality: fmean(values) for modality, values in scores.items()}
