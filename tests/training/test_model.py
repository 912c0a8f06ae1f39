# SPDX-License-Identifier: Apache-2.0
"""What is trained of a model: frozen encoders and layers, and gradient checkpointing."""

from copy import deepcopy

import pytest
import torch
from transformers import DebertaV2Config, MPNetConfig, WhisperConfig

from msa_online import MSAConfig, MSAModel
from msa_online.encoders.text import TextEncoder
from msa_online.methods import HEADS, MODULATORS, GradientModulator
from msa_online.training.config import TrainingArguments
from msa_online.training.config_reader import parse_arguments
from msa_online.training.model import limit_training, parameters_line, require_encoders
from msa_online.training.yaml_reader import ConfigurationError
from tests.training_fixtures import WIDTHS

WB = ("weight", "bias")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def speech_config(tiny_config):
    """The tiny model with pretrained encoders of text and audio."""
    audio = WhisperConfig(
        d_model=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, max_source_positions=40
    )
    return MSAConfig(**{**tiny_config.to_dict(), "audio_config": audio})


def limited(config: MSAConfig, **training) -> MSAModel:
    torch.manual_seed(0)
    model = MSAModel(config)
    limit_training(model.encoders, TrainingArguments(**training))
    return model


def gradients(model: MSAModel, batch: dict) -> dict[str, torch.Tensor]:
    """Gradients by name after one backward pass in training mode; every trained parameter has one."""
    torch.manual_seed(1)
    model.train()(**batch).loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    return found


@pytest.mark.parametrize(
    ("layers", "trained"), [(0, ["0.", "1."]), (1, ["1."]), (2, []), ("all", [])], ids=str
)
def test_the_embeddings_and_the_lowest_layers_are_frozen(layers, trained, speech_config, make_batch):
    found = gradients(limited(speech_config, freeze={"text": layers, "audio": layers}), make_batch())
    places = {"encoders.text.model.encoder.layer.": trained, "encoders.audio.model.layers.": trained}
    for prefix, expected in places.items():
        assert {name.removeprefix(prefix)[:2] for name in found if name.startswith(prefix)} == set(expected)
    others = {name for name in found if ".model." in name and not name.startswith(tuple(places))}
    assert others == (set() if layers == "all" else {f"encoders.audio.model.layer_norm.{it}" for it in WB})


@pytest.mark.parametrize("kind", [MPNetConfig, DebertaV2Config])
def test_embeddings_of_distances_are_frozen_with_the_other_embeddings(kind):
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    encoder = TextEncoder(kind(**SMALL, vocab_size=20, **(options if kind is DebertaV2Config else {})))
    encoder.freeze_below(1)
    trained = {name for name, value in encoder.model.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("encoder.layer.1.") for name in trained)


def test_frozen_layers_have_no_dropout(speech_config, make_batch):
    model = limited(speech_config, freeze={"text": 1})
    states = []
    model.encoders["text"].layers[0].register_forward_hook(lambda *call: states.append(call[-1]))
    model.encoders["text"].layers[1].register_forward_hook(lambda *call: states.append(call[-1]))
    for _ in range(2):
        model.train()(**make_batch())
    assert torch.equal(states[0], states[2]) and not torch.equal(states[1], states[3])


@pytest.mark.parametrize("freeze", [{}, {"text": 1, "audio": 1}, {"text": "all"}], ids=str)
def test_gradient_checkpointing_recomputes_trained_layers_and_changes_no_gradient(
    freeze, speech_config, make_batch
):
    plain = limited(speech_config, freeze=freeze)
    saving = limited(speech_config, freeze=freeze, gradient_checkpointing=["text", "audio"])
    calls = {}
    for modality in ("text", "audio"):
        for number, layer in enumerate(saving.encoders[modality].layers):
            inside = next(layer.children())
            calls[modality, number] = []
            inside.register_forward_hook(
                lambda _, __, output, seen=calls[modality, number]: seen.append(output[0].requires_grad)
            )
    expected, found = gradients(plain, make_batch()), gradients(saving, make_batch())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    for (modality, number), seen in calls.items():
        frozen = freeze.get(modality, 0)
        is_frozen = frozen == "all" or number < frozen
        # a frozen layer runs once, and no gradient passes it
        assert seen == ([False] if is_frozen else [True, True]), (modality, number)


