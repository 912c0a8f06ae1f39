# SPDX-License-Identifier: Apache-2.0
"""Draw what a run recorded of every epoch: losses, gradients, energies, coefficients, whatever has a name.

    python scripts/plot_history.py runs/mine/history.json history.png

One panel for the losses, one for the gradient norm of each (`training.measure_gradients=true`), one for each
group of diagnostics. Stages are told apart by a line between them.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANEL = (4.2, 3.2)  # inches
COLUMNS = 3
LOGARITHMIC = ("losses", "gradient", "encoder_gradient")


def read_panels(history: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Values by epoch, by name, by panel: names without a slash are losses, others belong to their prefix."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in history:
        for name, value in record["losses"].items():
            panel, slash, short = name.partition("/")
            panels[panel if slash else "losses"][short or name][record["epoch"]] = value
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
            positive = all(value > 0 for points in lines.values() for value in points.values())
            axis.set_yscale("log" if positive else "symlog")
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
