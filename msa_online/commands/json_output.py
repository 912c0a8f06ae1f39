# SPDX-License-Identifier: Apache-2.0
"""JSON output of commands."""

from pathlib import Path

from rich.console import Console

from msa_online.evaluation.json_text import json_text
from msa_online.results_file import ResultsError


def write_json(content: object, target: str, console: Console) -> None:
    """Write `content` as JSON to the file `target`, or print it for "-".

    Raises:
        ResultsError: The disk is full, or the folder not writable.
    """
    text = json_text(content)
    if target == "-":
        console.out(text, highlight=False)
    else:
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ResultsError(
                f"{target} cannot be written ({error.strerror}): free disk space, or give - to print it"
            ) from error
