# SPDX-License-Identifier: Apache-2.0
"""File names, labels and transcripts that mean something to rich, to Python, to a shell, to a terminal or to
Markdown are printed and stored as they are, by every command."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from msa_online import MSAConfig, MSAModel
from msa_online.evaluation.tables import markdown_text, open_console, printable_lines
from msa_online.model_card import write_model_card
from msa_online_cli import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

LABELS = (
    "[bold]joy[/bold]",
    "%s {0} {name}",
    "$(touch hacked) `x`",
    "a|b\nc",
    "\x1b[31mred\x1b[0m",
    ":smile: [/]",
)
FOLDER = "[red]x %s {0} $(touch hacked) :smile:"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands run in a folder in which nothing may appear, on a wide terminal without the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def recordings(tmp_path, make_clip, cache_dir) -> Path:
    """A folder of sounds whose names, labels and transcripts are hostile."""
    import csv

    folder = tmp_path / FOLDER
    folder.mkdir()
    names = ["[red]x.wav", "%s{0}.wav", "$(touch hacked).wav", "a\nb.wav", "\x1b[31m.wav", ":smile:[x].wav"]
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label", "split", "speaker"])
        for name, label, split in zip(names, LABELS, ["train"] * 3 + ["valid", "test", "test"], strict=True):
            make_clip(folder / "new.wav", video=False, seconds=0.5).rename(folder / name)
            writer.writerow([name, f"{label} is text", label, split, label])
    return folder


@pytest.fixture
def checkpoint(tmp_path, tiny_config, tiny_processor) -> str:
    """A classifier of the hostile labels in a folder with a hostile name."""
    folder = tmp_path / "runs" / FOLDER
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: at for at, name in enumerate(LABELS)}}
    settings = {key: value for key, value in tiny_config.to_dict().items() if key != "label_range"}
    MSAModel(MSAConfig(**{**settings, **names})).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


def assert_plain(printed: str) -> None:
    """No control characters of others reach the terminal, and brackets were not taken for markup."""
    assert "\x1b" not in printed and "\r" not in printed


def test_prepare_prints_names_and_labels_as_they_are(recordings, capsys):
    assert main(["prepare", str(recordings), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    for expected in (
        "[bold]joy[/bold] 1",
        "%s {0} {name} 1",
        "$(touch hacked) `x` 1",
        r"a|b\nc 1",
        r"\x1b[31mred",
    ):
        assert expected in captured.out, expected
    assert "classes have one clip only ('[bold]joy[/bold]' (1)" in captured.out


def test_broken_rows_are_listed_with_their_names_as_they_are(recordings, capsys):
    for path in recordings.glob("*.wav"):
        path.write_bytes(b"")
    assert main(["prepare", str(recordings)]) == 1
    message = capsys.readouterr().err
    assert_plain(message)
    assert f"{FOLDER}/metadata.csv line 2: '[red]x.wav' has zero bytes" in message
    assert r"'\x1b[31m.wav' has zero bytes" in message and r"'a\nb.wav'" in message


def test_evaluate_prints_and_writes_names_as_they_are(recordings, checkpoint, capsys):
    assert main(["evaluate", checkpoint, str(recordings), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out)
    assert f"{checkpoint} on test (2 samples)" in captured.out
    assert main(["evaluate", checkpoint, str(recordings), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["data"] == str(recordings) and report["checkpoint"] == checkpoint


def test_predict_prints_names_labels_and_json_as_they_are(recordings, checkpoint, capsys):
    clips = sorted(map(str, recordings.glob("*.wav")))
    texts = [word for label in LABELS for word in ("--text", label)]
    assert main(["predict", *clips, *texts, "--model", checkpoint]) == 0
    printed = capsys.readouterr().out
    assert_plain(printed)
    assert f"{recordings}/[red]x.wav: " in printed and f"{recordings}/a\\nb.wav: " in printed
    assert main(["predict", *clips, *texts, "--model", checkpoint, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["clip"] for answer in answers] == clips
    assert set(answers[0]["probabilities"]) == set(LABELS)


def test_describe_prints_names_as_they_are(checkpoint, capsys):
    config = json.loads(Path(checkpoint, "config.json").read_text())
    scores = {"accuracy": 0.5, "f1_weighted": 0.5, "f1_macro": None, "recall_macro": 0.5}
    record = {
        "data": FOLDER,
        "command": "train \x1b[31m [red]",
        "results": {"test": {"text": scores}},
        "comparison": [f"test: {label}" for label in LABELS],
    }
    Path(checkpoint, "config.json").write_text(json.dumps({**config, "trained_on": record}))
    assert main(["describe", checkpoint]) == 0
    printed = capsys.readouterr().out
    assert_plain(printed)
    assert FOLDER in printed and "test: [bold]joy[/bold]" in printed and r"\x1b[31mred" in printed
    assert main(["describe", checkpoint, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_on"]["comparison"][4] == f"test: {LABELS[4]}"


@pytest.mark.parametrize("name", [FOLDER, "\x1b[31m", "a\nb", "/no/such/[red]"])
def test_errors_name_files_as_they_are(name, capsys):
    for words in (["prepare", name], ["describe", name], ["predict", "--model", name, "--text", "x"]):
        assert main(words) == 1
        message = capsys.readouterr().err
        assert_plain(message)
        assert message.startswith("error: ") and name.split("\n")[0].replace("\x1b", "\\x1b") in message


def test_features_are_converted_and_the_command_to_train_on_them_can_be_pasted(tmp_path, capsys):
    source, folder = tmp_path / f"{FOLDER}.npz", tmp_path / f"corpus {FOLDER}"
    parts = {"text": np.ones((6, 2)), "label": np.array(LABELS), "split": np.array(["train", "valid"] * 3)}
    np.savez(source, id=np.array(LABELS), **parts)
    assert main(["convert-features", str(source), str(folder)]) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    words = shlex.split(captured.out.splitlines()[-1])
    assert f"data.path={folder}" in words
    assert main(["prepare", str(folder)]) == 1
    command = capsys.readouterr().err.partition("converted with: ")[2]
    assert str(folder) in shlex.split(command)


def test_a_run_prints_and_records_names_as_they_are(tmp_path, capsys):
    """Training on features: the console, the card, the configuration and the history."""
    random = np.random.default_rng(0)
    source = tmp_path / f"{FOLDER}.npz"
    features = {name: random.normal(size=(24, 2)) for name in ("text", "audio", "vision")}
    splits = np.array(["train"] * 12 + ["valid"] * 6 + ["test"] * 6)
    ids = np.array([f"{number} [red]" for number in range(24)])
    np.savez(source, id=ids, label=np.array(LABELS * 4), split=splits, **features)
    config = tmp_path / f"{FOLDER}.yaml"
    settings = {
        "model": {"feature_widths": dict.fromkeys(features, 2), "head_kwargs": {"hidden_size": 4}},
        "data": {"path": str(source), "task": "classification"},
        "training": {"epochs": 1, "output_dir": str(tmp_path / "runs" / FOLDER), "log_with": None},
    }
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config)]) == 0
    printed = capsys.readouterr().out
    assert_plain(printed)
    assert f"checkpoint and model card: {tmp_path / 'runs' / FOLDER}" in printed
    run = tmp_path / "runs" / FOLDER
    json.loads((run / "history.json").read_text(), parse_constant=pytest.fail)
    written = json.loads((run / "config.json").read_text(), parse_constant=pytest.fail)
    assert set(written["label2id"]) == set(LABELS)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert_plain(card)
    assert r"a\|b\\nc" in card and "%s {0} {name}" in card and r"$(touch hacked) \`x\`" in card
    assert f"msa-online evaluate {shlex.quote(FOLDER)} FEATURES" in card
    assert main(["describe", str(run)]) == 0
    assert_plain(capsys.readouterr().out)


def test_the_card_of_a_hostile_name_is_markdown_and_python_that_mean_the_name(tmp_path, tiny_config):
    folder = tmp_path / 'a "name" [x](http:example.com) ${data} | <b>'
    folder.mkdir()
    record = {
        **{"data": "a|b <script>", "modulator": "identity", "splits": {"train": 1}, "seed": 1, "epoch": 1},
        **{"mixed_precision": "no", "selection": "MAE", "protocol": "x", "command": "train '\n```\n# no'"},
        **{"results": {}, "comparison": [], "findings": {"empty text": 3}},
    }
    write_model_card(folder, MSAConfig(**{**tiny_config.to_dict(), "trained_on": record}))
    card = (folder / "README.md").read_text(encoding="utf-8")
    call = next(line for line in card.splitlines() if "from_pretrained" in line)
    assert json.loads(call.partition("from_pretrained(")[2].rstrip(")")) == folder.name
    assert r"| data | a\|b \<script> |" in card and "](http" not in card.partition("```python")[0]
    assert "| found in the clips | empty text: 3 |" in card and "\n# no" not in card


def test_text_for_the_terminal_keeps_lines_and_letters_and_escapes_the_rest():
    assert printable_lines("a\nb\x1b[0m\r\x07é👩\udcff") == "a\nb\\x1b[0m\\r\\x07é👩\\udcff"
    assert markdown_text("[red] a_b") == "[red] a_b"


def test_the_console_prints_brackets_colons_and_control_characters_as_they_are(capsys):
    open_console().print("[red]x[/red] :smile: \x1b[31m [/]")
    assert capsys.readouterr().out == "[red]x[/red] :smile: \\x1b[31m [/]\n"
