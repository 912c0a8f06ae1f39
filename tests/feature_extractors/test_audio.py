# SPDX-License-Identifier: Apache-2.0
"""The log-mel spectrogram is librosa's, for any length and loudness."""

import numpy as np
import pytest

from feature_extractors import SAMPLE_RATE, is_silent, log_mel


@pytest.mark.parametrize(("num_mels", "window_ms", "hop_ms"), [(80, 25, 10), (40, 32, 16)])
def test_log_mel_equals_librosa(num_mels, window_ms, hop_ms):
    import librosa

    waveform = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 0.1
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=SAMPLE_RATE,
        n_fft=16 * window_ms,
        hop_length=16 * hop_ms,
        n_mels=num_mels,
    )
    ours = log_mel(waveform, num_mels, window_ms, hop_ms)
    assert ours.shape == power.T.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, np.log(power.T), atol=1e-4)


@pytest.mark.parametrize("samples", [1, 100, 399, 400, 401])
def test_a_clip_shorter_than_a_window_still_gives_a_step(samples):
    spectrogram = log_mel(np.ones(samples, np.float32))
    assert len(spectrogram) == 1 + samples // 160 and np.isfinite(spectrogram).all()


def test_no_sound_gives_no_steps():
    assert log_mel(np.zeros(0, np.float32)).shape == (0, 80)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 50.0])
def test_log_mel_is_finite_at_any_level(scale):
    waveform = scale * np.random.default_rng(0).normal(size=SAMPLE_RATE).astype(np.float32)
    assert np.isfinite(log_mel(waveform)).all()


def test_a_window_of_an_odd_number_of_samples_works():
    assert len(log_mel(np.ones(1, np.float32), window_ms=25.0625)) == 1


def test_silence_is_told_from_quiet_speech():
    tone = np.sin(np.arange(SAMPLE_RATE) / 10).astype(np.float32)
    assert is_silent(np.zeros(0, np.float32)) and is_silent(0 * tone) and is_silent(1e-4 * tone)
    assert not is_silent(0.01 * tone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_samples_that_are_no_sound_never_reach_a_spectrogram(value):
    waveform = np.zeros(SAMPLE_RATE, np.float32)
    waveform[5] = value
    with pytest.raises(ValueError, match=r"sample 5 of the waveform is -?(nan|inf|1e\+38); give finite"):
        log_mel(waveform)
