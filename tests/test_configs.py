# SPDX-License-Identifier: Apache-2.0
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from msa_online import MSAModel
from msa_online.training.arguments import read_arguments
from msa_online.training.stages import make_schedule

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "configs"
LAUNCHERS = sorted(FOLDER.glob("accelerate/*.yaml"))
RUNS = sorted(set(FOLDER.rglob("*.yaml")) - set(LAUNCHERS))


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def command_of(path: Path) -> list[str]:
    """The command in the comment a configuration opens with."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# accelerate launch "), f"{path} does not open with the command that runs it"
    return shlex.split(first.removeprefix("# "))


def test_every_configuration_is_looked_at():
    assert RUNS and LAUNCHERS
    assert not [path for path in FOLDER.rglob("*") if path.is_file() and path not in (*RUNS, *LAUNCHERS)]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_configuration_says_how_to_run_it_and_can_be_run_so(path):
    words = command_of(path)
    script, config, *changes = words[words.index("train.py") :]
    assert (REPOSITORY / script).is_file() and REPOSITORY / config == path
    read_arguments(path, changes)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_configuration_builds_its_model(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = read_arguments(path)
    with torch.device("meta"):
        model = MSAModel(arguments.model_config(("class 0", "class 1")))
    make_schedule(arguments.training, model.head.stages)


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_accelerate_reads_its_configurations(path):
    words = command_of(path)
    assert REPOSITORY / words[words.index("--config_file") + 1] == path and "train.py" in words
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.mixed_precision in ("no", "fp16", "bf16")
