# SPDX-License-Identifier: Apache-2.0
"""A prediction as HTML, in words for visitors who do not know the model."""

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from feature_extractors import ClipError
from feature_extractors.clip import printable
from msa_online.modalities import MODALITIES
from msa_online.pipeline import HIDDEN, Prediction
from msa_online.timeline import Timeline, draw_timeline

NAMES = {"text": "What was said", "audio": "How it was said", "vision": "The face"}
START = "Starting point"
MOST_CLASSES = 8
MARGIN = 0.06
"""Free share of the plot of contributions at each side."""

STYLE = """
.msa { font-size: 1rem; line-height: 1.45; }
.msa h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .5rem; }
.msa p { margin: .3rem 0; }
.msa .small { opacity: .75; font-size: .9rem; }
.msa .empty { border: 1px dashed var(--border-color-primary); border-radius: 6px; padding: 6rem 1rem;
  text-align: center; }
.msa .answer { font-size: 2.6rem; font-weight: 650; line-height: 1.15; font-variant-numeric: tabular-nums; }
.msa .warning { border-left: 4px solid #c8771e; padding: .4rem .8rem; margin: .6rem 0;
  background: color-mix(in srgb, #c8771e 10%, transparent); }
.msa .track { position: relative; height: 1.1rem; background: var(--background-fill-secondary);
  border-radius: 3px; }
.msa .track > * { position: absolute; top: 0; bottom: 0; }
.msa .range { background: color-mix(in srgb, #2a6fbb 30%, transparent); border-radius: 3px; }
.msa .mark { width: 4px; margin-left: -2px; background: #2a6fbb; border-radius: 2px; top: -.2rem;
  bottom: -.2rem; }
.msa .zero { width: 1px; background: var(--body-text-color-subdued); opacity: .6; }
.msa .ends { display: flex; justify-content: space-between; }
.msa .rows { display: grid; grid-template-columns: minmax(7.5rem, max-content) 1fr max-content;
  gap: .45rem .8rem; align-items: center; font-variant-numeric: tabular-nums; }
.msa .rows .value { text-align: right; }
.msa .up { background: #2a6fbb; } .msa .down { background: #d9822b; }
.msa .up, .msa .down { border-radius: 2px; min-width: 2px; }
.msa .link { width: 2px; margin-left: -1px; background: var(--body-text-color); }
.msa .total { font-weight: 650; }
.msa .off { opacity: .65; }
.msa .faces { display: grid; grid-template-columns: repeat(auto-fill, minmax(3rem, 1fr)); gap: .4rem; }
.msa .faces img { width: 100%; aspect-ratio: 1; border-radius: 4px; object-fit: cover; }
.msa ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.msa .plot { width: 100%; background: white; border-radius: 4px; }
@media (max-width: 480px) {
  .msa .rows { gap: .45rem .5rem; font-size: .93rem; }
  .msa .faces { grid-template-columns: repeat(4, 1fr); }
}
"""


def result_html(result: Prediction | Timeline, crops: np.ndarray, label_range: Sequence[float] | None) -> str:
    """The answer for one clip.

    Args:
        result: The prediction, or that of a long recording.
        crops: Face crops (faces, size, size, 3) uint8 RGB that the model used; may be empty.
        label_range: Smallest and largest label; None if unknown.
    """
    prediction = result.overall if isinstance(result, Timeline) else result
    parts = [] if prediction.warning is None else [f'<p class="warning">{escape(prediction.warning)}.</p>']
    parts += _score(prediction, label_range) if prediction.label is None else _classes(prediction)
    if prediction.contributions:
        parts += _contributions(prediction)
    if isinstance(result, Timeline):
        parts += _timeline(result, label_range)
    if len(crops):
        parts.append("<h3>The face as the model saw it</h3>")
        pictures = "".join(f'<img alt="face crop" src="{_data_url(crop)}">' for crop in crops)
        parts.append(f'<div class="faces">{pictures}</div>')
    if notes := _notes(prediction):
        parts.append("<h3>Notes</h3><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return _div(parts)


def problem_html(problem: str) -> str:
    """One line about what could not be predicted, and why."""
    return _div([f'<p class="warning" role="alert">{escape(printable(problem))}</p>'])


def clip_problem(error: ClipError) -> str:
    """Why a clip cannot be used, with its name in place of its path on the server."""
    return f"{error.path.name} cannot be used: {error.detail}. Give another recording."


def _div(parts: Iterable[str]) -> str:
    return f'<div class="msa">{"".join(parts)}</div>'


def _score(prediction: Prediction, label_range: Sequence[float] | None) -> list[str]:
    score, interval = prediction.score, prediction.interval
    parts = ['<p class="small">Predicted score</p>', f'<div class="answer">{_signed(score)}</div>']
    if label_range is not None:
        low, high = label_range
        has_sign = low < 0 < high

        def place(value: float) -> float:
            return 100 * (min(max(value, low), high) - low) / (high - low)

        band = "" if interval is None else _bar("range", place(interval.low), place(interval.high))
        zero = f'<div class="zero" style="left:{place(0):.1f}%"></div>' if has_sign else ""
        mark = f'<div class="mark" style="left:{place(score):.1f}%"></div>'
        ends = [f"{value:+g}".replace("-", "−") for value in (low, high)]
        if has_sign:
            ends = [f"{ends[0]} negative", f"positive {ends[1]}"]
        parts += [
            f'<div class="track" role="img" aria-label="score on its scale">{band}{zero}{mark}</div>',
            f'<div class="ends small"><span>{ends[0]}</span><span>{ends[1]}</span></div>',
        ]
    if interval is not None:
        unsure = ": too uncertain to tell negative from positive" if interval.low < 0 < interval.high else ""
        parts.append(
            f"<p>For {interval.level:.0%} of such clips, people's rating is between "
            f"{_signed(interval.low)} and {_signed(interval.high)}{unsure}.</p>"
        )
    return parts


def _classes(prediction: Prediction) -> list[str]:
    ranked = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])
    parts = ['<p class="small">Most probable class</p>']
    parts += [f'<div class="answer">{escape(printable(prediction.label))}</div>', '<div class="rows">']
    for name, probability in ranked[:MOST_CLASSES]:
        bar = _bar("up", 0, 100 * probability)
        parts += _row(escape(printable(name)), f'<div class="track">{bar}</div>', f"{probability:.0%}")
    parts.append("</div>")
    if prediction.confidence is not None:
        parts.append('<p class="small">The probabilities are calibrated on validation clips.</p>')
    return parts


