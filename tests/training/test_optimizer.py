# SPDX-License-Identifier: Apache-2.0
from copy import deepcopy

import pytest
import torch
from transformers import WhisperConfig

from msa_online import MSAConfig, MSAModel
from msa_online.methods import HEADS, MODULATORS
from msa_online.training.optimizer import make_optimizer, make_scheduler, restart_decay, scaled_rates

RATES = {"learning_rate": 1e-3, "learning_rates": {"text": 2e-5}, "weight_decay": 0.1}


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
    optimizer = make_optimizer(tiny_model, learning_rate=0.5, learning_rates={"text": 0.5}, weight_decay=0.1)
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


@pytest.fixture
def whisper_config(tiny_config):
    """The tiny model with a pretrained audio encoder, of which layer 2 of 3 is read."""
    audio = WhisperConfig(
        d_model=8, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=16, max_source_positions=40
    )
    return MSAConfig(**{**tiny_config.to_dict(), "audio_config": audio, "audio_layer": 2})


def test_the_rates_of_layers_decay_from_the_top_of_each_pretrained_encoder(whisper_config):
    model = MSAModel(whisper_config)
    rates = {"learning_rate": 1e-3, "learning_rates": {"text": 4e-5, "vision": 5e-4}, "layer_decay": 0.5}
    optimizer = make_optimizer(model, **rates, weight_decay=0.1)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        **{"text_encoder/embeddings": 1e-5, "text_encoder/layer 1": 2e-5, "text_encoder/layer 2": 4e-5},
        **{"audio_encoder/embeddings": 5e-6, "audio_encoder/layer 1": 1e-5, "audio_encoder/layer 2": 2e-5},
        **{"vision_encoder": 5e-4, "rest": 1e-3},
    }
    expected = {
        "encoders.text.model.embeddings.": 1e-5,
        "encoders.text.model.encoder.layer.0.": 2e-5,
        "encoders.text.model.encoder.layer.1.": 4e-5,
        "encoders.audio.model.conv": 5e-6,
        "encoders.audio.model.layers.0.": 1e-5,
        "encoders.audio.model.layers.1.": 2e-5,
        "encoders.audio.norm.": 1e-3,  # read out by layers that the model adds
        "encoders.vision.": 5e-4,
        "head.": 1e-3,
    }
    owners = {id(value): name for name, values in model.modality_parameters().items() for value in values}
    for group in optimizer.param_groups:
        assert {owners.get(id(value)) for value in group["params"]} == {group["modality"]}
    found = settings_by_name(model, optimizer)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == trained
    for name, (rate, _) in found.items():
        assert [rate] == [own for prefix, own in expected.items() if name.startswith(prefix)], name


def test_what_follows_the_last_layer_has_the_rate_of_the_encoder(whisper_config):
    whisper_config.audio_layer = "last"
    model = MSAModel(whisper_config)
    optimizer = make_optimizer(model, learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1)
    settings = settings_by_name(model, optimizer)
    assert settings["encoders.audio.model.layer_norm.weight"] == (2e-5, 0.0)
    assert settings["encoders.audio.model.layers.0.fc1.weight"] == (5e-6, 0.1)


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


@pytest.mark.parametrize(("at", "after"), [(60, [1e-3, 5e-4, 0.0]), (5, [5e-4, 4.44444e-4, 0.0])])
def test_a_restart_returns_to_the_peak_rates_and_still_ends_at_zero(at, after, tiny_model):
    """A warm-up that has not ended goes on: nothing is skipped by a restart in step 5 of 10."""
    optimizer = make_optimizer(tiny_model, **RATES)
    scheduler = make_scheduler(optimizer, steps=100, warmup=0.1)
    rates = {}
    for step in range(101):
        if step == at:
            restart_decay(scheduler)
        assert scheduler.get_last_lr()[-1] == optimizer.param_groups[-1]["lr"]
        rates[step] = scheduler.get_last_lr()[-1]
        optimizer.step()
        scheduler.step()
    assert [rates[at], rates[80 if at == 60 else 60], rates[100]] == pytest.approx(after, rel=1e-5)
    resumed = make_scheduler(make_optimizer(tiny_model, **RATES), steps=100, warmup=0.1)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.lr_lambdas[0].start == max(at, 10)


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


