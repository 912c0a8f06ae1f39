# SPDX-License-Identifier: Apache-2.0
"""`msa-online train`: train a model from a configuration."""

import os
import shlex
from argparse import Namespace

from rich.console import Console

from msa_online.shipped_configs import find_configuration
from msa_online.training.config_reader import read_arguments
from msa_online.training.run import train

LAUNCHED = "msa-online launch"


def run(options: Namespace, console: Console) -> None:
    """Train a model; the command becomes part of the checkpoint's record."""
    program = LAUNCHED if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "msa-online train"
    command = f"{options.program or program} {shlex.join([options.config, *options.changes])}"
    train(read_arguments(find_configuration(options.config), options.changes), command)
