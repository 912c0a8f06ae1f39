# SPDX-License-Identifier: Apache-2.0
import shlex
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from msa_online import MSAModel
from msa_online.shipped_configs import description, find_configuration, shipped
from msa_online.studies.study import read_study
from msa_online.studies.tuning import read_search
from msa_online.training.config_reader import read_arguments
from msa_online.training.stages import make_schedule
from msa_online.training.yaml_reader import ConfigurationError

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "configs"
LAUNCHERS = sorted(FOLDER.glob("accelerate/*.yaml"))
STUDIES = sorted([*FOLDER.glob("ablations/*.yaml"), *FOLDER.glob("studies/*.yaml")])
SPACES = sorted(FOLDER.glob("spaces/*.yaml"))
SPACES_OF_VARIANTS = sorted(FOLDER.glob("spaces/features/*.yaml"))
RUNS = sorted(set(FOLDER.rglob("*.yaml")) - set(LAUNCHERS) - set(STUDIES) - {*SPACES, *SPACES_OF_VARIANTS})


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def command_of(path: Path, program: str) -> list[str]:
    """The command in the comment a configuration opens with."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# {program} "), f"{path} does not open with the command that runs it"
    return shlex.split(first.removeprefix("# "))


def test_every_configuration_is_looked_at():
    assert RUNS and LAUNCHERS and STUDIES and SPACES
    known = {*RUNS, *LAUNCHERS, *STUDIES, *SPACES, *SPACES_OF_VARIANTS}
    assert not [path for path in FOLDER.rglob("*") if path.is_file() and path not in known]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_configuration_says_how_to_run_it_and_can_be_run_so_anywhere(path, monkeypatch, tmp_path):
    _, _, config, *changes = command_of(path, "msa-online train")
    monkeypatch.chdir(tmp_path)
    assert find_configuration(config) == path
    read_arguments(path, changes)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_configuration_builds_its_model(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = read_arguments(path)
    with torch.device("meta"):
        model = MSAModel(arguments.model_config(("class 0", "class 1")))
    make_schedule(arguments.training, model.head.stages)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_a_study_says_how_to_run_it_and_can_be_run_so_anywhere(path, monkeypatch, tmp_path):
    _, _, study, *changes = command_of(path, "msa-online study")
    monkeypatch.chdir(tmp_path)
    assert REPOSITORY / study == path == find_configuration(study, "ablations/")
    assert read_study(path, changes).runs()


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_every_variant_of_a_study_builds_its_model_and_differs_from_the_others(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runs = read_study(path, ["seeds=[1]"]).runs()
    for run in runs:
        with torch.device("meta"):
            MSAModel(run.arguments.model_config(("class 0", "class 1")))
    settings = [[change for change in run.changes if "output_dir" not in change] for run in runs]
    assert all(settings.count(own) == 1 for own in settings)


@pytest.mark.parametrize("path", SPACES, ids=name_of)
def test_a_search_space_says_how_to_run_it_and_fits_the_configuration_of_its_name(path):
    _, _, config, *changes = [word for word in command_of(path, "msa-online tune") if word[:2] != "--"]
    changes = [change for change in changes if "=" in change]
    assert find_configuration(config) == FOLDER / path.name
    assert read_search(FOLDER / path.name, path, changes).space


@pytest.mark.parametrize("path", SPACES_OF_VARIANTS, ids=name_of)
def test_a_search_space_of_a_variant_fits_it_and_begins_with_its_own_settings(path):
    _, _, study, *words = command_of(path, "msa-online tune")
    assert words[words.index("--space") + 1] == path.relative_to(FOLDER / "spaces").with_suffix("").as_posix()
    variant = words[words.index("--variant") + 1]
    config, changes = read_study(find_configuration(study, "ablations/")).search_of(variant)
    search = read_search(config, path, changes)
    first = search.arguments.to_dict()
    for dimension in search.space:
        value = reduce(getitem, dimension.key.split("."), first)
        assert dimension.contains(value), f"{dimension.key}={value!r}"


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_accelerate_reads_its_configurations(path):
    words = command_of(path, "accelerate launch")
    assert REPOSITORY / words[words.index("--config_file") + 1] == path and "train.py" in words
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.mixed_precision in ("no", "fp16", "bf16")


def test_every_shipped_configuration_has_a_name_and_a_description():
    names = shipped()
    assert set(names.values()) == {*RUNS, *STUDIES, *LAUNCHERS, *SPACES, *SPACES_OF_VARIANTS}
    assert names["ebmc"] == FOLDER / "ebmc.yaml" and "ablations/ebmc" in names
    assert all(len(description(path)) > 4 for path in names.values())


def test_a_configuration_is_found_by_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = next(path for path in FOLDER.glob("ablations/*.yaml") if (FOLDER / path.name).is_file())
    run, name = FOLDER / study.name, study.stem
    assert find_configuration(name) == find_configuration(f"configs/{study.name}") == run
    assert find_configuration(name, "ablations/") == study
    (tmp_path / name).mkdir()  # a folder is no configuration
    assert find_configuration(name) == run
    (tmp_path / study.name).touch()
    assert find_configuration(study.name) == Path(study.name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("late_fuson", "did you mean 'late_fusion'"), ("zzz", "lists them"), ("my/run.yaml", "neither a file")],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_the_command_that_lists_them(name, hint):
    with pytest.raises(ConfigurationError, match=rf"{name}: .*{hint}.*") as caught:
        find_configuration(name)
    assert "`msa-online configs` lists them" in str(caught.value) and "\n" not in str(caught.value)
