# SPDX-License-Identifier: Apache-2.0
"""16-bit samples keep the sound; the log-mel spectrogram is librosa's, at any length and loudness."""

import numpy as np
import pytest

from feature_extractors import SAMPLE_RATE, is_silent, log_mel
from feature_extractors.audio import as_int16


def test_a_16_bit_recording_is_kept_exactly():
    samples = np.array([-32768, -32767, -1, 0, 1, 32767], np.int16)
    kept, full_scale = as_int16(samples / np.float32(32768))
    assert kept.dtype == np.int16 and kept.tolist() == samples.tolist() and full_scale == 1.0


@pytest.mark.parametrize("peak", [1e-30, 0.002, 0.7, 1.25, 900.0])
def test_any_other_sound_keeps_its_shape_to_a_level_of_its_own_peak(peak):
    tone = (peak * np.sin(np.arange(SAMPLE_RATE) / 10)).astype(np.float32)
    kept, full_scale = as_int16(tone)
    assert full_scale == max(np.abs(tone).max(), 0.001)  # the sound of a silent clip is not read
    np.testing.assert_allclose(kept * (full_scale / 32768), tone, atol=1.01 * full_scale / 32768)


def test_a_recording_without_samples_or_without_sound_is_kept():
    for samples in (0, 9):
        kept, full_scale = as_int16(np.zeros(samples, np.float32))
        assert kept.tolist() == [0] * samples and full_scale == 1.0


def test_log_mel_equals_librosa():
    import librosa

    waveform = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 0.1
    power = librosa.feature.melspectrogram(y=waveform, sr=SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)
    ours = log_mel(waveform)
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


def test_silence_is_told_from_quiet_speech():
    tone = np.sin(np.arange(SAMPLE_RATE) / 10).astype(np.float32)
    assert is_silent(np.zeros(0, np.float32)) and is_silent(0 * tone) and is_silent(1e-4 * tone)
    assert not is_silent(0.01 * tone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_samples_that_are_no_sound_never_reach_a_model(value):
    waveform = np.zeros(SAMPLE_RATE, np.float32)
    waveform[5] = value
    with pytest.raises(ValueError, match=r"sample 5 of the waveform is -?(nan|inf|1e\+38); give finite"):
        as_int16(waveform)
