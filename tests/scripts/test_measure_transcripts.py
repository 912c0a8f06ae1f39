# SPDX-License-Identifier: Apache-2.0
"""What is reported on transcripts is what was recognised, and the times are those of the sound."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from feature_extractors.transcript import Transcript, Word


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("measure_transcripts")


def test_case_punctuation_and_digits_are_no_errors(script):
    assert script.plain("Bin blue at F2, now.") == "bin blue at f two now"
    assert (
        script.plain("S0 again!") == script.plain("s zero again")
        and script.plain("Don't 12") == "don't one two"
    )


def test_words_of_a_synthetic_sentence_are_heard_at_their_times(script):
    truth, sound = script.sentence(0)
    loud = np.abs(sound) > 0.01 * np.abs(sound).max()
    first, last = np.flatnonzero(loud)[[0, -1]] / 16_000
    assert first == pytest.approx(truth.words[0].start, abs=0.01) == pytest.approx(script.PAUSE, abs=0.01)
    assert last == pytest.approx(truth.words[-1].end, abs=0.01)
    assert [word.text for word in truth.words] == truth.text.split()


def test_errors_of_times_count_words_that_were_recognised_only(script):
    truth = Transcript("a b c", (Word("a", 0, 1), Word("b", 1, 2), Word("c", 2, 3)), "en", "x")
    heard = Transcript("a x c", (Word("a", 0.5, 1.5), Word("x", 1, 2), Word("c", 2, 3)), "en", "x")
    sound = np.zeros(6 * 16_000, np.float32)
    found, even, count = script.time_errors([truth], [heard], [sound])
    assert count == 2 and found == pytest.approx(0.25) and even == pytest.approx((0.5 + 2.5) / 2)


def test_the_even_grid_is_compared_token_by_token(script, tiny_processor):
    words = (Word("it", 0.0, 0.2), Word("is", 0.2, 0.4), Word("good", 3.0, 4.0))
    heard = Transcript("it is good", words, "en", "x")
    away, off = script.from_even_grid(tiny_processor, heard, np.zeros(5 * 16_000, np.float32))
    assert away == pytest.approx([1.4, 2.2, 0.0]) and off.tolist() == [1, 1, 0]
