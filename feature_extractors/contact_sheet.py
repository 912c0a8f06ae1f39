# SPDX-License-Identifier: Apache-2.0
"""A picture of all sampled frames next to their face crops.

It shows problems that numbers hide: wrong faces, bad crops and rotated video.
"""

from pathlib import Path

import numpy as np

from feature_extractors.clip import ClipFeatures

PICTURE = 168
"""Height of frames and crops on the sheet in pixels."""

GAP = 14
CAPTION = 30
TITLE = 56
MAX_WIDTH = 1600

PAPER, INK, FAINT, GOOD, BAD = (
    (250, 250, 248),
    (32, 33, 36),
    (110, 113, 118),
    (24, 120, 60),
    (176, 42, 42),
)


def save_contact_sheet(path: Path, frames: np.ndarray, features: ClipFeatures, title: str) -> None:
    """Write the sheet as an image file.

    Args:
        path: The file; its suffix (.png, .jpg) sets the format. Parent folders are created.
        frames: The sampled RGB frames (frames, height, width, 3), uint8.
        features: The features extracted from these frames.
        title: Title of the sheet.

    Raises:
        ValueError: There is no frame to show.
        OSError: The file cannot be written.
    """
    import cv2

    if len(frames) == 0:
        raise ValueError("there is no frame to show on a contact sheet")
    tiles = [_tile(frame, features, index) for index, frame in enumerate(frames)]
    ok, encoded = cv2.imencode(path.suffix or ".png", _arrange(tiles, title)[..., ::-1])
    if not ok:
        raise OSError(f"cannot encode {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.tobytes())


def _tile(frame: np.ndarray, features: ClipFeatures, index: int) -> np.ndarray:
    """One frame with its crop on the right and a caption below."""
    import cv2

    width = max(1, round(frame.shape[1] * PICTURE / frame.shape[0]))
    found = bool(features.face_found[index])
    crop = cv2.resize(features.face_crops[index], (PICTURE, PICTURE), interpolation=cv2.INTER_CUBIC)
    if not found:
        crop[:] = (228, 228, 226)
        _write(crop, "no face", (PICTURE // 2 - 30, PICTURE // 2 + 6), FAINT, 16)
    shown = cv2.resize(frame, (width, PICTURE), interpolation=cv2.INTER_AREA)
    tile = np.full((PICTURE + CAPTION, width + PICTURE + 4, 3), PAPER, np.uint8)
    tile[:PICTURE, :width] = shown
    tile[:PICTURE, width + 4 :] = crop
    baseline = PICTURE + 20
    _write(tile, f"{features.timestamps[index]:.2f} s", (2, baseline), INK, 15)
    word, color = ("face found", GOOD) if found else ("not found", BAD)
    _write(tile, word, (width + 6, baseline), color, 15)
    return tile


def _arrange(tiles: list[np.ndarray], title: str) -> np.ndarray:
    """Arrange tiles in rows of about equal length under a title."""
    height, width = tiles[0].shape[:2]
    fitting = max(1, min(len(tiles), (MAX_WIDTH - GAP) // (width + GAP)))
    rows = -(-len(tiles) // fitting)
    columns = -(-len(tiles) // rows)
    shape = (TITLE + rows * (height + GAP), max(GAP + columns * (width + GAP), 520), 3)
    sheet = np.full(shape, PAPER, np.uint8)
    _write(sheet, title, (GAP, 36), INK, 20)
    for index, tile in enumerate(tiles):
        top = TITLE + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _write(
    picture: np.ndarray, text: str, at: tuple[int, int], color: tuple[int, int, int], size: int
) -> None:
    """Draw text into the picture; its baseline starts at `at` (x, y)."""
    import cv2

    cv2.putText(picture, text, at, color, cv2.FontFace("sans"), size, 400)
