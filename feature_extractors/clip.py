# SPDX-License-Identifier: Apache-2.0
"""Data classes of a clip, of its decoded media and extracted features, and the error of a broken clip.

Everything here is plain data: it can be passed between processes and stored without pickle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
"""Samples per second of every waveform in this package."""

FULL_SCALE = 32_768
"""The sample that has amplitude 1, as in 16-bit recordings; the largest that int16 holds is one less."""

LARGEST_FACE = 2_048
"""Largest height and width of a face crop, in pixels: more than any vision encoder reads."""

NUM_BLENDSHAPES = 52
"""Expression scores per face."""

NO_VIDEO = "no video stream"
NO_FACE = "no face"
NO_AUDIO = "no audio stream"
SILENT_AUDIO = "silent audio"
SEVERAL_FACES = "several faces"
STILL_PICTURE = "still picture"
FINDINGS = (NO_VIDEO, NO_FACE, SEVERAL_FACES, STILL_PICTURE, NO_AUDIO, SILENT_AUDIO)
"""What a valid clip may lack, and what makes its face doubtful."""

FACE_CHOICES = ("largest", "most_speaking")
"""How the face to track is chosen if there are several."""

Region = tuple[float, float, float, float]
"""Part of the frame: x and y of its upper left corner, width and height, as shares of the frame."""


def audio_track_finding(track: int, tracks: int, silent: int | None = None) -> str:
    """The finding that names the audio track in use, counted from 1, and a silent default track."""
    return f"audio track {track} of {tracks}" + (f", track {silent} is silent" if silent else "")


def cancelled_channels_finding(channel: int) -> str:
    """The finding that names the only channel in use, counted from 1; the mean of all cancels out."""
    return f"opposite channels, only channel {channel} is used"


SCENE_CUT = "scene cut"
SHOWN_CUTS = 5


def scene_cuts_finding(times: Sequence[float]) -> str:
    """The finding that names scene cuts, in seconds from the start of the file."""
    shown = ", ".join(f"{time:.1f}" for time in times[:SHOWN_CUTS])
    more = f" s and {len(times) - SHOWN_CUTS:,} more" if len(times) > SHOWN_CUTS else " s"
    return f"{SCENE_CUT}{'s' * (len(times) > 1)} at {shown}{more}"


def kind_of(finding: str) -> str:
    """A finding without what differs from clip to clip, to count clips by it."""
    return f"{SCENE_CUT}s" if finding.startswith(SCENE_CUT) else finding


REMEDIES = {
    "missing": "check the path",
    "not a file": "give the path of one media file",
    "empty": "copy or download the file again",
    "undecodable": "check that it is an audio or video file, or convert it with ffmpeg",
    "truncated": "copy or download the file again",
    "bad window": "give start and end in seconds with 0 <= start < end",
    "bad region": "give x, y, width and height as shares of the frame, such as 0.5, 0, 0.5, 1",
    "window beyond clip": "give a window inside the clip, or leave start and end out",
    "no streams": "give a file with sound or moving pictures",
    "playlist": "give the media files it names, one clip each",
    "format": "convert it with ffmpeg, for example to mp4 or wav",
    "picture too large": "scale it down or crop it with ffmpeg",
    "too many frames": "cut it into shorter clips with ffmpeg",
    "too many streams": "keep one video and one audio stream with ffmpeg (-map 0:v:0 -map 0:a:0)",
    "too long": "give start and end of the part that counts",
    "no such track": "give the number of an audio track of the file, counted from 1",
    "unusual sound": "convert the sound with ffmpeg, for example with -ac 1 -ar 16000",
    "bad samples": "export the sound again, with finite samples from -1 to 1",
    "too slow": "convert it to a lower resolution with ffmpeg, or cut it into shorter clips",
    "metadata too large": "convert it with ffmpeg, without its metadata (-map_metadata -1)",
    "too much memory": "convert it to a lower resolution with ffmpeg, or leave it out",
    "bad row": "correct this row of the table",
    "crashed": "convert it with ffmpeg, or leave it out",
}


def printable(path: Path | str) -> str:
    """A file name as one printable line: control characters and invalid bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


class ClipError(ValueError):
    """A clip cannot be used; the message has the file, the problem and the remedy.

    Attributes:
        path: The file.
        problem: Kind of problem, a key of `REMEDIES`.
        detail: Description of the problem.
    """

    def __init__(self, path: Path, problem: str, detail: str):
        """Create the error of one file."""
        super().__init__(path, problem, detail)
        self.path = path
        self.problem = problem
        self.detail = detail

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.detail}; {REMEDIES[self.problem]}"


