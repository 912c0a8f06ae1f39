# SPDX-License-Identifier: Apache-2.0
"""`msa-online extract-features`: extract a corpus of features from raw clips."""

import math
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from feature_extractors import ExtractionSettings
from msa_online.commands.convert_features import show_features
from msa_online.corpora.prepared_corpus import findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.evaluation.tables import show
from msa_online.precomputed.extraction import extract_features
from msa_online.precomputed.files import require_new_folder
from msa_online.processing_msa import MAX_TEXT_TOKENS, InputLimits


def run(options: Namespace, console: Console) -> None:
    """Extract a corpus of features from raw clips."""
    require_new_folder(Path(options.folder))
    corpus = read_corpus(
        options.data,
        label_column=options.label_column,
        skip_broken=options.skip_broken,
        audio_track=options.audio_track,
    )
    prepared = extract_features(
        corpus,
        Path(options.folder),
        text_encoder=options.text_encoder,
        level=options.level,
        settings=ExtractionSettings(num_frames=options.num_frames),
        workers=options.workers,
        skip_broken=options.skip_broken,
    )
    limits = InputLimits(MAX_TEXT_TOKENS, math.inf, load_tokenizer(options.text_encoder))
    show(findings_table(prepared, limits), console)
    show_features(options.folder, console)
