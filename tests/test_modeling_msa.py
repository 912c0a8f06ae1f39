# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from accelerate.utils import send_to_device
from transformers import AutoConfig, AutoModel, BertModel

from msa_online import MSAConfig, MSAModel
from msa_online.balancing import HEADS

every_head = pytest.mark.parametrize("head", HEADS)


@every_head
@pytest.mark.parametrize(
    "outputs", [{"label_range": [-3, 3]}, {"id2label": {0: "sad", 1: "happy", 2: "angry"}}]
)
def test_a_reloaded_model_is_the_same_model(head, outputs, tiny_config, make_batch, tmp_path):
    config = MSAConfig(
        **{**tiny_config.to_dict(), "id2label": None, "label2id": None, "head": head, **outputs}
    )
    torch.manual_seed(0)
    model = MSAModel(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is MSAModel
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)
    assert again.config.id2label == model.config.id2label
    assert again.config.label_range == model.config.label_range


def test_weights_missing_from_a_checkpoint_are_initialised_not_garbage(tiny_config, tmp_path):
    from safetensors.torch import load_file, save_file

    MSAModel(tiny_config).save_pretrained(tmp_path)
    kept = {
        name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "text" in name
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MSAModel.from_pretrained(tmp_path)
    assert all(
        torch.isfinite(value).all() and value.abs().max() < 10 for value in model.state_dict().values()
    )
    assert model.encoders["audio"].scale.weight.item() == pytest.approx(1 / 6)
    assert 0 < model.head.missing.tokens.std() < 0.1


def test_the_text_encoder_starts_from_pretrained_weights(tiny_config, tiny_text_encoder):
    model = MSAModel.from_pretrained_text(tiny_config, tiny_text_encoder)
    expected = BertModel.from_pretrained(tiny_text_encoder, add_pooling_layer=False).state_dict()
    assert all(
        torch.equal(value, model.encoders["text"].model.state_dict()[name])
        for name, value in expected.items()
    )


def test_what_hides_behind_an_absent_modality_changes_nothing(tiny_model, make_batch):
    batch = make_batch(present=(False, True, False))
    other = make_batch(seed=1)
    hidden = ("text_input_ids", "text_mask", "vision_values", "vision_blendshapes", "vision_mask")
    with torch.no_grad():
        expected = tiny_model(**batch).logits
        changed = tiny_model(**batch | {name: other[name] for name in hidden}).logits
    assert torch.equal(expected, changed)


def test_all_modalities_absent_is_legal_and_finite(tiny_model, make_batch):
    output = tiny_model(**make_batch(present=(False, False, False)))
    assert torch.isfinite(output.loss)
    output.loss.backward()
    gradients = [parameter.grad for parameter in tiny_model.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_head
def test_every_parameter_of_the_model_is_trained(head, tiny_config, make_batch):
    tiny_config.head = head
    model = MSAModel(tiny_config)
    reached: set[str] = set()
    for stage in model.head.stages:
        model.head.start_stage(stage)
        for present in ((True, True, True), (False, False, False)):
            model.zero_grad()
            model(**make_batch(present=present)).loss.backward()
            reached |= {
                name
                for name, value in model.named_parameters()
                if value.grad is not None and value.grad.any()
            }
    unreached = {name for name, _ in model.named_parameters()} - reached
    # BERT's position and word rows that no sample uses share a parameter with those it does
    assert unreached == set()


def test_ownership_is_disjoint_and_front_ends_belong_to_their_modality(tiny_model):
    owned = {
        name: {id(value) for value in values} for name, values in tiny_model.modality_parameters().items()
    }
    assert sum(map(len, owned.values())) == len(set().union(*owned.values()))
    for name, encoder in tiny_model.encoders.items():
        assert {id(value) for value in encoder.parameters()} <= owned[name]


def test_the_loss_is_the_weighted_sum_of_the_named_losses(tiny_model, make_batch):
    tiny_model.config.loss_weights = {"unimodal": 0.25}
    output = tiny_model(**make_batch())
    torch.testing.assert_close(output.loss, output.losses["task"] + 0.25 * output.losses["unimodal"])
    tiny_model.config.loss_weights = {"unimodal": 0.0}
    torch.testing.assert_close(tiny_model(**make_batch()).loss, output.losses["task"])


def test_the_whole_batch_moves_to_a_device(make_batch):
    moved = send_to_device(make_batch(), "meta")
    assert all(value.device.type == "meta" for value in moved.values())


def test_a_batch_of_one_equals_its_row_in_a_batch(tiny_model, make_batch):
    batch = make_batch()
    with torch.no_grad():
        expected = tiny_model(**batch).logits[:1]
        alone = tiny_model(**{name: value[:1] for name, value in batch.items()}).logits
    torch.testing.assert_close(alone, expected, atol=3e-6, rtol=0)


def test_gradients_stay_finite_in_bf16(tiny_model, make_batch):
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_model.train()(**make_batch())
    assert output.losses["task"].dtype == torch.float32
    output.loss.backward()
    assert all(
        torch.isfinite(value.grad).all() for value in tiny_model.parameters() if value.grad is not None
    )


@pytest.mark.parametrize(("field", "message"), [("head", "late_fusion"), ("calibrator", "identity")])
def test_an_unknown_part_is_named_with_those_there_are(field, message, tiny_config):
    setattr(tiny_config, field, "nosuch")
    with pytest.raises(ValueError, match=f"unknown {field} 'nosuch'; known are .*{message}"):
        MSAModel(tiny_config)