@dataclass(frozen=True)
class Clip:
    """A recording, or a time window of it.

    Attributes:
        path: A media file of any container format.
        start: Start of the window in seconds; None for the start of the file.
        end: End of the window in seconds; None for the end of the file.
        region: Part of the frame, as it is shown, that contains the face; None for the whole frame.
        audio_track: Number of the audio track, counted from 1; None for the default track, or for the first
            audible one if the default track is silent.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    region: Region | None = None
    audio_track: int | None = None


def is_region(region: Sequence[float]) -> bool:
    """Whether four numbers are a part of the frame that is not empty."""
    if len(region) != 4 or not all(math.isfinite(share) and share >= 0 for share in region):
        return False
    x, y, width, height = region
    return width > 0 and height > 0 and max(x + width, y + height) <= 1 + 1e-6


@dataclass(frozen=True)
class RawClip:
    """Decoded media of a clip.

    Attributes:
        frames: RGB frames (frames, height, width, 3), uint8; zero frames if there is no video.
        timestamps: Time of each frame (frames,), float64 seconds from the window's start.
        waveform: Mono sound (samples,), float32 at `SAMPLE_RATE`; sample 0 is at the window's start.
        duration: Length of the window in seconds.
        has_video: Whether there is a decodable video stream.
        has_audio: Whether there is a decodable audio stream.
        findings: What decoding found out: a still picture, scene cuts, the audio track in use if there are
            several, or the only channel.
        cuts: Times of scene cuts, in seconds from the window's start: of the first picture after each.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    waveform: np.ndarray
    duration: float
    has_video: bool
    has_audio: bool
    findings: tuple[str, ...] = ()
    cuts: tuple[float, ...] = ()


@dataclass(frozen=True)
class ExtractionSettings:
    """Settings of `extract`; part of the cache key, and saved with a trained model.

    Attributes:
        num_frames: Number of frames sampled from a clip, at the midpoints of as many equal intervals.
        max_height: Pixels to which the shorter side of larger frames is scaled before face detection.
        face_size: Height and width of a face crop in pixels, at most 2,048.
        face_choice: Which face is tracked if there are several: the "largest", or the "most_speaking", whose
            mouth moves most and in time with the sound (three times as many frames are decoded).
    """

    num_frames: int = 8
    max_height: int = 480
    face_size: int = 96
    face_choice: str = "largest"

    def __post_init__(self):
        """Validate the settings.

        Raises:
            ValueError: A value is out of range; names the setting, its value and what is allowed.
        """
        for name, low in (("num_frames", 1), ("max_height", 64), ("face_size", 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if self.face_size > LARGEST_FACE:
            raise ValueError(f"face_size is {self.face_size!r}; it must be at most {LARGEST_FACE}")
        if self.face_choice not in FACE_CHOICES:
            choices = " or ".join(map(repr, FACE_CHOICES))
            raise ValueError(f"face_choice is {self.face_choice!r}; it must be {choices}")


@dataclass(frozen=True)
class ClipFeatures:
    """Extracted features of a clip: all inputs of a model but the text.

    Sound is kept as samples, not as a spectrogram: each audio encoder has a front-end of its own.

    Attributes:
        waveform: Mono sound (samples,), int16 at `SAMPLE_RATE`; no samples without sound.
        face_crops: Aligned faces (frames, size, size, 3), uint8 RGB; zeros where no face was found.
        blendshapes: Blendshape scores in [0, 1] (frames, 52), float32; zeros where no face was found.
        face_found: Whether the frame shows the tracked face (frames,), bool.
        timestamps: Time of each frame (frames,), float32 seconds from the window's start.
        findings: What the clip lacks, or what makes its face doubtful; a subset of `FINDINGS`.
        duration: Length of the window in seconds.
        audible_from: Seconds from the window's start to the first audible sample; 0 if there is none.
        full_scale: Amplitude of the sample 32768: 1 for 16-bit recordings, which are kept exactly, else the
            peak of the sound.
    """

    waveform: np.ndarray
    face_crops: np.ndarray
    blendshapes: np.ndarray
    face_found: np.ndarray
    timestamps: np.ndarray
    findings: tuple[str, ...]
    duration: float
    audible_from: float = 0.0
    full_scale: float = 1.0

    def sound(self, seconds: float = math.inf) -> np.ndarray:
        """The first seconds of the sound (samples,), float32, nominally in [-1, 1]."""
        samples = self.waveform[: round(min(seconds * SAMPLE_RATE, len(self.waveform)))]
        return samples * np.float32(self.full_scale / FULL_SCALE)

    @property
    def has_audio(self) -> bool:
        """Whether there is an audio stream that is not silent."""
        return len(self.waveform) > 0 and NO_AUDIO not in self.findings and SILENT_AUDIO not in self.findings

    @property
    def has_face(self) -> bool:
        """Whether any frame shows a face."""
        return bool(self.face_found.any())

    @classmethod
    def absent(cls, settings: ExtractionSettings) -> "ClipFeatures":
        """Empty features, for text-only input: no sound, no frames, no findings."""
        size = settings.face_size
        return cls(
            waveform=np.zeros(0, np.int16),
            face_crops=np.zeros((0, size, size, 3), np.uint8),
            blendshapes=np.zeros((0, NUM_BLENDSHAPES), np.float32),
            face_found=np.zeros(0, bool),
            timestamps=np.zeros(0, np.float32),
            findings=(),
            duration=0.0,
        )


@dataclass(frozen=True)
class ClipExtent:
    """Amount of each modality in a clip.

    Attributes:
        seconds: Length of the clip.
        sound: Seconds of sound; 0 without sound.
        frames: Number of sampled frames; 0 if none shows a face.
        audible_from: Seconds before the first audible sample; 0 without sound.
    """

    seconds: float
    sound: float
    frames: int
    audible_from: float = 0.0

    @classmethod
    def of(cls, features: ClipFeatures) -> "ClipExtent":
        """The extent of extracted features."""
        sound = len(features.waveform) / SAMPLE_RATE if features.has_audio else 0.0
        frames = len(features.face_crops) if features.has_face else 0
        return cls(features.duration, sound, frames, features.audible_from)
