# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the path has to know the repository before its modules are imported
"""Damage media files at random and extract them as `msa-online prepare` does.

    python scripts/fuzz_media.py --files 2000 --seed 1111
    python scripts/fuzz_media.py --files 2000 --seed 1111 --folder DIR

The files are short clips in every container that PyAV can write here, and the media files in DIR. Each is
damaged in one way: flipped bits, a missing end, parts of other files, or absurd numbers beside the names of
header fields. Each must be read or be refused as a broken clip:

- no error other than ours ends the process that extracts, and a process that crashes costs only its clip;
- no clip takes longer than --seconds or more memory than --memory;
- features are finite.

The table shows for each container and kind of damage how many files were read and refused, the slowest, and
the most memory that a file took in addition to what the process had. If a rule is broken, the file is saved
in --output, and the exit status is 1. Files whose process crashed are saved too. Memory is measured on Linux.
"""

import argparse
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from feature_extractors import Clip, ClipError, ExtractionSettings, FeatureCache, get_asset
from feature_extractors.worker import WorkerError, extract_in_processes

# fmt: off
CONTAINERS = {
    ".mp4": ("libx264", "aac"), ".mov": ("mjpeg", "pcm_s16le"), ".mkv": ("libx265", "libopus"),
    ".webm": ("libvpx", "libopus"), ".avi": ("mpeg4", "libmp3lame"), ".flv": ("flv", "libmp3lame"),
    ".mpg": ("mpeg1video", "mp2"), ".ts": ("mpeg2video", "mp2"),
    ".wmv": ("wmv2", "wmav2"), ".mxf": ("mpeg2video", "pcm_s16le"), ".nut": ("ffv1", "pcm_s16le"),
    ".gif": ("gif", None), ".apng": ("apng", None), ".wav": (None, "pcm_s16le"), ".mp3": (None, "libmp3lame"),
    ".flac": (None, "flac"), ".ogg": (None, "libopus"), ".m4a": (None, "aac"), ".aac": (None, "aac"),
    ".aiff": (None, "pcm_s16be"), ".au": (None, "pcm_s16be"), ".caf": (None, "pcm_s16le"),
    ".ac3": (None, "ac3"), ".w64": (None, "pcm_s16le"), ".amr": (None, "amr_nb"),
}
"""Video and audio codec by container; those that this build of FFmpeg lacks are left out."""
# fmt: on
PICTURES = (".png", ".jpg", ".bmp", ".webp", ".tiff", ".ppm")
SETTINGS = ExtractionSettings(num_frames=2, face_size=32)
LARGEST = 2_000_000  # bytes of a file in --folder; larger ones are left out
AT_ONCE = 250  # files on the disk
EDGE = 4096  # bytes at both ends of a file in which headers lie
ABSURD = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x10000, 0x1000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


@dataclass
class Damaged:
    """One file.

    Attributes:
        path: Where it lies.
        container: Suffix of the intact file.
        damage: Kind of damage, a key of `DAMAGES`; "none" and "as found" for intact files of ours and others.
    """

    path: Path
    container: str
    damage: str


@dataclass
class Outcome:
    """What happened to the files of one container and one kind of damage, or to all."""

    read: int = 0
    refused: int = 0
    crashed: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0

    def count(self, result: object, seconds: float, megabytes: float) -> None:
        """Add one file."""
        problem = result.problem if isinstance(result, ClipError) else None
        self.read += problem is None
        self.crashed += problem == "crashed"
        self.refused += problem not in (None, "crashed")
        self.seconds, self.megabytes = max(self.seconds, seconds), max(self.megabytes, megabytes)

    def cells(self) -> tuple[str, ...]:
        """Cells of the table."""
        counts = (self.read, self.refused, self.crashed)
        return (str(sum(counts)), *map(str, counts), f"{self.seconds:.2f}", f"{self.megabytes:.0f}")


@dataclass
class Report:
    """What happened to all files.

    Attributes:
        outcomes: By container and kind of damage.
        problems: Number of refused files by kind of problem.
        violations: A line for each broken rule.
    """

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=lambda: defaultdict(Outcome))
    problems: Counter = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def intact_files(folder: Path) -> list[Path]:
    """Write one clip of half a second for each container and picture format that FFmpeg can write here."""
    written = []
    for suffix, (picture, sound) in CONTAINERS.items():
        path = folder / f"clip{suffix}"
        try:
            write_clip(path, picture, sound)
        except (av.error.FFmpegError, ValueError):  # this build lacks the codec or the container
            continue
        written.append(path)
    from PIL import Image

    for suffix in PICTURES:
        written.append(folder / f"picture{suffix}")
        Image.fromarray(_picture(0)).save(written[-1])
    return written


