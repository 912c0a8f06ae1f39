# SPDX-License-Identifier: Apache-2.0
"""`msa-online init-data`: start the metadata.csv of a folder of clips."""

import shlex
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from feature_extractors import FeatureCache
from msa_online.corpora.importing import start_metadata
from msa_online.transcription import transcriber_of


def run(options: Namespace, console: Console) -> None:
    """Write a row for every clip of a folder, and say what to fill in."""
    transcriber = transcriber_of(options.transcribe, options.language, FeatureCache())
    metadata, rows, notes = start_metadata(Path(options.folder).expanduser(), transcriber)
    console.print(f"wrote {metadata}: {rows:,} clips", soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(
        "fill in label (a score from -3 to 3, or a word), text and speaker; without speakers, clips of one "
        "person can be in two splits",
        soft_wrap=True,
    )
    console.print(f"next: msa-online prepare {shlex.quote(options.folder)}", soft_wrap=True)
