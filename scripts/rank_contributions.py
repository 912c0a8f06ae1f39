# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""In how many epochs do measured contributions rank the modalities as expected? Prints a table in Markdown.

    msa-online study pase data.path=features/graded ...
    python scripts/rank_contributions.py runs/studies/pase/PaSE/*/history.json --order text vision audio

Reads the histories of runs with the modulator `shapley`. The contributions are Shapley values of the loss
that a modality saves (docs/methods/pase.md, 2.7); *phi* are the coefficients that follow from them: smaller
for a modality that contributes more. Each row is the mean over the runs of one variant of a study.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from msa_online.evaluation.tables import as_markdown
from msa_online.methods.pase.modulator import equilibrium
from msa_online.modalities import MODALITIES

HEADER = ("runs", "contribution text / audio / vision, %", "phi text / audio / vision", "as expected")


def measured(path: Path, first: int) -> list[dict[str, float]]:
    """Contributions by modality, of each epoch of a run from the `first` on.

    Raises:
        ValueError: The file is no history, or has no contributions from that epoch on.
    """
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON
        history = None
    if not (isinstance(history, list) and history and all(map(is_epoch, history))):
        raise ValueError(f"{path} is not the history of a run: give the history.json of its folder")
    names = {name: f"contribution/{name}" for name in MODALITIES}
    found = [
        {modality: record["losses"][name] for modality, name in names.items()}
        for record in history
        if record["epoch"] >= first and record["losses"].keys() >= set(names.values())
    ]
    if not found:
        raise ValueError(
            f"{path} has no contributions of three modalities from epoch {first} on: train with "
            "training.modulator=shapley, or give a lower --from-epoch"
        )
    return found


def is_epoch(record: Any) -> bool:
    """Whether this is the record of an epoch: a dict with its number and its losses."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("epoch"), int)
        and isinstance(record.get("losses"), dict)
    )


def row_of(runs: str, epochs: Sequence[dict[str, float]], order: Sequence[str]) -> list[str]:
    """A row of the table for the epochs of all runs of a variant."""
    shares, weights, right = defaultdict(list), defaultdict(list), 0
    for contributions in epochs:
        total = sum(max(value, 0) for value in contributions.values())
        for name, weight in equilibrium(contributions).items():
            shares[name].append(100 * max(contributions[name], 0) / total if total else 0)
            weights[name].append(weight)
        right += sorted(contributions, key=contributions.get, reverse=True) == list(order)
    return [
        runs,
        " / ".join(f"{fmean(shares[name]):.0f}" for name in MODALITIES),
        " / ".join(f"{fmean(weights[name]):.2f}" for name in MODALITIES),
        f"{right} of {len(epochs)} ({right / len(epochs):.0%})",
    ]


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("histories", nargs="+", metavar="history.json", type=Path)
    parser.add_argument("--order", nargs=3, choices=MODALITIES, required=True, help="the largest one first")
    parser.add_argument("--from-epoch", type=int, default=3, help="leave out earlier epochs (default 3)")
    options = parser.parse_args(argv)
    if len(set(options.order)) < len(options.order):
        parser.error(f"--order names {' '.join(options.order)}: give each modality once")
    by_folder: dict[Path, list[dict[str, float]]] = defaultdict(list)
    try:
        for path in options.histories:
            by_folder[path.resolve().parent.parent] += measured(path, options.from_epoch)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = [
        row_of("/".join(folder.parts[-2:]), epochs, options.order) for folder, epochs in by_folder.items()
    ]
    print(as_markdown(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