def write_clip(path: Path, picture: str | None, sound: str | None) -> None:
    """Write moving pictures, a tone, or both."""
    with av.open(str(path), "w") as container:
        streams = []
        if picture:
            video = container.add_stream(picture, rate=25)
            video.width, video.height = 160, 128
            video.pix_fmt = video.codec.video_formats[0].name
            video.options = {"x265-params": "log-level=none"} if picture == "libx265" else {}
            streams.append((video, map(_video_frame, range(13))))
        if sound:
            rate = 8_000 if sound == "amr_nb" else 44_100 if path.suffix == ".flv" else 48_000
            audio = container.add_stream(sound, rate=rate)
            audio.layout = "mono"
            audio.bit_rate = 12_200 if sound == "amr_nb" else 64_000
            container.start_encoding()
            streams.append((audio, _audio_frames(audio)))
        for stream, frames in streams:
            for frame in (*frames, None):
                container.mux(stream.encode(frame))


def _picture(number: int) -> np.ndarray:
    rows, columns = np.mgrid[:128, :160]
    return np.stack([rows + 9 * number, columns, rows * columns // 99], 2).astype(np.uint8)


def _video_frame(number: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(_picture(number))
    frame.pts, frame.time_base = number, Fraction(1, 25)
    return frame


def _audio_frames(stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Half a second of a tone, in frames of the encoder's size."""
    rate, size = stream.rate, stream.frame_size or 1024
    tone = (np.sin(np.arange(rate // 2) * 0.05) * 9_000).astype(np.int16)
    resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=size)
    frame = av.AudioFrame.from_ndarray(tone[None], "s16", "mono")
    frame.sample_rate = rate
    yield from resampler.resample(frame)
    yield from resampler.resample(None)


def media_in(folder: Path) -> list[Path]:
    """Files in a folder and below that have a suffix and are not too large."""
    files = sorted(path for path in folder.rglob("*") if path.suffix and path.is_file())
    return [path for path in files if 0 < path.stat().st_size <= LARGEST]


def flip_bits(content: bytearray, others: Sequence[bytes], rng: random.Random) -> bytearray:
    """Flip up to 64 bits, in half of the files only near the start."""
    end = min(EDGE, len(content)) if rng.random() < 0.5 else len(content)
    for _ in range(1 << rng.randrange(7)):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return content


def cut(content: bytearray, others: Sequence[bytes], rng: random.Random) -> bytearray:
    """Leave out the end, or a part in the middle."""
    begin = rng.randrange(1, len(content))
    end = rng.choice([len(content), rng.randrange(begin, len(content) + 1)])
    return content[:begin] + content[end:]


def splice(content: bytearray, others: Sequence[bytes], rng: random.Random) -> bytearray:
    """Insert or overwrite a part with one of another file, or of the same one."""
    other = rng.choice([rng.choice(others), bytes(content)])
    begin, source = rng.randrange(len(content)), rng.randrange(len(other))
    part = other[source : source + rng.randrange(1, 2 * EDGE)]
    content[begin : begin + rng.choice([0, len(part)])] = part
    return content


def absurd_header(content: bytearray, others: Sequence[bytes], rng: random.Random) -> bytearray:
    """Overwrite up to four numbers near the ends of the file, most of them beside the name of a field."""
    edges = bytes(content[:EDGE]), bytes(content[-EDGE:])
    names = [found.start() for found in re.finditer(rb"[A-Za-z][A-Za-z0-9 ]{3}", edges[0])]
    names += [
        max(len(content) - EDGE, 0) + found.start() for found in re.finditer(rb"[A-Za-z ]{4}", edges[1])
    ]
    for _ in range(rng.randrange(1, 5)):
        width = rng.choice([1, 2, 4, 4, 4, 8])
        value = rng.choice(ABSURD).to_bytes(8, "big")[-width:]
        if names and rng.random() < 0.8:
            at = rng.choice(names) + rng.choice([-4, 4, 8, 12, 16, 20, 24])
        else:
            at = rng.randrange(min(EDGE, len(content)))
        if 0 <= at <= len(content) - width:
            content[at : at + width] = value[:: rng.choice([1, -1])]
    return content


DAMAGES = {"bits": flip_bits, "cut": cut, "splice": splice, "header": absurd_header}


def damaged_files(intact: Sequence[Path], options: argparse.Namespace, folder: Path) -> Iterator[Damaged]:
    """Write files one by one; each depends on the seed, its number and the intact files alone."""
    contents = [path.read_bytes() for path in intact]
    for number in range(options.first, options.first + options.files):
        rng = random.Random(f"{options.seed} {number}")
        index = number % len(intact)
        damage = rng.choice(list(DAMAGES))
        content = DAMAGES[damage](bytearray(contents[index]), contents, rng)
        suffix = intact[index].suffix.lower()
        path = folder / f"{number:06d}-{damage}{suffix}"
        path.write_bytes(content)
        yield Damaged(path, suffix, damage)


class Memory:
    """Memory that the only child process takes for one file; zero where it cannot be measured."""

    def __init__(self):
        """Begin before any process is started."""
        self._process, self._before = 0, 0.0

    def growth(self) -> float:
        """Megabytes of the highest peak since the last call in addition to the memory at that call."""
        children = multiprocessing.active_children()
        status = Path(f"/proc/{children[0].pid}/status") if len(children) == 1 else Path("none")
        try:
            numbers = dict(re.findall(r"(VmHWM|VmRSS):\s*(\d+)", status.read_text()))
            status.with_name("clear_refs").write_text("5")  # the peak counts from now on
        except OSError:
            return 0.0
        same, before = children[0].pid == self._process, self._before
        self._process, self._before = children[0].pid, int(numbers["VmRSS"]) / 1000
        return max(int(numbers["VmHWM"]) / 1000 - before, 0.0) if same else 0.0


def extract_all(files: Sequence[Damaged], options: argparse.Namespace, work: Path, report: Report) -> None:
    """Extract files in one process at a time, and check each result."""
    by_key = {f"{number:064x}": file for number, file in enumerate(files)}
    cache, memory = FeatureCache(work / "cache"), Memory()
    clips = {key: Clip(file.path) for key, file in by_key.items()}
    missing = dict(by_key)
    began = None  # the first file includes the start of the process
    try:
        for key, result in extract_in_processes(clips, cache, SETTINGS, workers=1):
            seconds = time.monotonic() - began if began else 0.0
            check(missing.pop(key), result, seconds, memory.growth(), options, report)
            if not isinstance(result, ClipError) and not _finite(cache, key):
                break_rule(by_key[key], "has features that are not finite", options, report)
            began = time.monotonic()
    except WorkerError as error:
        report.violations.append(f"extraction ended: {error}")
    for file in missing.values():
        break_rule(file, "has no result", options, report)
    shutil.rmtree(work / "cache", ignore_errors=True)


def check(
    file: Damaged,
    result: object,
    seconds: float,
    megabytes: float,
    options: argparse.Namespace,
    report: Report,
) -> None:
    """Count one result, and compare it with the rules."""
    report.outcomes[file.container, file.damage].count(result, seconds, megabytes)
    if isinstance(result, ClipError):
        report.problems[result.problem] += 1
        if result.problem == "crashed":
            _save(file, options)
            if "ended with status" in result.detail:
                break_rule(file, f"raised another error than ours: {result.detail}", options, report)
        if file.damage == "none":
            break_rule(file, f"is intact and was refused: {result.detail}", options, report)
    if seconds > options.seconds:
        break_rule(file, f"took {seconds:.1f} s", options, report)
    if megabytes > options.memory:
        break_rule(file, f"took {megabytes:,.0f} MB of memory", options, report)


def break_rule(file: Damaged, what: str, options: argparse.Namespace, report: Report) -> None:
    """Record a broken rule, and save the file."""
    report.violations.append(f"seed {options.seed}: {_save(file, options)} {what}")


def _save(file: Damaged, options: argparse.Namespace) -> Path:
    """Copy a file to the folder of saved files."""
    options.output.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file.path, options.output / f"{options.seed}-{file.path.name}"))


def _finite(cache: FeatureCache, key: str) -> bool:
    features = cache.load(key)
    return all(
        np.isfinite(part).all() for part in (features.sound(), features.blendshapes, features.duration)
    )


def fuzz(options: argparse.Namespace) -> Report:
    """Damage and extract all files."""
    report = Report()
    get_asset("face_landmarker")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        for name in ("intact", "damaged"):
            (work / name).mkdir()
        written = intact_files(work / "intact")
        found = media_in(options.folder) if options.folder else []
        stream = chain(
            (Damaged(path, path.suffix, "none") for path in written),
            (Damaged(path, path.suffix.lower(), "as found") for path in found),
            damaged_files([*written, *found], options, work / "damaged"),
        )
        while files := list(islice(stream, AT_ONCE)):
            extract_all(files, options, work, report)
            shutil.rmtree(work / "damaged")
            (work / "damaged").mkdir()
    return report


def show(report: Report, options: argparse.Namespace, console: Console) -> None:
    """Print the table, the problems of refused files, and broken rules."""
    table = Table("container", "damage", "files", "read", "refused", "crashed", "slowest (s)", "memory (MB)")
    total = Outcome()
    for (container, damage), outcome in sorted(report.outcomes.items()):
        table.add_row(container, damage, *outcome.cells())
        for name in ("read", "refused", "crashed"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.seconds = max(total.seconds, outcome.seconds)
        total.megabytes = max(total.megabytes, outcome.megabytes)
    table.add_row("all", "", *total.cells())
    console.print(table)
    problems = ", ".join(f"{problem} {count}" for problem, count in report.problems.most_common())
    console.print(f"seed {options.seed}; refused: {problems or 'none'}", markup=False)
    for line in report.violations:
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(report.violations)} broken rules")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a rule is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200, help="number of damaged files (200)")
    parser.add_argument("--seed", type=int, default=1111, help="seed of the damage (1111)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to repeat one (0)")
    parser.add_argument("--folder", type=Path, help="folder with further media files, at most 2 MB each")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of a file (20)")
    parser.add_argument("--memory", type=float, default=1000.0, help="memory limit of a file in MB (1000)")
    parser.add_argument("--output", type=Path, default=Path("fuzz_failures"), help="folder of saved files")
    options = parser.parse_args(arguments)
    console = Console()
    report = fuzz(options)
    show(report, options, console)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
