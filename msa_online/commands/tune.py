# SPDX-License-Identifier: Apache-2.0
"""`msa-online tune`: search settings of a configuration by the validation score."""

import importlib.util
import os
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from msa_online.evaluation.tables import UNLIMITED, PlainConsole
from msa_online.shipped_configs import find_configuration
from msa_online.studies.tuning import carry_out_search, read_search
from msa_online.training.yaml_reader import ConfigurationError


def run(options: Namespace, console: Console) -> None:
    """Search until the asked number of trials is finished."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("a search runs in one process: start it without accelerate launch")
    if importlib.util.find_spec("optuna") is None:
        options.refuse("optuna is not installed: pip install 'msa_online[tune]'")
    config = find_configuration(options.config)
    search = read_search(config, _find_space(options.space, config), options.changes)
    # bound to the terminal, because the output of each trial is redirected to a file
    console = PlainConsole(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    carry_out_search(search, options.trials, console)


def _find_space(name: str | None, config: Path) -> Path:
    """The space that was named, or the one in the folder `spaces` beside the configuration."""
    if name is not None:
        return find_configuration(name, "spaces/")
    path = config.parent / "spaces" / config.name
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: write a space there, or name one with --space")
    return path
