# SPDX-License-Identifier: Apache-2.0
"""Draw what a run recorded of every epoch: losses, gradients, energies, coefficients, whatever has a name.

    python scripts/plot_history.py runs/mine/history.json history.png

One panel for each loss, unweighted, one for the gradient norms of all of them
(`training.measure_gradients=true`), one for each group of diagnostics. Stages are told apart by a line.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANEL = (3.4, 2.6)  # inches
COLUMNS = 4
LOGARITHMIC = ("gradient", "encoder gradient")


def read_panels(history: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Values by epoch, by name, by panel: a loss has one, names with a slash share their prefix's."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in history:
        for name, value in record["losses"].items():
            panel, slash, short = name.partition("/")
            of_loss = "weighted sum of the losses" if name == "loss" else f"loss: {name}"
            title = panel.replace("_", " ") if slash else of_loss
            panels[title][short or name][record["epoch"]] = value
        judged_by = "mae" if "mae" in record["valid"] else "f1_weighted"
        panels[f"validation, {judged_by}"][record["stage"]][record["epoch"]] = record["valid"][judged_by]
    return panels


def draw(history: list[dict], target: Path) -> None:
    """Draw the panels of a history into an image file."""
    panels = read_panels(history)
    switches = [
        later["epoch"] - 0.5
        for earlier, later in zip(history, history[1:], strict=False)
        if earlier["stage"] != later["stage"]
    ]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
        for switch in switches:
            axis.axvline(switch, color="grey", linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        if len(lines) > 1:
            axis.legend(fontsize="x-small")
    figure.savefig(target, dpi=110)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    if len(argv) != 2:
        print(__doc__)
        return 2
    draw(json.loads(Path(argv[0]).read_text(encoding="utf-8")), Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
