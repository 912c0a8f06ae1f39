# SPDX-License-Identifier: Apache-2.0
r"""Draw the history of runs, by epoch: losses, gradient norms, contributions and other diagnostics.

    python scripts/plot_history.py runs/mine/history.json history.png
    python scripts/plot_history.py runs/with/history.json runs/without/history.json both.png \
        --panels contribution coefficient "validation, mae"

There is a panel for each unweighted loss, one for the gradient norms of all losses
(`training.measure_gradients=true`), and one for each group of diagnostics. A vertical line separates stages;
runs differ in line style.
"""

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANEL = (3.4, 2.6)  # inches
COLUMNS = 4
LOGARITHMIC = ("gradient", "encoder gradient")
KINDS_OF_LINE = ("-", "--", ":", "-.")


def read_panels(history: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Values by panel, name and epoch: each loss has a panel, names with a slash share that of the prefix."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in history:
        for name, value in record["losses"].items():
            panel, slash, short = name.partition("/")
            of_loss = "weighted sum of the losses" if name == "loss" else f"loss: {name}"
            title = panel.replace("_", " ") if slash else of_loss
            panels[title][short or name][record["epoch"]] = value
        metric = "mae" if "mae" in record["valid"] else "f1_weighted"
        panels[f"validation, {metric}"][record["stage"]][record["epoch"]] = record["valid"][metric]
    return panels


def draw(histories: dict[str, list[dict]], target: Path, selected: Sequence[str] = ()) -> None:
    """Draw the panels of histories, by name of the run, to an image file; the `selected` ones, or all.

    Raises:
        ValueError: No run has recorded a selected panel.
    """
    runs = {run: read_panels(history) for run, history in histories.items()}
    titles = _union(runs.values())
    if unknown := [title for title in selected if title not in titles]:
        raise ValueError(f"{unknown[0]!r} was not recorded; there are {', '.join(titles)}")
    titles = list(selected) or titles
    columns = min(COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PANEL[0] * columns, PANEL[1] * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes.flat, titles, strict=False):
        names = _union(panels.get(title, {}) for panels in runs.values())
        for panels, kind in zip(runs.values(), KINDS_OF_LINE, strict=False):
            for name, points in panels.get(title, {}).items():
                label = name if name not in axis.get_legend_handles_labels()[1] else None
                colour = f"C{names.index(name)}"
                epochs, values = list(points), list(points.values())
                axis.plot(epochs, values, kind, color=colour, marker="o", markersize=3, label=label)
        for history in histories.values():
            for earlier, later in zip(history, history[1:], strict=False):
                if earlier["stage"] != later["stage"]:
                    axis.axvline(later["epoch"] - 0.5, color="grey", linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize="x-small")
    if len(runs) > 1:
        of_runs = [
            plt.Line2D([], [], color="black", linestyle=kind, label=run)
            for run, kind in zip(runs, KINDS_OF_LINE, strict=False)
        ]
        figure.legend(handles=of_runs, loc="outside lower center", ncols=len(runs), fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def _union(named: Iterable[Iterable[str]]) -> list[str]:
    """All names, in the order of their first appearance."""
    return list(dict.fromkeys(itertools.chain.from_iterable(named)))


def read_history(path: Path) -> list[dict]:
    """Read the record of all epochs of a run.

    Raises:
        ValueError: The file contains something else.
    """
    history = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(history, list) and history and all("losses" in record for record in history)):
        raise ValueError(f"{path} is not the history of a run: give the history.json of its folder")
    return history


def run_names(histories: Sequence[Path]) -> list[str]:
    """Distinct names of runs: their folders relative to the common path, or files in the same folder."""
    paths = [path.resolve() for path in histories]
    folders = [path.parent for path in paths]
    places = folders if len(set(folders)) == len(folders) else paths
    shared = os.path.commonpath(folders)
    return [str(place.relative_to(shared)) for place in places]


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("histories", nargs="+", metavar="history.json", type=Path)
    parser.add_argument("target", metavar="picture.png", type=Path)
    parser.add_argument("--panels", nargs="+", default=(), help="only these, by their titles")
    arguments = parser.parse_args(argv)
    if len(arguments.histories) > len(KINDS_OF_LINE):
        parser.error(f"{len(arguments.histories)} histories: there are only {len(KINDS_OF_LINE)} line styles")
    try:
        histories = {
            run: read_history(path)
            for run, path in zip(run_names(arguments.histories), arguments.histories, strict=True)
        }
        draw(histories, arguments.target, arguments.panels)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
