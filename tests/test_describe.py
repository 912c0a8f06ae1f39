# SPDX-License-Identifier: Apache-2.0
import json
import socket
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from msa_online import MSAConfig, MSAModel
from msa_online.describe import describe, description_tables, record_lines
from msa_online.hub import CheckpointError
from msa_online.methods import CALIBRATORS, HEADS
from msa_online.training.yaml_reader import ConfigurationError


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch):
    """Every attempt to reach another machine fails the test."""

    def refuse(*arguments):
        raise AssertionError(f"tried to connect: {arguments[1:]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def write_config(tmp_path):
    """A function that writes a configuration file with the given `model:` section and other sections."""

    def write(*, data: dict | None = None, training: dict | None = None, **model) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model": model, "data": data or {}, "training": training or {}}))
        return path

    return write


def test_the_parts_sum_to_the_total(write_config):
    parameters = describe(write_config(text_encoder="sentence-transformers/all-MiniLM-L6-v2")).parameters
    assert parameters["total"] == sum(count for part, count in parameters.items() if part != "total")
    assert {"text_encoder", "audio_encoder", "vision_encoder"} < parameters.keys()
    assert any(part.startswith("head.") for part in parameters)


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        ("bert-base-uncased", 108_891_648),  # 109,482,240 of the whole BERT less its pooler's 590,592
        ("microsoft/deberta-v3-base", 183_831_552),
    ],
)
def test_text_encoders_have_their_published_sizes(write_config, encoder, count):
    assert describe(write_config(text_encoder=encoder)).parameters["text_encoder"] == count


def test_the_front_ends_have_the_reference_sizes(write_config):
    parameters = describe(write_config(text_encoder="bert-base-uncased", blendshapes=False)).parameters
    assert parameters["audio_encoder"] == 502_898  # layers 502,896, scaling of the log-mel 2
    assert parameters["vision_encoder"] == 507_302  # layers 507,296, scaling of the colours 6


def test_the_blendshape_stream_is_counted_with_the_face(write_config):
    parameters = describe(write_config(text_encoder="bert-base-uncased")).parameters
    # scaling 52 + 52, Linear(52, 160) and Linear(160, 160) with biases
    assert parameters["vision_encoder"] == 507_302 + 104 + 52 * 160 + 160 + 160 * 160 + 160


def test_a_description_is_json_with_the_total_where_scripts_look_for_it(write_config):
    document = json.loads(json.dumps(asdict(describe(write_config(text_encoder="bert-base-uncased")))))
    assert set(document) == {"parameters", "frozen", "shapes", "confidence", "trained_on"}
    assert isinstance(document["parameters"]["total"], int) and document["trained_on"] == {}


def test_the_shapes_of_a_clip_of_four_seconds(write_config):
    shapes = describe(write_config(text_encoder="bert-base-uncased")).shapes
    assert shapes["log-mel"] == [400, 80]
    assert shapes["face crops"] == [8, 96, 96, 3]
    assert shapes["text states"] == [20, 768]
    assert shapes["audio states"] == [50, 160]  # an eighth as many steps
    assert shapes["vision states"] == [8, 160]
    assert shapes["logits"] == [1]


def test_the_shapes_are_those_of_the_extraction_that_is_configured(write_config):
    path = write_config(text_encoder="bert-base-uncased", data={"num_frames": 4, "face_size": 64})
    shapes = describe(path).shapes
    assert shapes["face crops"] == [4, 64, 64, 3] and shapes["vision states"] == [4, 160]


@pytest.mark.parametrize(("encoder", "size"), [("dlib-face-resnet", 150), ("facebook/dinov2-small", 224)])
def test_face_crops_have_the_size_of_the_pictures_that_the_encoder_reads(encoder, size, write_config):
    path = write_config(text_encoder="bert-base-uncased", vision_encoder=encoder)
    assert describe(path).shapes["face crops"] == [8, size, size, 3]
    path = write_config(text_encoder="bert-base-uncased", vision_encoder=encoder, data={"face_size": 96})
    shapes = describe(path).shapes
    assert shapes["face crops"] == [8, 96, 96, 3] and shapes["pictures"] == [8, 3, size, size]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_described_with_every_calibrator(head, write_config):
    """Nothing is computed: the model has shapes and no values."""
    for calibrator in CALIBRATORS:
        model = {"text_encoder": "bert-base-uncased", "head": head, "calibrator": calibrator}
        assert describe(write_config(**model)).shapes["logits"] == [1]


def test_a_classification_is_described_without_its_data(write_config):
    path = write_config(text_encoder="bert-base-uncased", data={"task": "classification"})
    assert describe(path).shapes["logits"] == [2]


def test_a_model_of_features_is_described_without_front_ends(write_config):
    description = describe(write_config(feature_widths={"text": 1024, "audio": 512, "vision": 1024}))
    assert description.parameters.keys() and not [
        part for part in description.parameters if "encoder" in part
    ]
    assert description.shapes["audio features"] == description.shapes["audio states"] == [20, 512]
    assert "log-mel" not in description.shapes and description.shapes["logits"] == [1]
    assert "features of 20 steps" in shown(description)


def test_a_checkpoint_is_described_with_what_it_was_trained_on(tiny_config, tmp_path):
    record = {
        "data": "me/clips",
        "splits": {"train": 8},
        "results": {"test": {"text": {"mae": 0.5, "corr": 0.1}}},
    }
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "trained_on": record}))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not needed
    description = describe(tmp_path)
    assert description.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert description.trained_on == record
    assert record_lines(description) == ["trained on", "  data    me/clips", "  splits  train 8"]
    text = shown(description)
    assert f"{description.parameters['total']:,}" in text


def test_fine_tuning_is_described_by_the_checkpoint_it_starts_from(tiny_config, tmp_path, write_config):
    MSAModel(tiny_config).save_pretrained(tmp_path / "first")
    expected = describe(tmp_path / "first").parameters
    assert describe(write_config(training={"init_from": str(tmp_path / "first")})).parameters == expected


def test_the_terminal_shows_parts_total_and_shapes(write_config):
    text = shown(describe(write_config(text_encoder="bert-base-uncased", blendshapes=False)))
    for expected in ("108,891,648", "502,898", "507,302", "total", "400 x 80", "50 x 160"):
        assert expected in text


def test_what_a_configuration_freezes_is_counted_and_shown(write_config):
    training = {"freeze": {"text": 4}}
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    description = describe(write_config(text_encoder=encoder, training=training))
    # two of six layers of 1,774,464 are trained
    assert description.frozen == {"total": 19_016_448, "text_encoder": 22_565_376 - 2 * 1_774_464}
    assert "19,016,448" in shown(description)
    assert "frozen" not in shown(describe(write_config(text_encoder=encoder)))


def shown(description) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for table in description_tables(description, "run.yaml"):
            console.print(table)
    return capture.get()


@pytest.mark.parametrize(
    "model",
    [
        {"text_encoder": "bert-base-uncased", "head_kwargs": {"hiden_size": 8}},
        {"text_encoder": "bert-base-uncased", "audio_channels": [8]},
        {"text_encoder": "bert-base-uncased", "face_channels": 12},
    ],
    ids=["misspelt keyword", "one channel of two", "no multiple of eight"],
)
def test_a_configuration_that_builds_no_model_is_a_message_and_no_traceback(write_config, model):
    with pytest.raises(ConfigurationError, match=r"run\.yaml"):
        describe(write_config(**model))


def test_a_source_that_is_no_configuration_and_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="none.yaml: cannot read"):
        describe(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        describe(tmp_path)
