# SPDX-License-Identifier: Apache-2.0
"""Heads, calibrators and modulators of a user's own package."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from msa_online import MSAConfig, MSAModel
from msa_online.hub import CheckpointError, load_checkpoint
from msa_online.methods import HEADS
from msa_online.studies.study import read_study
from msa_online.training.config_reader import parse_arguments
from msa_online.training.yaml_reader import ConfigurationError
from msa_online_cli import main

WIDTHS = {"text": 4, "audio": 3, "vision": 2}
RUN = {"model": {"feature_widths": WIDTHS, "head": "mine"}, "plugins": ["my_plugin"]}


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """A module `my_plugin` that is not imported yet and registers the head `mine`."""
    path = tmp_path / "plugins" / "my_plugin.py"
    path.parent.mkdir()
    path.write_text(
        "from msa_online.methods import HEADS, LateFusionHead\n\n\n"
        "class MyHead(LateFusionHead):\n    pass\n\n\nHEADS['mine'] = MyHead\n"
    )
    monkeypatch.syspath_prepend(path.parent)
    yield path
    forget()


def forget() -> None:
    """What a new process knows of the plug-in: nothing."""
    HEADS.pop("mine", None)
    sys.modules.pop("my_plugin", None)


@pytest.fixture
def checkpoint(plugin, tmp_path, capsys) -> str:
    """A checkpoint of the head `mine`, in a process that has not imported the plug-in."""
    model = MSAModel(parse_arguments(RUN).model_config(()))
    model.save_pretrained(tmp_path / "checkpoint")
    forget()
    capsys.readouterr()
    return str(tmp_path / "checkpoint")


def test_a_configuration_imports_its_plug_ins_before_it_looks_up_the_head(plugin):
    arguments = parse_arguments(RUN)
    assert arguments.plugins == ["my_plugin"] and arguments.to_dict()["plugins"] == ["my_plugin"]
    assert arguments.model_config(()).plugins == ["my_plugin"]
    assert type(MSAModel(arguments.model_config(())).head).__name__ == "MyHead"


def test_without_the_plug_in_the_unknown_head_names_the_key(plugin):
    message = r"unknown head 'mine'; known are .*, or import your own with plugins: \[package\]"
    with pytest.raises(ConfigurationError, match=message):
        parse_arguments({"model": RUN["model"]})


@pytest.mark.parametrize("name", ["no_such_package", "", "my_plugin.nothing"])
def test_a_plug_in_that_is_missing_is_one_line(plugin, name):
    with pytest.raises(ConfigurationError, match=f"plugins: cannot import '{name}'") as caught:
        parse_arguments({**RUN, "plugins": [name]})
    assert "PYTHONPATH" in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_imports_its_plug_ins(plugin, tmp_path):
    (tmp_path / "base.yaml").write_text(json.dumps({"model": RUN["model"]}))
    study = {
        "config": str(tmp_path / "base.yaml"),
        "output_dir": "runs",
        "seeds": [1],
        "variants": {"mine": {}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    (run,) = read_study(tmp_path / "study.yaml", ["plugins=[my_plugin]"]).runs()
    assert run.arguments.plugins == ["my_plugin"]


def test_a_checkpoint_names_its_plug_ins_and_imports_none(checkpoint):
    assert json.loads(Path(checkpoint, "config.json").read_text())["plugins"] == ["my_plugin"]
    needed = "this checkpoint needs the plug-in my_plugin: import it first"
    with pytest.raises(CheckpointError, match=needed) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=needed):
        AutoModel.from_pretrained(checkpoint)
    assert "my_plugin" not in sys.modules
    import my_plugin

    assert isinstance(load_checkpoint(checkpoint)[0].head, my_plugin.MyHead)


def test_a_checkpoint_without_plug_ins_does_not_mention_them(tmp_path):
    MSAConfig(feature_widths=WIDTHS).save_pretrained(tmp_path)
    assert "plugins" not in json.loads((tmp_path / "config.json").read_text())


def test_commands_import_the_plug_ins_they_are_given(checkpoint, capsys):
    assert main(["describe", checkpoint]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "import it first" in error and error.count("\n") == 1
    assert main(["describe", checkpoint, "--plugin", "my_plugin"]) == 0
    assert "head.unimodal" in capsys.readouterr().out
