# SPDX-License-Identifier: Apache-2.0
"""Pretrained audio encoders: the states of transformers, whatever a sample is padded or batched with."""

import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from feature_extractors import get_asset
from msa_online import MSAConfig, MSAModel
from msa_online.encoders import encoder_class, load_encoder_config
from msa_online.encoders.pretrained import EncoderError
from msa_online.encoders.pretrained_audio import LayerWeights, pool
from msa_online.encoders.whisper import WhisperEncoder
from msa_online.modalities import ModalitySequence

LAYERS, WIDTH = 3, 16
STEPS = 24
"""Steps of one input; Whisper's tiny configuration has positions for exactly so many."""

TINY = {
    "whisper": {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 10,
        "max_source_positions": STEPS // 2,
        "max_target_positions": 8,
        "vocab_size": 50,
        "encoder_layerdrop": 0.5,  # as published configurations may have it
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "wav2vec2-bert": {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "feature_projection_input_dim": 10,
        "conv_depthwise_kernel_size": 5,
        "layerdrop": 0.5,
        "mask_time_prob": 0.3,
        "mask_feature_prob": 0.1,
        "vocab_size": 50,
    },
}


def tiny_config(family: str):
    return AutoConfig.for_model(family, **TINY[family])


def make_encoder(family: str, layer="last", stride=1):
    torch.manual_seed(0)
    config = tiny_config(family)
    encoder = encoder_class("audio", config)(config, layer, stride)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and norms too, so that padding would show
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder.eval()


def inputs_of(lengths: list[int], width: int = 10, steps: int | None = None) -> dict[str, torch.Tensor]:
    """Random inputs; padding holds large values."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(length, width, generator=generator) for length in lengths]
    steps = steps or max(lengths)
    batch = torch.full((len(lengths), steps, width), 1e3)
    for row, value in zip(batch, values, strict=True):
        row[: len(value)] = value
    return {"audio_values": batch, "audio_mask": torch.arange(steps) < torch.tensor(lengths)[:, None]}


@pytest.mark.parametrize("layer", ["last", 0, 2, "weighted"])
@pytest.mark.parametrize("family", TINY)
def test_a_sample_in_a_batch_has_the_states_it_has_alone(family, layer):
    """Measured: 5e-7 at a scale of 3; transformers' Whisper differs by a sixth of its scale."""
    encoder = make_encoder(family, layer, stride=4)
    lengths = [7, STEPS, 1, 16]
    together = encoder(inputs_of(lengths))
    for place, length in enumerate(lengths):
        alone = encoder(
            {name: value[place : place + 1, :length] for name, value in inputs_of(lengths).items()}
        )
        steps = alone.mask.shape[1]
        assert alone.mask.all() and together.mask[place].sum() == steps
        torch.testing.assert_close(together.values[place, :steps], alone.values[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, LAYERS, "last", "weighted"])
@pytest.mark.parametrize("family", TINY)
def test_the_states_are_those_of_transformers(family, layer):
    encoder = make_encoder(family, layer)
    reference = AutoModel.from_config(tiny_config(family)).eval()
    network = reference.encoder if family == "whisper" else reference
    network.load_state_dict(encoder.model.state_dict(), strict=False)  # without the layers above
    inputs = inputs_of([STEPS])
    values = inputs["audio_values"].mT if family == "whisper" else inputs["audio_values"]
    expected = network(values, output_hidden_states=True)
    wanted = {
        "last": expected.last_hidden_state,
        "weighted": torch.cat(expected.hidden_states, dim=-1),
    }
    states = encoder.states(inputs).values
    wanted = wanted[layer] if isinstance(layer, str) else expected.hidden_states[layer]
    torch.testing.assert_close(states, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_layers_above_the_one_that_is_read_are_not_built(family):
    whole, cut = make_encoder(family), make_encoder(family, 1)
    assert len(whole.layers) == LAYERS and len(cut.layers) == 1
    above = {name for name in whole.model.state_dict() if ".1." in name or ".2." in name}
    gone = whole.model.state_dict().keys() - cut.model.state_dict().keys()
    assert above <= gone <= above | {"layer_norm.weight", "layer_norm.bias"}
    assert make_encoder(family, LAYERS).state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("layer", ["last", 0, 1, "weighted"])
@pytest.mark.parametrize("family", TINY)
def test_every_trained_parameter_gets_a_gradient(family, layer):
    """One without would stop distributed training at its second step."""
    encoder = make_encoder(family, layer, stride=2).train()
    sequence = encoder(inputs_of([STEPS, 5]))
    (sequence.values * torch.randn(sequence.values.shape)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("family", TINY)
def test_training_skips_no_layer_and_masks_no_step(family):
    """The configurations ask for LayerDrop and SpecAugment; with dropout off, two passes are equal."""
    config = AutoConfig.for_model(
        family,
        **TINY[family],
        **({} if family == "whisper" else dict.fromkeys(DROPOUTS, 0.0)),
    )
    encoder = encoder_class("audio", config)(config, "last", 1).train()
    inputs = inputs_of([STEPS, STEPS])
    first = encoder(inputs).values
    assert all(torch.equal(first, encoder(inputs).values) for _ in range(4))


DROPOUTS = (
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"),
    "conformer_conv_dropout",
)


@pytest.mark.parametrize("family", TINY)
def test_a_sample_without_any_valid_step_is_finite_in_both_directions(family):
    encoder = make_encoder(family).train()
    inputs = inputs_of([STEPS, STEPS])
    inputs["audio_mask"][1] = False
    sequence = encoder(inputs)
    assert not sequence.present[1] and (sequence.values[1] == 0).all()
    sequence.values.square().sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_a_half_precision_model_reads_fp32_inputs(family, dtype):
    encoder = make_encoder(family, "weighted", stride=2)
    expected = encoder(inputs_of([STEPS, 9]))
    found = encoder.to(dtype)(inputs_of([STEPS, 9]))
    assert found.values.dtype == dtype
    scale = expected.values.abs().max()
    assert (found.values.float() - expected.values).abs().max() < scale * (
        0.02 if dtype == torch.float16 else 0.1
    )


@pytest.mark.parametrize("family", TINY)
def test_weights_are_loaded_from_a_folder_up_to_the_layer_that_is_read(family, tmp_path):
    torch.manual_seed(3)
    published = AutoModel.from_config(tiny_config(family))
    published.save_pretrained(tmp_path)
    network = published.encoder if family == "whisper" else published
    for layer in (1, "last"):
        encoder = make_encoder(family, layer)
        encoder.load_pretrained(tmp_path)
        for name, value in encoder.model.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name


@pytest.mark.parametrize(
    "kind", [WhisperModel, WhisperForConditionalGeneration, WhisperForAudioClassification]
)
def test_whisper_is_loaded_from_checkpoints_of_every_task(kind, tmp_path):
    torch.manual_seed(3)
    published = kind(tiny_config("whisper"))
    published.save_pretrained(tmp_path)
    expected = {
        name.rpartition("encoder.")[2] if "decoder" in name else name.partition("encoder.")[2]: value
        for name, value in published.state_dict().items()
        if "decoder" not in name and "encoder." in name
    }
    encoder = make_encoder("whisper")
    encoder.load_pretrained(tmp_path)
    assert encoder.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.model.state_dict().items())


def test_a_checkpoint_without_the_weights_is_refused_and_named(tmp_path):
    published = AutoModel.from_config(tiny_config("whisper"))
    kept = {name: value for name, value in published.state_dict().items() if "layers.2.fc1" not in name}
    published.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(EncoderError, match=r"2 of \d+ weights are missing, for example layers\.2\.fc1"):
        make_encoder("whisper").load_pretrained(tmp_path)
    make_encoder("whisper", 2).load_pretrained(tmp_path)  # does not need them


def test_weights_of_another_shape_than_the_configuration_are_refused_and_named(tmp_path):
    wider = AutoConfig.for_model("whisper", **TINY["whisper"] | {"encoder_ffn_dim": 48})
    AutoModel.from_config(wider).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"9 of \d+ weights .*layers\.0\.fc1\.bias: \[48\], not \[32\]"):
        make_encoder("whisper").load_pretrained(tmp_path)


def test_loading_a_part_of_a_checkpoint_warns_of_nothing(tmp_path, caplog, monkeypatch):
    AutoModel.from_config(tiny_config("whisper")).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        make_encoder("whisper", 1).load_pretrained(tmp_path)
        assert not caplog.records
        AutoModel.from_pretrained(tmp_path, num_hidden_layers=1, encoder_layers=1)
    assert "UNEXPECTED" in caplog.text, "transformers still reports, to whoever calls it"


def test_a_layer_that_the_encoder_lacks_is_refused():
    with pytest.raises(EncoderError, match=r"audio_layer is 4, and the 'whisper' encoder has 3 layers"):
        make_encoder("whisper", 4)


def test_a_whisper_is_told_when_a_sound_is_too_long():
    with pytest.raises(ValueError, match=f"25 log-mel steps.*at most {STEPS}"):
        make_encoder("whisper")(inputs_of([STEPS + 1]))


def test_the_published_whisper_is_loaded_by_name_and_has_its_own_states():
    """Real weights, on the 30 s that transformers insists on."""
    config = load_encoder_config("audio", "openai/whisper-tiny.en")
    encoder = WhisperEncoder(config, "weighted", stride=1).eval()
    encoder.load_pretrained("openai/whisper-tiny.en")
    values = torch.randn(1, 3000, 80, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 3000, dtype=torch.bool)
    reference = AutoModel.from_pretrained(get_asset("whisper-tiny.en-encoder")).encoder.eval()
    with torch.inference_mode():
        states = encoder.states({"audio_values": values, "audio_mask": mask}).values
        expected = torch.cat(reference(values.mT, output_hidden_states=True).hidden_states, dim=-1)
    assert expected.abs().max() > 5
    torch.testing.assert_close(states, expected, atol=1e-3, rtol=1e-4)


# --- pooling and weighing ---


@pytest.mark.parametrize(
    ("family", "stride"), [("whisper", 4), ("wav2vec2-bert", 4), ("audio-spectrogram-transformer", 1)]
)
def test_ten_to_twelve_states_a_second_remain_by_default(family, stride):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        assert encoder_class("audio", config).from_config(MSAConfig(audio_config=config)).stride == stride


def test_states_are_averaged_over_the_valid_steps_of_each_group():
    values = torch.arange(10.0).view(1, 5, 2)
    mask = torch.tensor([[True, False, True, False, False]])
    pooled = pool(ModalitySequence.of(values, mask), 2)
    assert pooled.values.tolist() == [[[0, 1], [4, 5], [0, 0]]]
    assert pooled.mask.tolist() == [[True, True, False]]


def test_layers_have_equal_weights_until_they_are_trained():
    weights = LayerWeights(3)
    values = torch.tensor([[1.0, 10.0, 2.0, 20.0, 6.0, 60.0]])
    torch.testing.assert_close(weights(values), torch.tensor([[3.0, 30.0]]))
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([0.0, 100.0, 0.0]))
    torch.testing.assert_close(weights(values), torch.tensor([[2.0, 20.0]]))


