# SPDX-License-Identifier: Apache-2.0
"""Errors of the input: printed as one message without a traceback, with exit status 1."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from feature_extractors import CacheError, ClipError
from feature_extractors.assets import AssetError
from feature_extractors.worker import WorkerError
from msa_online.data.datasets import CorpusError
from msa_online.encoders.text import TextEncoderError
from msa_online.evaluation.robustness import UndefinedScoreError
from msa_online.hub import CheckpointError
from msa_online.training.arguments import ConfigurationError
from msa_online.training.divergence import DivergedError

OTHERS_WAIT = 5.0  # seconds; the launcher looks at its processes several times a second


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
        _report(str(error))
        return 1
    return 0


def _report(message: str) -> None:
    """Print an error once, however many processes meet it.

    The first process of a machine prints it at once, and the launcher then ends the others. Those wait for
    that, and print only what the first did not meet.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(OTHERS_WAIT)
    Console(stderr=True).print(Text("error: ", style="red").append(message, style="default"), soft_wrap=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # the launcher of several processes ends with a long report: its last lines repeat this message
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), "utf-8")