def _contributions(prediction: Prediction) -> list[str]:
    """Bars that begin where the one above ends, from the baseline to the prediction."""
    is_score = prediction.label is None
    text = _signed if is_score else lambda value: f"{100 * value:+.0f} %".replace("-", "−")
    total = prediction.score if is_score else prediction.probabilities[prediction.label]
    ends = [prediction.baseline]
    for name in MODALITIES:
        ends.append(ends[-1] + prediction.contributions[name])
    low, high = min(0.0, *ends), max(0.0, *ends)
    spread = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (MARGIN + (1 - 2 * MARGIN) * (value - low) / spread)

    zero = f'<div class="zero" style="left:{place(0):.1f}%"></div>'

    def mark(value: float) -> str:
        return f'<div class="track">{zero}<div class="link" style="left:{place(value):.1f}%"></div></div>'

    what = "score" if is_score else f"probability of {escape(printable(prediction.label))}"
    parts = ["<h3>What moved the prediction</h3>", '<div class="rows">']
    parts += _row(START, mark(ends[0]), text(ends[0]))
    for name, start, end in zip(MODALITIES, ends, ends[1:], strict=False):
        if name in prediction.missing:
            reason = "off" if prediction.missing[name] == HIDDEN else "missing"
            parts += _row(NAMES[name], f'<div class="track">{zero}</div>', reason, "off")
            continue
        bar = _bar("up" if end >= start else "down", place(min(start, end)), place(max(start, end)))
        parts += _row(NAMES[name], f'<div class="track">{zero}{bar}</div>', text(end - start))
    parts += _row(f"= {what}", mark(total), text(total), "total")
    about = (
        f"The rows add up. The starting point is the {what} without any clip; blue raises it, orange lowers "
        "it. They show what the model reacts to, not whether it is right."
    )
    return [*parts, "</div>", f'<p class="small">{about}</p>']


def _row(name: str, plot: str, value: str, kind: str = "") -> list[str]:
    """The three cells of a row; the arguments are HTML."""
    return [
        f'<div class="{kind}">{name}</div>',
        plot,
        f'<div class="value {kind}">{value}</div>',
    ]


def _bar(kind: str, start: float, end: float) -> str:
    """A bar from `start` to `end`, in percent of the track."""
    return f'<div class="{kind}" style="left:{start:.1f}%;width:{end - start:.1f}%"></div>'


def _timeline(timeline: Timeline, label_range: Sequence[float] | None) -> list[str]:
    picture = io.BytesIO()
    draw_timeline(timeline, picture, label_range)
    return [
        "<h3>Along the recording</h3>",
        f'<img class="plot" alt="prediction over time" src="{_png_url(picture.getvalue())}">',
    ]


def _notes(prediction: Prediction) -> list[str]:
    """Everything that limits the prediction, in sentences."""
    heard = prediction.transcript
    return [
        *([f"{heard.model} heard, perhaps wrongly: {heard.text}"] if heard and heard.text else []),
        *_reasons(prediction.missing),
        *(f"{NAMES[name]}: only a part was read: {what}." for name, what in prediction.cut.items()),
        *(f"Found: {finding}." for finding in prediction.findings),
    ]


def _reasons(missing: Mapping[str, str]) -> list[str]:
    return [f"{NAMES[name]}: not used: {why}." for name, why in missing.items() if why != HIDDEN]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _data_url(crop: np.ndarray) -> str:
    import cv2

    _, encoded = cv2.imencode(".png", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))
    return _png_url(encoded.tobytes())


def _png_url(content: bytes) -> str:
    return f"data:image/png;base64,{b64encode(content).decode()}"
