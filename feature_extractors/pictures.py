# SPDX-License-Identifier: Apache-2.0
"""Convert decoded video frames to RGB pictures as a viewer shows them.

Decoders return what is stored: fields of two moments in one frame, pixels that are not square, pictures lying
on their side or mirrored, HDR signals, transparent areas. A `PictureConverter` undoes all of this.
"""

from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from feature_extractors import limits
from feature_extractors.clip import ClipError

if TYPE_CHECKING:
    import av

UNSPECIFIED, BT709, BT2020 = 2, 1, 9
"""Numbers of colour matrices in ITU-T H.273, which FFmpeg uses."""

MATRICES = {1, 4, 5, 6, 7, 9}
"""Colour matrices that FFmpeg's scaler knows."""

UNSUPPORTED = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "Y'D'zD'x", 13: "constant luminance"}
UNSUPPORTED |= {14: "ICtCp", 15: "IPT-C2"}
"""Colour matrices that FFmpeg's scaler does not know. Reserved numbers mean no matrix."""

PQ, HLG = 16, 18
"""Numbers of the HDR transfer characteristics in ITU-T H.273."""

HD_LONG, HD_SHORT = 1280, 720
"""A frame with a side of this length or more is HD; without a colour matrix it is read as BT.709."""

REFERENCE_WHITE = 203.0
"""Luminance in cd/m2 of diffuse white in HDR video (ITU-R BT.2408); it becomes SDR white, nearly."""

HLG_PEAK = 1000.0
"""Peak luminance in cd/m2 of the display for which HLG is shown (ITU-R BT.2100)."""

KNEE = 0.8
"""Share of SDR white above which tone mapping compresses highlights."""

SDR_GAMMA = 2.2

TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
"""Linear light with BT.2020 primaries to BT.709 primaries (ITU-R BT.2087)."""

PICTURE_CODECS = {
    "png",
    "apng",
    "mjpeg",
    "jpegls",
    "webp",
    "tiff",
    "libjxl",
    "jpegxl",
    "jpeg2000",
    "libdav1d",
}
"""Codecs whose frames may have a colour profile. PyAV crashes when it frees the profile of a frame."""

ICC_PROFILE = 15
"""Number of FFmpeg's kind of side data for colour profiles."""

NEW_SIDE_DATA = range(28, 48)
"""Numbers of FFmpeg's kinds of side data that PyAV does not know."""

STRAIGHT = 1.0
"""Rotations that differ from quarter turns by fewer degrees than this are quarter turns."""