@pytest.mark.needs("ebmc")
def test_biases_side_by_side_and_learned_scalars_are_not_decayed_either(tiny_config):
    switches = {"hidden_size": 8, "depth": 1, "learned_scalars": True, "missing_tokens": True}
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": "ebmc", "head_kwargs": switches}))
    settings = settings_by_name(model, make_optimizer(model, **RATES))
    assert settings.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, (_, decay) in settings.items() if decay}
    stacked = {name for name in settings if name.startswith("head.stacks.")}
    assert stacked & decayed == {name for name in stacked if name.endswith(".weight")} != set()
    assert not decayed & {"head.temperature.value", "head.gain.value"}


@pytest.mark.parametrize("head", HEADS)
def test_a_group_holds_parameters_of_one_modality_or_shared_ones(head, tiny_config):
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": head, "head_kwargs": {"hidden_size": 8}}))
    owners = {id(value): name for name, values in model.modality_parameters().items() for value in values}
    groups = make_optimizer(model, **RATES).param_groups
    for group in groups:
        assert {owners.get(id(value)) for value in group["params"]} == {group["modality"]}
    assert {group["modality"] for group in groups} == {"text", "audio", "vision", None}


@pytest.mark.needs("rebalance")
def test_probes_of_a_modulator_are_trained_too_in_groups_of_their_own(tiny_model):
    """At the rate of what is new, and at no modality's: `apply: lr` would slow what judges a modality."""
    plain = settings_by_name(tiny_model, make_optimizer(tiny_model, **RATES))
    MODULATORS["rebalance"]().attach(tiny_model, dict.fromkeys(("text", "audio", "vision"), 16), 16)
    optimizer = make_optimizer(tiny_model, **RATES)
    settings = settings_by_name(tiny_model, optimizer)
    probes = {name for name in settings if name.startswith("probes.")}
    assert settings.keys() == dict(tiny_model.named_parameters()).keys() and len(probes) == 12
    assert {name: settings[name] for name in settings.keys() - probes} == plain
    for name in probes:
        assert settings[name] == (1e-3, 0.0 if name.endswith("bias") else 0.1)
    of_probes = {id(value) for value in tiny_model.probes.parameters()}
    for group in optimizer.param_groups:
        inside = {id(value) in of_probes for value in group["params"]}
        assert inside == {group["name"] == "probes"}
        assert group["name"] != "probes" or group["modality"] is None


