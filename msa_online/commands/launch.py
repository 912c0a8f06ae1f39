# SPDX-License-Identifier: Apache-2.0
"""`msa-online launch`: train on several processes or GPUs, through Accelerate's launcher."""

import logging
import os
import signal
from argparse import Namespace

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from msa_online.training.yaml_reader import ConfigurationError
from msa_online.user_errors import UnfinishedError

USAGE = "msa-online launch [OPTION ...] CONFIG [key=value ...]; `accelerate launch --help` lists OPTIONs"
NOISY = ("accelerate.commands.launch", "torch.distributed.elastic")  # they report what is said here


def run(options: Namespace, console: Console) -> None:
    """Start `msa-online train` in each process; an error is printed by the process that meets it."""
    parser = launch_command_parser()
    parser.prog, parser.usage = "msa-online launch", USAGE  # Accelerate's own has 150 lines
    launch = parser.parse_args(options.words)
    launch.module, launch.quiet = True, True
    launch.training_script_args = ["train", launch.training_script, *launch.training_script_args]
    launch.training_script = "msa_online_cli"
    if (launch.num_processes or 1) > 1 and not torch.cuda.is_available():
        # several processes on a CPU; with its own flag --cpu Accelerate would start one
        launch.cpu, launch.multi_gpu = False, True
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch)
    except ValueError as error:  # options that exclude each other
        raise ConfigurationError(str(error)) from error
    except ChildFailedError as error:
        # negative: ended by a signal; SIGTERM is from the launcher, which ends the other processes
        failures = error.failures.values()
        if killed := [each for each in failures if each.exitcode < 0 and each.exitcode != -signal.SIGTERM]:
            raise UnfinishedError(
                f"process {killed[0].local_rank} was ended by {killed[0].signal_name()}; SIGKILL often means "
                "that memory ran out: lower training.batch_size. training.resume=true continues the run"
            ) from error
        raise SystemExit(1) from None  # the process has printed why
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
