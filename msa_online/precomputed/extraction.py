# SPDX-License-Identifier: Apache-2.0
"""Extract a corpus of features from clips: states of a frozen text encoder, acoustic and face descriptors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from feature_extractors import CacheError, ExtractionSettings, FeatureCache, log_mel
from feature_extractors.clip import NUM_BLENDSHAPES, ClipFeatures
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.encoders import load_encoder_config
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.encoders.text import TextEncoder
from msa_online.modalities import MODALITIES
from msa_online.precomputed.audio_descriptors import DESCRIPTORS, audio_descriptors
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import require_new_folder, write_feature_folder
from msa_online.precomputed.pooling import pool
from msa_online.processing_msa import MAX_TEXT_TOKENS, clean_text, mask_of, token_ids

TEXTS_TOGETHER = 32  # in one forward pass
NO_SOUND = np.zeros((0, 1), np.float32)


def extract_features(
    corpus: Corpus,
    folder: Path,
    *,
    text_encoder: str,
    level: str = "sequence",
    settings: ExtractionSettings | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
) -> PreparedCorpus:
    """Extract a corpus of features from clips, to train many heads on states that are computed once.

    Text becomes the last hidden states of the published text encoder, audio the descriptors of
    `audio_descriptors`, and each frame with a face its 52 blendshape scores. A modality that a clip lacks has
    no steps.

    Args:
        corpus: The clips; their label, split and speaker are kept.
        folder: Folder to write; it is written completely or not at all.
        text_encoder: Folder or name of a text encoder.
        level: "sequence" keeps the steps; "utterance" pools them with `pool`.
        settings: What to extract from clips; cached features are not extracted again.
        workers: Number of processes that extract features.
        skip_broken: Leave out clips that cannot be decoded, instead of raising.

    Returns:
        The prepared corpus, with its findings.

    Raises:
        CorpusError: The folder exists or cannot be written, or clips cannot be decoded.
        EncoderError: The text encoder is unavailable.
    """
    settings = settings or ExtractionSettings()
    require_new_folder(folder)
    tokenizer, encoder = load_tokenizer(text_encoder), TextEncoder(load_encoder_config("text", text_encoder))
    encoder.load_pretrained(text_encoder)
    cache = FeatureCache()
    prepared = prepare(corpus, cache, settings, workers, skip_broken, math.inf)
    samples = prepared.samples
    sequences = {name: [] for name in MODALITIES}
    sequences["text"] = encode_texts([sample.text for sample in samples], tokenizer, encoder)
    for sample in _progress(samples, "computing descriptors"):
        features = cache.load(prepared.keys[sample.id])
        if features is None:
            raise CacheError(f"the features of {sample.clip.path} were deleted from the cache: start again")
        spectrogram = log_mel(features.sound()) if features.has_audio else NO_SOUND
        sequences["audio"].append(audio_descriptors(spectrogram))
        sequences["vision"].append(blendshapes_of(features))
    widths = {"text": _width_of(encoder), "audio": len(DESCRIPTORS), "vision": NUM_BLENDSHAPES}
    steps = {name: FeatureSteps.join(sequences[name], widths[name]) for name in MODALITIES}
    if level == "utterance":
        steps = pool(steps)
    rows = [
        {
            "id": sample.id,
            "text": sample.text,
            "label": str(sample.label),
            "split": sample.split,
            "speaker": sample.speaker or "",
        }
        for sample in samples
    ]
    origin = {
        "made by": "msa-online extract-features",
        "clips": str(corpus.source),
        "level": level,
        "text": {"encoder": text_encoder, "states": "last hidden layer, special tokens included"},
        "audio": {"descriptors": DESCRIPTORS},
        "vision": {"scores": "MediaPipe blendshapes of frames with a face"},
        "extraction": asdict(settings),
        "widths": {name: each.width for name, each in steps.items()},
    }
    write_feature_folder(folder, rows, steps, origin)
    return prepared


@torch.inference_mode()
def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> list[np.ndarray]:
    """Last hidden states of each text, `(tokens, width)` float32; an empty text has no tokens.

    Special tokens are included. Texts are truncated to 128 tokens, as in `MSAProcessor`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = encoder.to(device).eval()
    ids = {
        number: torch.tensor(token_ids(tokenizer, clean_text(text), MAX_TEXT_TOKENS))
        for number, text in enumerate(texts)
        if clean_text(text)
    }
    states = [np.zeros((0, _width_of(encoder)), np.float32)] * len(texts)
    order = sorted(ids, key=lambda number: len(ids[number]))
    batches = [order[at : at + TEXTS_TOGETHER] for at in range(0, len(order), TEXTS_TOGETHER)]
    for batch in _progress(batches, "encoding texts"):
        texts_of_batch = [ids[number] for number in batch]
        padded = pad_sequence(texts_of_batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = mask_of(texts_of_batch)
        sequence = encoder({"text_input_ids": padded.to(device), "text_mask": mask.to(device)})
        for number, values in zip(batch, sequence.values.cpu().numpy(), strict=True):
            states[number] = values[: len(ids[number])].copy()
    return states


def blendshapes_of(features: ClipFeatures) -> np.ndarray:
    """Blendshape scores of the frames with a face, `(frames with a face, 52)` float32 in [0, 1]."""
    return features.blendshapes[features.face_found]


def _width_of(encoder: TextEncoder) -> int:
    return encoder.model.config.hidden_size


def _progress(items: Sequence, description: str) -> Iterable:
    return track(items, description, transient=True, console=Console(stderr=True))
