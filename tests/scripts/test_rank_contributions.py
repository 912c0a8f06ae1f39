# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import re
import shutil
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
    path = tmp_path / "study" / "PaSE" / "1" / "history.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))
    return path


def test_epochs_with_the_expected_order_are_counted(script, history, capsys):
    assert script.main([str(history), str(history), "--order", "text", "vision", "audio"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| study/PaSE |") and row.endswith("| 4 of 6 (67%) |")
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


def test_variants_of_the_same_name_in_two_studies_have_a_row_each(script, history, tmp_path, capsys):
    shutil.copytree(tmp_path / "study", tmp_path / "other")
    other = tmp_path / "other" / "PaSE" / "1" / "history.json"
    assert script.main([str(history), str(other), "--order", "text", "vision", "audio"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| study/PaSE", "| other/PaSE"]


@pytest.mark.parametrize(
    "content", ["[1, 2]", '[["losses"]]', '[{"losses": {}}]', '[{"epoch": 1, "losses": []}]', "{}", "no JSON"]
)
def test_a_file_that_is_no_history_is_refused_by_name(script, history, content, capsys):
    history.write_text(content)
    with pytest.raises(SystemExit):
        script.main([str(history), "--order", "text", "vision", "audio"])
    assert f"{history} is not the history of a run" in capsys.readouterr().err
