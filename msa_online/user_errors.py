# SPDX-License-Identifier: Apache-2.0
"""Print user errors in one line and exit with status 1."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers.utils import logging

from feature_extractors import CacheError, ClipError
from feature_extractors.catalogue import AssetError
from feature_extractors.worker import WorkerError
from msa_online.corpora.corpus import CorpusError
from msa_online.encoders.pretrained import EncoderError
from msa_online.evaluation.conditions import UndefinedScoreError
from msa_online.evaluation.tables import printable_lines
from msa_online.hub import CheckpointError
from msa_online.page.serving import PageError
from msa_online.publishing import PublishError
from msa_online.results_file import ResultsError
from msa_online.training.divergence import DivergedError
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.transcription import TranscriptionError

OTHERS_WAIT = 5.0  # seconds


class UnfinishedError(RuntimeError):
    """A command finished a part of its work and printed it; the message names the rest."""


INPUT_ERRORS = (  # errors of the user's input
    AssetError,
    CacheError,
    CheckpointError,
    ClipError,
    ConfigurationError,
    CorpusError,
    DivergedError,
    EncoderError,
    PageError,
    PublishError,
    ResultsError,
    TranscriptionError,
    UndefinedScoreError,
    UnfinishedError,
    WorkerError,
)


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status, 1 after a user error."""
    logging.set_verbosity_error()  # transformers warns of the pooler that is left out on purpose
    logging.disable_progress_bar()
    warnings.formatwarning = _as_line
    if sys.stderr.isatty():
        warnings.showwarning = _above_the_bar
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        warnings.simplefilter("ignore")  # the first process of the machine meets them too
    try:
        command()
    except INPUT_ERRORS as error:
        _report(str(error))
        return 1
    return 0


def _as_line(message: Warning | str, *_: object) -> str:
    """Format a warning for users: without file and line."""
    return f"warning: {message}\n"


def _above_the_bar(message: Warning | str, *details: object) -> None:
    """Print a warning on stderr, above a progress bar of tqdm if there is one."""
    tqdm.write(_as_line(message, *details), file=sys.stderr, end="")


def _report(message: str) -> None:
    """Print an error once, even if several processes raise it.

    The first process of a machine prints it at once, and the launcher then ends the others. That may take
    many seconds, so the others look for the report of the first, and print only other errors.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and _first_process_reports(message, report):
        return
    line = Text("error: ", style="red").append(printable_lines(message), style="default")
    Console(stderr=True).print(line, soft_wrap=True)
    if report:
        # the launcher of several processes prints a long report; its last lines repeat this message
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), "utf-8")


def _first_process_reports(message: str, report: str | None) -> bool:
    """Whether the first process of this machine also reports `message`; waits up to `OTHERS_WAIT` for it.

    Args:
        message: The error.
        report: File for the report of this process; the launcher gives each process `NUMBER/error.json`.
    """
    until = time.monotonic() + OTHERS_WAIT
    while time.monotonic() < until:
        first = report and Path(report).parent.with_name("0") / "error.json"
        if first and first.exists() and json.dumps(message) in first.read_text("utf-8"):
            return True
        time.sleep(0.1)
    return False
