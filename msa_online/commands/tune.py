# SPDX-License-Identifier: Apache-2.0
"""`msa-online tune`: search settings of a configuration by the validation score."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from msa_online.commands.study import console_beside_runs, require_one_process
from msa_online.extras import why_not_installed
from msa_online.shipped_configs import find_configuration
from msa_online.studies.study import read_study
from msa_online.studies.tuning import carry_out_search, read_search
from msa_online.training.yaml_reader import ConfigurationError


def run(options: Namespace, console: Console) -> None:
    """Search until the asked number of trials is finished."""
    require_one_process("a search")
    if missing := why_not_installed("optuna"):
        options.refuse(missing)
    if options.variant and not options.space:
        options.refuse("--variant needs --space: the settings to search differ between variants")
    config = find_configuration(options.config, "ablations/" if options.variant else "")
    changes = options.changes
    if options.variant:
        config, changes = read_study(config, changes).search_of(options.variant)
    search = read_search(config, _find_space(options.space, config), changes)
    carry_out_search(search, options.trials, console_beside_runs())


def _find_space(name: str | None, config: Path) -> Path:
    """The space that was named, or the one in the folder `spaces` beside the configuration."""
    if name is not None:
        return find_configuration(name, "spaces/")
    path = config.parent / "spaces" / config.name
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: write a space there, or name one with --space")
    return path
