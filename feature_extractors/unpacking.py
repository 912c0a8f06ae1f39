# SPDX-License-Identifier: Apache-2.0
"""Refuse files whose metadata unpack to gigabytes, before FFmpeg reads them.

FFmpeg unpacks the compressed texts and the colour profile of a PNG picture, wherever it is in a file, and the
compressed index of a QuickTime file, without a limit. It also allocates what a RIFF file declares for a text.
"""

import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from feature_extractors.clip import ClipError
from feature_extractors.limits import MAX_DECLARED, MAX_UNPACKED, Deadline

PNG = b"NG\r\n\x1a\n"
"""Signature of PNG and MNG pictures, without the first two bytes, in which they differ."""

PACKED_CHUNKS = (b"iCCP", b"zTXt")
"""PNG chunks that FFmpeg unpacks: a name, a zero byte, the method (one byte), and data packed with zlib."""

RIFF_TEXTS = b"INFO"
"""Type of a RIFF list of texts."""

LONGEST = max(len(PNG), len(RIFF_TEXTS)) - 1
"""Bytes of a signature that the read before may have."""


class MetadataGuard:
    """Looks at all bytes of a file on their way to FFmpeg, and measures metadata before FFmpeg gets them."""

    def __init__(self, path: Path, file: FileIO, deadline: Deadline):
        """Guard one open file; its position is kept."""
        self._path, self._file, self._deadline = path, file, deadline
        self._tail, self._end = b"", 0  # the last bytes read, and the position after them

    def look(self, data: bytes, position: int) -> None:
        """Look at bytes read from a position.

        Raises:
            ClipError: A picture or a list of texts begins in them whose metadata are too large.
        """
        if position != self._end:
            self._tail = b""
        joined, begin = self._tail + data, position - len(self._tail)
        for signature, measure in ((PNG, self._measure_picture), (RIFF_TEXTS, self._measure_texts)):
            at = joined.find(signature)
            while at >= 0:
                measure(begin + at + len(signature))
                self._file.seek(position + len(data))
                at = joined.find(signature, at + 1)
        self._tail, self._end = joined[-LONGEST:], position + len(data)

    def _measure_picture(self, position: int) -> None:
        """Unpack the metadata of the PNG picture whose chunks begin at a position, up to the limit."""
        unpacked = 0
        for name, begin, size in self._chunks(position):
            if name not in PACKED_CHUNKS:
                continue
            self._file.seek(begin)
            _, _, packed = self._file.read(min(size, MAX_UNPACKED)).partition(b"\0")
            unpacked += _unpacked_size(packed[1:], MAX_UNPACKED - unpacked)
            if max(size, unpacked) > MAX_UNPACKED:
                raise _too_large(self._path, MAX_UNPACKED)

    def _measure_texts(self, position: int) -> None:
        """Read the size of the RIFF list whose texts begin at a position."""
        self._file.seek(max(position - 12, 0))
        header = self._file.read(8)
        if header[:4] == b"LIST":
            check_declared(self._path, int.from_bytes(header[4:], "little"))

    def _chunks(self, position: int) -> Iterator[tuple[bytes, int, int]]:
        """Name, start and size of the content of each PNG chunk from a position on."""
        length = os.fstat(self._file.fileno()).st_size
        while position + 8 <= length:
            self._deadline.check()
            self._file.seek(position)
            header = self._file.read(8)
            name, size = header[4:], int.from_bytes(header[:4], "big")
            if not name.isalpha():
                return
            yield name, position + 8, size
            position += 12 + size


def check_declared(path: Path, size: int) -> None:
    """Check the size that a header declares for texts, or for an index that is unpacked.

    Raises:
        ClipError: It is too large.
    """
    if size > MAX_DECLARED:
        raise _too_large(path, MAX_DECLARED)


def _too_large(path: Path, limit: int) -> ClipError:
    return ClipError(
        path, "metadata too large", f"has metadata of more than {limit:,} bytes, or damaged ones"
    )


def _unpacked_size(packed: bytes, most: int) -> int:
    """Bytes to which data packed with zlib unpack; it stops beyond `most`, and where they are damaged."""
    unpacker, size = zlib.decompressobj(), 0
    try:
        while packed and size <= most:
            size += len(unpacker.decompress(packed, 1 << 16))
            packed = unpacker.unconsumed_tail
    except zlib.error:
        pass
    return size
