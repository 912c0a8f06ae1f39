# SPDX-License-Identifier: Apache-2.0
"""`msa-online prepare`: extract a corpus into the cache."""

from argparse import Namespace
from dataclasses import replace

from rich.console import Console

from feature_extractors import ExtractionSettings, FeatureCache
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus
from msa_online.corpora.csv_table import MissingColumnError
from msa_online.corpora.prepared_corpus import findings_table, splits_table
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.split_checks import copy_warnings, corpus_warnings, refuse_warnings, size_warnings
from msa_online.corpora.validation import with_scores
from msa_online.encoders.pretrained import load_image_processor, load_tokenizer
from msa_online.evaluation.tables import show
from msa_online.front_ends import face_size
from msa_online.processing_msa import InputLimits
from msa_online.transcription import transcriber_of

LABEL_COLUMNS = ("label", "emotion", "Emotion", "Sentiment")
"""Columns in which labels are looked for if none is named."""


def run(options: Namespace, console: Console) -> None:
    """Extract every clip of a corpus into the cache, and show what was found in clips, splits and labels."""
    tokenizer = load_tokenizer(options.text_encoder) if options.text_encoder else None
    image_processor = load_image_processor(options.vision_encoder) if options.vision_encoder else None
    pixels = options.face_size or face_size(image_processor)
    transcriber = transcriber_of(options.transcribe, options.language, FeatureCache())
    corpus = _read(options)
    if options.task != "classification":
        corpus = replace(corpus, samples=tuple(with_scores(corpus.samples)))
    warnings = [*corpus_warnings(corpus, None), *size_warnings(corpus.sizes)]
    if options.strict:
        refuse_warnings(corpus.source, warnings)
    settings = ExtractionSettings(
        num_frames=options.num_frames, face_size=pixels, face_choice=options.face_choice
    )
    seconds = options.max_audio_seconds
    prepared = prepare(
        corpus, FeatureCache(), settings, options.workers, options.skip_broken, seconds, transcriber
    )
    limits = InputLimits(options.max_text_tokens, seconds, tokenizer)
    show(findings_table(prepared, limits), console)
    if tokenizer is None:
        console.print(
            "--text-encoder NAME also counts words that its tokenizer does not know", soft_wrap=True
        )
    show(splits_table(prepared), console)
    copies = copy_warnings(prepared, prepared.contents)
    for line in (*warnings, *copies):
        console.print(f"warning: {line}", soft_wrap=True)
    if options.strict:
        refuse_warnings(corpus.source, copies)


def _read(options: Namespace) -> Corpus:
    """The corpus with its labels, if it has any."""
    choices = {
        "skip_broken": options.skip_broken,
        "audio_track": options.audio_track,
        "texts_optional": options.transcribe is not None,
    }
    if options.label_column:
        return read_corpus(options.data, label_column=options.label_column, labels_optional=True, **choices)
    try:
        return read_corpus(options.data, label_column=LABEL_COLUMNS[0], labels_optional=True, **choices)
    except MissingColumnError as error:
        column = next((name for name in LABEL_COLUMNS if name in error.columns), None)
        return read_corpus(options.data, label_column=column, labels_optional=True, **choices)
