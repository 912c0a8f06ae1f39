# SPDX-License-Identifier: Apache-2.0
"""JSON output of commands."""

from pathlib import Path

from rich.console import Console

from msa_online.evaluation.json_text import json_text


def write_json(content: object, target: str, console: Console) -> None:
    """Write `content` as JSON to the file `target`, or print it for "-"."""
    text = json_text(content)
    if target == "-":
        console.out(text, highlight=False)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n", encoding="utf-8")
