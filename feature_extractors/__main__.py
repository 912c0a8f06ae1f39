# SPDX-License-Identifier: Apache-2.0
"""`python -m feature_extractors clip.mp4`: show what a model sees and hears of a clip."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from feature_extractors.clip import ClipFeatures, RawClip

STRONGEST = 6
"""Number of blendshapes shown in the table."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 1 with one line on stderr if the clip cannot be used."""
    options = _parser().parse_args(arguments)
    from rich.console import Console

    from feature_extractors.assets import get_asset
    from feature_extractors.catalogue import AssetError
    from feature_extractors.clip import ClipError

    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        model = get_asset("face_landmarker", progress=errors.print)
        _show(options, model, Console())
    except (AssetError, ClipError, ValueError, OSError) as error:
        errors.print(f"error: {error}", style="red")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from feature_extractors.clip import FACE_CHOICES

    parser = argparse.ArgumentParser(
        prog="python -m feature_extractors", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("clip", type=Path, help="a video or audio file of any container")
    parser.add_argument("--start", type=float, help="beginning of the window in seconds")
    parser.add_argument("--end", type=float, help="end of the window in seconds")
    parser.add_argument("--audio-track", type=int, metavar="N", help="number of the audio track, from 1")
    parser.add_argument(
        "--region",
        type=float,
        nargs=4,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="part of the frame in which the face is, as shares of the frame: 0.5 0 0.5 1 is the right half",
    )
    parser.add_argument(
        "--face-choice", choices=FACE_CHOICES, default=FACE_CHOICES[0], help="which face if there are several"
    )
    parser.add_argument(
        "--save-contact-sheet",
        type=Path,
        metavar="PNG",
        help="write a picture of the sampled frames next to their face crops",
    )
    return parser


def _show(options: argparse.Namespace, model: Path, console: "Console") -> None:
    """Extract the features, print the table, and write the sheet on request."""
    import numpy as np

    from feature_extractors.clip import Clip, ExtractionSettings
    from feature_extractors.contact_sheet import save_contact_sheet
    from feature_extractors.extraction import decode_for, measure
    from feature_extractors.face import FaceExtractor

    settings = ExtractionSettings(face_choice=options.face_choice)
    region = tuple(options.region) if options.region else None
    clip = Clip(options.clip, options.start, options.end, region, options.audio_track)
    raw = decode_for(clip, settings)
    with FaceExtractor(settings, model) as face_extractor:
        features = measure(raw, settings, face_extractor, region)
    console.print(_table(options.clip, raw, features))
    sheet = options.save_contact_sheet
    if sheet and len(raw.frames) == 0:
        console.print("contact sheet: not written, there is no frame to show")
    elif sheet:
        title = f"{options.clip.name}   {raw.duration:.2f} s   {_faces(features)}"
        kept = np.isin(raw.timestamps.astype(np.float32), features.timestamps)
        save_contact_sheet(sheet, raw.frames[kept], features, title)
        console.print(f"contact sheet: {sheet}", soft_wrap=True, highlight=False, markup=False)


def _table(path: Path, raw: "RawClip", features: "ClipFeatures") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from feature_extractors.clip import SAMPLE_RATE, printable

    table = Table(title=escape(printable(path.name)), show_header=False, title_justify="left", min_width=60)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("duration", f"{raw.duration:.2f} s")
    table.add_row("streams", " + ".join(["video"] * raw.has_video + ["audio"] * raw.has_audio))
    table.add_row("frames", _frames(raw))
    table.add_row("faces", _faces(features))
    table.add_row("strongest blendshapes", _strongest(features))
    table.add_row("audio level", _level(raw))
    table.add_row("sound", f"{len(features.waveform):,} samples at {SAMPLE_RATE // 1000} kHz")
    style, findings = ("yellow", ", ".join(features.findings)) if features.findings else ("green", "none")
    table.add_row("findings", findings, style=style)
    return table


def _frames(raw: "RawClip") -> str:
    if len(raw.frames) == 0:
        return "none"
    height, width = raw.frames.shape[1:3]
    times = f"{raw.timestamps[0]:.2f} to {raw.timestamps[-1]:.2f} s"
    return f"{len(raw.frames)} of {width} x {height} pixels, shown at {times}"


def _faces(features: "ClipFeatures") -> str:
    return f"face in {int(features.face_found.sum())} of {len(features.face_found)} frames"


def _strongest(features: "ClipFeatures") -> str:
    """Names and mean scores over the frames with a face, the highest first."""
    from feature_extractors.face import BLENDSHAPE_NAMES

    if not features.has_face:
        return "-"
    means = features.blendshapes[features.face_found].mean(0)
    order = means.argsort()[::-1][:STRONGEST]
    return ", ".join(f"{BLENDSHAPE_NAMES[index]} {means[index]:.2f}" for index in order)


def _level(raw: "RawClip") -> str:
    """Mean and peak level relative to full scale."""
    import numpy as np

    if len(raw.waveform) == 0 or not raw.waveform.any():
        return "no sound at all" if raw.has_audio else "-"
    rms, peak = np.sqrt(np.mean(raw.waveform**2)), np.abs(raw.waveform).max()
    return f"{20 * np.log10(rms):.1f} dB on average, peak {20 * np.log10(peak):.1f} dB"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
