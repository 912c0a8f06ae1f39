# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Measure what the loader pays for a clip: its cache entry is read, and its sound and crops become inputs.

    python scripts/benchmark_front_ends.py
    python scripts/benchmark_front_ends.py --seconds 10 --threads 2

The times are CPU time, so that other programs do not count. They are medians over the rounds, in which all
rows take turns. Entries are in the system's page cache. "spectrogram in the cache" is how earlier versions
worked.
"""

import argparse
import sys
import tempfile
import time
import zlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file
from timing import Step, time_in_turns
from tokenizers import Tokenizer, models
from transformers import (
    ASTConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from feature_extractors import ClipFeatures, FeatureCache, log_mel
from msa_online import MSAProcessor
from msa_online.encoders.spectrogram_transformer import SpectrogramTransformer
from msa_online.user_errors import run_command

EPOCH = 1_000  # clips
SOUND = {
    "log-mel": None,
    "waveform (wav2vec2, HuBERT, WavLM)": Wav2Vec2FeatureExtractor(),
    "Whisper": WhisperFeatureExtractor(),
    "w2v-BERT": SeamlessM4TFeatureExtractor(),
    "Audio Spectrogram Transformer": SpectrogramTransformer.default_feature_extractor(ASTConfig()),
}
PICTURES = {
    "crops as they are": (None, None),
    "ViT": (ViTImageProcessorPil(), None),
    "ViT, crops of 96 pixels": (ViTImageProcessorPil(), 96),
    "CLIP": (CLIPImageProcessorPil(), None),
    "DINOv2": (BitImageProcessorPil(size={"shortest_edge": 256}), None),
}


def measure(options: argparse.Namespace, console: Console) -> None:
    """A table of the time to read an entry and to make the inputs of one modality."""
    torch.set_num_threads(options.threads)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Step] = {"spectrogram in the cache": stored_spectrogram(Path(folder), options)}
        for name, extractor in SOUND.items():
            processor = MSAProcessor(tokenizer, {}, audio_feature_extractor=extractor)
            steps[name] = step_of(Path(folder), processor, "audio", options)
        for name, (image_processor, size) in PICTURES.items():
            given = {} if size is None else {"face_size": size}
            processor = MSAProcessor(tokenizer, given, image_processor=image_processor)
            steps[name] = step_of(Path(folder), processor, "vision", options)
        medians = time_in_turns(steps, options.rounds)
    console.print(
        f"clips of {options.seconds:g} s with {options.frames} faces; torch has {options.threads} threads; "
        f"CPU time, median of {options.rounds} rounds"
    )
    table = Table("", "entry, KB", "reading, ms", "inputs, ms", f"{EPOCH:,} clips, s")
    for name, marks in medians.items():
        whole = marks["read"] + marks["inputs"]
        size = f"{marks['kilobytes'] / 1e3:,.0f}"
        table.add_row(
            name, size, f"{marks['read']:.2f}", f"{marks['inputs']:.2f}", f"{EPOCH * whole / 1e3:.1f}"
        )
    console.print(table)


def random_features(size: int, options: argparse.Namespace) -> ClipFeatures:
    """A clip of noise with a face in every frame, as large as `size` pixels."""
    random, frames = np.random.default_rng(0), options.frames
    return ClipFeatures(
        waveform=random.normal(0, 3_000, round(16_000 * options.seconds)).astype(np.int16),
        face_crops=random.integers(0, 256, (frames, size, size, 3), np.uint8),
        blendshapes=random.random((frames, 52), np.float32),
        face_found=np.ones(frames, bool),
        timestamps=np.arange(frames, dtype=np.float32),
        findings=(),
        duration=options.seconds,
    )


def step_of(folder: Path, processor: MSAProcessor, modality: str, options: argparse.Namespace) -> Step:
    """Reads the entry of a clip and makes the inputs of one modality."""
    cache, key = FeatureCache(folder), f"{processor.settings.face_size:064d}"
    cache.store(key, random_features(processor.settings.face_size, options))
    size = next(folder.rglob(f"{key}*")).stat().st_size

    def step() -> dict[str, float]:
        start = time.process_time()
        features = cache.load(key)
        read = time.process_time()
        processor.encode(features, None, [modality])
        return {"kilobytes": size / 1e3, "read": read - start, "inputs": time.process_time() - read}

    return step


def stored_spectrogram(folder: Path, options: argparse.Namespace) -> Step:
    """Reads an entry that has the spectrogram in place of the sound, and compares its checksum."""
    features, path = random_features(96, options), folder / "spectrogram.safetensors"
    arrays = {"log_mel": log_mel(features.sound()), "crops": features.face_crops}
    save_file(arrays, path)

    def step() -> dict[str, float]:
        start = time.process_time()
        with safe_open(path, framework="np") as entry:
            stored = {name: entry.get_tensor(name) for name in arrays}
        for array in stored.values():
            zlib.crc32(array)
        read = time.process_time()
        torch.from_numpy(stored["log_mel"])
        return {
            "kilobytes": path.stat().st_size / 1e3,
            "read": read - start,
            "inputs": time.process_time() - read,
        }

    return step


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the clip")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip, all with a face")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; a loader's worker has one")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(argv)
    for name in ("seconds", "frames", "threads", "rounds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0")
    return run_command(lambda: measure(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
