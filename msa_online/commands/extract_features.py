# SPDX-License-Identifier: Apache-2.0
"""`msa-online extract-features`: extract a corpus of features from raw clips."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from feature_extractors import FeatureCache
from msa_online.commands.convert_features import show_features
from msa_online.corpora.prepared_corpus import findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.evaluation.tables import show
from msa_online.precomputed.extraction import extract_features
from msa_online.precomputed.files import require_new_folder
from msa_online.transcription import transcriber_of


def run(options: Namespace, console: Console) -> None:
    """Extract a corpus of features from raw clips."""
    for name in ("audio_layer", "audio_stride"):
        if getattr(options, name) is not None and options.audio_encoder is None:
            options.refuse(f"--{name.replace('_', '-')} applies to the states of an --audio-encoder")
    require_new_folder(Path(options.folder))
    transcriber = transcriber_of(options.transcribe, options.language, FeatureCache())
    corpus = read_corpus(
        options.data,
        texts_optional=transcriber is not None,
        label_column=options.label_column,
        skip_broken=options.skip_broken,
        audio_track=options.audio_track,
    )
    done = extract_features(
        corpus,
        Path(options.folder),
        text_encoder=options.text_encoder,
        audio_encoder=options.audio_encoder,
        vision_encoder=options.vision_encoder,
        audio_layer="last" if options.audio_layer is None else options.audio_layer,
        audio_stride=options.audio_stride,
        level=options.level,
        extraction={"num_frames": options.num_frames},
        workers=options.workers,
        skip_broken=options.skip_broken,
        transcriber=transcriber,
    )
    show(findings_table(done.prepared, done.processor.limits), console)
    seconds = ", ".join(f"{name} {seconds:.1f}" for name, seconds in done.cpu_seconds.items())
    console.print(f"CPU seconds without the extraction of clips: {seconds}", highlight=False)
    show_features(options.folder, console)
