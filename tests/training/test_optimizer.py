# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.training.optimizer import make_optimizer, make_scheduler

RATES = {"learning_rate": 1e-3, "text_learning_rate": 2e-5, "weight_decay": 0.1}


def settings_by_name(model, optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each parameter, by its name in the model; each must be in one group only."""
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = group["lr"], group["weight_decay"]
    return found


def test_every_parameter_is_trained_and_none_twice(tiny_model):
    assert (
        settings_by_name(tiny_model, make_optimizer(tiny_model, **RATES)).keys()
        == dict(tiny_model.named_parameters()).keys()
    )


def test_the_pretrained_encoder_learns_slowly_and_the_rest_fast(tiny_model):
    for name, (rate, _) in settings_by_name(tiny_model, make_optimizer(tiny_model, **RATES)).items():
        assert rate == (2e-5 if name.startswith("encoders.text.") else 1e-3), name


def test_biases_norms_and_scalings_are_not_pulled_to_zero(tiny_model):
    settings = settings_by_name(tiny_model, make_optimizer(tiny_model, **RATES))
    for name, (_, decay) in settings.items():
        small = name.endswith(".bias") or "norm" in name.lower() or ".scale." in name
        assert not (small and decay), name
    for name in (
        "encoders.text.model.encoder.layer.0.attention.self.query.weight",
        "encoders.audio.convolutions.0.weight",
        "encoders.vision.convolutions.0.weight",
        "head.classifier.weight",
    ):
        assert settings[name][1] == 0.1, name


def test_a_step_without_gradients_shrinks_matrices_only(tiny_model):
    before = {name: parameter.detach().clone() for name, parameter in tiny_model.named_parameters()}
    optimizer = make_optimizer(tiny_model, learning_rate=0.5, text_learning_rate=0.5, weight_decay=0.1)
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(tiny_model.named_parameters())
    torch.testing.assert_close(after["head.classifier.weight"], before["head.classifier.weight"] * 0.95)
    assert torch.equal(after["head.classifier.bias"], before["head.classifier.bias"])
    assert torch.equal(after["encoders.vision.scale.weight"], before["encoders.vision.scale.weight"])


def test_a_frozen_text_encoder_is_left_out(tiny_model):
    tiny_model.encoders["text"].freeze()
    names = settings_by_name(tiny_model, make_optimizer(tiny_model, **RATES)).keys()
    assert names == {
        name for name, _ in tiny_model.named_parameters() if not name.startswith("encoders.text.")
    }
    assert all(group["params"] for group in make_optimizer(tiny_model, **RATES).param_groups)


def test_the_learning_rates_rise_to_their_peaks_and_fall_to_zero(tiny_model):
    optimizer = make_optimizer(tiny_model, **RATES)
    scheduler = make_scheduler(optimizer, steps=100, warmup=0.1)
    history = []
    for _ in range(101):
        history.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    text, rest = [rates[0] for rates in history], [rates[-1] for rates in history]
    assert (text[0], rest[0]) == (0.0, 0.0)
    assert (text[5], rest[5]) == pytest.approx((1e-5, 5e-4))  # half of the warm-up's ten steps
    assert (text[10], rest[10]) == pytest.approx((2e-5, 1e-3))
    assert (text[55], rest[55]) == pytest.approx((1e-5, 5e-4))  # half of the ninety after it
    assert (text[100], rest[100]) == (0.0, 0.0)
    assert max(rest) == pytest.approx(1e-3)


def test_without_warmup_the_first_step_takes_the_peak_rate(tiny_model):
    optimizer = make_optimizer(tiny_model, **RATES)
    assert make_scheduler(optimizer, steps=10, warmup=0.0).get_last_lr()[-1] == 1e-3


def test_a_constant_learning_rate_rises_and_stays(tiny_model):
    optimizer = make_optimizer(tiny_model, **RATES)
    scheduler = make_scheduler(optimizer, steps=20, warmup=0.1, decay="constant")
    history = []
    for _ in range(20):
        history.append(scheduler.get_last_lr()[-1])
        optimizer.step()
        scheduler.step()
    assert history == pytest.approx([0.0, 5e-4] + [1e-3] * 18)


def test_biases_side_by_side_and_learned_scalars_are_not_decayed_either(tiny_config):
    switches = {"hidden_size": 8, "depth": 1, "learned_scalars": True, "missing_tokens": True}
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": "ebmc", "head_kwargs": switches}))
    settings = settings_by_name(model, make_optimizer(model, **RATES))
    assert settings.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, (_, decay) in settings.items() if decay}
    stacked = {name for name in settings if name.startswith("head.stacks.")}
    assert stacked & decayed == {name for name in stacked if name.endswith(".weight")} != set()
    assert not decayed & {"head.temperature.value", "head.gain.value"}