def random_steps(model, optimizer, steps: int, seed: int) -> None:
    """Steps on random gradients; one parameter has none in every other step, as a head in stages has."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if number == 3 and step % 2 else gradient
        optimizer.step()


@pytest.mark.parametrize("head", HEADS)
def test_the_fused_step_follows_the_plain_one(head, tiny_config):
    """Fused is several times as fast and must not be another optimizer."""
    trained = []
    for kernel in ({}, {"fused": False, "foreach": False}):
        torch.manual_seed(0)
        model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": head}))
        optimizer = make_optimizer(model, **RATES)
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group.update(kernel)
        random_steps(model, optimizer, steps=20, seed=1)
        trained.append(model.state_dict())
    fused, plain = trained
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_reloaded_optimizer_continues_bit_for_bit(tiny_config):
    def start():
        torch.manual_seed(0)
        model = MSAModel(tiny_config)
        return model, make_optimizer(model, **RATES)

    whole, optimizer = start()
    random_steps(whole, optimizer, steps=3, seed=1)
    weights, state = deepcopy(whole.state_dict()), deepcopy(optimizer.state_dict())
    random_steps(whole, optimizer, steps=3, seed=2)
    resumed, optimizer = start()
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    random_steps(resumed, optimizer, steps=3, seed=2)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_parameters_of_several_types_are_stepped_together(tiny_model):
    tiny_model.encoders["text"].to(torch.bfloat16)
    tiny_model.head.double()
    before = {name: value.detach().clone() for name, value in tiny_model.named_parameters()}
    random_steps(tiny_model, make_optimizer(tiny_model, **RATES), steps=1, seed=0)
    for name, value in tiny_model.named_parameters():
        assert value.dtype == before[name].dtype and torch.isfinite(value).all()
        if name.startswith(("encoders.audio", "head.")) and value.grad is not None:
            assert not torch.equal(value, before[name]), name


def test_a_model_without_storage_has_an_optimizer_too(tiny_config):
    with torch.device("meta"):
        model = MSAModel(tiny_config)
    optimizer = make_optimizer(model, **RATES)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert settings_by_name(model, optimizer).keys() == dict(model.named_parameters()).keys()


def with_gradients(model: MSAModel) -> MSAModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("factor", [0.3, 0.0, 1.0])
def test_a_scaled_rate_makes_the_update_of_that_modality_as_many_times_as_long(factor, tiny_config):
    torch.manual_seed(0)
    model = MSAModel(tiny_config).double()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    owned = {id(value) for value in model.modality_parameters()["audio"]}
    names = {name for name, value in model.named_parameters() if id(value) in owned}
    updates = []
    for factors in ({}, {"audio": factor}):
        model.load_state_dict(start, strict=False)
        optimizer = make_optimizer(with_gradients(model), **RATES)
        with scaled_rates(optimizer, factors):
            optimizer.step()
        updates.append({name: value.detach() - start[name] for name, value in model.named_parameters()})
    plain, scaled = updates
    assert names and all(update.any() for update in plain.values())
    for name, update in plain.items():
        if name in names:
            torch.testing.assert_close(scaled[name], factor * update, rtol=1e-9, atol=1e-15)
        else:
            assert torch.equal(scaled[name], update), name


def test_scaled_rates_are_whole_again_afterwards_and_the_schedule_does_not_notice(tiny_model):
    histories = []
    for factors in ({}, {"text": 0.5, "vision": 0.0}):
        optimizer = make_optimizer(tiny_model, **RATES)
        scheduler = make_scheduler(optimizer, steps=6, warmup=0.5)
        history = []
        for _ in range(6):
            before = [group["lr"] for group in optimizer.param_groups]
            with scaled_rates(optimizer, factors):
                for group, rate in zip(optimizer.param_groups, before, strict=True):
                    assert group["lr"] == rate * factors.get(group["modality"], 1.0)
                optimizer.step()
            assert [group["lr"] for group in optimizer.param_groups] == before
            scheduler.step()
            history.append(before)
        histories.append(history)
    assert histories[0] == histories[1] and any(max(rates) == 1e-3 for rates in histories[0])


def test_adam_divides_a_factor_on_gradients_out_and_keeps_one_on_the_rate(tiny_model):
    """A constant coefficient has no effect after about 1 / (1 - beta2) steps (docs/methods/numerics.md)."""
    gradient = torch.tensor([0.7, -0.2, 1.3])
    paces = {}
    for apply, steps in (("gradient", 6000), ("lr", 1000)):
        weight = torch.nn.Parameter(torch.zeros(3))
        group = {"params": [weight], "modality": "audio"}
        optimizer = torch.optim.AdamW([group], lr=1e-3, weight_decay=0.0)
        pace = []
        for step in range(steps):
            coefficient = 1.0 if step < 100 else 0.2
            before = weight.detach().clone()
            weight.grad = gradient * (coefficient if apply == "gradient" else 1.0)
            with scaled_rates(optimizer, {"audio": coefficient} if apply == "lr" else {}):
                optimizer.step()
            pace.append((weight.detach() - before).norm().item())
        paces[apply] = [pace[number] / pace[99] for number in (150, -1)]
    assert paces["lr"] == pytest.approx([0.2, 0.2], rel=1e-3)
    assert paces["gradient"][0] < 0.3  # at first it seems to work
    assert paces["gradient"][1] == pytest.approx(1.0, abs=0.05)
