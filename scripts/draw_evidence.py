# SPDX-License-Identifier: Apache-2.0
"""Draw the quality of every method beside its size and the time of its step.

    python scripts/draw_evidence.py     # writes docs/evidence.png and the table in README.md

The figures are those of the table "Every method" of docs/evidence.md, in its order. The README has a shorter
form of this table.
"""

import re
import sys
from pathlib import Path

from matplotlib import pyplot as plt

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
TABLE = "### Every method"
QUALITY = {"all": "#1f5fa8", "six incomplete": "#d98b1f"}  # columns of the table, and the colour of each
COSTS = {"parameters": ("parameters, thousands", 1000), "CPU, ms": ("CPU time of a step, ms", 1)}
"""Columns of the table, with the title of the panel and the unit of its axis."""
SHORT = {
    "method": "method, stored states",
    "seeds": "seeds",
    "all": "MAE, all visible",
    "six incomplete": "MAE, six incomplete",
    "parameters": "parameters",
    "CPU, ms": "step, CPU ms",
}
"""Columns of the README's table, and their names there."""


def read_table() -> list[list[str]]:
    """Cells of the table, row by row; the first row has the names of the columns."""
    page = (DOCS / "evidence.md").read_text(encoding="utf-8").split(f"\n{TABLE}")[1]
    header, _, *rows = page[page.index("\n|") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, *rows)]


def read_figures() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and deviation of each column of the table, by method; the deviation is 0 where there is none."""
    header, *rows = read_table()
    figures = {}
    for name, *cells in rows:
        of_method = {}
        for column, cell in zip(header[1:], cells, strict=True):
            if column in QUALITY or column in COSTS:
                mean, _, deviation = cell.replace(",", "").partition("±")
                of_method[column] = float(mean), float(deviation or 0)
        figures[re.sub(r"[*`]", "", name)] = of_method
    return figures


def short_table() -> str:
    """The table of the README: its columns of the page's table, without line break at the end."""
    header, *rows = read_table()
    places = [header.index(column) for column in SHORT]
    cells = [[*SHORT.values()], *([row[at] for at in places] for row in rows)]
    head, *lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([head, "|---|" + "---:|" * (len(SHORT) - 1), *lines])


def draw() -> plt.Figure:
    """The picture: one row for each method, panels for errors, parameters and time."""
    figures = read_figures()
    places = range(len(figures), 0, -1)
    drawn, (errors, *costs) = plt.subplots(
        1, 3, figsize=(10.5, 0.34 * len(figures) + 1.2), sharey=True, width_ratios=(2, 1, 1)
    )
    for column, colour in QUALITY.items():
        means, deviations = zip(*(figures[name][column] for name in figures), strict=True)
        errors.errorbar(means, places, xerr=deviations, fmt="o", color=colour, capsize=2, label=column)
    errors.set_title("test MAE", fontsize=10)
    errors.legend(fontsize=8, loc="upper right")
    errors.set_yticks(list(places), list(figures), fontsize=9)
    for panel, (column, (title, unit)) in zip(costs, COSTS.items(), strict=True):
        panel.barh(places, [figures[name][column][0] / unit for name in figures], 0.5, color="#8a8f98")
        panel.set_title(title, fontsize=10)
    for panel in (errors, *costs):
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    return drawn


def main() -> int:
    """Write the picture and the table of the README; returns the exit status."""
    target, readme = DOCS / "evidence.png", REPOSITORY / "README.md"
    page = readme.read_text(encoding="utf-8")
    old = re.search(rf"^\| {SHORT['method']} \|(.*\n)(\|.*\n)*", page, re.MULTILINE)
    if old is None:
        print(f"{readme} has no table whose first column is {SHORT['method']!r}: add one", file=sys.stderr)
        return 1
    draw().savefig(target, dpi=130)
    readme.write_text(page.replace(old.group(), short_table() + "\n"), encoding="utf-8")
    print(target, readme, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
