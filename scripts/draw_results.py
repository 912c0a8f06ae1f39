# SPDX-License-Identifier: Apache-2.0
"""Draw the README's result: test MAE of EBMC and late fusion by visible modalities.

    python scripts/draw_results.py                 # reads docs/ebmc.md, writes docs/results.svg

The figures are those of the table "all-MiniLM-L6-v2, three seeds, test" in docs/ebmc.md.
"""

import re
import sys
from pathlib import Path

from draw_architecture import box, document, line, text

DOCS = Path(__file__).parents[1] / "docs"
SYSTEMS = {"late fusion": "audio", "EBMC": "text"}  # and the colour of each, by its name in the style
WIDTH, LEFT, RIGHT, TOP, ROW = 860, 196, 826, 98, 36
RANGE, TICKS = (0.65, 1.55), (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)


def read_figures() -> dict[str, list[tuple[float, float]]]:
    """Mean and standard deviation of each system's test MAE, by the modalities that are visible."""
    page = (DOCS / "ebmc.md").read_text(encoding="utf-8")
    table = page.split("### all-MiniLM-L6-v2, three seeds, test")[1].split("\n### ")[0]
    header = [cell.strip() for cell in re.search(r"^\| modalities \|.*", table, re.MULTILINE)[0].split("|")]
    columns = [header.index(f"{system} MAE") for system in SYSTEMS]
    figures = {}
    for row in re.findall(r"^\| [a-z].*±.*", table, re.MULTILINE):
        cells = [cell.strip() for cell in row.split("|")]
        figures[cells[1]] = [tuple(float(part) for part in cells[at].split("±")) for at in columns]
    return figures


def position(value: float) -> float:
    """Place of an MAE on the horizontal axis."""
    low, high = RANGE
    return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)


def draw() -> str:
    """The picture as the text of an SVG file."""
    figures = read_figures()
    bottom = TOP + ROW * len(figures)
    parts = [text(28, 38, "Test MAE by visible modalities", "title", "lower is better")]
    parts += [
        text(28, 62, "composite corpus, online from raw clips; mean and deviation over three seeds", "small")
    ]
    for number, (system, colour) in enumerate(SYSTEMS.items()):
        x = 640 + 112 * number
        parts += [f'<circle cx="{x}" cy="33" r="5.5" class="{colour}-fill"/>', text(x + 12, 38, system)]
    parts += [box(16, bottom - ROW - 4, WIDTH - 32, ROW, "chip", 8)]
    for tick in TICKS:
        parts += [line([(position(tick), TOP - 8), (position(tick), bottom - 6)], "grid")]
        parts += [text(position(tick), bottom + 14, f"{tick:.1f}", "small middle")]
    for row, (modalities, pairs) in enumerate(figures.items()):
        y = TOP + ROW * row + 14
        parts += [text(LEFT - 18, y + 4.5, modalities.replace("+", " + "), "right")]
        for colour, (mean, deviation), shift in zip(SYSTEMS.values(), pairs, (-5, 5), strict=True):
            ends = [(position(mean - deviation), y + shift), (position(mean + deviation), y + shift)]
            parts += [line(ends, f"line {colour}-line")]
            parts += [f'<circle cx="{position(mean):g}" cy="{y + shift:g}" r="5" class="{colour}-fill"/>']
    return document(bottom + 34, "Test MAE of late fusion and EBMC by visible modalities", parts, WIDTH)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "results.svg").write_text(draw(), encoding="utf-8")
