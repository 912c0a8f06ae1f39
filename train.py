# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  --help is answered before the imports that take seconds
"""Train a model: `accelerate launch --quiet train.py CONFIG [key=value ...]`.

The run itself is `msa_online/training/run.py`: build, fit, finish.
"""

import sys

import msa_online_cli

if __name__ == "__main__" and (status := msa_online_cli.answer_training_help(sys.argv[1:])) is not None:
    sys.exit(status)

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: DDP warns of a flag that stages need

import shlex

from msa_online.errors import run_command
from msa_online.training.config_reader import read_arguments
from msa_online.training.run import train


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    command = "accelerate launch --quiet train.py " + shlex.join(argv)
    return run_command(lambda: train(read_arguments(argv[0], argv[1:]), command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
