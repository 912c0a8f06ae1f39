# SPDX-License-Identifier: Apache-2.0
"""Recordings as cameras make them: what is kept of a frame is what a viewer would see."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from feature_extractors import BLENDSHAPE_NAMES, Clip, ClipError, FaceExtractor, decode
from feature_extractors.pictures import HLG, PQ, tone_map, upright

SMILE = BLENDSHAPE_NAMES.index("mouthSmileLeft")


@pytest.fixture(scope="module")
def face_extractor():
    with FaceExtractor() as extractor:
        yield extractor


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """The astronaut's face, (256, 256, 3)."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[0:256, 96:352])


def write_video(
    path: Path,
    pictures,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    matrix=None,
    **tags,
) -> Path:
    """Pictures (RGB arrays or ready frames) as a file of ten frames a second; tags are set on the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "12"} if options is None else options)
        first = pictures[0]
        stream.height, stream.width = (
            first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        )
        stream.pix_fmt = pixel_format
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, picture in enumerate(pictures):
            if isinstance(picture, np.ndarray):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                picture = picture.reformat(format=pixel_format)
            picture.pts, picture.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def frames_of(path: Path, **options) -> np.ndarray:
    return decode(Clip(path), **options).frames


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean absolute difference of pictures in gray levels."""
    return float(np.abs(ours.astype(float) - theirs.astype(float)).mean())


def scores(face_extractor, frames: np.ndarray) -> np.ndarray:
    """Blendshapes (frames, 52) of frames that all show a face."""
    faces = face_extractor.extract(frames)
    assert faces.found.all()
    return faces.blendshapes


def fixed_point(a: float, b: float, c: float, d: float) -> list[int]:
    """A display matrix as files store it."""
    one = 1 << 16
    return [round(a * one), round(b * one), 0, round(c * one), round(d * one), 0, 0, 0, 1 << 30]


