# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Measure what front-ends cost: in the loader, or with `--steps` in a step of training.

    python scripts/benchmark_front_ends.py
    python scripts/benchmark_front_ends.py --seconds 10 --threads 2
    python scripts/benchmark_front_ends.py --steps --rounds 5
    python scripts/benchmark_front_ends.py --steps MiniLM Whisper --rounds 5

In the loader, a clip's cache entry is read, and its sound and crops become inputs. Entries are in the
system's page cache. "spectrogram in the cache" is how earlier versions worked. All rows take turns.

A step is forward, backward and the optimizer's step on a batch of clips, in bf16 on a CPU, with random
weights, which do not change the cost. Each row has a process of its own. The memory is the peak of that
process, with the weights, the state of AdamW, and about 0.5 GB for the libraries.

The times are CPU time, so that other programs do not count. They are medians over the rounds.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file
from timing import WARM_UP, Step, time_in_turns
from tokenizers import Tokenizer, models
from torch import Tensor
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
from msa_online import MSAModel, MSAProcessor
from msa_online.encoders import encoder_class
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.encoders.spectrogram_transformer import SpectrogramTransformer
from msa_online.modalities import MODALITIES
from msa_online.training.config_reader import parse_arguments
from msa_online.training.model import limit_training
from msa_online.training.optimizer import make_optimizer
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


WHISPER = {"audio_encoder": "openai/whisper-tiny.en", "audio_layer": 3}
CLIP = {"vision_encoder": "openai/clip-vit-base-patch32"}
MPNET = {"text_encoder": "sentence-transformers/all-mpnet-base-v2"}
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MiniLM, convolutions": ({}, {}),
    "Whisper, frozen, states stored": (WHISPER, {"freeze": ["audio"]}),
    "Whisper, frozen, run in each step": (WHISPER, {"freeze": ["audio"], "cache_states": "off"}),
    "Whisper, tuned": (WHISPER, {}),
    "Whisper, tuned, checkpointing": (WHISPER, {"gradient_checkpointing": ["audio"]}),
    "CLIP, frozen, states stored": (CLIP, {"freeze": ["vision"]}),
    "CLIP, frozen, run in each step": (CLIP, {"freeze": ["vision"], "cache_states": "off"}),
    "CLIP, tuned": (CLIP, {}),
    "CLIP, tuned, checkpointing": (CLIP, {"gradient_checkpointing": ["vision"]}),
    "MPNet": (MPNET, {}),
    "MPNet, lower half frozen": (MPNET, {"freeze": {"text": 6}}),
}
"""Sections `model` and `training` of what `--steps` measures; the first row is compared with the others."""


def measure_steps(options: argparse.Namespace, console: Console) -> None:
    """Print a table in Markdown: CPU time and memory of a training step, each row from a fresh process."""
    console.print(
        f"a step of {options.batch} clips of {options.seconds:g} s with {options.frames} faces and "
        f"{options.tokens} tokens; bf16; torch has {options.threads} threads; CPU time, median of "
        f"{options.rounds} steps"
    )
    console.out("| | parameters | trained | CPU s | peak, GB |\n|---|---:|---:|---:|---:|")
    rows = [name for name in STEPS if not options.steps or name.split(",")[0] in options.steps]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, cost in zip(rows, pool.imap(partial(cost_of_step, options=options), rows), strict=True):
            counts = f"{cost.parameters:,} | {cost.trained:,}"
            console.out(f"| {name} | {counts} | {cost.seconds:.2f} | {cost.gigabytes:.2f} |")


@dataclass(frozen=True)
class StepCost:
    """CPU seconds of a step, peak memory of its process in GB, and parameter counts."""

    seconds: float
    gigabytes: float
    parameters: int
    trained: int


def cost_of_step(name: str, options: argparse.Namespace) -> StepCost:
    """Train a model of `STEPS` for a few steps on one random batch."""
    torch.set_num_threads(options.threads)
    model_section, training = STEPS[name]
    encoders = {"text_encoder": "sentence-transformers/all-MiniLM-L6-v2", **model_section}
    data = {"path": "none", "label_range": [-3, 3]}
    arguments = parse_arguments({"model": encoders, "data": data, "training": training})
    model = MSAModel(arguments.model_config(()))
    limit_training(model.encoders, arguments.training)
    model.train()
    batch = random_batch(model, arguments.training.cache_states != "off", options)
    optimizer = make_optimizer(model, learning_rate=1e-5, weight_decay=0.01)
    seconds = []
    for _ in range(WARM_UP + options.rounds):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    counts = [
        [p.numel() for p in model.parameters() if p.requires_grad or not only] for only in (False, True)
    ]
    return StepCost(statistics.median(seconds[WARM_UP:]), peak, *map(sum, counts))


def random_batch(model: MSAModel, store_states: bool, options: argparse.Namespace) -> dict[str, Tensor]:
    """Inputs of the model for clips of noise; of frozen encoders their states, if `store_states`."""
    network = model.config.audio_config
    kind = encoder_class("audio", network)
    processor = MSAProcessor(
        empty_tokenizer(),
        {"num_frames": options.frames},
        audio_feature_extractor=None if network is None else kind.default_feature_extractor(network),
        image_processor=None if model.config.vision_config is None else CLIPImageProcessorPil(),
    )
    clip = random_features(processor.settings.face_size, options)
    samples = [processor.encode(clip, None, ("audio", "vision"))] * options.batch
    tokens = torch.randint(model.config.text_config.vocab_size, (options.batch, options.tokens))
    batch = {
        **processor.pad(samples),
        "text_input_ids": tokens,
        "text_mask": torch.ones_like(tokens, dtype=torch.bool),
        "modality_present": torch.ones(options.batch, len(MODALITIES), dtype=torch.bool),
        "labels": torch.rand(options.batch) * 6 - 3,
    }
    for name, encoder in model.encoders.items():
        if store_states and isinstance(encoder, PretrainedEncoder) and encoder.frozen:
            with torch.no_grad():
                states = encoder.eval().states(batch)
            encoder.train()
            for key in encoder.input_names:
                del batch[key]
            batch |= {f"{name}_states": states.values, f"{name}_states_mask": states.mask}
    return batch


def empty_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows no word."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))


def measure(options: argparse.Namespace, console: Console) -> None:
    """A table of the time to read an entry and to make the inputs of one modality."""
    torch.set_num_threads(options.threads)
    tokenizer = empty_tokenizer()
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


def read_options(argv: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the clip")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip, all with a face")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; a loader's worker has one")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument(
        "--steps",
        nargs="*",
        choices=sorted({name.split(",")[0] for name in STEPS}),
        help="measure steps of training; of these models alone, if any are named",
    )
    parser.add_argument("--batch", type=int, default=8, help="clips in a step")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of each clip in a step")
    options = parser.parse_args(argv)
    for name in ("seconds", "frames", "threads", "rounds", "batch", "tokens"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0")
    return options


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    options = read_options(argv)
    run = measure if options.steps is None else measure_steps
    return run_command(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