def assert_only_the_rest_changed(trial, before: dict[str, torch.Tensor]) -> None:
    after = trial.loop.bare_model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith(("encoders.text.", "encoders.audio.")) for name in changed)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("head", HEADS)
def test_every_stage_of_every_head_trains_on_frozen_encoders(head, speech_config, rows, make_trial):
    speech_config.head, speech_config.head_kwargs = head, {"hidden_size": 8}
    trial = make_trial(speech_config, rows, GradientModulator(), freeze=["text", "audio"])
    trial.loop.measure_gradients = True
    model = trial.loop.bare_model
    for stage in model.head.stages:
        before = deepcopy(model.state_dict())
        model.head.start_stage(stage)
        trial.train(1, stage)
        assert_only_the_rest_changed(trial, before)
    assert trial.loop.progress.skipped == 0


@pytest.mark.parametrize("name", MODULATORS)
def test_every_modulator_acts_on_frozen_encoders(name, speech_config, rows, make_trial):
    """On the projections of the head; two epochs, because some compare steps."""
    trial = make_trial(speech_config, rows, MODULATORS[name](), freeze=["text", "audio"])
    before = deepcopy(trial.loop.bare_model.state_dict())
    trial.train(2)
    assert_only_the_rest_changed(trial, before)
    assert trial.loop.progress.skipped == 0 and trial.loop.progress.step == 6


def test_the_first_lines_of_a_run_say_what_is_trained(speech_config):
    def count(module) -> int:
        return sum(value.numel() for value in module.parameters())

    model = limited(speech_config)
    positions = model.encoders["audio"].model.embed_positions.weight.numel()  # Whisper never trains them
    every = count(model)
    assert parameters_line(model) == (
        f"training {every - positions:,} of {every:,} parameters; frozen: {positions:,} of audio_encoder"
    )
    text = count(model.encoders["text"])
    line = parameters_line(limited(speech_config, freeze=["text"]))
    assert (
        line.startswith(f"training {every - positions - text:,} of") and f"{text:,} of text_encoder" in line
    )


@pytest.fixture
def check(tiny_text_encoder):
    """A function that checks the encoders of a run with the tiny text encoder."""

    def check_run(model: dict | None = None, **training) -> None:
        model = {"text_encoder": str(tiny_text_encoder)} if model is None else model
        require_encoders(parse_arguments({"model": model, "data": {"path": "x"}, "training": training}))

    return check_run


def test_more_layers_than_an_encoder_has_are_refused_before_data_are_read(check):
    check(freeze={"text": 2}, gradient_checkpointing=["text"])
    with pytest.raises(
        ConfigurationError, match="training.freeze of text is 3, but its encoder has 2 layers"
    ):
        check(freeze={"text": 3})


def test_encoders_of_a_checkpoint_that_are_not_pretrained_are_frozen_as_a_whole(check, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    start = {"model": {}, "init_from": str(tmp_path)}
    check(**start, freeze=["audio", "vision"])
    with pytest.raises(
        ConfigurationError, match="training.freeze of audio is 1, but its encoder is not pretr"
    ):
        check(**start, freeze={"audio": 1})
    with pytest.raises(
        ConfigurationError, match="gradient_checkpointing names vision, but .* not pretrained"
    ):
        check(**start, gradient_checkpointing=["vision"])
    model = limited(tiny_model.config, freeze=["audio"])
    assert not any(value.requires_grad for value in model.encoders["audio"].parameters())


def test_features_have_no_encoder_to_freeze(check, tmp_path):
    MSAModel(MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 8})).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="but precomputed features have no encoder: leave it out"):
        arguments = {"training": {"init_from": str(tmp_path), "freeze": ["text"]}, "data": {"path": "x.npz"}}
        require_encoders(parse_arguments(arguments))
