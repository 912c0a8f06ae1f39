# SPDX-License-Identifier: Apache-2.0
"""MAG against its equations, computed token by token in NumPy (docs/methods/mag.md)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertModel

from msa_online import MSAConfig, MSAModel, MSAPipeline
from msa_online.encoders.pretrained import EncoderError
from msa_online.evaluation.conditions import decide_under
from msa_online.hub import load_checkpoint
from msa_online.methods import MODULATORS, MAGHead
from msa_online.modalities import MODALITIES, VISIBLE_SETS, ModalitySequence
from msa_online.training.config import TrainingArguments
from msa_online.training.model import limit_training
from msa_online.training.modulator import make_modulator
from msa_online.training.yaml_reader import ConfigurationError
from tests.equations import assert_equation

PRESENT = [[True, True, True], [True, False, True], [True, True, False], [True, False, False]]
PRESENT += [[False, True, True], [False, False, False]]
MOVED = ("gate.",)


def linear(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ values + weights.get(f"{name}.bias", 0)


def steps_of(sequence: ModalitySequence, sample: int) -> tuple[np.ndarray, np.ndarray]:
    return sequence.values[sample].detach().numpy(), sequence.mask[sample].numpy()


def during(values: np.ndarray, mask: np.ndarray, token: int, tokens: int) -> np.ndarray | None:
    """Mean of the observed steps of one of equally long tokens; None if there are none."""
    observed = np.flatnonzero(mask)
    if not len(observed):
        return None
    length = observed[-1] + 1
    covered = range(math.floor(token * length / tokens), math.ceil((token + 1) * length / tokens))
    found = [values[step] for step in covered if mask[step]]
    return np.mean(found, axis=0) if found else None


def shifted(
    weights: dict, state: np.ndarray, others: dict[str, np.ndarray | None], beta: float
) -> np.ndarray:
    """One token state, by (11.1) to (11.4)."""
    there = {name: values for name, values in others.items() if values is not None}
    if not there:
        return state
    displacement = weights["gate.bias"].copy()
    for name, values in there.items():
        gate = np.maximum(linear(weights, f"gate.gates.{name}", np.concatenate([state, values])), 0)
        displacement += gate * linear(weights, f"gate.values.{name}", values)
    factor = min(beta * np.linalg.norm(state) / np.linalg.norm(displacement), 1)
    moved = state + factor * displacement
    normal = (moved - moved.mean()) / np.sqrt(moved.var() + 1e-5)
    return weights["gate.norm.weight"] * normal + weights["gate.norm.bias"]


def shifted_text(weights: dict, states, sequences, sample: int, beta: float) -> list[np.ndarray]:
    """States of the observed tokens of a sample, after the gate."""
    _, mask = steps_of(sequences["text"], sample)
    tokens = np.flatnonzero(mask)
    return [
        shifted(
            weights,
            states[token],
            {
                name: during(*steps_of(sequences[name], sample), number, len(tokens))
                for name in ("audio", "vision")
            },
            beta,
        )
        for number, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_predictions_are_those_of_the_equations_whatever_is_absent(beta, outputs, make_head, make_gappy):
    head, sequences = make_head("mag", outputs, moved=MOVED, beta=beta), make_gappy(6, PRESENT)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    output = head(sequences)
    factors = []
    for sample, present in enumerate(PRESENT):
        states, means = {}, {}
        for name, there in zip(MODALITIES, present, strict=True):
            values, mask = steps_of(sequences[name], sample)
            means[name] = values[mask].mean(axis=0) if there else None
        if present[0]:
            values, _ = steps_of(sequences["text"], sample)
            tokens = shifted_text(weights, values, sequences, sample, beta)
            factors.append(tokens)
        for name, there in zip(MODALITIES, present, strict=True):
            read = np.mean(tokens, axis=0) if name == "text" and there else means[name]
            states[name] = np.tanh(linear(weights, f"projections.{name}", read)) if there else np.zeros(8)
            assert_equation("11.5", f"state of {name}", output.features[name][sample], states[name])
            own = np.tanh(linear(weights, f"projections.{name}", means[name])) if there else np.zeros(8)
            alone = linear(weights, f"predictors.{name}", own)
            assert_equation("11.7", f"prediction of {name}", output.modality_logits[name][sample], alone)
        expected = linear(weights, "classifier", np.concatenate(list(states.values())))
        assert_equation("11.6", f"prediction of {present}", output.logits[sample], expected)


def test_a_large_displacement_is_cut_to_beta_times_the_size_of_the_state(make_head, make_gappy):
    head, sequences = make_head("mag", moved=MOVED, beta=0.3), make_gappy(6, PRESENT)
    with torch.no_grad():
        head.gate.bias.fill_(100.0)
    states = sequences["text"].values
    displacement = head.gate._scale(states, head.gate.bias) * head.gate.bias
    sizes = torch.linalg.vector_norm(displacement, dim=-1) / torch.linalg.vector_norm(states, dim=-1)
    assert sizes[sequences["text"].mask].allclose(torch.tensor(0.3).double())


def test_a_word_with_a_time_is_shifted_by_what_is_heard_and_seen_then(make_head, make_gappy):
    head, sequences = make_head("mag", moved=MOVED), make_gappy(6, PRESENT)
    spans = torch.full((6, sequences["text"].mask.shape[1], 2, 2), torch.nan, dtype=torch.float64)
    spans[0, :, 0] = torch.tensor([0.0, 0.1])  # of the sound
    spans[0, :, 1] = torch.tensor([0.0, 1.0])  # the first frame
    timed = {**sequences, "text": replace(sequences["text"], spans=spans)}
    plain, moved = head.shift_text(sequences), head.shift_text(timed)
    assert not torch.allclose(plain[0], moved[0]) and torch.equal(plain[1:], moved[1:])
    first = {
        name: replace(sequences[name], values=sequences[name].values[:, :1], mask=sequences[name].mask[:, :1])
        for name in ("audio", "vision")
    }
    torch.testing.assert_close(head.shift_text({**sequences, **first})[0], moved[0])


# inside a text encoder


@pytest.fixture
def make_model(tiny_config):
    """A function that makes a tiny model of clips whose head acts after a layer."""

    def make(layer: int | None, **settings) -> MSAModel:
        torch.manual_seed(0)
        fields = {
            **tiny_config.to_dict(),
            "head": "mag",
            "head_kwargs": {"hidden_size": 8, "layer": layer, **settings},
        }
        model = MSAModel(MSAConfig(**fields)).eval()
        with torch.no_grad():
            for name, parameter in model.head.named_parameters():
                if name.startswith(MOVED):
                    parameter += torch.rand_like(parameter) * 0.5
        return model

    return make


every_layer = pytest.mark.parametrize("layer", [0, 1])


@every_layer
def test_the_layers_above_read_the_shifted_words(layer, make_model, make_batch):
    """Against BERT's own modules, called one after the other for one sample without padding."""
    model, batch = make_model(layer), make_batch()
    sequences = model.encode(**batch)
    weights = {name: value.double().numpy() for name, value in model.head.state_dict().items()}
    bert = model.encoders["text"].model
    found = model(**batch).features["text"]
    for sample in range(4):
        ids = batch["text_input_ids"][sample][batch["text_mask"][sample]].unsqueeze(0)
        with torch.no_grad():
            states = bert.embeddings(ids)
            for each in bert.encoder.layer[:layer]:
                states = each(states)
            whole = torch.zeros(len(batch["text_mask"][sample]), states.shape[2])
            whole[: states.shape[1]] = states[0]
            tokens = shifted_text(weights, whole.double().numpy(), sequences, sample, 1.0)
            states = torch.tensor(np.array(tokens), dtype=torch.float32).unsqueeze(0)
            for each in bert.encoder.layer[layer:]:
                states = each(states)
        read = states[0].double().numpy().mean(axis=0)
        expected = np.tanh(linear(weights, "projections.text", read))
        np.testing.assert_allclose(found[sample].detach(), expected, atol=1e-5)


