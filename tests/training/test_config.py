# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from msa_online.methods import HEADS
from msa_online.training.config import StageArguments, first_difference
from msa_online.training.config_reader import parse_arguments, read_arguments
from msa_online.training.yaml_reader import ConfigurationError, read_yaml, typed

MODEL = "model: {text_encoder: bert-base-uncased}\n"


@pytest.fixture
def read(tmp_path):
    """A function that writes a configuration file and reads it; the file is called run.yaml."""

    def read_text(text: str, *changes: str):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return read_arguments(tmp_path / "run.yaml", changes)

    return read_text


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("modle: {}", "modle", "model"),
        ("model: {hed: ebmc}", "model.hed", "head"),
        ("model: {text_encodr: x}", "model.text_encodr", "text_encoder"),
        ("training: {batchsize: 8}", "training.batchsize", "batch_size"),
        ("data: {labels_range: [-1, 1]}", "data.labels_range", "label_range"),
        ("training: {stages: [{name: a, epoch: 3}]}", "training.stages[0].epoch", "epochs"),
    ],
)
def test_a_misspelt_key_is_refused_naming_the_file_and_the_nearest_key(read, text, key, nearest):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: unknown key '{re.escape(key)}'.*'{nearest}'"):
        read(text)


def test_a_tilde_in_a_folder_is_the_users_home(read, monkeypatch):
    """In a file and behind `key=` no shell replaces it: a folder called ~ would be made."""
    monkeypatch.setenv("HOME", "/home/me")
    document = "model: {text_encoder: ~/bert, audio_encoder: openai/whisper-tiny.en}\n"
    arguments = read(document + "data: {path: x}", "training.output_dir=~/run", "training.init_from=~/start")
    assert arguments.model == {"text_encoder": "/home/me/bert", "audio_encoder": "openai/whisper-tiny.en"}
    assert arguments.training.output_dir == "/home/me/run"
    assert arguments.training.init_from == "/home/me/start"


@pytest.mark.parametrize("key", ["text_config", "label_range", "trained_on", "num_labels"])
def test_what_the_data_decide_cannot_be_set_as_part_of_the_model(read, key):
    with pytest.raises(ConfigurationError, match=f"unknown key 'model.{key}'"):
        read(f"model: {{text_encoder: x, {key}: 3}}")


