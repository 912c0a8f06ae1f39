# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from msa_online import MSAConfig, MSAModel
from msa_online.encoders.features import FeatureEncoder

WIDTHS = {"text": 7, "audio": 5, "vision": 3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 16}, label_range=[-3, 3])
    return MSAModel(config).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    values = {
        f"{name}_values": torch.randn(2, 4, width, generator=generator) for name, width in WIDTHS.items()
    }
    masks = {f"{name}_mask": torch.tensor([[True] * 4, [True, True, False, False]]) for name in WIDTHS}
    return {**values, **masks, "modality_present": torch.ones(2, 3, dtype=torch.bool)}


def test_features_are_standardised_and_padding_stays_zero():
    encoder = FeatureEncoder("audio", 2)
    encoder.standardize_by(torch.tensor([10.0, -1.0]), torch.tensor([2.0, 0.5]))
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[[12.0, -1.0], [8.0, 0.0], [0.0, 0.0]]])
    sequence = encoder({"audio_values": values, "audio_mask": mask})
    assert sequence.values.tolist() == [[[1.0, 0.0], [-1.0, 2.0], [0.0, 0.0]]]


def test_features_pass_unchanged_until_statistics_are_given(model, batch):
    sequences = model.encode(**batch)
    assert torch.equal(sequences["text"].values[0], batch["text_values"][0])


def test_a_model_of_features_learns_in_its_head_alone(model):
    assert not list(model.encoders.parameters())
    assert model.config.text_config is None and model.config.widths == WIDTHS


def test_a_loaded_checkpoint_scales_features_as_training_did(model, batch, tmp_path):
    model.encoders["audio"].standardize_by(torch.arange(5.0), torch.arange(1.0, 6.0))
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encoders["audio"].mean, torch.arange(5.0))
    torch.testing.assert_close(loaded(**batch).logits, expected)


def test_modalities_keep_their_order_in_a_saved_configuration(model, tmp_path):
    model.config.save_pretrained(tmp_path)  # with its keys sorted
    assert list(MSAConfig.from_pretrained(tmp_path).widths) == ["text", "audio", "vision"]


def test_a_checkpoint_without_statistics_does_not_start_from_garbage(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "encoders" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = MSAModel.from_pretrained(tmp_path, output_loading_info=True)  # on the meta device
    for encoder in loaded.encoders.values():
        assert (encoder.mean == 0).all() and (encoder.deviation == 1).all()


def test_what_stands_in_padding_changes_no_prediction(model, batch):
    expected = model(**batch).logits
    for name in WIDTHS:
        batch[f"{name}_values"][1, 2:] = 1e6
    torch.testing.assert_close(model(**batch).logits, expected)


def test_a_hidden_modality_leaks_nothing_into_the_prediction(model, batch):
    batch["modality_present"] = torch.tensor([[True, False, True]] * 2)
    expected = model(**batch).logits
    batch["audio_values"] = torch.randn(2, 4, 5)
    torch.testing.assert_close(model(**batch).logits, expected)
