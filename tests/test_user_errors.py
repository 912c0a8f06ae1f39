# SPDX-License-Identifier: Apache-2.0
"""What a user reads of an error or a warning, on one process and on several."""

import io
import json
import sys
import warnings

import pytest
from tqdm import tqdm

from msa_online import user_errors
from msa_online.corpora.corpus import CorpusError
from msa_online.user_errors import run_command


def fail() -> None:
    raise CorpusError("no such folder")


@pytest.fixture
def second_process(tmp_path, monkeypatch):
    """This process as the launcher's second; returns where its first would report."""
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    monkeypatch.setattr(user_errors, "OTHERS_WAIT", 0.2)
    return tmp_path / "0" / "error.json"


def test_an_error_that_the_first_process_reports_is_not_printed_by_the_second(second_process, capsys):
    second_process.write_text(json.dumps({"message": "no such folder", "timestamp": 1}))
    assert run_command(fail) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("first", [None, "another error"])
def test_an_error_that_only_the_second_process_meets_is_printed(first, second_process, capsys):
    if first:
        second_process.write_text(json.dumps({"message": first, "timestamp": 1}))
    assert run_command(fail) == 1
    assert capsys.readouterr().err == "error: no such folder\n"


def test_a_warning_is_one_line_without_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    run_command(lambda: None)
    printed = warnings.formatwarning("all predictions are equal", UserWarning, "metrics.py", 7)
    assert printed == "warning: all predictions are equal\n"


class Terminal(io.StringIO):
    """What a terminal receives."""

    def isatty(self) -> bool:
        return True


def test_a_warning_is_printed_above_a_progress_bar_and_not_into_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def warn_while_training() -> None:
        with tqdm(total=4, desc="epoch 1/2", ncols=40, mininterval=0, file=terminal) as bar:
            bar.update(2)
            warnings.warn("sound is late", UserWarning, stacklevel=1)

    with warnings.catch_warnings():  # puts everything back afterwards
        warnings.simplefilter("always")
        assert run_command(warn_while_training) == 0
    before, printed, after = terminal.getvalue().partition("warning: sound is late\n")
    assert printed and before.endswith("\r") and "epoch 1/2" in before  # the line of the bar was cleared
    assert after.lstrip("\r").startswith("epoch 1/2:  50%")


def test_only_the_first_process_of_a_machine_prints_warnings(second_process, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_command(lambda: warnings.warn("sound is late", UserWarning, stacklevel=1))
    assert capsys.readouterr().err == ""