@pytest.mark.parametrize(
    ("text", "key", "value", "kind"),
    [
        ("training: {epochs: ten}", "training.epochs", "'ten'", "int"),
        ("training: {epochs: 1.5}", "training.epochs", "1.5", "int"),
        ("training: {epochs: true}", "training.epochs", "True", "int"),
        ("training: {epochs: null}", "training.epochs", "None", "int"),
        ("training: {patience: soon}", "training.patience", "'soon'", "int or null"),
        ("training: {resume: 1}", "training.resume", "1", "bool"),
        ("training: {learning_rate: fast}", "training.learning_rate", "'fast'", "float"),
        ("training: {learning_rate: true}", "training.learning_rate", "True", "float"),
        ("training: {modality_dropout: 0.3}", "training.modality_dropout", "0.3", "dict"),
        ("training: {stages: [{name: a, epochs: x}]}", "training.stages[0].epochs", "'x'", "int"),
        ("data: {path: 3}", "data.path", "3", "str"),
        ("data: {missing: {rates: often}}", "data.missing.rates", "'often'", ".* or float or null"),
        ("data: {missing: {rates: [0.5]}}", "data.missing.rates", r"\[0.5\]", ".* or float or null"),
        ("data: {missing: {rates: {text: often}}}", "data.missing.rates.text", "'often'", "float"),
        ("data: {missing: {seed: 1.5}}", "data.missing.seed", "1.5", "int"),
        ("data: {label_range: 3}", "data.label_range", "3", ""),
        ("data: {label_range: [1]}", "data.label_range", r"\[1\]", ""),
        ("data: {label_range: [-1, high]}", "data.label_range", r"\[-1, 'high'\]", r"list\[float, float\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_file_key_value_and_type(read, text, key, value, kind):
    with pytest.raises(
        ConfigurationError, match=rf"run\.yaml: {re.escape(key)} is {value}, but must be .*{kind}"
    ):
        read(MODEL + text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("training: {stages: 3}", "training.stages is 3"),
        ("training: {stages: {warmup: 3}}", "training.stages"),
        ("training: {stages: [warmup]}", "training.stages.*'warmup'"),
        ("training: {stages: [{name: warmup}]}", "training.stages.*epochs"),
        ("training: {modality_dropout: {text: high}}", "training.modality_dropout.text is 'high'"),
        ("model: {text_encoder: x, head: [late_fusion]}", "head.*late_fusion"),
        ("data: 3", "data must be a section of keys, not 3"),
    ],
)
def test_a_value_of_the_wrong_shape_is_a_message_and_no_traceback(read, text, named):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*{named}"):
        read(MODEL + text if "model" not in text else text)


def test_numbers_are_taken_as_people_write_them(read):
    arguments = read(MODEL + "training: {learning_rate: 1e-5, clip_norm: 2}\ndata: {label_range: [0, 1e1]}")
    assert arguments.training.learning_rate == 1e-5  # YAML 1.1 takes 1e-5 for a string
    assert arguments.training.clip_norm == 2.0 and isinstance(arguments.training.clip_norm, float)
    assert arguments.data.label_range == (0.0, 10.0)


def test_changes_on_the_command_line_win_over_the_file(read):
    arguments = read(
        MODEL + "training: {epochs: 3, modality_dropout: {text: 0.1}}",
        "training.epochs=7",
        "training.learning_rate=1e-4",
        "training.modality_dropout.audio=0.2",
        "model.head_kwargs.hidden_size=32",
        "data.label_range=[0, 4]",
        "data.path=clips/with=sign",
        "training.log_with=null",
    )
    assert (arguments.training.epochs, arguments.training.learning_rate) == (7, 1e-4)
    assert arguments.training.modality_dropout == {"text": 0.1, "audio": 0.2}
    assert arguments.model == {"text_encoder": "bert-base-uncased", "head_kwargs": {"hidden_size": 32}}
    assert arguments.data.label_range == (0.0, 4.0)
    assert arguments.data.path == "clips/with=sign"
    assert arguments.training.log_with is None


def test_missing_rates_are_given_by_name_or_as_one_for_all(read):
    assert read(MODEL).data.missing.rates is None
    by_name = read(MODEL + "data: {missing: {rates: {audio: .5, text: .7}}}", "data.missing.rates.vision=0.3")
    assert by_name.data.missing.by_name == {"audio": 0.5, "text": 0.7, "vision": 0.3}
    assert by_name.data.missing.rounding == "largest_remainder"
    shared = read(MODEL, "data.missing.rates=0.5", "data.missing.rounding=official").data.missing
    assert shared.by_name == {"text": 0.5, "audio": 0.5, "vision": 0.5} and shared.rounding == "official"


def test_stages_can_be_given_in_the_file_and_on_the_command_line(read):
    expected = [StageArguments("enhance", 5, 2), StageArguments("balance", 3)]
    stages = "[{name: enhance, epochs: 5, patience: 2}, {name: balance, epochs: 3}]"
    assert read(MODEL + f"training: {{stages: {stages}}}").training.stages == expected
    assert read(MODEL, f"training.stages={stages}").training.stages == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training", "'training' is no change: write key=value"),
        ("training.epochs.x=2", "'training.epochs.x=2': 'epochs' holds a value"),
        ("training.epoch=2", "unknown key 'training.epoch'.*'epochs'"),
        ("training.epochs=many", "training.epochs is 'many'"),
        ("training.stages=[", r"training\.stages=\["),
    ],
)
def test_a_change_that_cannot_be_made_is_named(read, change, named):
    with pytest.raises(ConfigurationError, match=named):
        read(MODEL + "training: {epochs: 3}", change)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (
            "base: &base {x: 1}\nouter: {a: &a {<<: *base, x: 2}}\nb: {<<: *a}",
            {"base": {"x": 1}, "outer": {"a": {"x": 2}}, "b": {"x": 2}},
        ),
        (
            "a: &a {x: 1}\nb: &b {y: 2}\nboth:\n  <<: *a\n  <<: *b",
            {"a": {"x": 1}, "b": {"y": 2}, "both": {"x": 1, "y": 2}},
        ),
        ("{1: a, '1': b}", {1: "a", "1": "b"}),
    ],
    ids=["overridden after a merge", "two merges", "a number and a text"],
)
def test_keys_that_only_look_repeated_are_read(text, content):
    assert read_yaml(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "{x: 1, x: 2}",
        "{'x': 1, x: 2}",
        "[{a: {x: 1, x: 2}}]",
        "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}",
    ],
    ids=["plain", "quoted", "in a list", "beside a merge"],
)
def test_a_key_that_is_written_twice_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="the key 'x' occurs twice"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3"])
@pytest.mark.parametrize("changes", [(), ("training.epochs=3",), ("epochs=3",)])
def test_a_file_without_sections_is_refused(read, text, changes):
    with pytest.raises(ConfigurationError, match=r"run\.yaml: the file must be a section of keys"):
        read(text, *changes)


