# SPDX-License-Identifier: Apache-2.0
"""Clips that would cost gigabytes or days are refused from their header, naming value and limit."""

import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from feature_extractors import Clip, ClipError, decode, limits
from feature_extractors.limits import Deadline


def png(path: Path, width: int, height: int, depth: int = 1, rows: int | None = None) -> Path:
    """A gray picture of any size in few bytes; it may end after some rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    row = bytes(1 + -(-width * depth // 8))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def wav(path: Path, rate: int, channels: int, seconds: float = 0.1) -> Path:
    """Silence of any rate and number of channels."""
    size = 2 * channels * round(rate * seconds)
    layout = struct.pack("<HHIIHH", 1, channels, rate, 2 * rate * channels % 2**32, 2 * channels, 16)
    content = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", size) + bytes(size)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(content)) + content)
    return path


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (30_000, 1, "pictures of 30000 x 1 pixels, an aspect ratio beyond 16:1"),
        (1, 30_000, "pictures of 1 x 30000 pixels, an aspect ratio beyond 16:1"),
        (9_000, 8_000, "pictures of more than 67,108,864 pixels in all, or of damaged size"),
        (30_000, 30_000, "pictures of more than 67,108,864 pixels in all, or of damaged size"),
    ],
)
def test_extreme_pictures_are_refused_from_their_header(tmp_path, width, height, words):
    path = png(tmp_path / "bomb.png", width, height, rows=min(height, 9))
    assert path.stat().st_size < 20_000
    with pytest.raises(ClipError) as caught:
        decode(Clip(path))
    assert caught.value.problem == "picture too large" and words in str(caught.value)
    assert "with ffmpeg" in str(caught.value)


def test_a_picture_beyond_the_limit_is_not_decoded_when_its_file_is_opened(tmp_path):
    path = png(tmp_path / "bomb.png", 15_000, 15_000, depth=16, rows=9)
    assert path.stat().st_size < 2_000
    command = (
        "import re, sys; from feature_extractors import Clip, ClipError, decode\n"
        "try: decode(Clip(sys.argv[1]))\n"
        # of this program alone: ru_maxrss also counts the process that started it
        "except ClipError as error: print(error.problem, *re.findall(r'VmHWM:\\s*(\\d+)', "
        "open('/proc/self/status').read()))"
    )
    ran = subprocess.run([sys.executable, "-c", command, path], capture_output=True, text=True, check=True)
    problem, kilobytes = ran.stdout.rsplit(maxsplit=1)
    assert problem == "picture too large"
    assert int(kilobytes) < 250_000  # the decoded picture alone has 450 MB


def test_the_largest_real_pictures_are_accepted(tmp_path):
    for width, height in ((7_680, 4_320), (8_192, 8_192), (3_840, 1_080)):
        limits.check_picture(Path("x"), width, height)
    assert decode(Clip(png(tmp_path / "8k.png", 7_680, 4_320))).frames.shape == (1, 480, 853, 3)


@pytest.mark.parametrize(
    ("rate", "channels", "words"),
    [
        (48_000, 65, "65 sound channels, more than 64"),
        (1, 1, "sound of 1 samples a second, outside 1,000 to 768,000"),
        (1_000_000, 1, "sound of 1,000,000 samples a second, outside"),
    ],
)
def test_sound_that_cannot_be_resampled_sensibly_is_refused(tmp_path, rate, channels, words):
    with pytest.raises(ClipError) as caught:
        decode(Clip(wav(tmp_path / "a.wav", rate, channels, seconds=3 if rate == 1 else 0.1)))
    assert caught.value.problem == "unusual sound" and words in str(caught.value)


@pytest.mark.parametrize(("rate", "channels"), [(4_000, 1), (8_000, 1), (192_000, 2), (48_000, 64)])
def test_sound_of_real_recorders_is_accepted(tmp_path, rate, channels):
    assert len(decode(Clip(wav(tmp_path / "a.wav", rate, channels))).waveform) == 1600


def test_a_recording_that_is_too_long_is_refused_whole_and_accepted_in_windows(tmp_path):
    path = wav(tmp_path / "interview.wav", 1_000, 1, seconds=3 * 3600)
    with pytest.raises(ClipError, match=r"the clip lasts 10,800 s, more than 3,600 s; give start and end"):
        decode(Clip(path))
    with pytest.raises(ClipError, match=r"the window lasts 5,000 s, more than 3,600 s"):
        decode(Clip(path, 100, 5_100))
    assert len(decode(Clip(path, 9_000, 9_010)).waveform) == 160_000


def test_too_many_streams_are_refused(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4", seconds=0.2)
    monkeypatch.setattr(limits, "MAX_STREAMS", 1)
    with pytest.raises(ClipError, match=r"has 2 streams, more than 1; keep one video and one audio stream"):
        decode(Clip(path))


def test_too_many_frames_are_refused(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4", seconds=1, fps=25)
    monkeypatch.setattr(limits, "MAX_FRAMES", 20)
    with pytest.raises(ClipError, match=r"declares 25 frames, more than 20; cut it"):
        decode(Clip(path))


def test_fragments_that_declare_too_many_frames_are_refused_before_an_index_is_made(tmp_path, make_clip):
    import av

    whole = make_clip(tmp_path / "clip.mp4", seconds=1)
    path = tmp_path / "fragments.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert len(decode(Clip(path)).frames) == 8
    content = bytearray(path.read_bytes())
    at = content.index(b"trun") + 8
    assert struct.unpack(">I", content[at : at + 4])[0] <= 25
    content[at : at + 4] = struct.pack(">I", 80_000_000)
    path.write_bytes(content)
    with pytest.raises(ClipError, match=r"declares 80,000,\d\d\d frames, more than 20,000,000"):
        decode(Clip(path))


def test_pictures_that_grow_after_the_header_are_refused(tmp_path):
    import av

    path = tmp_path / "growing.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for number in range(20):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = (64, 64) if number < 10 else (2_720, 160)
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 10)
            picture = np.zeros((encoder.height, encoder.width, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuvj420p")
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = encoder.time_base, stream
                container.mux(packet)
    with pytest.raises(ClipError, match="2720 x 160 pixels, an aspect ratio beyond 16:1"):
        decode(Clip(path))


@pytest.mark.parametrize("suffix", [".mp4", ".png", ".wav"])
def test_a_clip_that_takes_too_long_is_refused_in_this_process(tmp_path, make_clip, monkeypatch, suffix):
    path = tmp_path / f"clip{suffix}"
    {".mp4": lambda: make_clip(path), ".png": lambda: png(path, 9, 9), ".wav": lambda: wav(path, 8_000, 1)}[
        suffix
    ]()
    monkeypatch.setattr(limits, "OPENING_SECONDS", -1.0)
    monkeypatch.setattr(limits, "SECONDS_PER_SECOND", 0.0)
    with pytest.raises(ClipError, match="takes longer than the -1 s allowed .*; convert it") as caught:
        decode(Clip(path))
    assert caught.value.problem == "too slow"


def test_the_time_allowed_grows_with_what_is_decoded(tmp_path, make_clip):
    deadline = Deadline(tmp_path / "clip.mp4")
    assert deadline.seconds == limits.OPENING_SECONDS
    decode(Clip(make_clip(deadline.path, seconds=2)), deadline=deadline)
    assert deadline.seconds == pytest.approx(limits.OPENING_SECONDS + 2 * limits.SECONDS_PER_SECOND, abs=1)


class Impatient(Deadline):
    """Allows a number of checks."""

    def __init__(self, path, allowed=float("inf")):
        super().__init__(path)
        self.checks, self.allowed = 0, allowed

    def check(self):
        self.checks += 1
        if self.checks > self.allowed:
            raise limits.too_slow(self.path, self.seconds)


def test_time_is_checked_while_a_long_file_is_decoded(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", seconds=2)
    patient = Impatient(path)
    decode(Clip(path), deadline=patient)
    with pytest.raises(ClipError, match="takes longer"):
        decode(Clip(path), deadline=Impatient(path, patient.checks // 2))
    assert patient.checks > 100


def test_time_is_checked_while_a_file_is_searched_for_references_to_others(tmp_path):
    path = tmp_path / "boxes.mov"
    path.write_bytes(struct.pack(">I4s", 8, b"free") * 1_000)
    with pytest.raises(ClipError, match="takes longer"):
        decode(Clip(path), deadline=Impatient(path, 500))
