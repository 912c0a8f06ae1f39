# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys

import pytest

HISTORY = [
    {"epoch": 1, "stage": "enhance", "losses": {"loss": 2.0, "msd/inv": 1.0}, "valid": {"mae": 1.2}},
    {"epoch": 2, "stage": "balance", "losses": {"loss": 1.0, "energy/text": 3.0}, "valid": {"mae": 0.8}},
]


@pytest.fixture
def plot(repository, tmp_path):
    """A function that runs the script in a folder with the histories of two runs."""
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "history.json").write_text(json.dumps(HISTORY))
        (tmp_path / run / "config.json").write_text("{}")

    def run_script(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, repository / "scripts/plot_history.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_script


@pytest.mark.parametrize(
    "arguments",
    [
        ["one/history.json", "new/folder/curves.png"],
        ["one/history.json", "other/history.json", "curves.png", "--panels", "energy", "validation, mae"],
    ],
)
def test_histories_become_a_picture(arguments, plot, tmp_path):
    done = plot(*arguments)
    assert done.returncode == 0, done.stderr
    target = next(word for word in arguments if word.endswith(".png"))
    assert (tmp_path / target).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one/history.json"], "picture.png"),
        (["one/config.json", "curves.png"], "config.json is not the history of a run"),
        (["one/history.json", "curves.png", "--panels", "enrgy"], "'enrgy' was not recorded; .*energy"),
    ],
)
def test_a_wrong_call_is_explained_and_draws_nothing(arguments, said, plot, tmp_path):
    done = plot(*arguments)
    assert done.returncode == 2
    assert re.search(said, done.stderr)
    assert not (tmp_path / "curves.png").exists()
