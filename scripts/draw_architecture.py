# SPDX-License-Identifier: Apache-2.0
"""Draw the architecture: the path of a raw clip to logits, and the methods that plug in.

    python scripts/draw_architecture.py            # writes docs/architecture.svg

The names of calibrators, heads and modulators come from the tables in `msa_online.methods`, so a new method
appears after the next run. The picture has its own background in light and dark, so it is legible on both.
"""

import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from msa_online.methods import CALIBRATORS, HEADS, MODULATORS

TARGET = Path(__file__).parents[1] / "docs" / "architecture.svg"
WIDTH = 1140
STYLE = """
    text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2937 }
    .title { font-size: 16px; font-weight: 600 }
    .small { font-size: 13px; font-weight: 400; fill: #5b6472 }
    .middle { text-anchor: middle }
    .right { text-anchor: end }
    .name { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
    .panel { fill: #fbfcfe; stroke: #d5dbe5 }
    .box { fill: #ffffff; stroke: #b6c0cf }
    .fixed { fill: #f1f3f6; stroke: #cbd2dc }
    .model { fill: #eef3fb; stroke: #9db4d8 }
    .chip { fill: #e8edf6; stroke: #c3cfe2 }
    .training { fill: #fdf3f5; stroke: #dba3b1 }
    .line { fill: none; stroke: #6b7686; stroke-width: 1.8 }
    .gradient { fill: none; stroke: #c0395a; stroke-width: 1.8; stroke-dasharray: 6 4 }
    .grid { fill: none; stroke: #dfe4ec }
    .tip { fill: #6b7686 }
    .gradient-tip, .gradient-word { fill: #c0395a }
    .text-line { stroke: #2563eb } .text-fill { fill: #2563eb }
    .audio-line { stroke: #c2680a } .audio-fill { fill: #c2680a }
    .vision-line { stroke: #0b8a62 } .vision-fill { fill: #0b8a62 }
    .hidden { stroke-dasharray: 2 4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6eaf1 }
      .small { fill: #9aa5b5 }
      .panel { fill: #12171f; stroke: #2c3542 }
      .box { fill: #1b222d; stroke: #465264 }
      .fixed { fill: #181e27; stroke: #3a4452 }
      .model { fill: #172334; stroke: #3d5a85 }
      .chip { fill: #26344a; stroke: #3d4f6d }
      .training { fill: #2a1a21; stroke: #7d4255 }
      .line { stroke: #8b97a8 }
      .gradient { stroke: #f0718f }
      .grid { stroke: #2a323e }
      .tip { fill: #8b97a8 }
      .gradient-tip, .gradient-word { fill: #f0718f }
      .text-line { stroke: #6ea8fe } .text-fill { fill: #6ea8fe }
      .audio-line { stroke: #f0a557 } .audio-fill { fill: #f0a557 }
      .vision-line { stroke: #4fd1a1 } .vision-fill { fill: #4fd1a1 }
    }
"""

LANES = (
    ("text", "transcript", "tokens", "any Hugging Face", "text encoder"),
    ("audio", "sound", "log-mel or samples", "convolutions or", "HF audio encoder"),
    ("vision", "pictures", "faces, blendshapes", "convolutions or", "HF image encoder"),
)
TOP, LANE, CHIP = 98, 80, 27  # top of the boxes, distance of lanes, height of a name with its margin


def text(x: float, y: float, words: str, kind: str = "", remark: str = "") -> str:
    """A line of text with its baseline at y, and a remark behind it in small letters."""
    behind = f'<tspan dx="10" class="small">{escape(remark)}</tspan>' if remark else ""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}{behind}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box", radius: float = 9) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>'


def line(points: Sequence[tuple[float, float]], kind: str = "line") -> str:
    """A line through points."""
    return f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" class="{kind}"/>'


def arrow(points: Sequence[tuple[float, float]], kind: str = "line", tip: str = "tip") -> str:
    """A line through points with an arrowhead at the last; its last part runs along an axis."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back, side = (x - 9 * dx, y - 9 * dy), (5 * dy, 5 * dx)
    head = [(x, y), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1])]
    corners = " ".join(f"{a:g},{b:g}" for a, b in head)
    return line([*points[:-1], back], kind) + f'<polygon points="{corners}" class="{tip}"/>'


def rows_of(names: Iterable[str], width: float) -> list[list[str]]:
    """Names in rows that fit a width."""
    rows: list[list[str]] = [[]]
    for name in names:
        if rows[-1] and sum(width_of(other) + 6 for other in rows[-1]) + width_of(name) > width:
            rows.append([])
        rows[-1].append(name)
    return rows


def width_of(name: str) -> float:
    """Width of the frame around a name."""
    return 7.9 * len(name) + 18


def chips(rows: Sequence[Sequence[str]], center: float, y: float, kind: str) -> str:
    """Framed names, row by row from y on, each row centred."""
    parts = []
    for number, row in enumerate(rows):
        left, top = center - (sum(width_of(name) + 6 for name in row) - 6) / 2, y + number * CHIP
        for name in row:
            parts += [box(left, top, width_of(name), CHIP - 5, "chip", 11)]
            parts += [text(left + 9, top + 15.5, name, f"name {kind}")]
            left += width_of(name) + 6
    return "\n".join(parts)


def document(height: float, title: str, parts: Iterable[str], width: float = WIDTH) -> str:
    """An SVG file with its own background."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    panel = box(1, 1, width - 2, height - 2, "panel", 14)
    head = [opening, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", panel]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def plug(
    x: float, width: float, title: str, lines: Sequence[str], rows: list[list[str]], bottom: float
) -> str:
    """A tall box for one kind of method: its title above, what it does, and the names that fit there."""
    center, y = x + width / 2, (TOP + bottom) / 2 - (20 * len(lines) + 10 + CHIP * len(rows)) / 2
    parts = [box(x, TOP, width, bottom - TOP), text(center, TOP - 13, title, "title middle")]
    parts += [text(center, y + 14 + 18 * number, words, "small middle") for number, words in enumerate(lines)]
    return "\n".join([*parts, chips(rows, center, y + 20 * len(lines) + 10, title)])