def test_an_empty_section_means_the_defaults(read):
    assert read(MODEL + "training:\n").training.epochs == 10
    assert read(MODEL + "training:\n", "training.epochs=2").training.epochs == 2


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x80\x81", b"\x80\x02binary", b"a: \x00"])
def test_a_file_that_is_no_yaml_is_a_message_and_no_traceback(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="model.safetensors: not YAML"):
        read_arguments(path)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml: cannot read the configuration .No such file"):
        read_arguments(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match=f"{tmp_path.name}: cannot read the configuration"):
        read_arguments(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("training: {epochs: 0}", "training.epochs is 0"),
        ("training: {batch_size: 0}", "training.batch_size is 0"),
        ("training: {accumulation: -1}", "training.accumulation is -1"),
        ("training: {learning_rate: 0}", "training.learning_rate is 0.0"),
        ("training: {learning_rates: {text: -1e-5}}", "training.learning_rates of text is -1e-05"),
        ("training: {learning_rates: {sound: 1e-5}}", "training.learning_rates names 'sound': one of text"),
        ("training: {learning_rates: {text: .inf}}", "training.learning_rates.text is inf"),
        ("training: {freeze: text}", r"training.freeze is 'text', but must be list\[str\] or dict"),
        ("training: {freeze: {text: 1.5}}", r"training.freeze.text is 1.5, but must be int or str"),
        (
            "training: {freeze: {text: lower}}",
            "training.freeze of text is 'lower': all, or a number of layers",
        ),
        (
            "training: {freeze: {text: -1}}",
            "training.freeze of text is -1: all, or a number of layers from 0",
        ),
        ("training: {layer_decay: 0}", "training.layer_decay is 0.0: above 0 and at most 1"),
        ("training: {layer_decay: 1.1}", "training.layer_decay is 1.1: above 0"),
        ("training: {freeze: [sound]}", "training.freeze names 'sound': one of text, audio, vision"),
        ("training: {freeze: [vision]}", "training.freeze names vision, .* not pretrained: .*model.vision"),
        ("training: {gradient_checkpointing: [face]}", "training.gradient_checkpointing names 'face'"),
        ("training: {gradient_checkpointing: [audio]}", "checkpointing names audio, .* not pretrained"),
        ("training: {text_learning_rate: 1e-5}", "training.text_learning_rate .*: use .*learning_rates.text"),
        ("training: {freeze_text_encoder: true}", r"freeze_text_encoder .*: use training.freeze=\[text\]"),
        ("training: {clip_norm: 0}", "training.clip_norm is 0.0"),
        ("training: {learning_rate: .nan}", "training.learning_rate is nan"),
        ("training: {weight_decay: -1}", "training.weight_decay is -1"),
        ("training: {patience: 0}", "training.patience is 0"),
        ("training: {seed: -1}", "training.seed is -1"),
        ("training: {warmup: 1.5}", "training.warmup is 1.5"),
        ("training: {warmup: -0.1}", "training.warmup is -0.1"),
        ("training: {mixed_precision: fp8}", "training.mixed_precision is 'fp8': one of auto, no"),
        ("training: {resume: true, overwrite: true}", "exclude each other"),
        ("training: {stages: [{name: a, epochs: 0}]}", "epochs of stage 'a' is 0: at least 1"),
        (
            "training: {modality_dropout: {sound: 0.1}}",
            "modality_dropout names 'sound': one of text, audio, vision",
        ),
        ("training: {modality_dropout: {audio: 1}}", "modality_dropout of audio is 1"),
        ("training: {modality_dropout: {audio: -0.1}}", "modality_dropout of audio is -0.1"),
        (
            "training: {modality_dropout: {text: 0.5, audio: 0.7, vision: 0.9}}",
            "training.modality_dropout: the rates of text, audio, vision sum to 2.1",
        ),
        ("training: {output_dir: ''}", "training.output_dir"),
        ("training: {push_to_hub: sentiment}", "training.push_to_hub is 'sentiment': .* like ORG/NAME"),
        ("data: {task: sorting}", "data.task is 'sorting'"),
        ("data: {label_range: [3, -3]}", r"data.label_range is \[3.0, -3.0\]"),
        ("data: {label_range: [.nan, 3]}", "data.label_range"),
        ("data: {num_frames: 0}", "num_frames is 0"),
        ("data: {face_size: 4}", "face_size is 4"),
        ("data: {max_text_tokens: 0}", "data.max_text_tokens is 0"),
        ("data: {max_audio_seconds: 0}", "data.max_audio_seconds is 0"),
        ("data: {loader_workers: -1}", "data.loader_workers is -1"),
        ("data: {missing: {rates: {sound: 0.5}}}", "data.missing: rates name 'sound': one of text, audio"),
        (
            "data: {missing: {rates: {text: 1}}}",
            "data.missing: the rate of text is 1.0: .*training.condition",
        ),
        ("data: {missing: {rates: {text: -0.1}}}", "data.missing: the rate of text is -0.1: at least 0"),
        ("data: {missing: {rates: 1}}", "data.missing: the rate of text is 1.0: at least 0 and below 1"),
        ("data: {missing: {rounding: up}}", "rounding is 'up': one of largest_remainder, official"),
        ("data: {missing: {seed: -1}}", "data.missing.seed is -1"),
        (
            "data: {missing: {rates: 0}}\ntraining: {modality_dropout: {text: 0.1}}",
            "data.missing.rates and training.modality_dropout exclude",
        ),
        (
            "data: {missing: {rates: 0.5}}\ntraining: {condition: text}",
            "data.missing.rates hides text, the only modality of training.condition",
        ),
        ("training: {selection: all}", "training.selection is 'all': one of complete, conditions"),
        (
            "training: {selection: conditions, condition: text}",
            "training.selection=conditions and training.condition exclude each other",
        ),
        (
            "data: {missing: {rates: 0.5}}\ntraining: {selection: conditions}",
            "training.selection=conditions and data.missing.rates exclude each other",
        ),
        (
            "data: {missing: {rates: {vision: 0.5}}}\ntraining: {condition: text+audio}",
            r"data.missing.rates names vision, which training.condition=text\+audio never shows",
        ),
        (
            "data: {missing: {rates: 0.5}}\ntraining: {frame_dropout: true}",
            "data.missing.rates and training.frame_dropout exclude",
        ),
        (
            "training: {frame_dropout: true, modality_dropout: {text: 0.1}}",
            "training.modality_dropout and training.frame_dropout exclude each other",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_loaded(read, text, named):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*{named}"):
        read(MODEL + text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model: {text_encoder: x, head: nosuch}", "head"),
        ("model: {text_encoder: x, calibrator: nosuch}", "calibrator"),
        (MODEL + "training: {modulator: nosuch}", "modulator"),
    ],
)
def test_an_unknown_method_is_refused_listing_the_known_ones(read, text, kind):
    known = {"head": "late_fusion", "calibrator": "identity", "modulator": "identity"}[kind]
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: unknown {kind} 'nosuch'; known are .*{known}"):
        read(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {text_encoder: x, head_kwargs: {hiden_size: 8}}", "hiden_size"),
        (MODEL + "training: {modulator_kwargs: {strength: 8}}", "strength"),
        ("model: {text_encoder: x, audio_width: wide}", "audio_width"),
    ],
)
def test_keywords_no_method_takes_are_refused_before_hours_of_extraction(read, text, named):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*{named}"):
        read(text)


