# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import yaml

from msa_online.studies.study import as_options, read_study
from msa_online.training.config_reader import read_arguments
from msa_online.training.yaml_reader import ConfigurationError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(
        "model: {text_encoder: bert-base-uncased, head: late_fusion, loss_weights: {unimodal: 0.3}}\n"
        "training: {epochs: 3}\n"
    )
    return path


@pytest.fixture
def write(tmp_path: Path, config: Path):
    """A function that writes a study file with some keys changed; None leaves a key out."""

    def write(**changes) -> Path:
        study = {
            "config": str(config),
            "output_dir": str(tmp_path / "runs"),
            "seeds": [1, 2],
            "changes": {"training.batch_size": 8},
            "variants": {"plain": {}, "no unimodal": {"model.loss_weights.unimodal": 0}},
        }
        study = {key: value for key, value in (study | changes).items() if value is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write


def test_every_variant_runs_with_every_seed_in_a_folder_of_its_own(write, tmp_path):
    runs = read_study(write()).runs()
    assert [(run.variant, run.seed) for run in runs] == [
        ("plain", 1), ("no unimodal", 1), ("plain", 2), ("no unimodal", 2),
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == 4
    assert runs[1].folder == tmp_path / "runs" / "no_unimodal" / "1"
    for run in runs:
        assert run.arguments.training.seed == run.seed
        assert run.arguments.training.output_dir == str(run.folder)
        assert run.arguments.training.batch_size == 8 and run.arguments.training.epochs == 3
    assert [run.arguments.model["loss_weights"]["unimodal"] for run in runs] == [0.3, 0, 0.3, 0]


def test_every_variant_runs_in_every_setting_and_has_the_last_word(write):
    settings = {"slow": {"training.learning_rate": 1e-4, "training.warmup": 0.2}, "fast": None}
    variants = {"plain": {}, "warm": {"training.warmup": 0.5}}
    runs = read_study(write(settings=settings, variants=variants, seeds=[1])).runs()
    assert [run.variant for run in runs] == ["plain, slow", "warm, slow", "plain, fast", "warm, fast"]
    assert [run.arguments.training.learning_rate for run in runs] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert [run.arguments.training.warmup for run in runs] == [0.2, 0.5, 0.1, 0.5]
    assert len({run.folder for run in runs}) == 4


def test_the_command_line_changes_all_variants_and_the_study_itself(write):
    study = read_study(
        write(), ["training.epochs=1", "training.batch_size=4", "seeds=[7]", "keep_checkpoints=true"]
    )
    assert study.seeds == [7] and study.keep_checkpoints
    for run in study.runs():
        assert run.arguments.training.epochs == 1 and run.arguments.training.batch_size == 4


def test_what_makes_a_variant_wins_over_the_command_line(write):
    runs = read_study(write(), ["model.loss_weights.unimodal=0.5", "seeds=[1]"]).runs()
    assert [run.arguments.model["loss_weights"]["unimodal"] for run in runs] == [0.5, 0]


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.1,
        1e-05,
        True,
        None,
        "text",
        "no",
        "1e-5",
        [{"name": "balance", "epochs": 3}],
        {"a": {"b": [1, 2]}},
        "x" * 200,
    ],
)
def test_values_reach_a_run_as_the_study_file_has_them(value, config, tmp_path):
    (change,) = as_options({"model.head_kwargs": {"it": value}})
    assert "\n" not in change
    assert yaml.safe_load(change.partition("=")[2]) == {"it": value}
    (change,) = as_options({"training.seed": value})
    assert yaml.safe_load(change.partition("=")[2]) == value


