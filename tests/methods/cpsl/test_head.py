# SPDX-License-Identifier: Apache-2.0
"""The CP/SL head with each of its settings (docs/methods/cpsl.md)."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F

from msa_online import MSAConfig, MSAModel
from msa_online.layers.alignment import resample, token_grid
from msa_online.layers.modules import MissingTokens
from msa_online.methods import CPSLHead
from msa_online.methods.cpsl import (
    GatedFusion,
    diversity_loss,
    reconstruction_loss,
    route_through,
    statistical_loss,
)
from msa_online.modalities import MODALITIES, ModalitySequence

ENCODED = ("audio", "vision")
LABELS = torch.linspace(-2, 2, 4, dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="session")
def make_cpsl(make_head):
    """A function that makes a small CP/SL head that drops nothing."""
    small = {"fusion_size": 7, "dropout": 0.0, "classifier_dropout": 0.0}
    return partial(make_head, "cpsl", moved=("norm.", "missing."), **small)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(mask: Tensor = MASK) -> dict[str, ModalitySequence]:
    """Features of 5 and of 4 numbers on three tokens of three samples."""
    return {
        name: ModalitySequence.of(random(*mask.shape, width, seed=width), mask)
        for name, width in (("audio", 5), ("vision", 4))
    }


def latents_at_a_match(inputs: dict[str, ModalitySequence]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means and variances of latents whose statistics are those of the features."""

    def spread_out(statistic: Tensor) -> Tensor:
        around = torch.linspace(-0.1, 0.1, 6, dtype=torch.float64)  # of mean zero
        return statistic.unsqueeze(-1) + around

    means = {name: spread_out(s.values.mean(dim=-1)) for name, s in inputs.items()}
    variances = {name: spread_out(s.values.var(dim=-1, correction=0)) for name, s in inputs.items()}
    return means, variances


def single_token(batch: int, seed: int = 0) -> dict[str, ModalitySequence]:
    """Samples of one token and one step, so that a feature of the output is one latent."""
    there = torch.ones(batch, 1, dtype=torch.bool)
    return {
        name: ModalitySequence.of(random(batch, 1, width, seed=seed + width), there)
        for name, width in (("text", 6), ("audio", 5), ("vision", 4))
    }


def without_gradient(head, loss: Tensor) -> set[str]:
    """Names of the parameters that a loss does not move."""
    loss.backward()
    return {name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()}


# the statistical loss (4.4, 4.5)


def test_matching_statistics_cost_nothing_and_a_shift_of_one_modality_a_quarter_of_its_square():
    inputs = inputs_of()
    means, variances = latents_at_a_match(inputs)
    assert statistical_loss(inputs, means, variances).item() == pytest.approx(0, abs=1e-20)
    for shifted in (means, variances):
        for name in ENCODED:
            for delta in (-2.0, 0.3, 5.0):
                original = shifted[name]
                shifted[name] = original + delta
                loss = statistical_loss(inputs, means, variances).item()
                assert loss == pytest.approx(delta**2 / 4, rel=1e-12)
                shifted[name] = original


def test_no_statistics_cost_less_than_matching_ones():
    inputs = inputs_of()
    for seed in range(20):
        means = {name: random(3, 3, 6, seed=seed) for name in ENCODED}
        variances = {name: random(3, 3, 6, seed=seed + 100).exp() for name in ENCODED}
        assert statistical_loss(inputs, means, variances) > 0


def test_whatever_stands_in_padding_costs_nothing():
    inputs = inputs_of()
    latents = {name: random(3, 3, 6, seed=2) for name in ENCODED}
    variances = {name: latent.exp() for name, latent in latents.items()}
    rebuilt = {name: random(*sequence.values.shape, seed=3) for name, sequence in inputs.items()}

    def losses(garbage: float) -> list[Tensor]:
        def spoilt(values: Tensor) -> Tensor:
            return torch.where(MASK.unsqueeze(-1), values, garbage)

        def all_spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: spoilt(values) for name, values in tensors.items()}

        given = {name: ModalitySequence(spoilt(s.values), s.mask, s.present) for name, s in inputs.items()}
        return [
            statistical_loss(given, all_spoilt(latents), all_spoilt(variances)),
            reconstruction_loss(given, all_spoilt(rebuilt)),
            diversity_loss(given, all_spoilt(variances)),
        ]

    for clean, dirty in zip(losses(1.0), losses(1e6), strict=True):
        assert torch.equal(clean, dirty)


