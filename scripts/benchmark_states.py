# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Time an epoch with frozen encoders: states computed in every epoch, computed once, or the head alone.

    python scripts/benchmark_states.py FOLDER
    python scripts/benchmark_states.py FOLDER --vision-encoder null

FOLDER is a corpus of clips. The three runs train the same head and differ in where the states come from:

- "in every epoch": training.cache_states=off;
- "computed once": training.cache_states=auto;
- "features": a folder that `msa-online extract-features` wrote, without encoders.

The vision encoder is by default a ViT of random weights, of 12 layers on crops of 96 pixels: its time does
not depend on the weights. With `null`, the face front-end learns from scratch, so that its states are
computed in every epoch by the first two runs; "features" then has blendshapes in its place. Epochs are timed
in turns, without validation, and the fastest of each run is shown.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rich.console import Console
from rich.table import Table
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from msa_online.corpora.reading import read_corpus
from msa_online.modalities import MODALITIES
from msa_online.precomputed.extraction import extract_features
from msa_online.precomputed.files import ORIGIN
from msa_online.training.accelerator import start_accelerator
from msa_online.training.config_reader import parse_arguments
from msa_online.training.run import Run, build
from msa_online.user_errors import run_command

SIZE = 96  # pixels of a face crop
RANDOM = "random"


def compare(options: argparse.Namespace, console: Console) -> None:
    """A table of the three runs."""
    with tempfile.TemporaryDirectory() as folder:
        encoders = encoders_of(options, Path(folder))
        features = Path(folder) / "features"
        done = extract_features(
            read_corpus(options.data, label_range=(-3, 3)),
            features,
            **encoders,
            extraction={"face_size": SIZE},
        )
        documents = documents_of(options, encoders, features, Path(folder))
        with contextlib.redirect_stdout(sys.stderr):
            runs = {name: start(document) for name, document in documents.items()}
        seconds = time_epochs(runs, options.epochs)
    samples = len(runs["features"].loaders["train"].dataset)
    frozen = ", ".join(name for name in MODALITIES if encoders[f"{name}_encoder"])
    computed = sum(done.cpu_seconds.values()) / len(done.prepared.samples)
    console.print(f"{samples:,} training clips; frozen: {frozen}; states, once: {1000 * computed:.1f} CPU ms")
    table = Table("states", "epoch, CPU s", "epoch, s", "clip, CPU ms")
    for name, (cpu, wall) in seconds.items():
        table.add_row(name, f"{cpu:.2f}", f"{wall:.2f}", f"{1000 * cpu / samples:.2f}")
    console.print(table)


def encoders_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The encoders as keys of `model:`; the random one is written into `folder`."""
    named = {name: getattr(options, f"{name}_encoder") for name in MODALITIES}
    if named["vision"] == RANDOM:
        named["vision"] = str(write_random_vit(folder / "vit", options.vision_width))
    encoders = {f"{name}_encoder": None if each == "null" else each for name, each in named.items()}
    return {**encoders, **({"audio_layer": options.audio_layer} if encoders["audio_encoder"] else {})}


def write_random_vit(folder: Path, width: int) -> Path:
    """Write a ViT of random weights, with patches of 16 pixels, and its image processor."""
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=SIZE,
        dtype="float32",
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def documents_of(
    options: argparse.Namespace, encoders: Mapping[str, Any], features: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """Configurations of the three runs, by name."""
    widths = json.loads((features / ORIGIN).read_text())["widths"]
    frozen = [name for name in MODALITIES if encoders[f"{name}_encoder"]]
    of_clips = {"model": dict(encoders), "data": {"path": options.data, "face_size": SIZE}}
    of_features = {"model": {"feature_widths": widths}, "data": {"path": str(features)}}
    cached = {"freeze": frozen, "cache_states": "auto"}
    kinds = {
        "in every epoch": (of_clips, {**cached, "cache_states": "off"}),
        "computed once": (of_clips, cached),
        "features": (of_features, {}),
    }
    common = {"batch_size": 32, "log_with": None, "mixed_precision": "no"}
    return {
        name: {**document, "training": {**common, **training, "output_dir": str(folder / "runs" / name)}}
        for name, (document, training) in kinds.items()
    }


def start(document: Mapping[str, Any]) -> Run:
    """Build a run; states that are not stored are computed here."""
    arguments = parse_arguments(document)
    return build(arguments, start_accelerator(arguments.training))


def time_epochs(runs: Mapping[str, Run], epochs: int) -> dict[str, tuple[float, float]]:
    """CPU seconds of all threads, and seconds, of the fastest epoch of each run, after one to warm up."""
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for epoch in range(epochs + 1):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run.sampler.start_epoch(epoch)
            stage = run.schedule.stage.name
            run.loop.train_epoch(run.loaders["train"], stage=stage, epoch=epoch, title=name)
            laps[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: min(each[1:]) for name, each in laps.items()}


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a corpus of clips, as for data.path of a run")
    parser.add_argument("--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--audio-encoder", default="openai/whisper-tiny.en", help='or "null"')
    parser.add_argument("--audio-layer", type=int, default=3)
    parser.add_argument("--vision-encoder", default=RANDOM, help='or "null", or the name of an encoder')
    parser.add_argument("--vision-width", type=int, default=192, help="width of the random encoder")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each run that are timed")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