@every_layer
def test_without_sound_and_face_the_text_is_read_as_without_a_gate(layer, make_model, make_batch):
    model, batch = make_model(layer), make_batch(present=(True, False, False))
    bert = BertModel(model.config.text_config, add_pooling_layer=False).eval()
    bert.load_state_dict(model.encoders["text"].model.state_dict())
    with torch.no_grad():
        plain = bert(batch["text_input_ids"], batch["text_mask"].long()).last_hidden_state
        read = model._head_inputs(model.encode(**batch))["text"]
    assert torch.equal(read.values, plain * batch["text_mask"].unsqueeze(-1))


@every_layer
@pytest.mark.parametrize("visible", VISIBLE_SETS)
def test_hiding_modalities_after_encoding_is_hiding_them_from_the_model(
    layer, visible, make_model, make_batch
):
    """So evaluation may encode once for all conditions."""
    model, batch = make_model(layer), make_batch()
    shown = torch.tensor([name in VISIBLE_SETS[visible] for name in MODALITIES]).expand(4, 3)
    with torch.no_grad():
        after = decide_under(model, model.encode(**batch), VISIBLE_SETS[visible]).logits
        before = model(**{**batch, "modality_present": shown}).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert after.isfinite().all()


@every_layer
def test_a_sample_is_judged_alone_and_without_its_padding(layer, make_model, make_batch):
    model, batch = make_model(layer), make_batch(present=(True, True, True))
    batch["modality_present"] = torch.tensor(PRESENT[:4])
    together = model(**batch).logits
    for sample in range(4):
        one = {name: values[sample : sample + 1] for name, values in batch.items()}
        tokens = int(one["text_mask"].sum())
        one |= {name: one[name][:, :tokens] for name in ("text_input_ids", "text_mask")}
        torch.testing.assert_close(model(**one).logits, together[sample : sample + 1], atol=1e-5, rtol=1e-5)