def test_a_front_end_cannot_meet_its_targets_by_changing_them():
    leaves = {name: s.values.clone().requires_grad_() for name, s in inputs_of().items()}
    inputs = {name: ModalitySequence(leaf, MASK, MASK.any(dim=1)) for name, leaf in leaves.items()}
    made = {name: random(3, 3, 6) for name in ENCODED}
    variances = {name: value.exp() for name, value in made.items()}
    rebuilt = {name: random(*leaf.shape, seed=1) for name, leaf in leaves.items()}
    assert not statistical_loss(inputs, made, variances).requires_grad
    assert not reconstruction_loss(inputs, rebuilt).requires_grad


@pytest.mark.parametrize("loss", ["stat", "recon"])
def test_losses_reach_a_front_end_only_through_the_latents(loss, make_cpsl, make_gappy):
    head = make_cpsl(ame=False).train()
    given = make_gappy()
    head(given)  # the extremes stand: the same batch moves them no further
    leaves = {name: sequence.values.clone().requires_grad_() for name, sequence in given.items()}
    sequences = {name: ModalitySequence(leaves[name], s.mask, s.present) for name, s in given.items()}
    found = torch.autograd.grad(head(sequences, LABELS).losses[loss], [leaves[name] for name in ENCODED])
    # the same with the encoders cut off from what they read leaves nothing
    for name in ENCODED:
        head.encoders[name].register_forward_pre_hook(lambda module, given: (given[0].detach(),))
    cut_off = head(sequences, LABELS).losses[loss]
    left = torch.autograd.grad(
        cut_off, [leaves[name] for name in ENCODED], allow_unused=True, materialize_grads=True
    )
    assert all(gradient.any() for gradient in found)
    assert not any(gradient.any() for gradient in left)


# reconstruction (4.6) and diversity (4.7)


def test_a_decoder_that_gives_back_its_input_costs_nothing(make_cpsl, make_gappy):
    width = 5
    head = make_cpsl(widths={"text": 6, "audio": width, "vision": width}, hidden_size=width)
    with torch.no_grad():
        for name in ENCODED:
            encoder, decoder = head.encoders[name], head.decoders[name]
            for layer in (encoder.trunk[0], encoder.mean, decoder[0], decoder[3]):
                torch.nn.init.eye_(layer.weight)
                layer.bias.zero_()
    sequences = make_gappy()
    sequences["vision"] = sequences["audio"]
    head.train()(sequences)  # sets the extremes, so that nothing scaled is below zero
    assert head.eval()(sequences, LABELS).losses["recon"].item() == pytest.approx(0, abs=1e-28)
    with torch.no_grad():
        head.decoders["audio"][3].bias += 0.2
    assert head(sequences, LABELS).losses["recon"].item() == pytest.approx(0.2**2 / 2)


def test_diversity_is_the_negative_entropy_of_the_gaussians():
    inputs = inputs_of()
    variances = {name: (0.5 * random(3, 3, 6, seed=4)).exp() for name in ENCODED}
    entropies = [Normal(0.0, variances[name][MASK].sqrt()).entropy().mean() for name in ENCODED]
    expected = -torch.stack(entropies).mean()
    torch.testing.assert_close(diversity_loss(inputs, variances), expected, **EXACT)


@pytest.mark.parametrize(("variance", "log_variance"), [(1e-6, -6), (1e-30, -6), (1e3, 2), (1e30, 2)])
def test_diversity_rewards_no_variance_beyond_its_bounds(variance, log_variance):
    inputs = inputs_of()
    variances = {name: torch.full((3, 3, 6), variance, requires_grad=True) for name in ENCODED}
    loss = diversity_loss(inputs, variances)
    assert loss.item() == pytest.approx(-0.5 * (math.log(2 * math.pi * math.e) + log_variance))
    loss.backward()
    assert not any(values.grad.any() for values in variances.values())


def test_more_variance_is_more_diversity_within_the_bounds():
    inputs = inputs_of()
    losses = [
        diversity_loss(inputs, {name: torch.full((3, 3, 6), math.exp(power)) for name in ENCODED}).item()
        for power in (-5.9, -3.0, 0.0, 1.9)
    ]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


# the Gaussian encoders (4.1)


