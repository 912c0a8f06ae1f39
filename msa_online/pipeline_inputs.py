# SPDX-License-Identifier: Apache-2.0
"""What `MSAPipeline` takes: files, windows, bytes, arrays and transcripts, checked and paired."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any

from feature_extractors import Clip, ClipError, ExtractionSettings, RawClip, Upload, clip_of_arrays
from feature_extractors.transcript import Transcript
from msa_online.corpora.corpus import Corpus, CorpusError
from msa_online.corpora.layouts import VIDEO_SUFFIXES, find_layout
from msa_online.corpora.reading import read_corpus
from msa_online.processing_msa import clean_text

KEYS = ("clip", "text", "audio", "sampling_rate", "frames", "start", "end")
"""What can be given for one clip."""

# fmt: off
MEDIA_SUFFIXES = {
    *VIDEO_SUFFIXES, ".m4v", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".wmv",
    ".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aiff",
}
# fmt: on
"""Suffixes of the files in a folder that are taken for clips, in lower case."""

_MISSING = object()


@dataclass(frozen=True)
class Sample:
    """One checked input.

    Attributes:
        source: The recording; None for text only.
        text: The transcript; None if there is none.
        transcript: What a recogniser heard, of which `text` is the text; None if the text was given.
    """

    source: Clip | Upload | RawClip | None
    text: str | None
    transcript: Transcript | None = None

    @property
    def name(self) -> str | None:
        """Name of the file; None without one."""
        return str(self.source.path) if isinstance(self.source, Clip | Upload) else None


def samples_of(clips: Any, text: Any, settings: ExtractionSettings) -> Iterable[Sample]:
    """Check and pair clips and transcripts: lists at once, iterators one by one.

    Raises:
        ValueError: As in `MSAPipeline.__call__`.
    """
    if is_lazy(clips) or is_lazy(text):
        return _lazily(clips, text, settings)
    lists = (list, tuple)
    if clips is None and isinstance(text, lists):
        clips = [None] * len(text)
    if text is None and isinstance(clips, lists):
        text = [None] * len(clips)
    if not isinstance(clips, lists):
        raise ValueError(f"one clip but a list of {len(text)} texts: give a list of clips, or one text")
    if not isinstance(text, lists):
        raise ValueError(
            f"a list of {len(clips)} clips but one text: give a list with one text (or None) for each clip"
        )
    if len(clips) != len(text):
        raise ValueError(f"{len(clips)} clips but {len(text)} texts: give one text (or None) for each clip")
    pairs = enumerate(zip(clips, text, strict=True), start=1)
    return [sample_of(settings, clip, transcript, number) for number, (clip, transcript) in pairs]


def _lazily(clips: Any, text: Any, settings: ExtractionSettings) -> Iterator[Sample]:
    for name, values in (("clips", clips), ("texts", text)):
        if not (values is None or is_lazy(values) or isinstance(values, list | tuple)):
            raise ValueError(f"one of {name} but an iterator of the other: give lists or iterators of both")

    def paired() -> Iterator[tuple[Any, Any]]:
        if clips is None or text is None:
            yield from ((None, each) if clips is None else (each, None) for each in (clips or text))
            return
        for pair in zip_longest(clips, text, fillvalue=_MISSING):
            if _MISSING in (pair[0], pair[1]):
                fewer = "clips" if pair[0] is _MISSING else "texts"
                raise ValueError(f"too few {fewer}: give one text (or None) for each clip")
            yield pair

    return (sample_of(settings, *pair, number) for number, pair in enumerate(paired(), start=1))


def is_lazy(values: Any) -> bool:
    """Whether these are the items of a generator or another iterator; an open file is one item."""
    return isinstance(values, Iterator) and not hasattr(values, "read")


def sample_of(
    settings: ExtractionSettings,
    clip: Any = None,
    text: Any = None,
    number: int = 1,
    *,
    audio: Any = None,
    sampling_rate: int | None = None,
    frames: Any = None,
    start: float | None = None,
    end: float | None = None,
) -> Sample:
    """Check one input; `number` is its place, for messages.

    Raises:
        ValueError: As in `MSAPipeline.__call__`.
    """
    if isinstance(clip, Mapping):
        if unknown := sorted(map(str, clip.keys() - set(KEYS))):
            raise ValueError(f"clip {number} has {', '.join(unknown)}: known are {', '.join(KEYS)}")
        others = (text, audio, sampling_rate, frames, start, end)
        if any(value is not None for value in others):
            raise ValueError(f"clip {number} is a dict: give its text and all others in it")
        parts = dict(clip)
        return sample_of(settings, parts.pop("clip", None), parts.pop("text", None), number, **parts)
    if not isinstance(text, str | None):
        raise ValueError(f"text {number} is {text!r}: give a string, or None if there is none")
    windowed = start is not None or end is not None
    if audio is not None or frames is not None:
        if clip is not None:
            raise ValueError(f"clip {number} has a file and arrays: give one of them")
        if windowed:
            raise ValueError(f"clip {number} has arrays and a window: cut the arrays instead")
        return Sample(clip_of_arrays(settings, audio, sampling_rate, frames), text)
    if clip is None and windowed:
        raise ValueError(f"clip {number} has a window but no file")
    if clip is None and not clean_text(text):
        raise ValueError("nothing to predict from: give a clip, a text, or both")
    return Sample(_source(clip, number, start, end), text)


def _source(clip: Any, number: int, start: float | None, end: float | None) -> Clip | Upload | RawClip | None:
    if isinstance(clip, Clip | Upload | RawClip):
        if start is not None or end is not None:
            raise ValueError(f"clip {number} is a {type(clip).__name__}, which has its own window")
        return clip
    if clip is None:
        return None
    if isinstance(clip, str | Path):
        return Clip(Path(clip), start, end)
    if isinstance(clip, bytes | bytearray | memoryview):
        return Upload(clip, start, end)
    if isinstance(clip, TextIOBase):
        raise ValueError(f"clip {number} is a file opened as text: open it in binary mode")
    if hasattr(clip, "read"):
        return Upload(clip, start, end)
    raise ValueError(
        f"clip {number} is {clip!r}: give a path, a Clip, bytes, an open file, a dict of parts, or None"
    )


def files_in(
    paths: Iterable[Path], texts: Path | None = None, texts_optional: bool = False
) -> list[Sample | ClipError]:
    """The clips that paths name: files as they are, of folders all media files in them and below.

    Transcripts and windows come from a table: metadata.csv in a folder (or another layout that `read_corpus`
    knows), or `texts`. Each row that names a file is one clip, with its window, region and audio track. Files
    without a row have no transcript.

    Args:
        paths: Files and folders.
        texts: Table with the columns file_name (relative to its folder) and text.
        texts_optional: Tables may lack the column text.

    Returns:
        The clips, folders in the order of their names; a `ClipError` for each row that cannot be used.

    Raises:
        CorpusError: A table cannot be used, or a folder has no clips.
    """
    files: list[Path] = []
    tables = [texts] if texts else []
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*") if _is_media(each, path))
            if not texts and find_layout(path):
                tables.append(path)
            elif not found:
                raise CorpusError(f"{path} has no media files: give a folder of clips")
            files += found
        else:
            files.append(path)
    rows: dict[Path, list[Sample]] = {}
    broken: list[ClipError] = []
    for table in tables:
        corpus = read_corpus(table, label_column=None, skip_broken=True, texts_optional=texts_optional)
        broken += _broken_rows(corpus)
        for row in corpus.samples:
            rows.setdefault(row.clip.path.resolve(), []).append(Sample(row.clip, row.text or None))
    files = list(dict.fromkeys(files))
    listed = [rows.get(file.resolve(), [Sample(Clip(file), None)]) for file in files]
    return [*(sample for samples in listed for sample in samples), *broken]


def _is_media(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in MEDIA_SUFFIXES and not hidden and path.is_file()


def _broken_rows(corpus: Corpus) -> list[ClipError]:
    return [
        ClipError(Path(f"{row.source}, line {row.line}"), "bad row", row.problem) for row in corpus.broken
    ]
