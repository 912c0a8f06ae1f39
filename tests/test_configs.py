# SPDX-License-Identifier: Apache-2.0
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from msa_online import MSAModel
from msa_online.studies.study import read_study
from msa_online.training.config_reader import read_arguments
from msa_online.training.stages import make_schedule

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "configs"
LAUNCHERS = sorted(FOLDER.glob("accelerate/*.yaml"))
STUDIES = sorted([*FOLDER.glob("ablations/*.yaml"), *FOLDER.glob("studies/*.yaml")])
RUNS = sorted(set(FOLDER.rglob("*.yaml")) - set(LAUNCHERS) - set(STUDIES))


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def command_of(path: Path, program: str = "accelerate launch") -> list[str]:
    """The command in the comment a configuration opens with."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# {program} "), f"{path} does not open with the command that runs it"
    return shlex.split(first.removeprefix("# "))


def test_every_configuration_is_looked_at():
    assert RUNS and LAUNCHERS and STUDIES
    known = {*RUNS, *LAUNCHERS, *STUDIES}
    assert not [path for path in FOLDER.rglob("*") if path.is_file() and path not in known]


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


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_a_study_says_how_to_run_it_and_can_be_run_so(path, monkeypatch):
    _, script, study, *changes = command_of(path, "python")
    assert (REPOSITORY / script).is_file() and REPOSITORY / study == path
    monkeypatch.chdir(REPOSITORY)  # a study names its configuration as seen from there
    assert read_study(path, changes).runs()


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_every_variant_of_a_study_builds_its_model_and_differs_from_the_others(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(REPOSITORY)
    runs = read_study(path, ["seeds=[1]"]).runs()
    for run in runs:
        with torch.device("meta"):
            MSAModel(run.arguments.model_config(("class 0", "class 1")))
    settings = [[change for change in run.changes if "output_dir" not in change] for run in runs]
    assert all(settings.count(own) == 1 for own in settings)


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_accelerate_reads_its_configurations(path):
    words = command_of(path)
    assert REPOSITORY / words[words.index("--config_file") + 1] == path and "train.py" in words
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.mixed_precision in ("no", "fp16", "bf16")