@every_layer
@pytest.mark.parametrize("frozen", [False, True])
def test_everything_that_trains_has_a_gradient(layer, frozen, make_model, make_batch):
    model = make_model(layer).train()
    if frozen:
        model.encoders["text"].freeze()
    reached: set[str] = set()
    for present in PRESENT:
        model.zero_grad()
        model(**make_batch(present=tuple(present))).loss.backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values()), present
        reached |= {name for name, gradient in gradients.items() if gradient.any()}
    wanted = {name for name, each in model.named_parameters() if each.requires_grad}
    never = {name for name in wanted if name.endswith("key.bias")}  # the softmax ignores it
    unseen = {name for name in wanted if "token_type" in name}  # one of two types
    assert wanted - reached <= never | unseen
    assert frozen == (not any(name.startswith("encoders.text") for name in reached))


def test_the_hook_leaves_nothing_behind_if_a_pass_fails(make_model, make_batch):
    model, batch = make_model(1), make_batch()
    expected = model(**batch).logits
    encoder = model.encoders["text"]
    with pytest.raises(ZeroDivisionError):
        encoder.finish(encoder(batch), lambda _: 1 / 0)
    assert not any(layer._forward_pre_hooks for layer in encoder.layers)
    assert torch.equal(model(**batch).logits, expected)


@every_layer
def test_a_saved_model_predicts_the_same(layer, make_model, make_batch, tmp_path):
    model, batch = make_model(layer), make_batch()
    model.save_pretrained(tmp_path)
    assert torch.equal(MSAModel.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


def test_without_predictions_of_each_modality_alone_there_are_none(make_model, make_batch):
    output = make_model(1)(**make_batch())
    assert output.modality_logits == {} and set(output.losses) == {"task"}
    assert "unimodal needs predictions" in MAGHead(
        {"text": 4, "audio": 4, "vision": 4}, 1, layer=1
    ).weights_problem({"unimodal": 0.3})


@pytest.mark.slow
@pytest.mark.parametrize("modulator", [name for name in ("identity", "shapley") if name in MODULATORS])
def test_a_run_on_clips_with_a_frozen_text_encoder_ends_with_a_model_that_predicts(
    modulator, tiny_corpus, tiny_text_encoder, cache_dir, train, tmp_path
):
    """What a modulator decides from stored sequences goes through the text encoder too."""
    folder = train(
        {
            "model": {
                "text_encoder": str(tiny_text_encoder),
                **{"audio_channels": [16, 16], "audio_width": 16, "face_channels": 8, "face_width": 16},
                **{"head": "mag", "head_kwargs": {"hidden_size": 8, "layer": 1}},
            },
            "data": {"path": str(tiny_corpus), "num_frames": 4, "face_size": 32},
            "training": {
                **{"epochs": 1, "batch_size": 8, "freeze": ["text"], "log_with": None},
                **{"modality_dropout": {"text": 0.3}, "modulator": modulator, "mixed_precision": "no"},
                "output_dir": str(tmp_path / "run"),
            },
        }
    )
    model, processor = load_checkpoint(folder)
    assert model.encoders["text"].opened_at == 1
    prediction = MSAPipeline(model, processor)(tiny_corpus / "clip_00.mp4", text="a good film")
    assert math.isfinite(prediction.score) and sum(prediction.contributions.values()) == pytest.approx(
        prediction.score - prediction.baseline, abs=1e-4
    )


@pytest.mark.needs("ogm")
def test_a_modulator_that_compares_modalities_alone_is_refused(make_model):
    with pytest.raises(ConfigurationError, match="model.head=mag predicts nothing from .* alone: use a head"):
        make_modulator(TrainingArguments(modulator="ogm"), make_model(1), 3, Accelerator(cpu=True))


# what cannot be


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"layer": -1}, "layer=-1"), ({"beta": 0}, "beta=0"), ({"regression_loss": "huber"}, "huber")],
)
def test_impossible_settings_are_refused(settings, expected, make_head):
    with pytest.raises(ValueError, match=expected):
        make_head("mag", **settings)


def test_features_have_no_text_encoder_to_act_in():
    config = MSAConfig(
        feature_widths={"text": 4, "audio": 3, "vision": 2}, head="mag", head_kwargs={"layer": 1}
    )
    with pytest.raises(
        EncoderError, match="head 'mag' acts after layer 1 of the text encoder, and precomputed"
    ):
        MSAModel(config)


def test_a_layer_that_the_text_encoder_lacks_is_refused(make_model):
    with pytest.raises(
        EncoderError, match="after layer 2 of the text encoder, which has 2 layers: .* 0 to 1"
    ):
        make_model(2)


def test_states_that_are_recomputed_are_refused(make_model):
    with pytest.raises(
        ConfigurationError, match="gradient_checkpointing names text, and the head acts inside"
    ):
        limit_training(make_model(1).encoders, TrainingArguments(gradient_checkpointing=["text"]))
