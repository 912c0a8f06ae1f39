# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from accelerate.utils import send_to_device
from transformers import AutoConfig, AutoModel, BertModel

from msa_online import MSAConfig, MSAModel
from msa_online.methods import CALIBRATORS, HEADS

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
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # all are new files of one umask
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
    model, _ = MSAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all(
        torch.isfinite(value).all() and value.abs().max() < 10 for value in model.state_dict().values()
    )
    assert model.encoders["audio"].scale.weight.item() == pytest.approx(1 / 6)
    assert 0 < model.head.missing.tokens.std() < 0.1


def test_the_text_encoder_starts_from_pretrained_weights(tiny_config, tiny_text_encoder):
    tiny_config.text_encoder = str(tiny_text_encoder)
    model = MSAModel.from_pretrained_encoders(tiny_config)
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


HALVES = {torch.bfloat16: 0.03, torch.float16: 0.004}
SWITCHES = {  # of heads that do other arithmetic under them; every head is tested as it comes, too
    "ebmc": [
        {"cce": "shared", "uncertainty": "disagreement", "learned_scalars": True, "missing_tokens": True},
        {"cce_in_fusion": "off"},
    ],
    "cpsl": [{"ame": False, "pooling": "first"}],
    "pase": [{"gate": "learned"}, {"gate": "uniform"}],
}
VARIANTS = [(head, switches) for head in HEADS for switches in [{}, *SWITCHES.get(head, [])]]
WIDTHS = {"text": 6, "audio": 4, "vision": 5}


def half_config(head: str, switches: dict, calibrator: str, of_features: bool, tiny_config) -> MSAConfig:
    settings = {"head": head, "head_kwargs": {"hidden_size": 16, **switches}, "calibrator": calibrator}
    if of_features:
        return MSAConfig(feature_widths=WIDTHS, label_range=[-3, 3], **settings)
    return MSAConfig(**{**tiny_config.to_dict(), **settings})


def feature_batch(batch_size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {"labels": torch.rand(batch_size, generator=generator) * 6 - 3}
    batch["modality_present"] = torch.rand(batch_size, 3, generator=generator) > 0.2
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(batch_size, 7, width, generator=generator)
        batch[f"{name}_mask"] = torch.arange(7) < torch.randint(1, 8, (batch_size, 1), generator=generator)
    return batch


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("of_features", [False, True])
@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize(("head", "switches"), VARIANTS)
def test_a_model_in_half_precision_takes_fp32_inputs_and_predicts_the_same(
    head, switches, calibrator, of_features, dtype, tiny_config, make_batch
):
    torch.manual_seed(0)
    model = MSAModel(half_config(head, switches, calibrator, of_features, tiny_config)).eval()
    batch = feature_batch() if of_features else make_batch(6)
    if not of_features:
        batch["audio_values"] = batch["audio_values"] * 4 - 11  # as loud as log-mel spectrograms are
    exact = model(**batch)
    rough = model.to(dtype)(**batch)
    assert rough.logits.dtype == dtype
    torch.testing.assert_close(rough.logits.float(), exact.logits, atol=HALVES[dtype], rtol=HALVES[dtype])
    torch.testing.assert_close(rough.loss.float(), exact.loss, atol=HALVES[dtype], rtol=HALVES[dtype])
    for stage in model.head.stages:
        model.train().head.start_stage(stage)
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@every_head
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, "float16"])
def test_a_checkpoint_opens_in_the_requested_precision(head, asked, tiny_config, make_batch, tmp_path):
    torch.manual_seed(0)
    MSAModel(half_config(head, {}, [*CALIBRATORS][-1], False, tiny_config)).save_pretrained(tmp_path)
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    exact = AutoModel.from_pretrained(tmp_path)(**batch).logits
    model = AutoModel.from_pretrained(tmp_path, dtype=asked)
    dtype = torch.float16 if asked == "float16" else asked
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(model(**batch).logits.float(), exact, atol=HALVES[dtype], rtol=HALVES[dtype])
    model.save_pretrained(tmp_path / "half")  # and once more, as it was saved
    again = AutoModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype and torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_text_encoder_in_half_precision_does_not_make_the_model_so(tiny_config):
    config = MSAConfig(**tiny_config.to_dict())
    config.text_config.dtype = torch.float16
    assert {parameter.dtype for parameter in MSAModel(config).parameters()} == {torch.float32}
    assert config.text_config.dtype == torch.float32  # what a checkpoint then says of it


def test_statistics_of_features_keep_their_range_in_half_precision(tmp_path):
    """Energies of 1e6 and probabilities of 1e-7 are both beyond fp16."""
    model = MSAModel(half_config("late_fusion", {}, "identity", True, None)).eval()
    for encoder in model.encoders.values():
        encoder.standardize_by(torch.full_like(encoder.mean, 1e6), torch.full_like(encoder.deviation, 1e-9))
    batch = feature_batch()
    for name in WIDTHS:
        batch[f"{name}_values"] = 1e6 + 1e-9 * batch[f"{name}_values"]
    exact = model(**batch).logits
    model.half()
    model.save_pretrained(tmp_path)
    for half in (model, AutoModel.from_pretrained(tmp_path, dtype=torch.float16)):
        assert half.encoders["text"].mean.dtype == torch.float32
        torch.testing.assert_close(half(**batch).logits.float(), exact, atol=4e-3, rtol=0)
    assert model.double().encoders["text"].mean.dtype == torch.float64
    assert model.float().encoders["text"].mean.dtype == torch.float32


def test_log_mel_is_scaled_before_it_is_rounded(tiny_model):
    """At -11 bf16 has steps of 0.06: a signal that is rounded first is off by more than one that is not."""
    values = torch.linspace(-22, 2, 80 * 40).reshape(1, 40, 80)
    exact = tiny_model.encoders["audio"].scale(values)
    scale = tiny_model.to(torch.bfloat16).encoders["audio"].scale
    rough = scale(values)
    assert rough.dtype == torch.bfloat16
    with_rounded_weights = values * scale.weight.float() + scale.bias.float()
    assert torch.equal(rough, with_rounded_weights.to(torch.bfloat16))
    torch.testing.assert_close(rough.float(), exact, atol=0.02, rtol=0)  # deviations


@pytest.mark.parametrize(("field", "message"), [("head", "late_fusion"), ("calibrator", "identity")])
def test_an_unknown_part_is_named_with_those_there_are(field, message, tiny_config):
    setattr(tiny_config, field, "nosuch")
    with pytest.raises(ValueError, match=f"unknown {field} 'nosuch'; known are .*{message}"):
        MSAModel(tiny_config)


def test_states_of_an_encoder_replace_its_inputs(tiny_model, make_batch):
    batch = make_batch(present=(True, True, False))
    expected = tiny_model(**batch).logits
    states = tiny_model.encoders["text"].states(batch)
    batch |= {"text_states": states.values, "text_states_mask": states.mask}
    for name in ("text_input_ids", "text_mask"):
        del batch[name]
    torch.testing.assert_close(tiny_model(**batch).logits, expected)
    del batch["text_states_mask"]
    with pytest.raises(ValueError, match="the model needs text_states_mask"):
        tiny_model(**batch)
