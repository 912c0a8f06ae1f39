# SPDX-License-Identifier: Apache-2.0
"""Open one media file with FFmpeg, and no other file or address.

FFmpeg interprets names and contents: "http:talk.mp4" is an address, "img%03d.png" a series of images, and a
playlist opens all that it lists. Here FFmpeg does not see the name; it reads from a Python file object, which
is as fast. Only formats that contain their own media are accepted. A file that refers to another file is
refused.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from feature_extractors.clip import ClipError
from feature_extractors.limits import MAX_PIXELS, Deadline, check_frames
from feature_extractors.unpacking import MetadataGuard, check_declared

if TYPE_CHECKING:
    import av

# fmt: off
VIDEO_FORMATS = (
    "mov", "matroska", "webm", "avi", "flv", "live_flv", "kux", "mpeg", "mpegts", "mpegvideo", "asf", "rm",
    "ogg", "nut", "mxf", "gxf", "dv", "wtv", "nuv", "nsv", "swf", "ivf", "obu", "yuv4mpegpipe", "dhav",
    "ifv", "pva", "ty", "pmp", "lxf", "vivo", "smjpeg", "mjpeg", "mjpeg_2000", "m4v", "h261", "h263",
    "h264", "hevc", "vvc", "vc1", "vc1test", "dirac", "dnxhd", "cavsvideo", "av1", "apv", "evc", "avs2",
    "avs3",
)
AUDIO_FORMATS = (
    "wav", "w64", "aiff", "au", "caf", "mp3", "aac", "loas", "flac", "ape", "tta", "wv", "tak", "mpc",
    "mpc8", "shn", "ac3", "eac3", "ac4", "dts", "dtshd", "truehd", "mlp", "amr", "amrnb", "amrwb", "gsm",
    "g722", "g723_1", "g726", "g729", "ilbc", "sbc", "codec2", "lc3", "qcp", "voc", "sox", "ircam",
    "nistsphere", "avr", "iff", "oma", "aea", "dsf", "dss", "alaw", "mulaw", "xwma", "spdif", "iamf", "qoa",
    "osq", "mmf", "pvf", "paf", "sln", "act", "wve",
)
PICTURE_FORMATS = (
    "png_pipe", "apng", "jpeg_pipe", "jpegls_pipe", "jpegxl_pipe", "jpegxl_anim", "j2k_pipe", "bmp_pipe",
    "webp_pipe", "gif", "gif_pipe", "tiff_pipe", "ppm_pipe", "pgm_pipe", "pbm_pipe", "pam_pipe", "qoi_pipe",
)
SUBTITLE_FORMATS = ("srt", "ass", "webvtt")  # opened, then refused for having neither audio nor video
# fmt: on
FORMATS = VIDEO_FORMATS + AUDIO_FORMATS + PICTURE_FORMATS + SUBTITLE_FORMATS
"""FFmpeg's names of the accepted formats, which contain all their media in one file."""

PLAYLISTS = {
    "an M3U or HLS playlist": r"#EXTM3U",
    "an ffconcat list": r"(#.*\n\s*)*(ffconcat version|file\s+\S)",
    "a PLS playlist": r"\[playlist\]",
    "an ASF reference file": r"\[reference\]|ASF ",
    "a DASH manifest": r"<([\s\S]*<)?(\w+:)?MPD\b",
    "a Smooth Streaming manifest": r"<([\s\S]*<)?SmoothStreamingMedia\b",
    "an ASX playlist": r"<([\s\S]*<)?asx\b",
    "a SMIL or WPL playlist": r"(SMILtext\s*)?<([\s\S]*<)?smil\b",
    "an XSPF playlist": r"<([\s\S]*<)?playlist\b",
    "an IMF composition": r"<([\s\S]*<)?(\w+:)?(CompositionPlaylist|AssetMap|PackingList)\b",
    "a session description (SDP)": r"v=0\r?\n|(.*\n)*?c=IN IP",
    "a VobSub index": r"# VobSub index file",
    "a cue sheet": r"((REM|TITLE|PERFORMER|CATALOG|SONGWRITER)\b.*\n\s*)*FILE \"",
    "an internet shortcut": r"\[InternetShortcut\]",
    "a list of addresses": r"(#.*\n\s*)*(RTSPtext\s*)?[a-z][a-z0-9+.-]+://",
}
"""Files that refer to media instead of containing them, with a pattern of the start of their text."""

SNIFFED = 4096
"""Number of bytes at the start of a file in which playlists are recognised."""


@contextmanager
def open_media(path: Path, deadline: Deadline) -> Iterator["av.container.InputContainer"]:
    """Open the container in a file, in a `with` block.

    Args:
        path: An existing file.
        deadline: Time limit, checked at each read.

    Raises:
        ClipError: The file is a playlist or refers to other files, is not in an accepted format, has metadata
            that unpack to more than the limit, or exceeds the time limit.
        OSError: The file cannot be read, or FFmpeg cannot open it.
    """
    import av

    def refuse_further_files(url: str, flags: int, options: dict[str, str]) -> None:
        raise _names_others(path, f"a file that refers to {url!r}")

    with open(path, "rb", buffering=0) as file:
        if kind := _playlist_kind(file) or _reference_movie(path, file, deadline):
            raise _names_others(path, kind)
        file.seek(0)
        try:
            container = av.open(
                _MediaFile(path, file, deadline),
                container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"},
                options={"max_pixels": str(MAX_PIXELS)},  # opening a file decodes its first frames
                metadata_errors="replace",
                io_open=refuse_further_files,
            )
        except av.error.ArgumentError as error:  # FFmpeg's error for a format that is not accepted
            detail = "cannot be read: it is damaged, or not in an accepted audio or video format"
            raise ClipError(path, "format", detail) from error
        with container:
            yield container