def test_evaluation_and_training_without_ame_draw_nothing(make_cpsl, make_gappy):
    sequences = make_gappy()
    for head, draws in (
        (make_cpsl(), False),
        (make_cpsl(ame=False).train(), False),
        (make_cpsl().train(), True),
    ):
        head(sequences)  # the extremes of this batch are taken in once
        logits = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            logits.append(head(sequences).logits)
        assert torch.equal(*logits) is not draws


def test_latents_are_drawn_with_the_variance_that_the_encoder_states(make_cpsl):
    head, batch = make_cpsl(hidden_size=3), 40_000
    one = single_token(1)
    head.train()(single_token(50, seed=9))
    head.eval()
    mean, variance = head.encoders["audio"](head.scaling["audio"](one["audio"]).values)
    many = {
        name: ModalitySequence(
            s.values.expand(batch, -1, -1), s.mask.expand(batch, -1), s.present.expand(batch)
        )
        for name, s in one.items()
    }
    # the extremes would follow the batch: the encoders train, the scaling stands
    head.train()
    head.scaling.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = head(many).features["audio"]
    torch.testing.assert_close(drawn.var(dim=0), variance[0, 0] + 1e-6, rtol=0.04, atol=0)
    errors = (drawn.mean(dim=0) - mean[0, 0]) / (variance[0, 0] / batch).sqrt()
    assert errors.abs().max() < 4
    within = ((drawn - mean[0, 0]).abs() < variance[0, 0].sqrt()).double().mean(dim=0)
    torch.testing.assert_close(within, torch.full((3,), 0.6827).double(), rtol=0, atol=0.012)  # normal
    assert torch.corrcoef(drawn.T).triu(1).abs().max() < 0.025  # features are drawn apart


def test_a_latent_moves_with_its_mean_one_to_one(make_cpsl):
    head = make_cpsl(hidden_size=3).train()
    features = head(single_token(2)).features["audio"]
    for sample in range(2):
        for k in range(3):
            (gradient,) = torch.autograd.grad(
                features[sample, k], head.encoders["audio"].mean.bias, retain_graph=True
            )
            assert torch.equal(gradient, F.one_hot(torch.tensor(k), 3).double())


def test_variances_stay_above_zero_whatever_the_weights(make_cpsl):
    encoder = make_cpsl().encoders["audio"]
    for bias in (-1e4, 0.0, 1e4):
        with torch.no_grad():
            encoder.variance.bias.fill_(bias)
        _, variance = encoder(random(3, 5))
        assert (variance >= 1e-6).all() and torch.isfinite(variance).all()


def test_without_ame_variances_serve_the_statistics_alone(make_cpsl, make_gappy):
    head = make_cpsl(ame=False).train()
    losses = head(make_gappy(), LABELS).losses
    assert set(losses) == {"task", "unimodal", "recon", "stat"}
    of_variances = {f"encoders.{name}.variance.{kind}" for name in ENCODED for kind in ("weight", "bias")}
    assert of_variances <= without_gradient(head, losses["task"] + losses["unimodal"] + losses["recon"])
    head.zero_grad()
    assert not of_variances & without_gradient(head, head(make_gappy(), LABELS).losses["stat"])