def test_the_learning_rate_of_one_encoder_is_changed_on_the_command_line(read):
    run = read(MODEL + "training: {learning_rates: {audio: 1e-4}}", "training.learning_rates.text=3e-5")
    assert run.training.learning_rates == {"audio": 1e-4, "text": 3e-5}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [-3, 0, 10**18])
def test_sizes_of_heads_that_cannot_be_built_are_refused(read, head, size):
    with pytest.raises(ConfigurationError, match=r"run\.yaml: model\.head_kwargs: "):
        read(f"model: {{text_encoder: x, head: {head}, head_kwargs: {{hidden_size: {size}}}}}")


@pytest.mark.parametrize(
    "size",
    [
        *("audio_channels: [-1, 3]", "audio_channels: [0, 0]", "audio_channels: []", "audio_width: 0"),
        *("face_channels: 7", "face_channels: -8", "face_width: -1", "face_width: 0"),
    ],
)
def test_sizes_of_encoders_that_cannot_be_built_are_refused(read, size):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*model\.{size.split(':')[0]}"):
        read(f"model: {{text_encoder: x, {size}}}")


def test_a_run_needs_a_text_encoder_or_a_checkpoint_to_start_from(read):
    with pytest.raises(ConfigurationError, match=r"run\.yaml: model\.text_encoder is missing"):
        read("data: {path: clips}")
    assert read("training: {init_from: runs/first}").training.init_from == "runs/first"


