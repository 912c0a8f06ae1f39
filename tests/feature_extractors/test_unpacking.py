# SPDX-License-Identifier: Apache-2.0
"""Metadata that unpack to gigabytes are refused before FFmpeg unpacks them, wherever they are in a file."""

import gc
import multiprocessing
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import pytest

from feature_extractors import Clip, ClipError, decode, limits
from feature_extractors.limits import MAX_DECLARED, MAX_UNPACKED


def chunk(name: bytes, *content: bytes) -> bytes:
    joined = b"".join(content)
    return struct.pack(">I", len(joined)) + name + joined + struct.pack(">I", zlib.crc32(name + joined))


def picture(*metadata: bytes) -> bytes:
    """A gray PNG picture of 64 x 64 pixels."""
    header = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(65 * 64))
    parts = (chunk(b"IHDR", header), *metadata, chunk(b"IDAT", pixels), chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed(size: int) -> bytes:
    return zlib.compress(b"a" * size, 9)


def box(name: bytes, *content: bytes) -> bytes:
    joined = b"".join(content)
    return struct.pack(">I", 8 + len(joined)) + name + joined


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    joined = b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(joined)) + b"WAVE" + joined


SOUND = [
    (b"fmt ", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)),
    (b"LIST", b"INFO" + b"INAM" + struct.pack("<I", 4) + b"talk"),
    (b"data", bytes(32_000)),
]


def write(path: Path, content: bytes) -> Clip:
    path.write_bytes(content)
    return Clip(path)


def refused(clip: Clip) -> str:
    with pytest.raises(ClipError) as caught:
        decode(clip)
    assert caught.value.problem == "metadata too large"
    return str(caught.value)


BOMBS = {
    "colour profile": [chunk(b"iCCP", b"x\0\0", packed(MAX_UNPACKED + 1))],
    "text": [chunk(b"zTXt", b"x\0\0", packed(MAX_UNPACKED + 1))],
    "many texts": [chunk(b"zTXt", b"%d\0\0" % number, packed(1_000_000)) for number in range(33)],
    "damaged at its end": [chunk(b"zTXt", b"x\0\0", packed(MAX_UNPACKED + 1 << 1)[:-200], bytes(200))],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_picture_whose_metadata_unpack_to_too_much_is_refused(tmp_path, bomb):
    clip = write(tmp_path / "a.png", picture(*BOMBS[bomb]))
    assert clip.path.stat().st_size < 100_000
    assert "more than 32,000,000 bytes" in refused(clip)


def test_such_a_picture_in_a_video_or_as_a_cover_is_refused(tmp_path):
    import av

    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "gray"
        for number in range(3):
            packet = av.Packet(picture(*BOMBS["text"]) if number else picture())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 10), stream
            container.mux(packet)
    assert "bytes" in refused(Clip(path))
    cover = b"\0image/png\0\3\0" + picture(*BOMBS["colour profile"])
    size = bytes(len(cover) >> shift & 127 for shift in (21, 14, 7, 0))
    whole = bytes(len(cover) + 10 >> shift & 127 for shift in (21, 14, 7, 0))
    tag = b"ID3\4\0\0" + whole + b"APIC" + size + b"\0\0" + cover
    refused(write(tmp_path / "a.wav", tag + riff(*SOUND)))


def test_metadata_of_ordinary_size_are_accepted(tmp_path):
    profile = chunk(b"iCCP", b"x\0\0", packed(3_000_000))
    texts = [chunk(b"zTXt", b"%d\0\0" % number, packed(10_000)) for number in range(9)]
    for _ in range(5):  # a colour profile must not crash the process when frames are freed
        assert decode(write(tmp_path / "a.png", picture(profile, *texts))).frames.shape == (1, 64, 64, 3)
        gc.collect()
    assert len(decode(write(tmp_path / "a.wav", riff(*SOUND))).waveform) == 16_000


def test_a_signature_is_found_across_two_reads(tmp_path, monkeypatch):
    from feature_extractors.opening import _MediaFile

    clip = write(tmp_path / "a.png", picture(*BOMBS["text"]))
    read = _MediaFile.read
    monkeypatch.setattr(_MediaFile, "read", lambda self, size: read(self, min(size, 5)))
    refused(clip)


def test_a_list_of_texts_that_declares_gigabytes_is_refused(tmp_path):
    content = riff(*SOUND).replace(b"LIST" + struct.pack("<I", 16), b"LIST" + struct.pack("<I", 1 << 31))
    assert "more than 64,000,000 bytes" in refused(write(tmp_path / "a.wav", content))


def test_a_compressed_index_that_unpacks_to_too_much_is_refused(tmp_path):
    index = box(b"cmvd", struct.pack(">I", MAX_DECLARED + 1), packed(1_000))
    content = box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), index))
    refused(write(tmp_path / "a.mov", content))


def _allocate(extra: int, connection) -> None:
    limits.limit_memory(extra)
    try:
        connection.send(len(bytes(200_000_000)))
    except MemoryError:
        connection.send("refused")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux limits memory")
def test_a_process_gets_no_more_memory_than_its_limit():
    context = multiprocessing.get_context("spawn")
    for extra, expected in ((100_000_000, "refused"), (400_000_000, 200_000_000)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_allocate, args=(extra, theirs))
        process.start()
        assert ours.recv() == expected
        process.join()