def _names_others(path: Path, kind: str) -> ClipError:
    return ClipError(path, "playlist", f"is {kind}, which refers to media instead of containing them")


class _MediaFile:
    """File object for FFmpeg with a neutral name, a time limit, and a limit on metadata."""

    def __init__(self, path: Path, file: FileIO, deadline: Deadline):
        self.name = _hint(path)
        self._file, self._deadline = file, deadline
        self._guard = MetadataGuard(path, file, deadline)

    def read(self, size: int) -> bytes:
        self._deadline.check()
        position = self._file.tell()
        data = self._file.read(size)
        self._guard.look(data, position)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._deadline.check()
        try:
            return self._file.seek(offset, whence)
        except OSError as error:  # damaged files contain invalid offsets: FFmpeg handles the error
            return -(error.errno or 1)

    def tell(self) -> int:
        return self._file.tell()


def _hint(path: Path) -> str:
    """Neutral name with the file's suffix, which FFmpeg needs for headerless audio (.g722) and long ID3 tags.

    Suffixes of still images are dropped: FFmpeg would look for numbered series of files.
    """
    suffix = path.suffix[1:].lower()
    plain = suffix.isascii() and suffix.isalnum()
    return f"clip.{suffix}" if plain and suffix not in _picture_suffixes() else "clip"


@cache
def _picture_suffixes() -> set[str]:
    """Suffixes that FFmpeg treats as series of images."""
    from av import ContainerFormat

    return ContainerFormat("image2", "w").extensions


def _playlist_kind(file: FileIO) -> str | None:
    """Kind of playlist, recognised from the start of the text; None for media."""
    file.seek(0)
    head = file.read(SNIFFED)
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1"
    text = head.decode(encoding, "replace").removeprefix("\xef\xbb\xbf").lstrip()
    if "\0" in text:
        return None
    return next((kind for kind, begins in PLAYLISTS.items() if re.match(begins, text, re.IGNORECASE)), None)


def _reference_movie(path: Path, file: FileIO, deadline: Deadline) -> str | None:
    """Description of a QuickTime or MP4 file that refers to other files; None for all others.

    Raises:
        ClipError: Its index is compressed and unpacks to too many bytes, or its fragments declare too many
            frames.
    """
    size = file.seek(0, os.SEEK_END)
    frames = 0
    for name, begin, end in _boxes(file, 0, size, deadline):
        if not (name.isascii() and name.replace(b" ", b"a").isalnum()):
            return None  # not a QuickTime file, or damaged
        if name == b"moov":
            movie = list(_boxes(file, begin, end, deadline))
            _check_index(path, file, movie, deadline)
            references = [box for box in movie if box[0] == b"rmra"]
            tracks = (box for name, *box in movie if name == b"trak")
            if references or any(_is_external(file, *track, deadline) for track in tracks):
                return "a QuickTime reference movie"
        if name == b"moof":
            frames += _frames_in(file, begin, end, deadline)
            check_frames(path, frames)
    return None


def _frames_in(file: FileIO, begin: int, end: int, deadline: Deadline) -> int:
    """Number of frames that a movie fragment declares; FFmpeg makes an index of them without reading more."""
    frames = 0
    for name, run, run_end in _boxes(file, begin, end, deadline):
        if name == b"traf":
            frames += _frames_in(file, run, run_end, deadline)
        if name == b"trun":
            file.seek(run + 4)
            frames += int.from_bytes(file.read(4), "big")
    return frames


def _check_index(path: Path, file: FileIO, movie: list[tuple[bytes, int, int]], deadline: Deadline) -> None:
    """Check the size to which the compressed index of a movie unpacks, if it has one."""
    for _, begin, end in (box for box in movie if box[0] == b"cmov"):
        for name, content, _ in _boxes(file, begin, end, deadline):
            if name == b"cmvd":
                file.seek(content)
                check_declared(path, int.from_bytes(file.read(4), "big"))


def _is_external(file: FileIO, begin: int, end: int, deadline: Deadline) -> bool:
    """Whether a track's data references point to another file."""
    for wanted in (b"mdia", b"minf", b"dinf", b"dref"):
        boxes = _boxes(file, begin, end, deadline)
        found = next((box for name, *box in boxes if name == wanted), None)
        if found is None:
            return False
        begin, end = found
    for kind, entry, entry_end in _boxes(file, begin + 8, end, deadline):
        file.seek(entry)
        flags = int.from_bytes(file.read(4), "big")
        if kind in (b"alis", b"url ", b"urn ") and not flags & 1 and entry_end - entry > 4:
            return True
    return False


def _boxes(file: FileIO, begin: int, end: int, deadline: Deadline) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each MP4 box between two positions."""
    while begin + 8 <= end:
        deadline.check()
        file.seek(begin)
        header = file.read(16)
        length, content = int.from_bytes(header[:4], "big"), begin + 8
        if length == 1:
            length, content = int.from_bytes(header[8:16], "big"), begin + 16
        stop = end if length == 0 else begin + length
        if stop < content:
            return
        yield header[4:8], content, min(stop, end)
        begin = stop