WIDTHS = "feature_widths: {text: 1024, audio: 512, vision: 1024}"


def test_a_model_of_features_needs_widths_and_no_text_encoder(read):
    arguments = read(f"model: {{text_encoder: null, {WIDTHS}}}")
    config = arguments.model_config(())
    assert config.text_config is None
    assert config.widths == {"text": 1024, "audio": 512, "vision": 1024}
    assert read(MODEL, "model.text_encoder=null", f"model.{WIDTHS.replace(': ', '=', 1)}") == arguments


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {text_encoder: null}", "model.text_encoder is missing.*model.feature_widths, like"),
        (f"model: {{text_encoder: x, {WIDTHS}}}", "exclude each other"),
        ("model: {feature_widths: {text: 8}}", "model.feature_widths is {'text': 8}: a width for each"),
        ("model: {feature_widths: {text: 8, audio: 8, video: 8}}", "a width for each modality"),
        ("model: {feature_widths: {text: 8, audio: 0, vision: 8}}", "a width for each modality"),
        ("model: {feature_widths: {text: 8, audio: wide, vision: 8}}", "a width for each modality"),
        ("model: {feature_widths: 8}", "model.feature_widths is 8"),
        (f"model: {{{WIDTHS}, audio_width: 8}}", "model.audio_width applies to raw clips only"),
        *(
            (f"model: {{{WIDTHS}}}\ntraining: {{{key}}}", "names text, but .* features has no encoders")
            for key in ("freeze: [text]", "learning_rates: {text: 1e-5}", "gradient_checkpointing: [text]")
        ),
        (f"model: {{{WIDTHS}}}\ndata: {{split_column: ''}}", "data.split_column is empty"),
        (f"model: {{{WIDTHS}}}\ndata: {{standardize: 1}}", "data.standardize is 1, but must be bool"),
    ],
)
def test_widths_of_features_that_cannot_work_are_refused(read, text, named):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*{named}"):
        read(text)


def test_the_record_of_a_run_configures_the_same_run(read):
    arguments = read(
        MODEL + "data: {label_range: [-1, 1], prepare_workers: 2}",
        "data.missing={rounding: official, seed: 3}",
        "training.stages=[{name: a, epochs: 2}, {name: b, epochs: 1, patience: 1}]",
        "training.modality_dropout={text: 0.25}",
    )
    assert read(yaml.safe_dump(arguments.to_dict())) == arguments