# --- freezing ---


@pytest.mark.parametrize("family", TINY)
def test_a_frozen_network_has_no_gradients_and_what_reads_it_has(family):
    encoder = make_encoder(family, "weighted")
    encoder.freeze()
    encoder.train()
    assert not encoder.states(inputs_of([STEPS])).values.requires_grad
    assert not encoder.model.training and encoder.norm.training
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"layer_weights.logits", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("family", TINY)
def test_the_embeddings_and_the_lowest_layers_can_be_frozen(family):
    encoder = make_encoder(family)
    encoder.freeze_below(2)
    encoder.train()
    trained = {name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
    assert trained and all("layers.2." in name or name.startswith("layer_norm.") for name in trained)
    assert [layer.training for layer in encoder.layers] == [False, False, True]
    with pytest.raises(ValueError, match="4 layers to freeze, and the encoder has 3"):
        encoder.freeze_below(4)


# --- whole models ---


def batch_for(model: MSAModel, labels: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    return {
        "modality_present": torch.ones(2, 3, dtype=torch.bool),
        "text_input_ids": torch.randint(5, 20, (2, 4), generator=generator),
        "text_mask": mask,
        **inputs_of([STEPS, 9]),
        "vision_values": torch.randint(0, 255, (2, 4, 32, 32, 3), generator=generator, dtype=torch.uint8),
        "vision_blendshapes": torch.rand(2, 4, 52, generator=generator),
        "vision_mask": mask,
        **({"labels": torch.tensor([1.0, -2.0])} if labels else {}),
    }


@pytest.mark.parametrize("layer", ["last", 1, "weighted"])
@pytest.mark.parametrize("family", TINY)
def test_a_checkpoint_alone_rebuilds_the_model(family, layer, make_model, tmp_path):
    model = make_model(tiny_config(family), layer, audio_encoder=str(tmp_path / "home" / "my-encoder"))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert isinstance(again, MSAModel) and again.config.audio_layer == layer
    assert again.config.audio_encoder == "my-encoder" and again.config.audio_config.model_type == family
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    batch = batch_for(model)
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, again)]
    assert trained[0] == trained[1]


def test_the_width_of_the_audio_states_is_that_of_the_encoder(make_model):
    model = make_model(tiny_config("whisper"))
    assert model.config.widths == {"text": 32, "audio": WIDTH, "vision": 16}
    assert model.encode(**batch_for(model))["audio"].values.shape[2] == WIDTH


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_requested_attention_is_the_one_of_the_audio_encoder(attention, make_model, tmp_path):
    model = make_model(tiny_config("whisper"))
    model.save_pretrained(tmp_path)
    again = MSAModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert again.encoders["audio"].model.config._attn_implementation == attention
    batch = batch_for(model)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(tiny_config("whisper")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(**batch_for(model, labels=True)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"audio_layer": "first"}, "audio_layer is 'first': last, weighted, or the number"),
        ({"audio_layer": -1}, "audio_layer is -1"),
        ({"audio_stride": 0}, "audio_stride is 0: at least 1"),
    ],
)
def test_nonsense_is_refused_by_the_configuration(settings, expected):
    with pytest.raises(ValueError, match=expected):
        MSAConfig(**settings)
