# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Compare the batches of training with a random order and with sorting: overlap, padding, balance of work.

    python scripts/benchmark_batches.py FOLDER
    python scripts/benchmark_batches.py FOLDER --batch-size 8 --accumulation 4

Only the transcripts of the training split are read. For 1, 2 and 8 processes the table shows:

- overlap: largest share of a step's samples that share a step again five epochs later, mean over steps;
- padding: the share of padding in the batches, in tokens;
- slowest: padded tokens of the process with the most, divided by the mean over the processes.

"sorted pools" sorts 16 effective batches at a time and gives every process the next slice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from rich.console import Console
from rich.table import Table

from msa_online.batching import BucketBatchSampler, micro_batch_sizes, overlap
from msa_online.corpora.reading import read_corpus
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.user_errors import run_command

APART = 5  # epochs
POOL = 16  # effective batches

Epoch = list[list[np.ndarray]]
"""Samples of each micro-batch of each step."""


def compare(options: argparse.Namespace, console: Console) -> None:
    """A table of the three orders for each number of processes."""
    tokenizer = load_tokenizer(options.text_encoder)
    samples = read_corpus(options.data, label_column=None).split("train")
    texts = [sample.text or "" for sample in samples]
    lengths = np.array([len(tokenizer(text, truncation=True, max_length=128)["input_ids"]) for text in texts])
    console.print(
        f"{len(lengths)} texts of {lengths.mean():.1f} tokens on average, at most {lengths.max()}; batch "
        f"{options.batch_size}, accumulation {options.accumulation}, {options.epochs} pairs of epochs"
    )
    table = Table("processes", "order", "overlap", "padding", "slowest")
    for processes in (1, 2, 8):
        parts = processes * options.accumulation
        sampler = BucketBatchSampler(lengths, options.batch_size, parts, options.seed, processes)
        for name, order in {"as in training": trained, "random": shuffled, "sorted pools": pooled}.items():
            epochs = [order(sampler, epoch) for epoch in range(options.epochs + APART)]
            whole = [[np.concatenate(step) for step in epoch] for epoch in epochs]
            found = [overlap(one, other) for one, other in zip(whole, whole[APART:], strict=False)]
            padding, slowest = work(epochs, lengths, processes)
            table.add_row(str(processes), name, f"{np.mean(found):.3f}", f"{padding:.1%}", f"{slowest:.2f}")
    console.print(table)


def work(epochs: Sequence[Epoch], lengths: np.ndarray, processes: int) -> tuple[float, float]:
    """Share of padding, and the work of the slowest process divided by the mean."""
    batches = [batch for epoch in epochs for step in epoch for batch in step]
    tokens = np.array([len(batch) * lengths[batch].max() for batch in batches])
    together = tokens.reshape(-1, processes)
    real = sum(lengths[batch].sum() for batch in batches)
    return 1 - real / tokens.sum(), float(np.mean(together.max(axis=1) / together.mean(axis=1)))


def trained(sampler: BucketBatchSampler, epoch: int) -> Epoch:
    """The batches of training."""
    sampler.start_epoch(epoch)
    batches, parts = [np.array(batch) for batch in sampler], sampler.batches_per_step
    return [batches[at : at + parts] for at in range(0, len(batches), parts)]


def shuffled(sampler: BucketBatchSampler, epoch: int) -> Epoch:
    """Batches of the same sizes, in a random order."""
    return _sliced(sampler, np.random.default_rng([sampler.seed, epoch]).permutation(len(sampler.lengths)))


def pooled(sampler: BucketBatchSampler, epoch: int) -> Epoch:
    """Batches of the same sizes, from pools sorted by length."""
    order = np.random.default_rng([sampler.seed, epoch]).permutation(len(sampler.lengths))
    pool = POOL * sampler.largest * sampler.batches_per_step
    pools = [order[at : at + pool] for at in range(0, len(order), pool)]
    ordered = [chunk[np.argsort(sampler.lengths[chunk], kind="stable")] for chunk in pools]
    return _sliced(sampler, np.concatenate(ordered))


def _sliced(sampler: BucketBatchSampler, order: np.ndarray) -> Epoch:
    sizes = np.array(micro_batch_sizes(len(order), sampler.steps, sampler.batches_per_step))
    batches = np.split(order, np.cumsum(sizes)[:-1])
    return [batches[at : at + sizes.shape[1]] for at in range(0, len(batches), sizes.shape[1])]


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a corpus of clips, as for data.path of a run")
    parser.add_argument("--text-encoder", default="all-MiniLM-L6-v2", help="encoder whose tokenizer is used")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20, help="pairs of epochs to average over")
    parser.add_argument("--seed", type=int, default=1111)
    options = parser.parse_args(argv)
    for name in ("batch_size", "accumulation", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