FLAGS_ITS_FRAMES = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vc1", "wmv3", "vp8", "vp9", "av1"}
"""Codecs whose frames are flagged as interlaced or not; for others the flag of the container is used."""


ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that return transparency for codecs whose usual decoder drops it."""


def decoder_of(stream: "av.stream.Stream") -> "av.CodecContext":
    """The stream's decoder, or one that also returns the transparency that the container declares."""
    import av

    own = stream.codec_context
    declared = {name.lower(): value for name, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if not declared or own.name not in ALPHA_DECODERS:
        return own
    try:
        decoder = av.CodecContext.create(ALPHA_DECODERS[own.name], "r")
    except av.codec.codec.UnknownCodecError:  # an FFmpeg built without libvpx
        return own
    decoder.thread_count, decoder.options = 1, {"max_pixels": str(limits.MAX_PIXELS)}
    return decoder


class DecodedFrame(NamedTuple):
    """A frame, with the properties of the decoder at the time of decoding.

    Attributes:
        frame: The decoded frame.
        pixel_aspect: Width of a pixel by its height.
        fields: "tff" or "bff" for an interlaced frame by its first field, "auto" where the frame itself knows
            the first field, None for a progressive frame.
    """

    frame: "av.VideoFrame"
    pixel_aspect: Fraction
    fields: str | None


class PictureConverter:
    """Converts the frames of one video stream.

    Attributes:
        max_height: Pictures whose shorter side is longer than this are scaled down, keeping their shape.
    """

    def __init__(self, path: Path, stream: "av.VideoStream", max_height: int):
        """Create a converter for one stream of the file at `path`, before its first frame is decoded."""
        from av.video.reformatter import VideoReformatter

        self.max_height = max_height
        self._path = path
        self._of_picture = stream.codec_context.name in PICTURE_CODECS
        self._decoder = stream.codec_context
        self._flags_its_frames = self._decoder.name in FLAGS_ITS_FRAMES
        self._of_container = stream.sample_aspect_ratio
        self._at_first = self._decoder.sample_aspect_ratio
        self._reformatter = VideoReformatter()  # one for all frames: creating it costs more than using it

    def receive(self, frame: "av.VideoFrame") -> DecodedFrame:
        """The frame with the current properties of the decoder."""
        return DecodedFrame(frame, self._pixel_aspect(), self._fields(frame))

    def convert(
        self, this: DecodedFrame, before: DecodedFrame | None = None, after: DecodedFrame | None = None
    ) -> np.ndarray:
        """The picture (height, width, 3), uint8 RGB, as a viewer sees it.

        Args:
            this: The frame wanted.
            before: The frame that was decoded before it, if any; interlaced frames need both neighbours.
            after: The frame that is decoded after it, if any.

        Raises:
            ClipError: The colours are coded in a way that cannot be read, or the pixels so far from square
                that the picture has an extreme shape.
        """
        frame, transfer = this.frame, this.frame.color_trc
        matrix = display_matrix(frame, self._of_picture)
        if this.fields:
            frame = _deinterlaced(this, before, after)
        colors = self._color_matrix(frame)
        if _has_alpha(frame):
            frame = _on_black(frame, colors)
        size = self._size(frame.width, frame.height, this.pixel_aspect)
        if transfer in (PQ, HLG):
            signal = self._reformat(frame, size, "rgb48le", colors)
            return upright(tone_map(signal, transfer, wide=this.frame.color_primaries != BT709), matrix)
        return upright(self._reformat(frame, size, "rgb24", colors), matrix)

    def _size(self, width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
        """Width and height of the picture before rotation."""
        shown_width = width * float(pixel_aspect)
        limits.check_picture(self._path, max(1, round(shown_width)), height)
        scale = min(1.0, self.max_height / min(shown_width, height))
        return max(1, round(shown_width * scale)), max(1, round(height * scale))

    def _reformat(
        self, frame: "av.VideoFrame", size: tuple[int, int], pixel_format: str, color_matrix: int
    ) -> np.ndarray:
        return self._reformatter.reformat(
            frame, *size, pixel_format, src_colorspace=color_matrix, interpolation="AREA", threads=1
        ).to_ndarray()

    def _color_matrix(self, frame: "av.VideoFrame") -> int:
        """The frame's colour matrix; if it has none, BT.2020 for HDR and BT.709 for HD."""
        if frame.colorspace in UNSUPPORTED:
            detail = f"cannot be decoded (its colours are coded as {UNSUPPORTED[frame.colorspace]})"
            raise ClipError(self._path, "undecodable", detail)
        if frame.colorspace in MATRICES:
            return frame.colorspace
        if frame.color_trc in (PQ, HLG):
            return BT2020
        sides = sorted((frame.width, frame.height))
        return BT709 if sides[1] >= HD_LONG or sides[0] >= HD_SHORT else UNSPECIFIED

    def _pixel_aspect(self) -> Fraction:
        """The pixel aspect ratio of the container, else of the stream, which may change, else 1."""
        now = self._decoder.sample_aspect_ratio
        changed = now and now != self._at_first and self._of_container == self._at_first
        return (now if changed else self._of_container or now) or Fraction(1)

    def _fields(self, frame: "av.VideoFrame") -> str | None:
        """Which field of an interlaced frame is first; see `DecodedFrame`."""
        if frame.interlaced_frame:
            return "auto"
        if self._flags_its_frames:
            return None
        return {2: "tff", 3: "bff", 4: "bff", 5: "tff"}.get(self._decoder.field_order)


def together(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of any sizes as one array (pictures, height, width, 3).

    Where sizes differ, each picture is scaled up, keeping its shape, to the largest height and width, and
    centred on black.
    """
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    return np.stack([_fitted(picture, int(height), int(width)) for picture in pictures])


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    import cv2

    if picture.shape[:2] == (height, width):
        return picture
    scale = min(height / picture.shape[0], width / picture.shape[1])
    shown_height, shown_width = round(picture.shape[0] * scale), round(picture.shape[1] * scale)
    top, left = (height - shown_height) // 2, (width - shown_width) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + shown_height, left : left + shown_width] = cv2.resize(
        picture, (shown_width, shown_height), interpolation=cv2.INTER_LINEAR
    )
    return canvas


def display_matrix(frame: "av.VideoFrame", of_picture: bool = False) -> np.ndarray | None:
    """The (2, 2) matrix that maps stored to displayed directions (x, y); None if there is none.

    Args:
        frame: A decoded frame.
        of_picture: Whether its codec is one of `PICTURE_CODECS`.
    """
    from av.sidedata.sidedata import Type

    try:
        side_data = (_without_other_side_data(frame) if of_picture else frame).side_data
    except ValueError:  # PyAV knows fewer kinds of it than FFmpeg and then gives none at all
        side_data = _without_other_side_data(frame).side_data
    data = side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5] / 65536.0
    matrix = np.array([[a, c], [b, d]])
    lengths = np.linalg.norm(matrix, axis=0)  # scale is in the pixel aspect ratio already
    if not lengths.all() or abs(np.linalg.det(matrix / lengths)) < 0.5:
        return None  # flattens the picture: damaged
    return matrix / lengths


def _without_other_side_data(frame: "av.VideoFrame") -> "av.VideoFrame":
    """The frame without the kinds of side data that PyAV does not know, or that crash it."""
    kinds = (ICC_PROFILE, *NEW_SIDE_DATA)
    return _filtered([frame], *(f"sidedata=delete:type={kind}" for kind in kinds))[0]


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Mirror, transpose and rotate a picture (height, width, 3) by a display matrix.

    Args:
        picture: The picture as stored.
        matrix: What `display_matrix` returned. Rotations other than quarter turns put the picture on black,
            large enough to show all of it.
    """
    if matrix is None:
        return picture
    lies = abs(matrix[0, 1]) + abs(matrix[1, 0]) > abs(matrix[0, 0]) + abs(matrix[1, 1])
    exact = np.sign(matrix) * (np.eye(2)[::-1] if lies else np.eye(2))
    if lies:
        picture = picture.transpose(1, 0, 2)
    if exact[0].sum() < 0:
        picture = picture[:, ::-1]
    if exact[1].sum() < 0:
        picture = picture[::-1]
    rest = matrix @ exact.T
    angle = np.degrees(np.arctan2(rest[1, 0] - rest[0, 1], rest[0, 0] + rest[1, 1]))
    picture = np.ascontiguousarray(picture)
    return picture if abs(angle) < STRAIGHT else _rotated(picture, angle)


def _rotated(picture: np.ndarray, angle: float) -> np.ndarray:
    """The picture rotated clockwise by an angle in degrees, on black."""
    import cv2

    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -angle, 1.0)
    cosine, sine = np.abs(turn[0, :2])
    new_width, new_height = round(width * cosine + height * sine), round(width * sine + height * cosine)
    turn[:, 2] += (new_width - width) / 2, (new_height - height) / 2
    return cv2.warpAffine(picture, turn, (new_width, new_height), flags=cv2.INTER_LINEAR)


def _deinterlaced(
    this: DecodedFrame, before: DecodedFrame | None, after: DecodedFrame | None
) -> "av.VideoFrame":
    """The first field of a frame, its missing lines interpolated in space and time (bwdif)."""
    frame = this.frame
    shape = (frame.width, frame.height, frame.format.name)
    near = [each.frame for each in (before, this, after) if each is not None]
    near = [each for each in near if (each.width, each.height, each.format.name) == shape]
    return _filtered(near, f"bwdif=mode=send_frame:parity={this.fields}:deint=all")[near.index(frame)]


def _filtered(frames: "list[av.VideoFrame]", *filters: str) -> "list[av.VideoFrame]":
    """Frames of one size and format after a chain of FFmpeg's filters that give one frame for each."""
    import av

    first, base = frames[0], Fraction(1, 25)
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=base)
    chain = [graph.add(*each.split("=", 1)) for each in filters]
    graph.link_nodes(source, *chain, graph.add("buffersink")).configure()
    times = [(frame.pts, frame.time_base) for frame in frames]
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, base
        graph.vpush(frame)
    graph.vpush(None)
    results = [graph.vpull() for _ in frames]
    for frame, (pts, time_base) in zip(frames, times, strict=True):
        frame.pts, frame.time_base = pts, time_base
    return results


def _has_alpha(frame: "av.VideoFrame") -> bool:
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def _on_black(frame: "av.VideoFrame", color_matrix: int) -> "av.VideoFrame":
    """The frame composed on black before scaling, so that hidden colours do not bleed into visible ones."""
    import av

    rgba = frame.reformat(format="rgba", src_colorspace=color_matrix, threads=1).to_ndarray()
    alpha = rgba[..., 3:].astype(np.uint16)
    composed = ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
    return av.VideoFrame.from_ndarray(composed, "rgb24")


def tone_map(signal: np.ndarray, transfer: int, wide: bool = True) -> np.ndarray:
    """Convert an HDR picture to SDR: diffuse white becomes white, brighter highlights are compressed.

    Args:
        signal: RGB values (height, width, 3), uint16.
        transfer: `PQ` or `HLG`.
        wide: Whether the primaries are those of BT.2020; otherwise those of BT.709.

    Returns:
        The picture (height, width, 3), uint8 RGB, with BT.709 primaries.
    """
    light = _linear_light(transfer)[signal]
    if transfer == HLG:  # OOTF of the display (ITU-R BT.2100): system gamma 1.2 on the luminance
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = light * np.maximum(luminance, 1e-6)[..., None] ** 0.2 * HLG_PEAK
    primaries = TO_BT709 if wide else np.eye(3)
    light = np.maximum(light @ (primaries.T / REFERENCE_WHITE).astype(np.float32), 0)
    peak = light.max(axis=-1, keepdims=True)
    room = 1 - KNEE
    compressed = KNEE + room * np.tanh((peak - KNEE) / room)
    light *= np.where(peak > KNEE, compressed / np.maximum(peak, KNEE), 1)
    return np.rint(255 * light ** (1 / SDR_GAMMA)).astype(np.uint8)


@cache
def _linear_light(transfer: int) -> np.ndarray:
    """Light for each 16-bit signal (65536,), float32: cd/m2 for PQ, scene light in [0, 1] for HLG."""
    signal = np.linspace(0, 1, 65536)
    if transfer == PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        light = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)
