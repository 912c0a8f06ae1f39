# SPDX-License-Identifier: Apache-2.0
"""Acoustic descriptors of a log-mel spectrogram: MFCCs, energy and spectral shape."""

import numpy as np

from feature_extractors.clip import SAMPLE_RATE

COEFFICIENTS = 20
STEPS_TOGETHER = 8
"""Number of spectrogram steps averaged into one: 100 a second become 12.5, as in the audio encoder."""

DESCRIPTORS = (
    *(f"mfcc {number}" for number in range(COEFFICIENTS)),
    *(f"delta of mfcc {number}" for number in range(COEFFICIENTS)),
    "log energy",
    *("spectral centroid", "spectral bandwidth", "spectral rolloff", "spectral flatness"),
)
"""Names of the 45 descriptors, in order."""


def audio_descriptors(log_mel: np.ndarray) -> np.ndarray:
    """Compute the descriptors of a clip with librosa.

    They are 20 cepstral coefficients and their deltas over nine steps, the log energy, and centroid,
    bandwidth, 85 % rolloff (all three in Hz) and flatness of the spectrum. The spectrum is that of the mel
    bands at their centre frequencies.

    Args:
        log_mel: Natural log of the power mel spectrogram, `(steps, mels)`; its bands reach from 0 Hz to half
            the sample rate.

    Returns:
        `(ceil(steps / 8), 45)` float32, means over eight steps.
    """
    import librosa  # imported here because it takes seconds

    if len(log_mel) == 0:
        return np.zeros((0, len(DESCRIPTORS)), np.float32)
    power = np.exp(log_mel.T.astype(np.float64))  # (mels, steps)
    # bands are triangles between neighbouring frequencies, so the ends of the range are not centres
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
