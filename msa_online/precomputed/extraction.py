# SPDX-License-Identifier: Apache-2.0
"""Extract a corpus of features from clips: states of frozen encoders, acoustic descriptors, blendshapes."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from feature_extractors import FeatureCache, log_mel
from feature_extractors.clip import NUM_BLENDSHAPES, ClipFeatures
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.cache_filling import load_features, prepare
from msa_online.corpora.corpus import Corpus
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.encoders import load_encoder_config, load_preprocessors, make_encoders
from msa_online.encoders.pretrained import EncoderError
from msa_online.modalities import MODALITIES
from msa_online.precomputed.audio_descriptors import DESCRIPTORS, audio_descriptors
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import require_new_folder, write_feature_folder
from msa_online.precomputed.pooling import pool
from msa_online.precomputed.states import FrozenEncoder
from msa_online.processing_msa import MAX_AUDIO_SECONDS, MSAProcessor
from msa_online.transcription import Transcriber

NO_SOUND = np.zeros((0, 1), np.float32)


@dataclass(frozen=True)
class Extraction:
    """What `extract_features` did.

    Attributes:
        prepared: The prepared corpus, with its findings.
        processor: Made the encoders' inputs; its limits are those of what was read.
        cpu_seconds: CPU time that the features of each modality took.
    """

    prepared: PreparedCorpus
    processor: MSAProcessor
    cpu_seconds: dict[str, float]


def extract_features(
    corpus: Corpus,
    folder: Path,
    *,
    text_encoder: str,
    audio_encoder: str | None = None,
    vision_encoder: str | None = None,
    audio_layer: str | int = "last",
    audio_stride: int | None = None,
    level: str = "sequence",
    extraction: Mapping[str, Any] | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    transcriber: Transcriber | None = None,
) -> Extraction:
    """Extract a corpus of features from clips, to train many heads on states that are computed once.

    Text becomes the states of the published text encoder. Audio becomes those of the audio encoder, or
    without one the descriptors of `audio_descriptors`. Each frame with a face becomes its 52 blendshape
    scores, after the states of the vision encoder if there is one. A modality that a clip lacks has no steps.

    States are those that training with frozen encoders computes, in fp32, before anything that is learned.
    They are kept in the cache: an interrupted extraction continues, and training finds them.

    Args:
        corpus: The clips; their label, split and speaker are kept.
        folder: Folder to write; it is written completely or not at all.
        text_encoder: Folder or name of a text encoder.
        audio_encoder: Folder or name of an audio encoder.
        vision_encoder: Folder or name of a vision encoder.
        audio_layer: "last", or the number of a layer of the audio encoder, as in `MSAConfig`.
        audio_stride: How many consecutive states of the audio encoder are averaged, as in `MSAConfig`.
        level: "sequence" keeps the steps; "utterance" pools them with `pool`.
        extraction: What to extract from clips: fields of `ExtractionSettings`.
        workers: Number of processes that extract clips.
        skip_broken: Leave out clips that cannot be decoded, instead of raising.
        transcriber: Makes the texts of clips that have none.

    Raises:
        CorpusError: The folder exists or cannot be written, or clips cannot be decoded.
        CacheError: The disk is too small or not writable.
        EncoderError: An encoder is unavailable, is for another modality or lacks the layer, or `audio_layer`
            is "weighted".
    """
    if audio_layer == "weighted":
        raise EncoderError(
            "audio_layer 'weighted' is learned in training: extract one layer (last, or its number), or "
            "train on the clips with model.audio_layer=weighted and training.freeze=[audio]"
        )
    require_new_folder(folder)
    names = {"text": text_encoder, "audio": audio_encoder, "vision": vision_encoder}
    names = {name: encoder for name, encoder in names.items() if encoder is not None}
    config = MSAConfig(
        **{f"{name}_encoder": encoder for name, encoder in names.items()},
        **{f"{name}_config": load_encoder_config(name, encoder) for name, encoder in names.items()},
        audio_layer=audio_layer,
        audio_stride=audio_stride,
    )
    encoders = make_encoders(config)
    for name, encoder in names.items():
        encoders[name].load_pretrained(encoder)
        encoders[name].freeze()
    processor = MSAProcessor(
        extraction=dict(extraction or {}),
        max_audio_seconds=MAX_AUDIO_SECONDS if audio_encoder else math.inf,
        **load_preprocessors(config),
    )
    prepared = prepare(
        corpus,
        FeatureCache(),
        processor.settings,
        workers,
        skip_broken,
        processor.max_audio_seconds,
        transcriber,
    )
    steps, cpu_seconds = {}, {}
    for name in MODALITIES:
        began = time.process_time()
        if name in names:
            steps[name] = states_of(FrozenEncoder(name, encoders[name], config, processor, prepared))
        else:
            steps[name] = describe(prepared, *DESCRIPTIONS[name])
        cpu_seconds[name] = time.process_time() - began
    if level == "utterance":
        steps = pool(steps)
    in_dialogues = any(sample.dialogue for sample in prepared.samples)
    rows = [
        {
            "id": sample.id,
            "text": sample.text,
            "label": str(sample.label),
            "split": sample.split,
            "speaker": sample.speaker or "",
            **({"dialogue": sample.dialogue or "", "turn": sample.turn or ""} if in_dialogues else {}),
        }
        for sample in prepared.samples
    ]
    origin = {
        "made by": "msa-online extract-features",
        "clips": str(corpus.source),
        "level": level,
        **_origin_of_states(names, encoders, audio_layer, processor.max_audio_seconds),
        "extraction": asdict(processor.settings),
        "widths": {name: each.width for name, each in steps.items()},
        "cpu_seconds": {name: round(seconds, 1) for name, seconds in cpu_seconds.items()},
    }
    write_feature_folder(folder, rows, steps, origin)
    return Extraction(prepared, processor, cpu_seconds)


def states_of(frozen: FrozenEncoder) -> FeatureSteps:
    """States of a frozen encoder for all samples of its corpus; those that are not stored are computed.

    A sample without the modality has no steps; frames without a face are left out.
    """
    if not frozen.keys:
        width = frozen.config.widths[frozen.name] + (NUM_BLENDSHAPES if frozen.name == "vision" else 0)
        return FeatureSteps.join([np.zeros((0, width))] * len(frozen.data.samples), width)
    frozen.compute(frozen.missing, "cuda" if torch.cuda.is_available() else "cpu")
    states = [frozen.states.of(sample.id) for sample in frozen.data.samples]
    kept = [values[mask].float().numpy() for values, mask in states]
    return FeatureSteps.join(kept, kept[0].shape[1])


def describe(
    prepared: PreparedCorpus, description: Callable[[ClipFeatures], np.ndarray], width: int
) -> FeatureSteps:
    """Descriptions `(time, width)` of all clips, made without an encoder."""
    samples = track(prepared.samples, "computing descriptors", transient=True, console=Console(stderr=True))
    clips = (load_features(prepared.cache, prepared.keys[sample.id], sample) for sample in samples)
    return FeatureSteps.join([description(features) for features in clips], width)


def descriptors_of(features: ClipFeatures) -> np.ndarray:
    """Acoustic descriptors of the sound, `(steps, 45)` float32; see `audio_descriptors`."""
    return audio_descriptors(log_mel(features.sound()) if features.has_audio else NO_SOUND)


def blendshapes_of(features: ClipFeatures) -> np.ndarray:
    """Blendshape scores of the frames with a face, `(frames with a face, 52)` float32 in [0, 1]."""
    return features.blendshapes[features.face_found]


DESCRIPTIONS = {
    "audio": (descriptors_of, len(DESCRIPTORS)),
    "vision": (blendshapes_of, NUM_BLENDSHAPES),
}
"""What is extracted without an encoder, and its width."""


def _origin_of_states(
    names: Mapping[str, str], encoders: nn.ModuleDict, audio_layer: str | int, max_audio_seconds: float
) -> dict[str, dict[str, Any]]:
    """What each modality's features are, for the record."""
    text = {"encoder": names["text"], "states": "last hidden layer, special tokens included"}
    audio: dict[str, Any] = {"descriptors": DESCRIPTORS}
    if "audio" in names:
        stride = encoders["audio"].stride
        audio = {
            "encoder": names["audio"],
            "layer": audio_layer,
            "stride": stride,
            "states": f"means of {stride} consecutive states, of the first {max_audio_seconds:g} s",
        }
    blendshapes = "MediaPipe blendshapes of frames with a face"
    vision = {"scores": blendshapes}
    if "vision" in names:
        joined = f"one state a frame with a face, then its {NUM_BLENDSHAPES} blendshape scores, concatenated"
        vision = {"encoder": names["vision"], "states": joined, "scores": blendshapes}
    return {"text": text, "audio": audio, "vision": vision}
