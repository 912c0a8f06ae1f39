# SPDX-License-Identifier: Apache-2.0
"""The commands of the guides work as they stand there, one after another, on small data and encoders."""

import csv
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoModel, WhisperFeatureExtractor

import msa_online_cli
from feature_extractors.__main__ import main as feature_extractors_main
from feature_extractors.assets import cache_root
from msa_online.training.config_reader import read_arguments
from tests.test_readme import blocks
from tests.training.test_encoders import WHISPER

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
ENCODERS = ("sentence-transformers/all-MiniLM-L6-v2", "FacebookAI/xlm-roberta-base")
RECOMMENDED = {  # as configs/recommended.yaml, but tiny
    "model": {
        "text_encoder": ENCODERS[0],
        "audio_encoder": "tiny_whisper",
        "audio_layer": 2,
        "face_channels": 8,
        "face_width": 16,
        "head_kwargs": {"hidden_size": 16, "deviation": ["audio"]},
    },
    "data": {"num_frames": 4, "face_size": 32, "max_audio_seconds": 1},
    "training": {"freeze": ["audio"], "epochs": 1, "batch_size": 8},
}
CHANGES = {  # of the words on the page, to what is there in the test
    "model.feature_widths={text: 384, audio: 90, vision: 104}": (
        "model.feature_widths={text: 32, audio: 90, vision: 104}"
    ),
    "data.max_audio_seconds=10": "data.max_audio_seconds=0.5",
    "48": "15",
}
SHORTER = {"late_fusion_plain_offline": ["training.epochs=1"], "synthesize": ["--workers", "1"]}


def commands(page: str) -> list[list[str]]:
    """All commands of a page, each once, in order."""
    text = "".join(blocks("bash", (REPOSITORY / page).read_text("utf-8"))).replace("\\\n", " ")
    found = {line.strip(): shlex.split(line, comments=True) for line in text.splitlines() if line.strip()}
    return list(found.values())


@pytest.fixture(scope="module")
def workplace(tiny_corpus, tiny_text_encoder, tmp_path_factory):
    """The current folder of a user, with everything that the pages name; clips are extracted once."""
    folder = tmp_path_factory.mktemp("guides")
    cache = folder / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(cache_root() / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MSA_CACHE", str(cache))
        for name in ENCODERS:
            shutil.copytree(tiny_text_encoder, folder / name)
        torch.manual_seed(0)
        whisper = AutoModel.from_config(
            AutoConfig.for_model("whisper", **{**WHISPER, "max_source_positions": 200})
        )
        whisper.save_pretrained("tiny_whisper")
        WhisperFeatureExtractor(chunk_length=4).save_pretrained("tiny_whisper")
        Path("recommended").write_text(yaml.safe_dump(RECOMMENDED))  # a file has priority over a shipped one
        shutil.copytree(tiny_corpus, "my_clips", ignore=shutil.ignore_patterns("metadata.csv"))
        shutil.copy(tiny_corpus / "clip_00.mp4", "clip.mp4")
        Path("new_clips").mkdir()
        shutil.copy(tiny_corpus / "clip_00.mp4", "new_clips")
        yield folder


def fill_in(corpus: Path) -> None:
    """Do what the page asks the user to do with the table."""
    rows = list(csv.DictReader((corpus / "metadata.csv").open(encoding="utf-8")))
    for number, row in enumerate(rows):
        row["mood"] = ("negative", "neutral", "positive")[number % 3]
    with open("my_clips/metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def add_folds(table: Path) -> None:
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "fold_1"])
        writer.writeheader()
        writer.writerows({**row, "fold_1": row["split"]} for row in rows)


def run(words: list[str]) -> int | None:
    """Run a command in this process as a new one; those that need several, or the Hub, are parsed only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    words = [CHANGES.get(word, word) for word in words]
    if words[:3] == ["python", "-m", "feature_extractors"]:
        return feature_extractors_main(words[3:])
    assert words[0] == "msa-online"
    if words[1] == "publish":
        msa_online_cli.build_parser().parse_args(words[1:])
        return 0
    if words[1] == "launch":
        launch = launch_command_parser().parse_args(words[2:])
        read_arguments(Path(launch.training_script), launch.training_script_args)
        return 0
    return msa_online_cli.main([*words[1:], *(each for word in words for each in SHORTER.get(word, []))])


def test_from_a_folder_of_clips_to_a_model_in_all_ways_of_the_guide(workplace, tiny_corpus):
    for words in commands("docs/fine_tune.md"):
        assert not run(words), words
        if words[1] == "init-data":
            assert Path("my_clips/metadata.csv").is_file()
            fill_in(tiny_corpus)
        if words[1] == "extract-features":
            add_folds(Path("features/mine/metadata.csv"))
    runs = {path.parent.name for path in Path("runs").glob("*/model.safetensors")}
    assert runs == {
        *("mine", "second", "moods", "moods_from_scores", "german", "frozen", "lora", "few", "fold_1")
    }


@pytest.mark.needs("ogm")
def test_every_answer_of_the_troubleshooting_page_works(workplace, tiny_corpus, mmsa_content):
    Path("unaligned_50.pkl").write_bytes(pickle.dumps(mmsa_content))
    fill_in(tiny_corpus)
    for name in ("runs", "features"):
        shutil.rmtree(name, ignore_errors=True)
    start = "msa-online train recommended data.path=my_clips training.output_dir=runs/mine"
    assert not run(shlex.split(start))
    for words in commands("docs/troubleshooting.md"):
        assert not run(words), words
    assert os.path.getsize("faces.png") and os.path.getsize("results.csv")
