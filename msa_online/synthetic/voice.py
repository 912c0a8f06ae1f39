# SPDX-License-Identifier: Apache-2.0
"""Speech of the synthetic corpus: the tone has a sentiment, the words are neutral.

espeak-ng speaks neutral sentences. Its synthesiser keeps state between utterances, so the same words would
sound different depending on what was rendered before. Each utterance is therefore synthesised in a separate
process, which runs this file as a script with the standard library only. It reads text and settings, and
writes samples.
"""

import ctypes
import json
import subprocess
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

VOICE_RATE = 22_050  # samples per second that espeak-ng produces
LOW_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m7", "Andy", "Gene")
HIGH_VARIANTS = ("f1", "f2", "f3", "f4", "f5", "Annie", "linda", "steph")
VOICES = tuple(f"en-us+{name}" for pair in zip(LOW_VARIANTS, HIGH_VARIANTS, strict=True) for name in pair)

CARRIERS = (
    "the meeting was moved to the second floor of the other building",
    "they put the boxes on the table next to the window",
    "the number on the door is written above the handle",
    "we take the bus at ten past eight from the station",
    "the report has four pages and a table at the end",
    "she keeps the keys in the drawer under the printer",
    "the road goes along the river and turns left at the bridge",
    "the paper comes in sheets of two different sizes",
)


@dataclass(frozen=True)
class Speech:
    """Settings of an utterance in espeak-ng's units: pitches 0 to 100, `words_per_minute` 80 to 450."""

    voice: str
    pitch: int
    pitch_range: int
    words_per_minute: int


def prosody(cue: float, voice: str, pitch_offset: float) -> tuple[Speech, float]:
    """Speech settings and gain (a factor) of a cue: a happier voice is higher, livelier, faster and louder.

    Args:
        cue: Sentiment in [-3, 3].
        voice: One of `VOICES`.
        pitch_offset: Pitch of the speaker relative to the voice, a few units.
    """
    speech = Speech(
        voice=voice,
        pitch=round(48 + 11 * cue + pitch_offset),
        pitch_range=round(50 + 14 * cue),
        words_per_minute=round(165 * (1 + 0.09 * cue)),
    )
    return speech, 10 ** (2.0 * cue / 20)


def speak(words: str, speech: Speech) -> "np.ndarray":
    """Synthesise `words`: `(samples,)` float32 in [-1, 1] at `VOICE_RATE`, equal on every call.

    Raises:
        RuntimeError: espeak-ng failed; the message has its output.
    """
    import espeakng_loader
    import numpy as np

    request = {
        "library": espeakng_loader.get_library_path(),
        "data": espeakng_loader.get_data_path(),
        "voice": speech.voice,
        # by espeak_PARAMETER: espeakRATE, espeakPITCH, espeakRANGE
        "parameters": {1: speech.words_per_minute, 3: speech.pitch, 4: speech.pitch_range},
        "words": words,
    }
    script = [sys.executable, "-I", "-S", __file__]
    done = subprocess.run(script, input=json.dumps(request).encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"espeak-ng could not speak {words!r} as {speech}: {done.stderr.decode().strip()}")
    return np.frombuffer(done.stdout, np.int16).astype(np.float32) / 32768


def _synthesise(library: str, data: str, voice: str, parameters: dict[str, int], words: str) -> bytes:
    """Call the C library; returns 16-bit samples at `VOICE_RATE`."""
    espeak = ctypes.CDLL(library)
    samples = array("h")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(chunk: object, count: int, events: object) -> int:
        if chunk and count > 0:
            samples.extend(chunk[:count])
        return 0  # continue

    synchronous = 2  # AUDIO_OUTPUT_SYNCHRONOUS: nothing is played; espeak_Synth calls back before it returns
    rate = espeak.espeak_Initialize(synchronous, 0, data.encode(), 0)
    if rate != VOICE_RATE:
        raise RuntimeError(f"espeak_Initialize returned {rate}, not {VOICE_RATE}")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath noise is seeded with the time by default
    espeak.espeak_SetSynthCallback(collect)
    _require_ok(espeak.espeak_SetVoiceByName(voice.encode()), f"voice {voice}")
    for number, value in parameters.items():
        _require_ok(espeak.espeak_SetParameter(int(number), value, 0), f"parameter {number}={value}")
    text = words.encode()
    _require_ok(espeak.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, 1, None, None), "speech")
    return samples.tobytes()


def _require_ok(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"{what}: status {status}")


if __name__ == "__main__":
    sys.stdout.buffer.write(_synthesise(**json.load(sys.stdin)))
