# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, imported; it measures without changing torch's threads for other tests."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    module = importlib.import_module("benchmark_front_ends")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda number: None)
    return module


def test_every_front_end_is_measured_beside_the_spectrogram_of_the_cache(script, capsys):
    assert script.main(["--seconds", "0.5", "--frames", "1", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("spectrogram in the cache", "log-mel", *script.SOUND, *script.PICTURES):
        assert name.split()[0] in printed


def test_a_step_is_measured_with_the_states_of_a_frozen_encoder_or_with_the_encoder(script, monkeypatch):
    options = script.read_options(
        ["--steps", "--batch", "2", "--seconds", "0.5", "--frames", "1", "--rounds", "1"]
    )
    batches, random_batch = [], script.random_batch

    def recorded(*arguments):
        batches.append(random_batch(*arguments))
        return batches[-1]

    monkeypatch.setattr(script, "random_batch", recorded)
    stored = script.cost_of_step("Whisper, frozen, states stored", options)
    run = script.cost_of_step("Whisper, frozen, run in each step", options)
    assert "audio_states" in batches[0] and "audio_values" not in batches[0]
    assert "audio_values" in batches[1] and "audio_states" not in batches[1]
    assert stored.trained == run.trained < run.parameters == stored.parameters
    assert stored.seconds > 0 and stored.gigabytes > 0.1
