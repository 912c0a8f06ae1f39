# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import re
from pathlib import Path

import pytest

EPOCHS = [(9, 1, 1), (1, 5, 3), (4, 1, 2), (2, 1, 3), (3, -1, 1)]  # contributions of text, audio, vision


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("rank_contributions")


@pytest.fixture
def history(script, tmp_path):
    """The history of a run that measured `EPOCHS`, in the folder of a study."""
    records = [
        {
            "epoch": epoch,
            "losses": {
                f"contribution/{name}": value for name, value in zip(script.MODALITIES, each, strict=True)
            },
        }
        for epoch, each in enumerate(EPOCHS, start=1)
    ]
    path = tmp_path / "PaSE" / "1" / "history.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))
    return path


def test_epochs_with_the_expected_order_are_counted(script, history, capsys):
    assert script.main([str(history), str(history), "--order", "text", "vision", "audio"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| PaSE |") and row.endswith("| 4 of 6 (67%) |")
    assert "| 55 / 10 / 35 |" in row  # means of 57, 33, 75; of 14, 17, 0; of 29, 50, 25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--order", "text", "text", "audio"], "each modality once"),
        (
            ["--order", "text", "vision", "audio", "--from-epoch", "9"],
            "no contributions .*lower --from-epoch",
        ),
    ],
)
def test_a_wrong_call_is_explained(script, history, arguments, said, capsys):
    with pytest.raises(SystemExit):
        script.main([str(history), *arguments])
    assert re.search(said, capsys.readouterr().err)