# fusion (4.2, 4.3)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_without_the_shift_the_text_decides_alone(pooling, make_cpsl, make_gappy):
    head = make_cpsl(4, residual=0.0, pooling=pooling)
    sequences = make_gappy()
    found = head(sequences).logits
    for sample, text in enumerate(sequences["text"].values):
        states = head.norm(text[sequences["text"].mask[sample]])
        pooled = states[0] if pooling == "first" else states.mean(dim=0)
        expected = head.classifier(torch.tanh(head.pooler(pooled)))
        torch.testing.assert_close(found[sample], expected, **EXACT)
    others = make_gappy(seed=1) | {"text": sequences["text"]}
    assert torch.equal(head(others).logits, found)
    assert torch.equal(head({**others, "audio": others["audio"].only(LABELS > 0)}).logits, found)
    unmoved = without_gradient(head, head(sequences, torch.arange(4)).losses["task"])
    assert {name for name, _ in head.named_parameters()} - unmoved == {
        f"{part}.{kind}" for part in ("norm", "pooler", "classifier") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_what_is_fused_lies_between_the_two_modalities_and_the_shift_is_bounded(factor):
    torch.manual_seed(0)
    fusion = GatedFusion(8, 7, 6).double()
    seen = []
    fusion.project.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    audio, vision = random(50, 8) * factor, random(50, 8, seed=1) * factor
    shift = fusion(audio, vision)
    corners = torch.stack([torch.tanh(fusion.audio(audio)), torch.tanh(fusion.vision(vision))])
    low, high = corners.amin(dim=0), corners.amax(dim=0)
    assert (seen[0] >= low - 1e-12).all() and (seen[0] <= high + 1e-12).all()
    limit = 1.0 if factor == 1 else 1 + 1e-12  # far out, tanh is 1 to the last bit
    assert (seen[0].abs() < limit).all() and (shift.abs() < 1).all()
    assert (seen[0] - low > 1e-3).any() and (high - seen[0] > 1e-3).any()  # neither corner always wins


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_text_padded_on_the_left_is_read_like_text_padded_on_the_right(pooling, make_cpsl, make_sequences):
    head, sequences = make_cpsl(pooling=pooling), make_sequences()
    text, width = sequences["text"], sequences["text"].mask.shape[1]
    moved = torch.stack(
        [values.roll(width - int(seen.sum()), 0) for values, seen in zip(text.values, text.mask, strict=True)]
    )
    left = ModalitySequence(moved, text.mask.flip(1), text.present)
    assert not torch.equal(left.mask, text.mask)
    one, other = (head({**sequences, "text": given}, LABELS) for given in (text, left))
    torch.testing.assert_close(other.logits, one.logits, **EXACT)
    for name in MODALITIES:
        torch.testing.assert_close(other.features[name], one.features[name], **EXACT)
    for name, loss in one.losses.items():
        torch.testing.assert_close(other.losses[name], loss, **EXACT)


def test_the_first_token_is_not_the_mean_of_them(make_cpsl, make_sequences):
    first, mean = (make_cpsl(pooling=pooling)(make_sequences()).logits for pooling in ("first", "mean"))
    assert (first - mean).abs().max() > 1e-3


def test_an_unknown_pooling_is_refused(make_cpsl):
    with pytest.raises(ValueError, match="pooling='max' must be one of mean, first"):
        make_cpsl(pooling="max")


def test_a_text_of_width_one_is_refused():
    with pytest.raises(ValueError, match="the text has width 1.*feature_widths.text=64"):
        CPSLHead({"text": 1, "audio": 4, "vision": 4}, 1)


# what is absent


def test_without_text_each_modality_is_one_token_of_all_its_steps(make_cpsl, make_gappy):
    head = make_cpsl()
    sequences = make_gappy(present=(False, True, True))
    features = head(sequences).features
    assert not features["text"].any()
    for name in ENCODED:
        for sample, values in enumerate(sequences[name].values):
            average = values[sequences[name].mask[sample]].mean(dim=0)
            expected, _ = head.encoders[name](average)  # the scaling is the identity before training
            torch.testing.assert_close(features[name][sample], expected, **EXACT)


def test_only_training_on_the_token_grid_moves_the_extremes(make_cpsl, make_gappy):
    """The steps behind s_a and s_v reach further than averages over tokens; the same range scales them."""
    head, sequences = make_cpsl().train(), make_gappy()
    head(sequences)
    for name in ENCODED:
        averaged = resample(sequences[name], token_grid(sequences["text"]))
        for extreme, found in (("low", "amin"), ("high", "amax")):
            expected = getattr(averaged.values[averaged.mask], found)(dim=0)
            torch.testing.assert_close(getattr(head.scaling[name], extreme), expected, **EXACT)
        assert head.scaling[name].batches == 1


def test_padding_changes_no_loss_and_no_extreme(make_cpsl, make_gappy):
    sequences = make_gappy()
    padded = {
        name: ModalitySequence(F.pad(s.values, (0, 0, 0, 3)), F.pad(s.mask, (0, 3)), s.present)
        for name, s in sequences.items()
    }
    heads = [make_cpsl(ame=False).train() for _ in range(2)]
    one, other = (head(given, LABELS) for head, given in zip(heads, (sequences, padded), strict=True))
    for name, loss in one.losses.items():
        torch.testing.assert_close(other.losses[name], loss, **EXACT)
    buffers = dict(heads[1].named_buffers())
    for name, value in heads[0].named_buffers():
        torch.testing.assert_close(buffers[name], value, **EXACT)


def test_the_learned_states_belong_to_the_modalities_they_are_made_for():
    tokens = MissingTokens(8, ENCODED).double()
    assert tokens.tokens.shape == (2, 8)
    states, there = random(3, 8), torch.tensor([True, False, True])
    for row, name in enumerate(ENCODED):
        filled = tokens(name, states, there)
        assert torch.equal(filled[1], tokens.tokens[row]) and torch.equal(filled[there], states[there])
    with pytest.raises(ValueError):
        tokens("text", states, there)


@pytest.mark.parametrize("absent", ENCODED)
def test_only_the_state_of_what_is_absent_is_read(absent, make_cpsl, make_sequences):
    head = make_cpsl()
    present = [name != absent for name in MODALITIES]
    unmoved = without_gradient(head, head(make_sequences(present=present)).logits.sum())
    assert "missing.tokens" not in unmoved
    moved = head.missing.tokens.grad.any(dim=1).tolist()
    assert moved == [name == absent for name in ENCODED]
    assert f"encoders.{absent}.mean.weight" in unmoved


# sizes, ownership and weights


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize(
    ("text", "audio", "vision", "hidden", "fusion"), [(768, 74, 47, 256, 512), (384, 64, 32, 16, 24)]
)
def test_each_part_has_the_size_its_equation_says(text, audio, vision, hidden, fusion, outputs):
    def linear(inputs: int, wide: int) -> int:
        return inputs * wide + wide

    with torch.device("meta"):
        widths = {"text": text, "audio": audio, "vision": vision}
        head = CPSLHead(widths, outputs, hidden_size=hidden, fusion_size=fusion)
    counts = Counter()
    for name, parameter in head.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    assert counts == {
        "encoders": sum(linear(width, hidden) + 2 * linear(hidden, hidden) for width in (audio, vision)),
        "missing": 2 * hidden,
        "fusion": linear(2 * hidden, fusion) + 2 * linear(hidden, fusion) + linear(fusion, text),
        "decoders": sum(linear(hidden, hidden) + linear(hidden, width) for width in (audio, vision)),
        "norm": 2 * text,
        "pooler": linear(text, text),
        "classifier": linear(text, outputs),
        "predictors": linear(text, outputs) + 2 * linear(hidden, outputs),
    }


def test_the_papers_widths_are_the_default():
    with torch.device("meta"):
        head = CPSLHead({"text": 768, "audio": 74, "vision": 47}, 1)
    assert head.encoders["audio"].mean.weight.shape == (256, 256)
    assert head.fusion.gate.weight.shape == (512, 512)
    assert sum(parameter.numel() for parameter in head.parameters()) == 1_971_837


def test_gradient_modulation_may_touch_the_gaussian_encoders_alone(make_cpsl):
    head = make_cpsl()
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    owned = {m: {names[id(value)] for value in values} for m, values in head.modality_parameters().items()}
    assert owned["text"] == set()
    for m in ENCODED:
        assert owned[m] == {name for name in names.values() if name.startswith(f"encoders.{m}.")}


def test_with_all_other_weights_zero_the_loss_is_the_task(tiny_text_config, make_batch):
    weights = dict.fromkeys(("recon", "unimodal", "div", "stat"), 0.0)
    config = MSAConfig(
        text_config=tiny_text_config,
        audio_channels=[16, 16],
        audio_width=16,
        face_channels=8,
        face_width=16,
        head="cpsl",
        head_kwargs={"hidden_size": 16, "fusion_size": 16},
        loss_weights=weights,
    )
    torch.manual_seed(0)
    model = MSAModel(config).train()
    output = model(**make_batch())
    assert set(output.losses) == {"task", *weights}
    assert torch.equal(output.loss, output.losses["task"])
    output.loss.backward()
    unused = {
        name.split(".")[0] for name, p in model.head.named_parameters() if p.grad is None or not p.grad.any()
    }
    assert unused >= {"decoders", "predictors"}


# half precision


def scaled(sequences: dict[str, ModalitySequence], factor: float) -> dict[str, ModalitySequence]:
    return {name: ModalitySequence(s.values * factor, s.mask, s.present) for name, s in sequences.items()}


def run(head, sequences, labels: Tensor, half: torch.dtype | None, scale: float = 1.0):
    """Output of a head under autocast to `half` and, by name, the gradients of `scale` times its losses."""
    head.zero_grad()
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        output = head(sequences, labels)
    (scale * sum(output.losses.values())).backward()
    gradients = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    return output, gradients


def assert_finite(head, output, gradients: dict[str, Tensor]) -> None:
    assert torch.isfinite(output.logits).all()
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32 and torch.isfinite(loss), name
    for name, value in (gradients | dict(head.named_buffers())).items():
        assert torch.isfinite(value).all(), name


EXTREMES = {
    "states a hundred times too large": {"factor": 100.0},
    "states near the largest that fp16 holds": {"factor": 1e4},
    "states of almost zero": {"factor": 1e-6},
    "one sample": {"batch": 1},
    "nothing at all": {"present": (False, False, False)},
    "no text": {"present": (False, True, True)},
    "no audio in the whole batch": {"present": (True, False, True)},
    "a modality in one sample only": {"present": [[True, True, True]] + [[True, True, False]] * 3},
}
every_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_task = pytest.mark.parametrize("outputs", [1, 4], ids=["regression", "classification"])


def labels_of(outputs: int, batch: int = 4) -> Tensor:
    return (torch.tensor([-3.0, 3.0, 3.0, -3.0]) if outputs == 1 else torch.tensor([0, 3, 3, 0]))[:batch]


@every_half
@every_task
@pytest.mark.parametrize("extreme", EXTREMES)
def test_losses_gradients_and_extremes_stay_finite(extreme, outputs, half, make_cpsl, make_gappy):
    given = {"factor": 1.0, "batch": 4, "present": (True, True, True)} | EXTREMES[extreme]
    head = make_cpsl(outputs).float().train()
    sequences = scaled(make_gappy(given["batch"], given["present"], dtype=torch.float32), given["factor"])
    # the error of the text's own prediction grows with its states: they need the small loss scale that a
    # GradScaler arrives at
    scale = 2.0**-16 if half == torch.float16 and given["factor"] > 1 else 1.0
    for _ in range(2):  # the batch that sets the extremes, and one after it
        assert_finite(head, *run(head, sequences, labels_of(outputs, given["batch"]), half, scale))


@every_half
def test_a_long_recording_of_large_states_does_not_overflow_in_its_average(half, make_cpsl):
    head = make_cpsl().float().train()
    sequences = {
        name: ModalitySequence.of(
            100 + random(2, 1000, width, seed=width).float(), torch.ones(2, 1000, dtype=torch.bool)
        )
        for name, width in (("text", 6), ("audio", 5), ("vision", 4))
    }
    # without text, one token averages a thousand steps
    sequences["text"] = sequences["text"].only(torch.zeros(2, dtype=torch.bool))
    assert_finite(head, *run(head, sequences, labels_of(1, 2), half))


@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@every_task
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_on_ordinary_inputs_half_precision_is_near_fp32(
    training, outputs, half, tolerance, make_cpsl, make_gappy
):
    head = make_cpsl(outputs, hidden_size=32, fusion_size=64, ame=not training).float().train()
    sequences = make_gappy(dtype=torch.float32)
    head(sequences)  # sets the extremes
    head.train(training)
    exact, exact_gradients = run(head, sequences, labels_of(outputs), None)
    rough, rough_gradients = run(head, sequences, labels_of(outputs), half)
    torch.testing.assert_close(rough.logits.float(), exact.logits, rtol=tolerance, atol=tolerance)
    for name, loss in exact.losses.items():
        assert rough.losses[name].dtype == torch.float32, name
        assert rough.losses[name].item() == pytest.approx(loss.item(), rel=tolerance), name
    one, other = (
        torch.cat([values[name].flatten() for name in exact_gradients])
        for values in (exact_gradients, rough_gradients)
    )
    assert (other - one).norm() < 2 * tolerance * one.norm()


def test_a_pooled_state_of_its_own_changes_no_state_and_no_gradient():
    torch.manual_seed(0)
    states = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(states)
    pooled, same = route_through(states.mean(dim=1), states)
    torch.testing.assert_close(same, states)
    (gradient, of_pooled) = torch.autograd.grad((same.square() * weights).sum(), (states, pooled))
    torch.testing.assert_close(gradient, 2 * weights * states)
    torch.testing.assert_close(of_pooled, gradient.sum(dim=1))  # where all tokens together are wanted
