# SPDX-License-Identifier: Apache-2.0
"""The Audio Spectrogram Transformer: the states of transformers, without those of padding."""

import pytest
import torch
from transformers import ASTForAudioClassification, AutoConfig, AutoModel

from msa_online import MSAModel
from msa_online.encoders import encoder_class
from msa_online.encoders.spectrogram_transformer import SpectrogramTransformer

LAYERS, WIDTH, BANDS, LONGEST = 3, 16, 24, 64
PATCH, STRIDE = 16, 8  # in steps; (24 - 16) / 8 + 1 = 2 bands of patches, (64 - 16) / 8 + 1 = 7 times


def tiny_config():
    return AutoConfig.for_model(
        "audio-spectrogram-transformer",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        num_mel_bins=BANDS,
        max_length=LONGEST,
        time_stride=STRIDE,
        frequency_stride=STRIDE,
    )


def make_encoder(layer="last", stride=1) -> SpectrogramTransformer:
    torch.manual_seed(0)
    encoder = encoder_class("audio", tiny_config())(tiny_config(), layer, stride)
    with torch.no_grad():  # biases, norms and positions too, so that padding would show
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder.eval()


def sounds(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random filter banks; padding is loud."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.full((len(lengths), max(lengths), BANDS), 1e3)
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = torch.randn(length, BANDS, generator=generator)
    return {"audio_values": batch, "audio_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]}


def over_bands(states: torch.Tensor, times: int) -> torch.Tensor:
    """Mean over frequency of what transformers returns: two tokens, then patches by band."""
    return states[:, 2:].unflatten(1, (-1, times)).mean(dim=1)


@pytest.mark.parametrize("layer", ["last", 0, 1, "weighted"])
def test_a_sample_in_a_batch_has_the_states_it_has_alone(layer):
    """Measured: 2e-7 at a scale of 3."""
    encoder = make_encoder(layer, stride=2)
    lengths = [30, LONGEST, 1, 47]
    batch = sounds(lengths)
    together = encoder(batch)
    for place, length in enumerate(lengths):
        alone = encoder({name: value[place : place + 1, :length] for name, value in batch.items()})
        steps = alone.mask.shape[1]
        assert alone.mask.all() and together.mask[place].sum() == steps
        torch.testing.assert_close(together.values[place, :steps], alone.values[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, LAYERS, "last", "weighted"])
def test_the_states_are_those_of_transformers(layer):
    encoder = make_encoder(layer)
    reference = AutoModel.from_config(tiny_config()).eval()
    reference.load_state_dict(encoder.model.state_dict(), strict=False)  # without the layers above
    batch = sounds([LONGEST])
    expected = reference(batch["audio_values"], output_hidden_states=True)
    hidden = [over_bands(it, 7) for it in (*expected.hidden_states[:-1], expected.last_hidden_state)]
    wanted = {"last": hidden[-1], "weighted": torch.cat(hidden, dim=-1)}
    wanted = wanted[layer] if isinstance(layer, str) else hidden[layer]
    torch.testing.assert_close(encoder.states(batch).values, wanted, atol=1e-6, rtol=1e-5)


def test_a_short_sound_has_the_states_of_a_long_one_whose_end_transformers_masks():
    encoder = make_encoder()
    short = sounds([30])
    padded = torch.nn.functional.pad(short["audio_values"], (0, 0, 0, LONGEST - 30))
    times = torch.arange(7) < (30 - PATCH) // STRIDE + 1
    attended = torch.cat([torch.ones(2, dtype=torch.bool), times.repeat(2)])
    expected = encoder.model(padded, attention_mask=attended[None]).last_hidden_state
    found = encoder.states(short).values
    torch.testing.assert_close(found, over_bands(expected, 7)[:, times], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", ["last", 0, 1, "weighted"])
def test_every_trained_parameter_gets_a_gradient(layer):
    """One without would stop distributed training at its second step."""
    encoder = make_encoder(layer, stride=2).train()
    sequence = encoder(sounds([30, 20]))
    (sequence.values * torch.randn(sequence.values.shape)).sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]


def test_a_sample_without_sound_is_finite_in_both_directions():
    encoder = make_encoder().train()
    batch = sounds([LONGEST, LONGEST])
    batch["audio_mask"][1] = False
    sequence = encoder(batch)
    assert not sequence.present[1] and (sequence.values[1] == 0).all()
    sequence.values.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_a_half_precision_model_reads_fp32_inputs(dtype, tolerance):
    encoder = make_encoder("weighted")
    expected = encoder(sounds([LONGEST, 30])).values
    found = encoder.to(dtype)(sounds([LONGEST, 30])).values
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("task", [None, ASTForAudioClassification])
def test_weights_are_loaded_with_and_without_a_classifier(task, tmp_path):
    torch.manual_seed(3)
    published = AutoModel.from_config(tiny_config()) if task is None else task(tiny_config())
    published.save_pretrained(tmp_path)
    expected = published.base_model.state_dict()
    for layer in (1, "last"):
        encoder = make_encoder(layer)
        encoder.load_pretrained(tmp_path)
        found = encoder.model.state_dict()
        assert len(encoder.layers) == (1 if layer == 1 else LAYERS)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_patches_and_the_lowest_layers_can_be_frozen():
    encoder = make_encoder()
    encoder.freeze_below(2)
    trained = {name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
    above = {name for name in trained if not name.startswith("layers.2.")}
    assert above == {"layernorm.weight", "layernorm.bias"} and trained > above


@pytest.mark.parametrize("layer", ["last", 0, "weighted"])
def test_a_checkpoint_alone_rebuilds_the_model(layer, make_model, tmp_path):
    model = make_model(tiny_config(), layer)
    with torch.no_grad():  # so that a tensor that is initialised and not loaded would show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    again = MSAModel.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    trained = [{name for name, p in it.named_parameters() if p.requires_grad} for it in (model, again)]
    assert trained[0] == trained[1]


def test_a_sound_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=f"{LONGEST + 1} steps, and this network reads at most {LONGEST}"):
        make_encoder()(sounds([LONGEST + 1]))
