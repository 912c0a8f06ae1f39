# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages beside it tell people to type works as it stands there."""

import ast
import pickle
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import msa_online
import msa_online_cli
from feature_extractors.__main__ import main as feature_extractors_main
from msa_online.methods import CALIBRATORS, HEADS, MODULATORS
from msa_online.shipped_configs import find_configuration
from msa_online.studies.study import read_study
from msa_online.studies.tuning import read_search
from msa_online.training.config_reader import read_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
REPOSITORY = Path(__file__).parents[1]
PAGES = {
    name: (REPOSITORY / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/data.md", "docs/training.md", "docs/using_a_checkpoint.md")
}
README = PAGES["README.md"]


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(start: str) -> list[list[str]]:
    """The commands of all pages that begin so, each once."""
    text = "".join(block for page in PAGES.values() for block in blocks("bash", page))
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    found = {" ".join(words): words for words in lines if words[: len(start.split())] == start.split()}
    return list(found.values())


LONG = ("train", "study", "launch", "tune", "serve")  # commands that are checked, but not run
SHORT = [words for words in commands("msa-online") if words[1] not in LONG]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_text_config, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "mine"
    config = msa_online.MSAConfig(
        text_config=tiny_text_config,
        audio_channels=[16, 16],
        face_channels=8,
        head_kwargs={"hidden_size": 16},
        label_range=[-3, 3],
    )
    msa_online.MSAModel(config).save_pretrained(folder)
    msa_online.MSAProcessor(tiny_tokenizer, {"num_frames": 4, "face_size": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def mmsa_pickle(mmsa_content, tmp_path) -> Path:
    path = tmp_path / "unaligned_50.pkl"
    path.write_bytes(pickle.dumps(mmsa_content))
    return path


def test_the_two_commands_are_scripts_of_this_repository():
    scripts = commands("bash")
    assert [words[1] for words in scripts[:2]] == ["scripts/demo.sh", "scripts/test.sh"]
    assert all((REPOSITORY / words[1]).is_file() for words in scripts)


@pytest.mark.parametrize("words", commands("accelerate launch"), ids=" ".join)
def test_launch_commands_name_files_and_keys_that_exist(words):
    if "--config_file" in words:
        assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    program = words.index("-m")
    assert words[program : program + 3] == ["-m", "msa_online_cli", "train"]
    assert read_arguments(find_configuration(words[program + 3]), words[program + 4 :])


@pytest.mark.parametrize("words", commands("msa-online launch"), ids=" ".join)
def test_commands_of_our_launcher_name_files_and_keys_that_exist(words):
    launch = launch_command_parser().parse_args(words[2:])
    assert launch.config_file is None or (REPOSITORY / launch.config_file).is_file()
    assert read_arguments(find_configuration(launch.training_script), launch.training_script_args)


@pytest.mark.parametrize("words", SHORT, ids=" ".join)
def test_msa_online_commands_run(
    words, checkpoint, tiny_corpus, tiny_text_encoder, mmsa_pickle, cache_dir, tmp_path
):
    stand_ins = {
        "runs/mine": str(checkpoint),
        "PATH/TO/CLIPS": str(tiny_corpus),
        "clip.mp4": str(tiny_corpus / "clip_00.mp4"),
        "sentence-transformers/all-MiniLM-L6-v2": str(tiny_text_encoder),
        **dict.fromkeys(("unaligned_39.pkl", "unaligned_50.pkl"), str(mmsa_pickle)),
        "google-bert/bert-base-chinese": str(tiny_text_encoder),
        "features/sims": str(tmp_path / "sims"),
        **{name: str(tmp_path / name) for name in ("results.csv", "timeline.csv", "curve.png")},
        "features/mosi": str(tmp_path / "mosi"),
        "features/mine": str(tmp_path / "mine"),
        "features/control": str(tmp_path / "control"),
    }
    assert msa_online_cli.main([stand_ins.get(word, word) for word in words[1:]]) == 0


@pytest.mark.parametrize("words", commands("msa-online serve"), ids=" ".join)
def test_serve_commands_have_options_that_exist(words):
    assert msa_online_cli.build_parser().parse_args(words[1:]).command == "serve"


@pytest.mark.parametrize("words", commands("python -m feature_extractors"), ids=" ".join)
def test_feature_extractor_commands_run(words, tiny_corpus, tmp_path):
    stand_ins = {"clip.mp4": str(tiny_corpus / "clip_00.mp4"), "faces.png": str(tmp_path / "faces.png")}
    assert not feature_extractors_main([stand_ins.get(word, word) for word in words[3:]])
    assert (tmp_path / "faces.png").exists()


@pytest.mark.parametrize("words", commands("msa-online study"), ids=" ".join)
def test_study_commands_name_files_and_keys_that_exist(words):
    assert read_study(find_configuration(words[2], "ablations/"), words[3:]).runs()


@pytest.mark.parametrize("words", commands("msa-online tune"), ids=" ".join)
def test_tune_commands_name_configurations_with_a_space_and_keys_that_exist(words):
    config = find_configuration(words[2])
    changes = words[5:] if words[3] == "--trials" else words[3:]
    assert read_search(config, config.parent / "spaces" / config.name, changes).space


@pytest.mark.parametrize("words", commands("msa-online train"), ids=" ".join)
def test_train_commands_name_configurations_and_keys_that_exist(words):
    assert read_arguments(find_configuration(words[2]), words[3:])


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks("python", page)])
def test_the_python_of_a_page_runs(name, checkpoint, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python", PAGES[name]):
        code = block.replace("runs/mine", str(checkpoint)).replace(
            "clip.mp4", str(tiny_corpus / "clip_00.mp4")
        )
        exec(compile(ast.parse(code), name, "exec"), names)
    assert names["prediction"].modalities == ("text", "audio", "vision")
    if "without_text" in names:
        assert list(names["without_text"].missing) == ["text"]
    if "trainer" in names:
        assert (tmp_path / "runs" / "trainer" / "model.safetensors").is_file()


def test_every_method_has_a_file_a_test_a_configuration_and_a_row():
    configurations = [path.read_text() for path in (REPOSITORY / "configs").glob("*.yaml")]
    registered = {**HEADS, **MODULATORS, **CALIBRATORS}
    for name in registered.keys() - {"identity"}:
        method = registered[name].__module__.split(".")[2]  # of msa_online.methods: a file, or a folder
        tests = REPOSITORY / "tests/methods"
        assert (tests / f"test_{method}.py").is_file() or any((tests / method).glob("test_*.py"))
        assert any(re.search(rf"\b{name}\b", text) for text in configurations)
        assert re.search(rf"`configs/\w*{method}\w*\.yaml`", README)
