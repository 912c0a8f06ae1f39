# SPDX-License-Identifier: Apache-2.0
"""What a model does not see of a transcript is reported with counts by every command."""

import json
from pathlib import Path

import pytest

from msa_online import MSAPipeline
from msa_online_cli import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TEXTS = {
    "known.wav": "a very good film",
    "partly.wav": "a very добрый film",
    "wholly.wav": "😀 ดีมาก",
    "invisible.wav": "\ufeff\u200b\u200e\ufe0f",
    "long.wav": "good " * 40,
}


@pytest.fixture
def recordings(tmp_path, make_clip, cache_dir) -> Path:
    rows = ["file_name,text,label,split"]
    for number, (name, text) in enumerate(TEXTS.items()):
        make_clip(tmp_path / name, video=False, seconds=0.5 + number / 50)
        rows.append(f"{name},{text},{number - 2},test")
    (tmp_path / "metadata.csv").write_text("\n".join(rows), "utf-8")
    return tmp_path


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path) -> str:
    tiny_model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.max_text_tokens = 32
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def row_of(printed: str, finding: str) -> list[str]:
    line = next(line for line in printed.splitlines() if finding in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_prepare_counts_texts_that_are_empty_unknown_or_cut(recordings, tiny_text_encoder, capsys):
    words = ["--text-encoder", str(tiny_text_encoder), "--max-text-tokens", "32", "--workers", "1"]
    assert main(["prepare", str(recordings), *words]) == 0
    printed = capsys.readouterr().out
    assert row_of(printed, "empty text") == ["empty text", "1", "20.0%", "5"]
    assert row_of(printed, "text all unknown") == ["text all unknown", "1", "20.0%", "4"]
    # 4 known tokens, 4 with one unknown, 2 unknown, 40 known
    assert row_of(printed, "text partly unknown")[1:] == ["1", "20.0%", "3; 6.0% of all tokens"]
    assert row_of(printed, "text cut at 32 tokens")[3] == "6; longest: 32 of 42 tokens"
    assert "All texts that are unknown to the tokenizer look alike to the model." in printed
    assert "--text-encoder" not in printed
    assert main(["prepare", str(recordings)]) == 0
    assert "--text-encoder NAME also counts words that its tokenizer does not know" in capsys.readouterr().out


def test_evaluate_reports_unknown_texts_as_json(recordings, checkpoint, capsys):
    assert main(["evaluate", checkpoint, str(recordings), "--json", "-", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    unknown = {"share_of_tokens": 3 / 50, "all_unknown": [4], "partly_unknown": [3]}
    assert report["unknown_text"] == unknown
    assert report["findings"]["empty text"] == [5] and report["cut"]["text"]["lines"] == [6]


def test_predict_says_what_of_a_text_is_unknown_or_invisible(recordings, checkpoint, capsys):
    texts = [word for name in ("partly.wav", "wholly.wav") for word in ("--text", TEXTS[name])]
    assert main(["predict", *texts, "--model", checkpoint]) == 0
    printed = capsys.readouterr().out
    assert "found: text: 1 of 4 tokens unknown" in printed and "found: text: 2 of 2 tokens unknown" in printed
    assert printed.count("warning: the tokenizer knows no word of the text") == 1
    clip = str(recordings / "known.wav")
    assert main(["predict", clip, "--text", TEXTS["invisible.wav"], "--model", checkpoint, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["missing"]["text"] == "empty text" and answer["modalities"] == ["audio"]


@pytest.mark.parametrize("text", ["", "\u200b", "\ufeff \u200e", "\ufe0f"])
def test_a_text_without_anything_in_it_is_refused_with_the_usage(text, checkpoint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--text", text, "--model", checkpoint])
    assert caught.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("nothing to predict from: give a clip, a text, or both")
    )


def test_special_tokens_in_a_text_do_not_shield_what_follows(tiny_model, tiny_processor):
    """A text that says [SEP] or [PAD] is read to its end."""
    pipeline = MSAPipeline(tiny_model, tiny_processor, device="cpu")
    first, second = pipeline(None, ["good [SEP] [PAD] bad", "good [SEP] [PAD] great"])
    assert first.score != second.score
    assert first.findings == ("text: 6 of 8 tokens unknown",)
