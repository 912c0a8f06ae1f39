# SPDX-License-Identifier: Apache-2.0
"""Log-mel spectrogram to a few dozen descriptors of how something is said."""

import numpy as np

from feature_extractors.clip import SAMPLE_RATE

COEFFICIENTS = 20
STEPS_TOGETHER = 8
"""Spectrogram steps averaged into one: 100 a second become 12.5, as in the learned audio front-end."""

DESCRIPTORS = (
    *(f"mfcc {number}" for number in range(COEFFICIENTS)),
    *(f"delta of mfcc {number}" for number in range(COEFFICIENTS)),
    "log energy",
    *("spectral centroid", "spectral bandwidth", "spectral rolloff", "spectral flatness"),
)
"""Name of each descriptor, in order: 45."""


def audio_descriptors(log_mel: np.ndarray) -> np.ndarray:
    """Descriptors of the sound of one clip, by librosa.

    Cepstral coefficients and their change over nine steps, the log of the energy, and centroid, bandwidth,
    85 % rolloff (all three in Hz) and flatness of the spectrum, here of the mel bands at their centres.

    Args:
        log_mel: Natural log of the power mel spectrogram, `(steps, mels)`, bands between 0 Hz and half the
            sample rate.

    Returns:
        `(ceil(steps / 8), 45)` float32, the mean of each eight steps.
    """
    import librosa  # seconds, and only here

    if len(log_mel) == 0:
        return np.zeros((0, len(DESCRIPTORS)), np.float32)
    power = np.exp(log_mel.T.astype(np.float64))  # (mels, steps)
    # the bands are triangles between neighbours: their centres leave out the two ends of the range
    centres = librosa.mel_frequencies(len(power) + 2, fmin=0, fmax=SAMPLE_RATE / 2)[1:-1]
    spectrum = {"S": np.sqrt(power), "freq": centres}
    cepstrum = librosa.feature.mfcc(S=log_mel.T, n_mfcc=COEFFICIENTS)
    described = np.concatenate(
        [
            cepstrum,
            librosa.feature.delta(cepstrum, mode="nearest"),
            np.log(power.sum(axis=0, keepdims=True)),
            librosa.feature.spectral_centroid(**spectrum),
            librosa.feature.spectral_bandwidth(**spectrum),
            librosa.feature.spectral_rolloff(**spectrum),
            librosa.feature.spectral_flatness(S=spectrum["S"]),
        ]
    )  # (descriptors, steps)
    starts = np.arange(0, len(log_mel), STEPS_TOGETHER)
    counts = np.diff([*starts, len(log_mel)])
    return (np.add.reduceat(described, starts, axis=1) / counts).T.astype(np.float32)