def test_the_task_decides_the_outputs_of_the_model():
    document = {"model": {"text_encoder": "bert-base-uncased"}, "data": {"label_range": [0, 5]}}
    regression = parse_arguments(document).model_config(())
    assert (regression.num_labels, regression.label_range, regression.is_regression) == (1, [0.0, 5.0], True)

    document["data"] = {"task": "classification"}
    classification = parse_arguments(document).model_config(("angry", "happy", "sad"))
    assert classification.id2label == {0: "angry", 1: "happy", 2: "sad"}
    assert classification.label2id == {"angry": 0, "happy": 1, "sad": 2}
    assert (classification.num_labels, classification.label_range) == (3, None)
    assert parse_arguments(document).data.legal_range is None


@pytest.mark.needs("shapley")
def test_yaml_words_that_used_to_mean_false_are_words(read):
    """`training.mixed_precision=no` is what messages tell users to write."""
    arguments = read(MODEL + "training: {mixed_precision: no, resume: false}", "training.overwrite=True")
    assert arguments.training.mixed_precision == "no"
    assert arguments.training.resume is False and arguments.training.overwrite is True
    changed = read(MODEL, "training.modulator=shapley", "training.modulator_kwargs={apply: off}")
    assert changed.training.modulator_kwargs == {"apply": "off"}
    with pytest.raises(ConfigurationError, match="training.resume is 'yes', but must be bool"):
        read(MODEL, "training.resume=yes")


def test_runs_differ_by_the_first_key_and_a_key_of_a_newer_version_has_its_default(read):
    run = read(MODEL + "training: {epochs: 3}", "data.missing.seed=5").to_dict()
    earlier = {**run, "training": {key: value for key, value in run["training"].items() if key != "decay"}}
    assert first_difference(earlier, run, ()) is None
    changed = {**run, "training": {**run["training"], "epochs": 4, "seed": 2}}
    assert first_difference(earlier, changed, ()) == ("training.epochs", 3, 4)
    assert first_difference(earlier, changed, {"training.epochs", "training.seed"}) is None
    assert first_difference(earlier, {**run, "plugins": ["mine"]}, ()) == ("plugins", None, ["mine"])


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Mapping[str, float], {"text": 1}),
        (Literal["a", "b"], "a"),
        (Path, "folder"),
        (Sequence[int] | None, [1, 2]),
        (tuple[int, int] | int, [1, 2]),
        (list, [1, "a"]),
        (Any, {"a": [None]}),
    ],
)
def test_annotations_of_a_plug_in_are_no_obstacle(hint, value):
    made = typed(value, hint, "run.yaml", "model.head_kwargs", "it")
    assert made == (tuple(value) if hint == tuple[int, int] | int else value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("audio_layer: 3", "model.audio_layer applies to pretrained encoders only.*model.audio_encoder"),
        ("audio_encoder: x, audio_width: 8", "model.audio_width applies to convolutions only"),
        ("vision_encoder: x, face_channels: 8", "model.face_channels applies to convolutions only"),
        (
            "audio_encoder: x, audio_layer: first",
            "model.audio_layer is 'first': last, weighted",
        ),
        ("audio_encoder: x, audio_layer: -1", "model.audio_layer is -1"),
        ("audio_encoder: x, audio_layer: true", "audio_layer.*True"),
        ("audio_encoder: x, audio_stride: 0", "model.audio_stride is 0: at least 1"),
        ("audio_encoder: x, audio_config: {}", "model.audio_config"),
    ],
)
def test_settings_of_pretrained_encoders_are_checked_without_loading_one(read, model, expected):
    with pytest.raises(ConfigurationError, match=expected):
        read(f"model: {{text_encoder: x, {model}}}")


def test_features_exclude_pretrained_encoders_of_every_modality(read):
    with pytest.raises(ConfigurationError, match="model.audio_encoder and model.feature_widths exclude"):
        read(f"model: {{audio_encoder: x, {WIDTHS}}}")
