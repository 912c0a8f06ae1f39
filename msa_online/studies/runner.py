# SPDX-License-Identifier: Apache-2.0
"""Carry out a study in this process, and report the results: table, values, curves over its settings."""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.memory import clear_device_cache
from rich.console import Console

from msa_online.evaluation.conditions import LABELS
from msa_online.evaluation.json_text import json_text
from msa_online.evaluation.tables import HEADLINES, as_markdown, selection_metric, show
from msa_online.studies.comparison import (
    DIFFERENCES_LEGEND,
    RunScore,
    as_table,
    clip_errors,
    compare,
    comparison_page,
    comparison_table,
    differences,
    differences_table,
)
from msa_online.studies.convergence import COLUMNS as END_COLUMNS
from msa_online.studies.convergence import (
    RunEnd,
    draw_diagnostics,
    draw_learning_curves,
    warnings_of,
)
from msa_online.studies.folder import held, require_writable
from msa_online.studies.sensitivity import draw_sensitivity, sweeps
from msa_online.studies.study import Study, StudyRun, name_in
from msa_online.training.checkpoint import read_predictions
from msa_online.training.model import require_encoders
from msa_online.training.run import train
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.user_errors import INPUT_ERRORS

CURVES = "learning_curves.png"


def carry_out(runs: Sequence[StudyRun], study: Study, console: Console) -> None:
    """Train all runs that are not finished; prints one line per run.

    Raises:
        ConfigurationError: The folder cannot be written, or another process works there; or it contains a
            finished run of other settings; or an encoder of a variant is unavailable or unsuitable, which is
            checked before the first run; or a run stopped with an error of its input. Finished runs are kept.
    """
    with held(Path(study.output_dir)):
        _carry_out(runs, study, console)


def _carry_out(runs: Sequence[StudyRun], study: Study, console: Console) -> None:
    for run in runs:
        if run.record and run.difference:
            raise ConfigurationError(
                f"{run.folder} holds a finished run with other settings ({run.difference}): give "
                "another output_dir, or restore the settings"
            )
        tidy(run, study)
    todo = [run for run in runs if not run.record]
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    for run in {run.variant: run for run in todo}.values():
        if not run.arguments.training.init_from:  # an earlier variant may still have to make it
            with _named(run):
                require_encoders(run.arguments)
    started = time.monotonic()
    for number, run in enumerate(todo, start=1):
        console.print(f"[{number}/{len(todo)}] {run.variant}, seed {run.seed}: ", end="")
        try:
            train_quietly(run, study)
        except ConfigurationError:
            console.print("stopped")
            raise
        tidy(run, study)
        elapsed = time.monotonic() - started
        remaining = elapsed / number * (len(todo) - number)
        console.print(f"finished after {_clock(elapsed)}, about {_clock(remaining)} remaining")


def train_quietly(run: StudyRun, study: Study) -> None:
    """Train in this process, as `msa-online train` does; the output goes to a file next to the run's folder.

    Raises:
        ConfigurationError: The input is invalid; names the variant.
    """
    command = shlex.join(["msa-online", "train", study.config, *run.changes])
    with _named(run), quietly(run.folder):
        train(run.to_train(), command)


