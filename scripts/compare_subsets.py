# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Does a further modality ever make a model worse? Compare the finished runs of a study in pairs of subsets.

    msa-online study subsets data.path=features/control
    python scripts/compare_subsets.py subsets data.path=features/control

Each of the seven subsets of the modalities is compared with those that have one modality less, on the test
split. *trained*: models that were trained on one subset alone (`training.condition`, in the settings of the
study). *tested*: one model, tested under both. The 95 % interval is a bootstrap over clips, which are paired,
and over runs; * marks a modality that makes the error larger beyond it. Arguments are those of the study.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from rich.console import Console

from msa_online.evaluation.significance import Difference, difference_in_error
from msa_online.evaluation.tables import as_markdown
from msa_online.modalities import CONDITIONS
from msa_online.shipped_configs import find_configuration
from msa_online.studies.comparison import condition_errors
from msa_online.studies.study import Study, name_in, read_study
from msa_online.training.checkpoint import read_predictions
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.user_errors import run_command

RESAMPLES = 1000
HEADER = ("model", "pairs", "from", "to", "error before", "after", "difference", "95 % interval")
STEPS = [
    (few, more)
    for few in CONDITIONS
    for more in CONDITIONS
    if set(CONDITIONS[few]) < set(CONDITIONS[more]) and len(CONDITIONS[more]) == len(CONDITIONS[few]) + 1
]


def compare_subsets(options: argparse.Namespace, console: Console) -> None:
    """Print a table in Markdown, and how many of its steps make the error larger.

    Raises:
        ConfigurationError: The study has no finished runs with two subsets to compare.
    """
    study = read_study(find_configuration(options.study, "ablations/"), options.changes)
    compared = [
        ((model, pairs, *cells), difference)
        for model, pairs, errors in read_errors(study)
        for cells, difference in steps_of(errors, same_runs=pairs == "tested")
    ]
    if not compared:
        raise ConfigurationError(
            f"{study.output_dir}: no finished runs under two subsets of the modalities: run the study first"
        )
    console.out(as_markdown(HEADER, [[*cells, *described(difference)] for cells, difference in compared]))
    worse = sum(difference.low > 0 for _, difference in compared)
    console.out(f"\nlarger error beyond the interval: {worse} of {len(compared)}")


def read_errors(study: Study) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Errors `(runs, clips)` by subset, of every model: trained on each subset, and tested on it."""
    errors: dict[str, dict[str, list[np.ndarray]]] = {}
    conditions = {}
    for run in study.runs():
        if run.record and (predictions := read_predictions(run.folder, "test")):
            conditions[run.variant] = run.arguments.training.condition
            for condition, each in condition_errors(predictions).items():
                errors.setdefault(run.variant, {}).setdefault(condition, []).append(each)
    for variant in study.variants:
        trained = {}
        for setting in study.settings:
            if condition := conditions.get(name := name_in(variant, setting)):
                trained[condition] = np.stack(errors[name][condition])
        yield variant, "trained", trained
    for variant, by_condition in errors.items():
        if conditions[variant] is None:
            yield variant, "tested", {name: np.stack(each) for name, each in by_condition.items()}


def steps_of(
    errors: dict[str, np.ndarray], *, same_runs: bool
) -> Iterator[tuple[tuple[str, ...], Difference]]:
    """The subsets and mean errors of each step from a subset to a larger one, and the difference."""
    for few, more in STEPS:
        if few in errors and more in errors:
            before, after = errors[few], errors[more]
            system, reference = after, before
            if same_runs:  # as two systems, their runs would be drawn apart; a run is its own pair
                system, reference = after - before, np.zeros_like(before[:1])
            difference = difference_in_error(system, reference, resamples=RESAMPLES)
            yield (few, more, *(f"{value.mean():.3f}" for value in (before, after))), difference


def described(difference: Difference) -> tuple[str, str]:
    """The cells of a difference and its interval."""
    mark = "*" if difference.low > 0 else ""
    return f"{difference.mean:+.3f}{mark}", f"{difference.low:+.3f} to {difference.high:+.3f}"


def main(argv: list[str]) -> int:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="YAML file of a study, or the name of a shipped one")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="as for `msa-online study`")
    options = parser.parse_args(argv)
    return run_command(lambda: compare_subsets(options, Console(width=200, highlight=False)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
