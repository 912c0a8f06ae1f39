# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the path has to know the repository before its modules are imported
"""Run a study: every variant of a configuration with every seed, and one table of them all.

A study is a YAML file:

    config: configs/ebmc_offline.yaml         what all variants start from
    output_dir: runs/studies/ebmc             a folder for each run, table.md, results.json
    seeds: [1111, 1112, 1113]
    changes: {training.batch_size: 64}        to the configuration, in all variants
    variants:
      EBMC: {}                                changes of each variant; they win over those of all
      without MSD: {model.loss_weights.msd: 0}
    settings:                                 where there are any, every variant runs in each; curves.png
      rate 0.3: {data.missing.rates: 0.3}
    keep_checkpoints: false                   weights are deleted once a run has been scored

`key=value` on the command line changes all variants (data.path=features), or, without a dot, the study itself
(seeds=[1111], output_dir=runs/mine). Called again, a study that was stopped goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TQDM_DISABLE", "1")  # a study shows its own progress

import matplotlib
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.memory import clear_device_cache
from matplotlib import pyplot as plt
from rich.console import Console

from msa_online.errors import INPUT_ERRORS, run_command
from msa_online.evaluation.tables import HEADLINES, UNLIMITED, show
from msa_online.studies.comparison import (
    RunScore,
    compare,
    comparison_page,
    comparison_table,
)
from msa_online.studies.study import Study, StudyRun, name_in, read_study
from msa_online.training.run import train
from msa_online.training.yaml_reader import ConfigurationError

matplotlib.use("Agg")


def run_study(options: argparse.Namespace, console: Console) -> None:
    """Carry out what is left of a study and report on all that is finished."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("a study runs in one process: start it with python, not accelerate launch")
    study = read_study(options.study, options.changes)
    runs = study.runs()
    if strange := set(options.only) - set(study.combinations):
        raise ConfigurationError(
            f"--only {strange.pop()!r} is no variant: one of {', '.join(map(repr, study.combinations))}"
        )
    if not options.table:
        carry_out([run for run in runs if not options.only or run.variant in options.only], study, console)
    report(runs, study, Path(options.study).stem, console)


def carry_out(runs: Sequence[StudyRun], study: Study, console: Console) -> None:
    """Train what is not finished yet, one line to a run.

    Raises:
        ConfigurationError: A folder holds a finished run of other settings; or a run stopped with an error of
            its input, which is named, and those before it are kept.
    """
    for run in runs:
        if run.record and run.difference:
            raise ConfigurationError(
                f"{run.folder} holds a finished run with other settings ({run.difference}): repeat what was "
                "said then, or give another output_dir"
            )
        tidy(run, study)
    todo = [run for run in runs if not run.record]
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
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
    """Train as train.py does, in this process; what it prints goes to a file beside the run's folder.

    Raises:
        ConfigurationError: With an error of the input, and the variant's name before it.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # else the next run cannot choose its precision
    GradientState._reset_state()
    clear_device_cache(garbage_collection=True)
    command = shlex.join(["accelerate", "launch", "--quiet", "train.py", study.config, *run.changes])
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_name(f"{run.folder.name}.log")
    try:
        with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            train(run.to_train(), command)
    except INPUT_ERRORS as error:
        raise ConfigurationError(f"variant {run.variant!r}, seed {run.seed}: {error}") from error


def tidy(run: StudyRun, study: Study) -> None:
    """Delete the weights of a finished run, unless the study keeps them."""
    if run.record and not study.keep_checkpoints:
        for weights in run.folder.rglob("*.safetensors"):
            weights.unlink()


def report(runs: Sequence[StudyRun], study: Study, name: str, console: Console) -> None:
    """Show the finished runs in a table, and write it to `table.md` and all figures to `results.json`.

    Raises:
        ConfigurationError: No run is finished.
    """
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
    notes = [f"{len(finished)} of {len(runs)} runs are finished. Data: {finished[0].record['data']}."]
    details = [{"variant": run.variant, "seed": run.seed, **run.record} for run in finished]
    folder = Path(study.output_dir)
    page = comparison_page(compared, title, notes)
    (folder / "table.md").write_text(page, encoding="utf-8")
    figures = {"study": name, "split": split, "tier": tier, "variants": compared, "runs": details}
    (folder / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if study.settings:
        draw_curves(compared, study, split, folder / "curves.png")
    show(comparison_table(compared, title), console)
    console.print(*notes)
    console.print(f"written to {folder / 'table.md'} and {folder / 'results.json'}", soft_wrap=True)


def draw_curves(compared: Mapping[str, Mapping[str, Any]], study: Study, split: str, target: Path) -> None:
    """Draw what each variant scored in each setting, with its deviation over the seeds.

    At missing rates the score is that under the mask, else that with everything to be seen.
    """
    metric = next(name for name in ("mae", "f1_weighted") if name in _scored(next(iter(compared.values()))))
    figure, axis = plt.subplots(figsize=(2 + 0.7 * len(study.settings), 4.2), layout="constrained")
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
    plt.close(figure)


def _scored(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(figures[group] for group in ("imr", "all", "only") if figures[group])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("changes", metavar="key=value", nargs="*")
    parser.add_argument(
        "--only", metavar="VARIANT", action="append", default=[], help="run this variant; repeatable"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, only make the table again")
    options = parser.parse_intermixed_args(argv)
    console = Console(
        file=sys.stdout, markup=False, highlight=False
    )  # the terminal, while a run's output is redirected
    if not console.is_terminal:
        console.width = UNLIMITED
    return run_command(lambda: run_study(options, console))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