@contextmanager
def quietly(folder: Path) -> Iterator[None]:
    """Prepare this process for another run, and send its output to a file next to the run's folder."""
    AcceleratorState._reset_state(reset_partial_state=True)  # otherwise the next run keeps this precision
    GradientState._reset_state()
    clear_device_cache(garbage_collection=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


@contextmanager
def _named(run: StudyRun) -> Iterator[None]:
    """Report errors of the input with the run that has them."""
    try:
        yield
    except INPUT_ERRORS as error:
        raise ConfigurationError(f"variant {run.variant!r}, seed {run.seed}: {error}") from error


def tidy(run: StudyRun, study: Study) -> None:
    """Delete the weights of a finished run, unless the study keeps them."""
    if run.record and not study.keep_checkpoints:
        for weights in run.folder.rglob("*.safetensors"):
            weights.unlink()


def report(runs: Sequence[StudyRun], study: Study, name: str, console: Console) -> None:
    """Show the finished runs in a table; write the table to `table.md` and all values to `results.json`.

    Raises:
        ConfigurationError: No run is finished, or the folder cannot be written.
    """
    require_writable(Path(study.output_dir))
    finished = [run for run in runs if run.record]
    if not finished:
        raise ConfigurationError(f"{study.output_dir}: no run of the study is finished there")
    split = "test" if all("test" in run.record["results"] for run in finished) else "valid"
    scores = [
        RunScore(
            run.variant, run.seed, run.record["results"][split], run.record.get("shares", {}).get(split, {})
        )
        for run in finished
    ]
    order = list(study.combinations)
    compared = compare(sorted(scores, key=lambda score: order.index(score.variant)))
    tier = (
        "online, from raw clips"
        if finished[0].arguments.model.get("text_encoder")
        else "on extracted features"
    )
    title = f"{name}: {split} split, {tier}"
    ends = sorted(map(RunEnd.of, finished), key=lambda end: order.index(end.run.variant))
    notes = [
        f"{len(finished)} of {len(runs)} runs are finished. Data: {finished[0].record['data']}.",
        *warnings_of(ends),
    ]
    details = [{"variant": run.variant, "seed": run.seed, **run.record} for run in finished]
    folder = Path(study.output_dir)
    tested = differences(*_errors_of(finished, study, split))
    page = comparison_page(compared, title, notes)
    if tested:
        metric = "mae" if "mae" in next(iter(finished[0].record["results"][split].values())) else "accuracy"
        header, rows = differences_table(tested, metric)
        subtitle = f"Difference to {study.reference or next(iter(study.variants))}"
        page += f"\n## {subtitle}\n\n{as_markdown(header, rows)}\n\n{DIFFERENCES_LEGEND}\n"
        differing = as_table(header, rows, subtitle, DIFFERENCES_LEGEND)
    page += "\n## Where each run stopped\n\n" + as_markdown(
        ["variant", *END_COLUMNS], [end.cells for end in ends]
    )
    page += f"\n\nLearning curves: [{CURVES}]({CURVES}).\n"
    (folder / "table.md").write_text(page, encoding="utf-8")
    figures = {"study": name, "split": split, "tier": tier, "variants": compared, "runs": details}
    figures["differences"] = {
        variant: {group: asdict(each) for group, each in by_group.items()}
        for variant, by_group in tested.items()
    }
    figures["ends"] = [end.figures for end in ends]
    (folder / "results.json").write_text(json_text(figures, indent=1), encoding="utf-8")
    draw_learning_curves(ends, folder / CURVES)
    draw_diagnostics(ends, folder / "diagnostics.png")
    if study.settings:
        draw_curves(compared, study, split, folder / "curves.png")
    if swept := sweeps(study, finished):
        draw_sensitivity(compared, swept, split, folder / "sensitivity.png")
    show(comparison_table(compared, title), console)
    if tested:
        show(differing, console)
    console.print("\n".join(notes), soft_wrap=True)
    console.print(f"written to {folder / 'table.md'} and {folder / 'results.json'}", soft_wrap=True)


def _errors_of(
    finished: Sequence[StudyRun], study: Study, split: str
) -> tuple[dict[str, list[dict[str, np.ndarray]]], dict[str, str]]:
    """Errors of all runs on single clips by variant, and the references of variants with the same clips."""
    errors: dict[str, list[dict[str, np.ndarray]]] = {variant: [] for variant in study.combinations}
    labels: dict[str, np.ndarray] = {}
    for run in finished:
        if predictions := read_predictions(run.folder, split):  # earlier versions saved none
            labels.setdefault(run.variant, predictions[LABELS])
            errors[run.variant].append(clip_errors(predictions))
    references = {
        variant: reference
        for variant, reference in study.references.items()
        if variant in labels and reference in labels and np.array_equal(labels[variant], labels[reference])
    }
    return errors, references


def draw_curves(compared: Mapping[str, Mapping[str, Any]], study: Study, split: str, target: Path) -> None:
    """Draw the score of each variant in each setting, with its standard deviation over the seeds.

    At missing rates it is the score with the mask, otherwise the score with all modalities.
    """
    from matplotlib.figure import Figure  # takes a second

    metric = selection_metric("mae" in _scored(next(iter(compared.values()))))
    figure = Figure(figsize=(2 + 0.7 * len(study.settings), 4.2), layout="constrained")
    axis = figure.subplots()
    for variant in study.variants:
        points = {
            setting: _scored(compared[name])[metric]
            for setting in study.settings
            if (name := name_in(variant, setting)) in compared
        }
        means = [spread["mean"] for spread in points.values()]
        deviations = [spread["std"] or 0.0 for spread in points.values()]
        axis.errorbar(list(points), means, deviations, marker="o", markersize=3, capsize=2, label=variant)
    axis.set_ylabel(f"{HEADLINES[metric]}, {split}")
    axis.tick_params(axis="x", rotation=45)
    axis.legend(fontsize="x-small")
    figure.savefig(target, dpi=110)


def _scored(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(figures[group] for group in ("imr", "all", "only") if figures[group])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