def draw() -> str:
    """The picture of the architecture as the text of an SVG file."""
    heads, calibrators, modulators = rows_of(HEADS, 152), rows_of(CALIBRATORS, 116), rows_of(MODULATORS, 420)
    bottom = TOP + max(2 * LANE + 56, 70 + CHIP * max(len(heads), len(calibrators)))
    center = (TOP + bottom) / 2

    parts = [box(150, 22, 196, bottom - 4, "fixed", 12), box(372, 22, 594, bottom - 4, "model", 12)]
    parts += [
        text(248, 50, "feature_extractors", "title middle"),
        text(248, 74, "fixed signal work", "small middle"),
    ]
    parts += [text(390, 50, "MSAModel", "title", "one checkpoint, trained end to end")]

    parts += [box(22, TOP, 102, bottom - TOP), text(73, TOP - 13, "raw clip", "title middle")]
    parts += [f'<polygon points="63,{center - 52:g} 63,{center - 24:g} 87,{center - 38:g}" class="tip"/>']
    parts += [text(73, center + 3, "clip.mp4", "name middle")]
    parts += [
        text(73, center + 28, "any usual", "small middle"),
        text(73, center + 45, "container", "small middle"),
    ]

    parts += [text(466, TOP - 13, "encoders", "title middle")]
    for lane, (name, source, features, *encoder) in enumerate(LANES):
        y, stroke, fill = center + (lane - 1) * LANE, f"line {name}-line", f"{name}-fill"
        behind = stroke + " hidden" * (name == "audio")
        parts += [arrow([(124, y), (166, y)], stroke, fill), box(166, y - 28, 164, 56, f"box {name}-line")]
        parts += [text(248, y - 5, source, f"middle {fill}"), text(248, y + 15, features, "small middle")]
        parts += [arrow([(330, y), (388, y)], stroke, fill), box(388, y - 28, 156, 56, f"box {name}-line")]
        parts += [text(466, y - 4 + 18 * row, words, "small middle") for row, words in enumerate(encoder)]
        parts += [arrow([(544, y), (624, y)], behind, fill), arrow([(760, y), (788, y)], behind, fill)]
    parts += [
        text(580, center - 12, "missing:", "small middle"),
        text(580, center + 24, "masked", "small middle"),
    ]

    parts += [plug(624, 136, "calibrator", ("rescales the", "encoder states"), calibrators, bottom)]
    parts += [plug(788, 164, "head", ("fuses and balances", "the modalities"), heads, bottom)]

    parts += [arrow([(952, center), (998, center)])]
    parts += [box(998, TOP, 120, bottom - TOP), text(1058, TOP - 13, "output", "title middle")]
    words = ("score or emotion", "", "each modality", "alone", "", "named losses")
    parts += [text(1058, center - 52, "logits", "title middle")]
    parts += [text(1058, center - 31 + 18 * row, line, "small middle") for row, line in enumerate(words)]

    below, tall = bottom + 62, 52 + CHIP * len(modulators)
    middle = below + tall / 2
    parts += [box(446, below, 446, tall, "box training")]
    parts += [text(464, below + 27, "modulator", "title", "in training only; no part of the checkpoint")]
    parts += [chips(modulators, 669, below + 41, "modulator")]
    parts += [arrow([(1058, bottom), (1058, middle), (892, middle)], "gradient", "gradient-tip")]
    parts += [text(976, middle - 9, "backward", "small middle gradient-word")]
    parts += [arrow([(446, middle), (412, middle), (412, bottom + 18)], "gradient", "gradient-tip")]
    parts += [text(402, middle - 5, "scales the gradients", "small right gradient-word")]
    parts += [text(402, middle + 13, "of each modality", "small right gradient-word")]

    for row, (kind, words) in enumerate(
        {"line": "forward", "gradient": "gradients", "line hidden": "missing"}.items()
    ):
        parts += [line([(24, below + 14 + 24 * row), (56, below + 14 + 24 * row)], kind)]
        parts += [text(66, below + 18.5 + 24 * row, words, "small")]
    return document(below + tall + 22, "Architecture of msa_online", parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else TARGET).write_text(draw(), encoding="utf-8")
