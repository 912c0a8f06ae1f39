# SPDX-License-Identifier: Apache-2.0
"""`msa-online prepare`: extract a corpus into the cache."""

from argparse import Namespace

from rich.console import Console

from feature_extractors import ExtractionSettings, FeatureCache
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.prepared_corpus import findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.encoders.text import load_tokenizer
from msa_online.evaluation.tables import show
from msa_online.processing_msa import InputLimits


def run(options: Namespace, console: Console) -> None:
    """Extract every clip of a corpus into the cache and show what was found."""
    corpus = read_corpus(
        options.data,
        label_column=None,
        skip_broken=options.skip_broken,
        audio_track=options.audio_track,
    )
    settings = ExtractionSettings(
        num_frames=options.num_frames, face_size=options.face_size, face_choice=options.face_choice
    )
    seconds = options.max_audio_seconds
    prepared = prepare(corpus, FeatureCache(), settings, options.workers, options.skip_broken, seconds)
    tokenizer = load_tokenizer(options.text_encoder) if options.text_encoder else None
    limits = InputLimits(options.max_text_tokens, seconds, tokenizer)
    show(findings_table(prepared, limits), console)
