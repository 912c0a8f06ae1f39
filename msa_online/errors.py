# SPDX-License-Identifier: Apache-2.0
"""Errors of the input: printed as one message without a traceback, with exit status 1."""

from collections.abc import Callable

from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from feature_extractors import CacheError, ClipError
from feature_extractors.assets import AssetError
from msa_online.data.datasets import CorpusError
from msa_online.data.prepare import WorkerError
from msa_online.encoders.text import TextEncoderError
from msa_online.evaluation.robustness import UndefinedScoreError
from msa_online.hub import CheckpointError
from msa_online.training.arguments import ConfigurationError
from msa_online.training.divergence import DivergedError


class UnfinishedError(RuntimeError):
    """A command did a part of its work and printed that; the message names the rest."""


INPUT_ERRORS = (
    AssetError,
    CacheError,
    CheckpointError,
    ClipError,
    ConfigurationError,
    CorpusError,
    DivergedError,
    TextEncoderError,
    UndefinedScoreError,
    UnfinishedError,
    WorkerError,
)


def run_command(command: Callable[[], None]) -> int:
    """Carry out a command of the command line; returns the exit status, 1 after an error of the input."""
    logging.set_verbosity_error()  # transformers reports a pooler left out on purpose as if it were a fault
    logging.disable_progress_bar()
    try:
        command()
    except INPUT_ERRORS as error:
        Console(stderr=True).print(
            Text("error: ", style="red").append(str(error), style="default"), soft_wrap=True
        )
        return 1
    return 0
