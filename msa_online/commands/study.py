# SPDX-License-Identifier: Apache-2.0
"""`msa-online study`: run every variant of a study with every seed, and compare them in one table."""

import os
import sys
from argparse import Namespace

from rich.console import Console

from msa_online.evaluation.tables import UNLIMITED, PlainConsole
from msa_online.shipped_configs import find_configuration
from msa_online.studies.runner import carry_out, report
from msa_online.studies.study import read_study
from msa_online.training.yaml_reader import ConfigurationError


def run(options: Namespace, console: Console) -> None:
    """Run what is missing of a study, and report on all finished runs."""
    require_one_process("a study")
    path = find_configuration(options.study, "ablations/")
    study = read_study(path, options.changes)
    runs = study.runs()
    study.require_variants(options.only)
    console = console_beside_runs()
    if not options.table:
        carry_out([run for run in runs if not options.only or run.variant in options.only], study, console)
    report(runs, study, path.stem, console)


def require_one_process(what: str) -> None:
    """Refuse to start several runs in each process of a launcher; `what` starts them, like "a study"."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(f"{what} runs in one process: start it without accelerate launch")


def console_beside_runs() -> Console:
    """A console bound to the terminal of now, because the output of each run is redirected to a file."""
    console = PlainConsole(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console
