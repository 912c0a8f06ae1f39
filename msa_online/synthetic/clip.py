# SPDX-License-Identifier: Apache-2.0
"""Render one planned clip as an mp4: a face and a voice, each with its own cue."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msa_online.synthetic.face import FRAME_SIZE, FaceRenderer, Look, head_motion
from msa_online.synthetic.plan import CLIPS, LIMIT, SPEAKERS, CorpusRecipe, PlannedClip, generator
from msa_online.synthetic.voice import CARRIERS, VOICE_RATE, VOICES, prosody, speak

if TYPE_CHECKING:
    from av.container import OutputContainer

FRAMES_PER_SECOND = 8
LOUDNESS = 0.4  # factor on the output of espeak-ng, so that the loudest voice does not clip
DIM, BRIGHT = 0.6, 1.05  # brightness of the light that shows a sign
FADE = 0.03  # seconds at both ends, where the utterance is cut


@dataclass(frozen=True)
class SyntheticSpeaker:
    """Voice and face of a speaker, the same in all clips."""

    voice: str
    pitch_offset: float
    look: Look

    @classmethod
    def of(cls, recipe: CorpusRecipe, number: int) -> "SyntheticSpeaker":
        """Draw speaker `number`, counted from 0; low and high voices alternate."""
        rng = generator(recipe, SPEAKERS, number + 1)  # index 0 is used for the splits
        return cls(VOICES[number % len(VOICES)], float(rng.uniform(-4, 4)), Look.draw(rng))

    def showing(self, signs: Mapping[str, int]) -> "SyntheticSpeaker":
        """The speaker in a clip of a control: a low or high voice and dim or bright light show its signs."""
        if not signs:
            return self
        pair = VOICES.index(self.voice) // 2 * 2  # low and high voices alternate
        light = DIM if signs["vision"] < 0 else BRIGHT
        mean = sum(self.look.colour) / 3
        look = replace(self.look, colour=tuple(light * part / mean for part in self.look.colour))
        return replace(self, voice=VOICES[pair + (signs["audio"] > 0)], look=look)


def write_clip(
    path: Path, recipe: CorpusRecipe, index: int, planned: PlannedClip, renderer: FaceRenderer
) -> None:
    """Render clip `index` of a corpus as an mp4 at `path`, written atomically."""
    rng = generator(recipe, CLIPS, index)
    speaker = SyntheticSpeaker.of(recipe, index % recipe.speakers).showing(planned.signs)
    frames = round(rng.uniform(*recipe.seconds) * FRAMES_PER_SECOND)
    waveform = _talk(planned.cues["audio"], speaker, frames / FRAMES_PER_SECOND, rng)
    if planned.cues["vision"] is None:
        pictures = renderer.faceless(frames, rng)
    else:
        pictures = _act(planned.cues["vision"], speaker, waveform, frames, rng, renderer)
    handle, draft = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        _encode(Path(draft), pictures, None if planned.cues["audio"] is None else waveform)
        os.chmod(draft, 0o644)  # mkstemp's files are private
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _talk(
    cue: float | None, speaker: SyntheticSpeaker, seconds: float, rng: np.random.Generator
) -> np.ndarray:
    """Speech of the length of the clip, `(samples,)` float32; neutral if the cue is missing."""
    words = ", ".join(CARRIERS[i] for i in rng.choice(len(CARRIERS), 2, replace=False))
    speech, gain = prosody(cue or 0.0, speaker.voice, speaker.pitch_offset)
    waveform = speak(words, speech)[: round(seconds * VOICE_RATE)] * np.float32(gain * LOUDNESS)
    ramp = np.linspace(0, 1, round(FADE * VOICE_RATE), dtype=np.float32)
    waveform[: len(ramp)] *= ramp
    waveform[-len(ramp) :] *= ramp[::-1]
    return waveform.clip(-1, 1)


def _act(
    cue: float,
    speaker: SyntheticSpeaker,
    waveform: np.ndarray,
    frames: int,
    rng: np.random.Generator,
    renderer: FaceRenderer,
) -> np.ndarray:
    """The talking face, `(frames, 160, 160, 3)` uint8 RGB."""
    waver = 1 + 0.06 * np.sin(2 * np.pi * (np.arange(frames) / rng.uniform(6, 14) + rng.random()))
    expressions = (cue / LIMIT * waver).clip(-1, 1)
    poses = head_motion(frames, rng)
    openness = _openness(waveform, frames)
    return np.stack(
        [renderer.draw(speaker.look, *state) for state in zip(poses, expressions, openness, strict=True)]
    )


def _openness(waveform: np.ndarray, frames: int) -> np.ndarray:
    """Opening of the mouth in each frame, `(frames,)` in [0, 0.8], relative to the loudest frame.

    It is relative because loudness is a cue of the audio and must not be visible.
    """
    energy = np.array([np.sqrt(np.mean(part**2)) for part in np.array_split(waveform, frames)])
    return 0.8 * energy / max(energy.max(), 1e-6)


def _encode(path: Path, pictures: np.ndarray, waveform: np.ndarray | None) -> None:
    """Write H.264 and, if there is a waveform, mono AAC; with one thread the bytes are reproducible."""
    import av

    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # with its macroblock tree, x264 gives other bytes from run to run, even on one thread
        quality = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"}
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=quality)
        video.width = video.height = FRAME_SIZE
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = None
        if waveform is not None:
            audio = container.add_stream("aac", rate=VOICE_RATE, layout="mono")
            audio.bit_rate = 48_000
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            _encode_audio(container, audio, waveform)


def _encode_audio(container: "OutputContainer", stream: "object", waveform: np.ndarray) -> None:
    import av

    frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = VOICE_RATE, 0
    fifo = av.AudioFifo()
    fifo.write(frame)
    while (chunk := fifo.read(stream.frame_size or 1024, partial=True)) is not None:
        container.mux(stream.encode(chunk))
    container.mux(stream.encode())
