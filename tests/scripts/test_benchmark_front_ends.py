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
