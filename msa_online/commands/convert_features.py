# SPDX-License-Identifier: Apache-2.0
"""`msa-online convert-features`: convert precomputed features to a corpus."""

import shlex
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from feature_extractors.clip import printable
from msa_online.evaluation.tables import open_console, show
from msa_online.modalities import MODALITIES
from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.corpus import features_table
from msa_online.precomputed.reading import read_features


def run(options: Namespace, console: Console) -> None:
    """Convert a file of precomputed features to a corpus."""
    with open_console(stderr=True).status(Text(f"reading {printable(options.source)}")):
        convert_features(
            Path(options.source),
            Path(options.folder),
            metadata=Path(options.metadata) if options.metadata else None,
            label_column=options.label_column,
            split_column=options.split_column,
            level=options.level,
            text_encoder=options.text_encoder,
            non_finite=options.non_finite,
            valid_share=options.valid_share,
            skip_broken=options.skip_broken,
        )
    show_features(options.folder, console)


def show_features(folder: str, console: Console) -> None:
    """Show the content of a folder of features, and the settings to train on it."""
    corpus = read_features(folder)
    show(features_table(corpus), console)
    known = {name: steps.width for name, steps in corpus.steps.items()}
    # for a modality that is not in the data, any width works
    widths = ", ".join(f"{name}: {known.get(name, 1)}" for name in MODALITIES)
    path = shlex.quote(f"data.path={folder}")
    console.print(f"train on it: 'model.feature_widths={{{widths}}}' {path}", soft_wrap=True)