def test_the_recorded_changes_make_the_same_run_with_train_py(write, config):
    for run in read_study(write()).runs():
        assert read_arguments(config, run.changes) == run.arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"variants": None}, "lacks variants"),
        ({"seeds": []}, r"seeds is \[\]: a list of whole numbers"),
        ({"seeds": [1, 1]}, "give each seed once"),
        ({"seeds": [True]}, r"seeds is \[True\], but must be list\[int\]"),
        ({"seeds": [-1]}, "whole numbers"),
        ({"seeds": 1111}, "seeds is 1111"),
        ({"output_dir": 5}, "output_dir is 5"),
        ({"keep_checkpoints": "often"}, "keep_checkpoints is 'often', but must be bool"),
        ({"variants": {}}, "variants is empty"),
        ({"variants": ["plain"]}, r"variants is \['plain'\], but must be dict"),
        ({"variants": {"plain": 3}}, "variants.plain is 3, but must be dict"),
        ({"variants": {0.1: {}}}, "variants has the name 0.1: write names in quotes"),
        ({"variants": {"?": {}}}, "needs a letter or a digit"),
        ({"variants": {"a b": {}, "a_b": {}}}, "'a b' and 'a_b' would share the folder 'a_b'"),
        ({"variants": {"a": {"training.seed": 3}}}, "'a' sets training.seed: the study sets that"),
        ({"changes": {"training.output_dir": "x"}}, "'changes' sets training.output_dir"),
        (
            {"variants": {"a": {"training": {"seed": 3}}}},
            "'a' sets the whole section training: name its keys",
        ),
        (
            {"variants": {"a": {}, "a, b": {}}, "settings": {"b, c": {}, "c": {}}},
            "'a' in 'b, c' and 'a, b' in 'c' would share the folder 'a_b_c'",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused_with_the_key_and_the_remedy(write, changes, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_study(write(**changes))
    assert "study.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seeds", "write key=value"),
        ("seeds=[", "not YAML"),
        ("seeds=none", "seeds is 'none'"),
        ("patience=3", "unknown key 'patience'"),
        ("training.resume=true", "sets training.resume"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named(write, option, message):
    with pytest.raises(ConfigurationError, match=message):
        read_study(write(), [option])


def test_a_file_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere.yaml: cannot read the study"):
        read_study(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigurationError, match="must be a section of keys"):
        read_study(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigurationError, match="not YAML"):
        read_study(tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("variants:\n  a: {training.epochs: 1}\n  a: {training.epochs: 2}\n")
    with pytest.raises(ConfigurationError, match="the key 'a' occurs twice"):
        read_study(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"model.loss_weights.unimodul": 0}, "variant 'mine': .*'model.loss_weights.unimodul'"),
        ({"training.epochs": 0}, "variant 'mine': .*training.epochs is 0"),
        ({"training.push_to_hub": "lab/mine"}, "variant 'mine': training.push_to_hub .*msa-online publish"),
        ({"training.stages": [{"name": "balance", "epochs": 1}]}, "variant 'mine': .*balance"),
    ],
)
def test_a_variant_that_cannot_work_is_named_before_anything_is_trained(write, own, message):
    with pytest.raises(ConfigurationError, match=message):
        read_study(write(variants={"plain": {}, "mine": own})).runs()


def test_seeds_and_names_that_no_run_can_have_are_refused_before_anything_is_trained(write):
    with pytest.raises(ConfigurationError, match="variant 'plain': .*training.seed is 4294967296: at most"):
        read_study(write(seeds=[2**32], variants={"plain": {}})).runs()
    with pytest.raises(ConfigurationError, match="training.output_dir is .*: names of at most 200 bytes"):
        read_study(write(variants={"x" * 201: {}})).runs()


def leave(run, **settings) -> None:
    """What an interrupted or finished run leaves in its folder, so far as a study looks at it."""
    run.folder.mkdir(parents=True)
    record = run.arguments.to_dict()
    record["training"] |= settings
    (run.folder / "run.yaml").write_text(yaml.safe_dump(record))


def test_an_interrupted_run_is_resumed_and_one_with_other_settings_is_started_anew(write):
    same, other, *_ = read_study(write()).runs()
    leave(same, log_with="wandb")  # makes no difference to what a run learns
    leave(other, epochs=30)
    for run in (same, other):
        (run.folder / "state").mkdir()
    assert same.to_train().training.resume and not same.to_train().training.overwrite
    assert other.to_train().training.overwrite and not other.to_train().training.resume
    assert other.difference == "training.epochs=30, now 3"


def test_a_run_of_an_earlier_version_is_recognised_by_its_keys(write):
    run = read_study(write()).runs()[0]
    leave(run, freeze_text_encoder=False)
    expected = "training.freeze_text_encoder of an earlier version, now training.freeze=[text]"
    assert run.difference == expected and run.to_train().training.overwrite


def test_a_run_is_finished_only_once_its_results_are_there_and_its_state_is_gone(write):
    run = read_study(write()).runs()[0]
    assert run.record is None
    leave(run)
    assert run.record is None and run.to_train().training.overwrite
    (run.folder / "config.json").write_text(json.dumps({"trained_on": None}))
    assert run.record is None
    for damaged in (b'{"trained_on": {"resu', b"[]", b"\xff", b'{"trained_on": {"seed": 1}}'):
        (run.folder / "config.json").write_bytes(damaged)
        assert run.record is None
    (run.folder / "config.json").write_text(json.dumps({"trained_on": {"results": {}}}))
    assert run.record == {"results": {}} and run.difference is None
    (run.folder / "state").mkdir()
    assert run.record is None


@pytest.mark.needs("ebmc")
def test_a_budget_offers_every_variant_the_same_optimizer_steps(write):
    stages = [{"name": "enhance", "epochs": 4, "patience": 2}, {"name": "balance", "epochs": 8}]
    variants = {
        "plain": {},
        "large batches": {"training.batch_size": 16, "training.accumulation": 2},
        "two stages": {"model.head": "ebmc", "model.loss_weights": {}, "training.stages": stages},
    }
    plain, large, staged = read_study(write(variants=variants, epochs=30, seeds=[1])).runs()
    assert plain.arguments.training.epochs == 30
    assert large.arguments.training.epochs == 120  # batches of 32, not 8
    assert [(stage.name, stage.epochs, stage.patience) for stage in staged.arguments.training.stages] == [
        ("enhance", 10, 2), ("balance", 20, None),
    ]  # fmt: skip
    assert staged.changes[-1].startswith("training.stages="), "the command of the run lacks its budget"
    with pytest.raises(ConfigurationError, match="epochs is 0: at least 1"):
        read_study(write(epochs=0))