def shown(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Each pixel (x, y) moved to (a x + c y, b x + d y), and all of them into the first quadrant."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    result = np.zeros((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    result[new_y, new_x] = picture
    return result


EIGHT = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]
EIGHT += [(0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("matrix", EIGHT)
def test_a_video_stored_turned_mirrored_or_transposed_is_shown_upright(tmp_path, portrait, suffix, matrix):
    stored = portrait[:192]  # not square, so that a wrong transposition shows
    path = write_video(tmp_path / f"clip{suffix}", [stored] * 3, matrix=fixed_point(*matrix))
    (frame, *_) = frames_of(path)
    expected = shown(stored, *matrix)
    assert frame.shape == expected.shape and difference(frame, expected) < 4


def test_a_mirrored_face_keeps_its_smile(tmp_path, portrait, face_extractor):
    path = write_video(tmp_path / "clip.mp4", [portrait[:, ::-1]] * 3, matrix=fixed_point(-1, 0, 0, 1))
    assert scores(face_extractor, frames_of(path))[:, SMILE].min() > 0.8


@pytest.mark.parametrize("degrees", [30, -50, 135])
def test_any_rotation_is_undone(tmp_path, portrait, degrees):
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    large = cv2.copyMakeBorder(portrait, *[64] * 4, cv2.BORDER_CONSTANT)
    turn = cv2.getRotationMatrix2D((191.5, 191.5), degrees, 1.0)  # counterclockwise; the matrix undoes it
    stored = cv2.warpAffine(large, turn, (384, 384))
    path = write_video(tmp_path / "clip.mp4", [stored] * 2, matrix=fixed_point(cosine, sine, -sine, cosine))
    (frame, *_) = frames_of(path, max_height=2000)
    top, left = (np.array(frame.shape[:2]) - 384) // 2
    inner = (slice(120, 264), slice(120, 264))
    assert difference(frame[top : top + 384, left : left + 384][inner], large[inner]) < 8


def test_a_damaged_display_matrix_is_ignored():
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert upright(picture, None) is picture


@pytest.mark.parametrize(
    ("suffix", "codec", "aspect"),
    [
        (".mp4", "libx264", Fraction(64, 45)),
        (".mkv", "mpeg4", Fraction(64, 45)),
        (".avi", "mpeg4", Fraction(64, 45)),
        (".ts", "mpeg2video", Fraction(64, 45)),
        (".mov", "qtrle", Fraction(64, 45)),  # the frame has none, the container has
        (".mp4", "libx264", Fraction(8, 9)),
    ],
)
def test_pixels_that_are_not_square_are_shown_so(tmp_path, portrait, face_extractor, suffix, codec, aspect):
    if codec == "mpeg2video":  # says the aspect of the whole picture, of which it knows few
        aspect = Fraction(4, 3)
        stored = cv2.resize(portrait, (256, 256))
    else:
        stored = cv2.resize(portrait, (round(256 / aspect / 2) * 2, 256), interpolation=cv2.INTER_AREA)
    path = write_video(
        tmp_path / f"clip{suffix}",
        [stored] * 5,
        codec=codec,
        pixel_format="rgb24" if codec == "qtrle" else "yuv420p",
        sample_aspect_ratio=aspect,
        options={"b": "4000000"} if codec in ("mpeg4", "mpeg2video") else {},
    )
    frames = frames_of(path)
    assert frames.shape[1:3] == (256, round(stored.shape[1] * aspect))
    if codec != "mpeg2video":
        plain = scores(face_extractor, portrait[None])
        assert np.abs(scores(face_extractor, frames) - plain).sum(1).max() < 2.5


def test_an_aspect_that_flattens_the_picture_is_refused(tmp_path, portrait):
    path = write_video(tmp_path / "clip.mp4", [portrait] * 2, sample_aspect_ratio=Fraction(40, 1))
    with pytest.raises(ClipError, match="10240 x 256 pixels, an aspect ratio beyond"):
        decode(Clip(path))


def write_changing(path: Path, *parts: np.ndarray) -> Path:
    """Transport streams of pictures of several sizes, one after the other."""
    pieces, start = [], 0
    for number, picture in enumerate(parts):
        piece = path.with_name(f"{number}.ts")
        with av.open(str(piece), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "12", "bf": "0"})
            stream.height, stream.width = picture.shape[:2]
            stream.pix_fmt = "yuv420p"
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = start, Fraction(1, 10)
                start += 1
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        pieces.append(piece.read_bytes())
    path.write_bytes(b"".join(pieces))
    return path


def test_frames_that_change_their_shape_are_not_squashed(tmp_path, portrait, face_extractor):
    wide = cv2.copyMakeBorder(portrait, 0, 0, 100, 100, cv2.BORDER_CONSTANT)
    tall = cv2.copyMakeBorder(portrait, 100, 100, 0, 0, cv2.BORDER_CONSTANT)
    half = cv2.resize(wide, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    frames = frames_of(write_changing(tmp_path / "clip.ts", half, wide, tall))
    assert frames.shape[1:3] == (456, 456)
    smiles = scores(face_extractor, frames)[:, SMILE]
    assert len(frames) == 8 and smiles.min() > 0.8


def interlace(pictures: np.ndarray, top_first: bool) -> np.ndarray:
    """Frames of two moments each: even lines from one picture, odd lines from the next, or the reverse."""
    frames = pictures[0::2].copy()
    if top_first:
        frames[:, 1::2] = pictures[1::2, 1::2]
    else:
        frames[:, 0::2] = pictures[1::2, 0::2]
    return frames


def moving(portrait: np.ndarray, height: int, step: int, count: int) -> np.ndarray:
    """A face of `height` pixels that moves `step` pixels to the right from one picture to the next."""
    face = cv2.resize(portrait, (height, height), interpolation=cv2.INTER_AREA)
    width = (height + step * count + 15) // 16 * 16
    pictures = np.full((count, height, width, 3), 90, np.uint8)
    for number, picture in enumerate(pictures):
        picture[:, number * step : number * step + height] = face
    return pictures


INTERLACED = {
    "h264 top": (".mp4", {"codec": "libx264", "options": {"crf": "12", "x264-params": "tff=1"}}, True),
    "h264 bottom": (".mkv", {"codec": "libx264", "options": {"crf": "12", "x264-params": "bff=1"}}, False),
    "mpeg2": (".mpg", {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "b": "9000000"}}, True),
    "by container": (".mkv", {"codec": "ffv1", "field_order": 2}, True),
    "by container, bottom": (".mkv", {"codec": "ffv1", "field_order": 3}, False),
}


@pytest.mark.parametrize("height", [288, 576])
@pytest.mark.parametrize("kind", INTERLACED)
def test_interlaced_video_is_read_as_one_moment(tmp_path, portrait, face_extractor, height, kind):
    suffix, options, top_first = INTERLACED[kind]
    pictures = moving(portrait, height, step=8, count=12)
    plain = write_video(tmp_path / "plain.mp4", pictures[0::2])
    woven = write_video(tmp_path / f"woven{suffix}", interlace(pictures, top_first), **options)
    expected = scores(face_extractor, frames_of(plain, num_frames=5))
    ours = scores(face_extractor, frames_of(woven, num_frames=5))
    assert np.abs(ours - expected).sum(1).max() < 1.2


def test_the_marks_of_progressive_video_are_believed(tmp_path, portrait):
    stripes = portrait.copy()
    stripes[::2] = 0
    path = write_video(tmp_path / "clip.mp4", [stripes] * 3, options={"crf": "4"})
    assert difference(frames_of(path)[0], stripes) < 12


def color_bars(height: int, width: int) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    colors = [(200, 40, 40), (40, 180, 60), (50, 60, 200), (225, 180, 150)]
    for number, color in enumerate(colors):
        picture[:, number * width // 4 : (number + 1) * width // 4] = color
    return picture


@pytest.mark.parametrize(
    ("height", "width", "matrix", "tag"),
    [
        (720, 1280, "ITU709", None),
        (1280, 720, "ITU709", None),
        (360, 640, "ITU601", None),
        (576, 720, "ITU601", None),
        (360, 640, "ITU709", 1),
        (720, 1280, "ITU601", 6),
        (720, 1280, "ITU709", 3),  # a reserved number says nothing
    ],
)
def test_colours_are_read_with_the_matrix_they_were_written_with(tmp_path, height, width, matrix, tag):
    bars = color_bars(height, width)
    frame = av.VideoFrame.from_ndarray(bars, "rgb24").reformat(format="yuv444p", dst_colorspace=matrix)
    frame.colorspace = 2 if tag is None else tag
    path = write_video(
        tmp_path / "clip.mkv",
        [frame] * 2,
        codec="libx264",
        pixel_format="yuv444p",
        options={"crf": "4"},
        colorspace=2 if tag is None else tag,
    )
    (ours, *_) = frames_of(path, max_height=2000)
    assert difference(ours, bars) < 3


def test_full_range_video_keeps_its_contrast(tmp_path):
    bars = color_bars(240, 320)
    frame = av.VideoFrame.from_ndarray(bars, "rgb24").reformat(format="yuv444p", dst_color_range="JPEG")
    path = write_video(
        tmp_path / "clip.mp4", [frame] * 2, pixel_format="yuv444p", options={"crf": "4"}, color_range=2
    )
    assert difference(frames_of(path)[0], bars) < 3


def test_a_colour_coding_that_cannot_be_read_is_named(tmp_path):
    frame = av.VideoFrame.from_ndarray(color_bars(64, 64), "rgb24").reformat(format="yuv444p")
    frame.colorspace = 8
    path = write_video(tmp_path / "clip.mkv", [frame] * 2, pixel_format="yuv444p", colorspace=8)
    with pytest.raises(ClipError, match="its colours are coded as YCgCo"):
        decode(Clip(path))


def hdr_signal(picture: np.ndarray, transfer: int) -> np.ndarray:
    """An SDR picture as an HDR one (height, width, 3) uint16 with BT.2020 colours; white is 203 cd/m2."""
    light = (picture / 255.0) ** 2.2
    primaries = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    light = light @ primaries.T
    if transfer == PQ:
        power = (light * 203 / 10_000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        shown_light = light * 0.203
        luminance = shown_light @ [0.2627, 0.6780, 0.0593]
        scene = shown_light * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
        above = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), above)
    return np.rint(np.clip(signal, 0, 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx265"), (".mkv", "ffv1")])
def test_hdr_video_is_shown_as_sdr(tmp_path, portrait, face_extractor, transfer, suffix, codec):
    frame = av.VideoFrame.from_ndarray(hdr_signal(portrait, transfer), "rgb48le")
    frame = frame.reformat(format="yuv420p10le", dst_colorspace="BT2020")
    frame.color_trc, frame.color_primaries, frame.colorspace = transfer, 9, 9
    path = write_video(
        tmp_path / f"clip{suffix}",
        [frame] * 2,
        codec=codec,
        pixel_format="yuv420p10le",
        options={"x265-params": "log-level=none:crf=10"} if codec == "libx265" else {},
        color_trc=transfer,
        color_primaries=9,
        colorspace=9,
    )
    frames = frames_of(path)
    assert difference(frames[0], portrait) < 8
    assert np.abs(scores(face_extractor, frames) - scores(face_extractor, portrait[None])).sum(1).max() < 1.2


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_tone_mapping_goes_from_black_to_white_without_wrapping(transfer):
    ramp = np.repeat(np.linspace(0, 65535, 512).astype(np.uint16)[None, :, None], 3, axis=2)
    gray = tone_map(ramp, transfer).astype(int)[0]
    assert gray[0].tolist() == [0, 0, 0] and gray[-1].min() >= 250
    assert (np.diff(gray[:, 1]) >= 0).all() and np.ptp(gray, axis=1).max() <= 2


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [
        (".mov", "qtrle", "argb"),
        (".mov", "png", "rgba"),
        (".png", "png", "rgba"),
        (".mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_transparent_pictures_stand_on_black(tmp_path, portrait, suffix, codec, pixel_format):
    alpha = np.zeros(portrait.shape[:2], np.uint8)
    alpha[:128], alpha[128:192] = 255, 128  # what lies below is hidden
    frame = av.VideoFrame.from_ndarray(np.dstack([portrait, alpha]), "rgba").reformat(format=pixel_format)
    count = 1 if suffix == ".png" else 2
    path = tmp_path / f"clip{suffix}"
    if suffix == ".png":
        packets = _encoded(frame, codec, pixel_format)
        path.write_bytes(packets)
    else:
        write_video(path, [frame] * count, codec=codec, pixel_format=pixel_format, options={})
    (ours, *_) = frames_of(path)
    assert difference(ours, portrait * (alpha[..., None] / 255.0)) < 3


def test_transparent_webm_stands_on_black(tmp_path, portrait):
    alpha = np.full(portrait.shape[:2], 255, np.uint8)
    alpha[128:] = 0
    frame = av.VideoFrame.from_ndarray(np.dstack([portrait, alpha]), "rgba").reformat(format="yuva420p")
    path = write_video(
        tmp_path / "clip.webm",
        [frame] * 3,
        codec="libvpx-vp9",
        pixel_format="yuva420p",
        options={"crf": "10", "b": "2000000"},
    )
    frames = frames_of(path)
    assert len(frames) == 3 and difference(frames[1], portrait * (alpha[..., None] > 0)) < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_by_their_exif_orientation(tmp_path, portrait, orientation):
    encoded = cv2.imencode(".jpg", portrait[:192, :, ::-1])[1].tobytes()
    entry = struct.pack("<HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entry
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + encoded[2:])
    assert difference(frames_of(path)[0], cv2.imread(str(path))[..., ::-1]) < 3


def _encoded(frame: av.VideoFrame, codec: str, pixel_format: str) -> bytes:
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, pixel_format
    encoder.time_base = Fraction(1, 10)
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode()))
