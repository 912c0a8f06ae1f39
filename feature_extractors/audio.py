# SPDX-License-Identifier: Apache-2.0
"""Sound as 16-bit samples, log-mel spectrograms, and the detection of silence.

The spectrogram equals librosa's `melspectrogram` (power 2, Hann window, zero-padded centres, Slaney bands);
tests compare the two. Only the filter bank of librosa is used here: its STFT compiles code at the first call,
17 s on a new machine and 1.4 s in every later process. Loaders compute spectrograms in every epoch, so they
must be cheap: SciPy's FFT of float32 takes a fifth of the time of NumPy's, and a sparse filter bank keeps the
product out of BLAS, whose idle threads cost ten times as much as the product.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors.clip import FULL_SCALE, SAMPLE_RATE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NUM_MELS = 80
"""Mel bands of a spectrogram, between 0 Hz and half the sample rate."""

WINDOW_MS = 25
"""Length of an analysis window in milliseconds."""

HOP_MS = 10
"""Time between two steps of a spectrogram in milliseconds."""

POWER_FLOOR = 1e-10
"""Lower bound of the power, so that digital silence has a finite logarithm."""

SILENCE_PEAK = 1e-3
"""A waveform that stays within +-0.001 of full scale (-60 dB) contains no audible speech."""

MAX_SAMPLE = 1e3
"""Samples beyond this many times full scale (+60 dB) stem from damage or a wrong scale."""


def as_int16(waveform: np.ndarray) -> tuple[np.ndarray, float]:
    """Sound as 16-bit samples.

    A 16-bit recording is kept exactly. Other sound is scaled by its peak: the rounding of a quiet clip is as
    quiet, and a clip louder than full scale keeps its shape.

    Args:
        waveform: Mono sound (samples,), any length; values nominally in [-1, 1].

    Returns:
        The samples (samples,) int16, and the amplitude of the sample 32768.

    Raises:
        ValueError: A sample is not finite or exceeds `MAX_SAMPLE`.
    """
    _refuse_bad_samples(waveform)
    peak, levels = float(np.abs(waveform).max(initial=0.0)), waveform * np.float32(FULL_SCALE)
    is_16_bit = peak <= 1 and np.array_equal(levels, np.rint(levels))
    full_scale = 1.0 if is_16_bit else max(peak, SILENCE_PEAK)
    scaled = np.rint(waveform * np.float32(FULL_SCALE / full_scale))
    return np.minimum(scaled, FULL_SCALE - 1).astype(np.int16), full_scale


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram, the usual input of learned audio front-ends.

    Args:
        waveform: Mono sound (samples,) at `SAMPLE_RATE`, any length; values nominally in [-1, 1].

    Returns:
        Natural log of the mel power (steps, `NUM_MELS`), float32 and finite, at least log(1e-10); step i is
        centred on i * `HOP_MS`. One step for a clip shorter than a hop, none for an empty waveform.

    Raises:
        ValueError: A sample is not finite or exceeds `MAX_SAMPLE`.
    """
    _refuse_bad_samples(waveform)
    window, hop = (ms * SAMPLE_RATE // 1000 for ms in (WINDOW_MS, HOP_MS))
    if len(waveform) == 0:
        return np.zeros((0, NUM_MELS), np.float32)
    taper, bands = _filters(window)
    padded = np.pad(waveform.astype(np.float32, copy=False), window // 2)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]  # (steps, window)
    return np.log(np.maximum(mel_power(pieces * taper, bands), POWER_FLOOR))


def mel_power(pieces: np.ndarray, bands: "csr_array", fft_size: int | None = None) -> np.ndarray:
    """Mel power of windows of a sound, in one thread.

    Args:
        pieces: Tapered windows (steps, window), float32.
        bands: Mel filter bank (mels, fft_size // 2 + 1), float32.
        fft_size: Length of the Fourier transform; by default the window's.

    Returns:
        The power (steps, mels), float32.
    """
    from scipy import fft

    spectrum = fft.rfft(pieces, fft_size)
    power = spectrum.real**2 + spectrum.imag**2
    return np.ascontiguousarray((bands @ power.T).T)


@lru_cache(maxsize=1)
def _filters(window: int) -> tuple[np.ndarray, "csr_array"]:
    """The periodic Hann window (window,) and the mel bands (`NUM_MELS`, window // 2 + 1), both float32."""
    from librosa import filters
    from scipy.sparse import csr_array

    taper = filters.get_window("hann", window).astype(np.float32)
    bands = filters.mel(sr=SAMPLE_RATE, n_fft=window, n_mels=NUM_MELS)
    return taper, csr_array(bands)


def _refuse_bad_samples(waveform: np.ndarray) -> None:
    if (index := first_bad_sample(waveform)) is not None:
        raise ValueError(
            f"sample {index} of the waveform is {waveform[index]:g}; give finite values, nominally in [-1, 1]"
        )


def first_bad_sample(waveform: np.ndarray) -> int | None:
    """Index of the first sample that is not finite or exceeds `MAX_SAMPLE`; None if there is none."""
    bad = ~(np.abs(waveform) <= MAX_SAMPLE)  # also True for NaN: its comparisons are False
    return int(bad.argmax()) if bad.any() else None


def audible_from(waveform: np.ndarray) -> float:
    """Seconds before the first audible sample of a waveform (samples,); infinite if it is silent."""
    audible = np.abs(waveform) >= SILENCE_PEAK
    return float(audible.argmax()) / SAMPLE_RATE if audible.any() else np.inf


def is_silent(waveform: np.ndarray) -> bool:
    """Whether a waveform (samples,) is inaudible, so that the audio modality has to be masked."""
    return len(waveform) == 0 or float(np.abs(waveform).max()) < SILENCE_PEAK
