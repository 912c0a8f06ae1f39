# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

HISTORY = [
    {"epoch": 1, "stage": "enhance", "losses": {"loss": 2.0, "msd/inv": 1.0}, "valid": {"mae": 1.2}},
    {"epoch": 2, "stage": "balance", "losses": {"loss": 1.0, "energy/text": 3.0}, "valid": {"mae": 0.8}},
]


@pytest.mark.parametrize("arguments", [["history.json", "curves.png"], ["history.json"]])
def test_a_history_becomes_a_picture_and_a_wrong_call_an_explanation(arguments, repository, tmp_path):
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    done = subprocess.run(
        [sys.executable, repository / "scripts/plot_history.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if len(arguments) == 2:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert done.returncode == 2 and "history.json history.png" in done.stdout
