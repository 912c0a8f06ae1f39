# SPDX-License-Identifier: Apache-2.0
"""The PaSE head (docs/methods/pase.md): classes of scores, calibration, alignment, fusion."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.methods import HEADS
from msa_online.methods.pase.head import EntropyGate, PaSEHead, score_bins
from msa_online.methods.pase.transport import transport_plan
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 5, "vision": 4}
SCORES = torch.tensor([-2.2, -1.0, 0.1, 1.2, 2.4, 0.4, -0.6, 1.9])
GAPS = torch.ones(8, 3, dtype=torch.bool)
GAPS[0, 1] = GAPS[3, 1] = GAPS[4, 2] = False
GAPS[6, 0] = GAPS[6, 1] = False
GAPS[7] = False
every_gate = pytest.mark.parametrize("gate", ["entropy", "learned", "uniform"])


def make_head(outputs: int = 1, *, steps: int = 0, sequences=None, labels=SCORES, **settings) -> PaSEHead:
    """A small head in float64 that drops nothing, whose prototypes have seen some steps of training."""
    torch.manual_seed(0)
    head = PaSEHead(WIDTHS, outputs, **{"hidden_size": 8, "depth": 1, "dropout": 0.0, **settings}).double()
    head.train()
    for _ in range(steps):
        head(sequences, labels)
        head.end_step(taken=True)
    return head


@pytest.fixture
def gappy(make_sequences):
    return make_sequences(8, GAPS)


@pytest.mark.parametrize(
    ("bins", "scores", "classes"),
    [
        (5, [-3, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 1.51, 2.5, 3], [0, 0, 0, 2, 2, 2, 4, 4, 4, 4]),
        (7, [-3, -2.5, -0.5, 0.5, 0.51, 2.5, 3], [0, 1, 3, 3, 4, 5, 6]),
        (3, [-3, -0.01, 0, 0.01, 3], [0, 0, 1, 2, 2]),
        (2, [-3, -0.01, 0, 3], [0, 0, 1, 1]),
    ],
)
def test_scores_fall_into_the_bins_that_acc_5_and_acc_7_have(bins, scores, classes):
    for dtype in (torch.float32, torch.float64):
        found = score_bins(torch.tensor(scores, dtype=dtype), bins)
        assert found.dtype == torch.int64 and found.tolist() == classes


@pytest.mark.parametrize("bins", [2, 3, 5, 7])
def test_a_score_beyond_the_range_has_a_class_too(bins):
    assert score_bins(torch.tensor([-9.0, 9.0]), bins).tolist() == [0, bins - 1]


@pytest.mark.parametrize(
    ("widths", "count"),
    [
        ({"text": 1024, "audio": 512, "vision": 1024}, 5_195_829),
        ({"text": 768, "audio": 74, "vision": 35}, 4_764_981),
    ],
)
def test_it_has_the_size_of_the_published_network(widths, count):
    head = PaSEHead(widths, 1, hidden_size=256, depth=4, gate="learned")
    assert sum(value.numel() for value in head.parameters()) == count


def normalised(weights: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, weights, 0.0).sum(dim=0) / present.sum(dim=0).clamp(min=1)


@every_gate
@pytest.mark.parametrize("steps", [0, 2])
def test_weights_of_the_modalities_a_sample_has_are_one_on_average(gate, steps, gappy):
    head = make_head(gate=gate, steps=steps, sequences=gappy)
    present = torch.stack([sequence.present for sequence in gappy.values()])
    weights = head._weights(torch.stack([head._read(*pair) for pair in gappy.items()]), present)
    assert not weights[~present].any() and (weights[present] > 0).all()
    expected = present.any(dim=0).to(weights)
    torch.testing.assert_close(normalised(weights, present), expected, atol=1e-12, rtol=0)
    alone = present.sum(dim=0) == 1
    assert alone.any() and torch.allclose(weights[present & alone], weights.new_ones(()))
    if gate == "entropy" and steps:
        assert weights[present & (present.sum(dim=0) > 1)].std() > 0.01


def test_weights_are_those_of_the_entropies(gappy):
    """(2.5) by sample and modality, over classes that the modality knows."""
    head = make_head(steps=2, sequences=gappy)
    head.prototypes.means[1, 3] = 0
    features = {name: head._read(name, sequence) for name, sequence in gappy.items()}
    present = torch.stack([sequence.present for sequence in gappy.values()])
    found = head._weights(torch.stack(list(features.values())), present)
    for sample in range(8):
        favour = {}
        for row, name in enumerate(MODALITIES):
            if not present[row, sample]:
                continue
            known = head.prototypes.known[row].nonzero().flatten().tolist()
            means = head.prototypes.means[row, known]
            logits = F.cosine_similarity(features[name][sample].unsqueeze(0), means) / 0.1
            chances = logits.softmax(dim=0).tolist()
            entropy = -sum(chance * math.log(chance) for chance in chances if chance > 0)
            favour[row] = math.exp(-entropy / math.log(len(known)))
        for row, value in favour.items():
            expected = len(favour) * value / sum(favour.values())
            quantity = f"weight of {MODALITIES[row]} in sample {sample}"
            assert_equation("2.5", quantity, found[row, sample], expected, rtol=1e-6, atol=1e-12)


def test_modalities_that_are_as_sure_as_each_other_weigh_the_same(make_sequences):
    head = make_head()
    with torch.no_grad():
        head.prototypes.means.copy_(torch.randn(5, 8).expand(3, -1, -1))
        states = torch.randn(6, 8, dtype=torch.float64).expand(3, -1, -1)
        weights = head._weights(states, torch.ones(3, 6, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.ones(3, 6, dtype=torch.float64), atol=1e-12, rtol=0)


def plain_concatenation(head: PaSEHead, sequences) -> Tensor:
    joint = torch.cat([head._read(name, sequence) for name, sequence in sequences.items()], dim=-1)
    return head.classifier(joint + head.fusion(joint))


def test_without_a_gate_the_fusion_is_plain_concatenation(gappy):
    head = make_head(gate="uniform", steps=2, sequences=gappy)
    torch.testing.assert_close(head(gappy).logits, plain_concatenation(head, gappy), atol=1e-12, rtol=0)


def test_before_any_prototype_is_known_the_fusion_is_plain_concatenation(gappy):
    head = make_head()
    torch.testing.assert_close(head(gappy).logits, plain_concatenation(head, gappy), atol=1e-12, rtol=0)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_a_prediction_depends_on_no_label(gate, training, gappy):
    """The published gate looks at the label in training."""
    head = make_head(gate=gate, steps=2, sequences=gappy).train(training)
    plain = head(gappy)
    for labels in (SCORES, -SCORES, torch.zeros(8)):
        output = head(gappy, labels)
        assert torch.equal(output.logits, plain.logits) and torch.equal(output.fused, plain.fused)


def test_training_moves_prototypes_and_looking_does_not(gappy):
    head = make_head(steps=1, sequences=gappy)
    before = head.prototypes.means.clone()
    head.eval()(gappy, SCORES)
    head.end_step(taken=True)
    head.train()(gappy)  # without labels nobody knows whose class they are
    head.end_step(taken=True)
    head(gappy, -SCORES)
    head.end_step(taken=False)
    assert torch.equal(head.prototypes.means, before)
    head(gappy, -SCORES)
    head.end_step(taken=True)
    assert not torch.equal(head.prototypes.means, before)


def test_prototypes_are_the_mean_states_of_the_samples_that_have_the_modality(gappy):
    head = make_head(steps=1, sequences=gappy)
    features = head(gappy).features
    classes = score_bins(SCORES, 5)
    for row, name in enumerate(MODALITIES):
        for number in range(5):
            chosen = (classes == number) & gappy[name].present
            assert head.prototypes.known[row, number] == chosen.any()
            if chosen.any():
                expected = features[name][chosen].mean(dim=0).float()
                torch.testing.assert_close(head.prototypes.means[row, number].float(), expected)


def align_naively(prototypes: Tensor, known: Tensor, epsilon: float = 0.05) -> dict[str, float]:
    """(2.3, 2.4) pair by pair, on the classes that both know."""
    found = {"cal/match": 0.0, "cal/reg": 0.0, "cal/omega": 0.0}
    total = 0.0
    for one, other in itertools.combinations(range(3), 2):
        both = known[one] & known[other]
        count = int(both.sum())
        first, second = (F.normalize(prototypes[row][both], dim=-1) for row in (one, other))
        cost = (first[:, None] - second[None]).square().sum(dim=-1)
        mass = torch.full((count,), 1 / count, dtype=cost.dtype)
        there = transport_plan(cost, mass, mass, epsilon=epsilon)
        back = transport_plan(cost.T, mass, mass, epsilon=epsilon)
        identity = torch.eye(count)
        match = 0.5 * ((there * cost).sum() + (back * cost.T).sum()).item()
        asymmetry = (there - back.T).square().sum().item()
        astray = sum((count * plan - identity).square().sum().item() for plan in (there, back)) / 2
        total += match + 0.1 * asymmetry + 0.05 * astray
        for name, value in (("match", match), ("reg", asymmetry), ("omega", astray)):
            found[f"cal/{name}"] += value / 3
    return found | {"cal": total}


def test_the_alignment_is_that_of_every_pair_both_ways(gappy):
    head = make_head(steps=1, sequences=gappy)
    head.prototypes.means[1, 3] = 0  # in one modality alone; nor is it in this batch
    chosen = torch.tensor([0, 2, 4])
    batch = {name: type(s)(s.values[chosen], s.mask[chosen], s.present[chosen]) for name, s in gappy.items()}
    output = head(batch, SCORES[chosen])
    own = F.one_hot(score_bins(SCORES[chosen], 5), 5).bool()
    present = torch.stack([sequence.present for sequence in batch.values()])
    states = torch.stack(list(output.features.values()))
    seen = head.prototypes.with_batch(states, own & present.unsqueeze(-1))
    assert not seen.known[1, 3] and seen.known[0, 3]
    expected = align_naively(seen.values.detach(), seen.known)
    for name in ("cal/match", "cal/reg", "cal/omega"):
        assert_equation("2.4", name, output.diagnostics[name], expected[name], rtol=1e-5, atol=1e-9)
    assert_equation("2.4", "loss cal", output.losses["cal"], expected["cal"], rtol=1e-5, atol=1e-12)
    pairs = [value.item() for name, value in output.diagnostics.items() if name.startswith("transport/")]
    assert sum(pairs) == pytest.approx(expected["cal"], rel=1e-5)


def test_aligned_prototypes_cost_nothing():
    head = make_head()
    with torch.no_grad():
        head.prototypes.means.copy_(torch.eye(8)[:5].expand(3, -1, -1))
        states = torch.zeros(3, 1, 8, dtype=torch.float64)
        nobody = torch.zeros(3, 1, 5, dtype=torch.bool)
        found = head._align(head.prototypes.with_batch(states, nobody))
    for name, value in found.items():
        assert value.item() == pytest.approx(0, abs=1e-8), name


def encoder_gradient(head: PaSEHead, sequences, term: str) -> Tensor | None:
    head.zero_grad()
    loss = head(sequences, SCORES).losses[term]
    if not loss.requires_grad:
        return None
    loss.backward()
    return head.projections["audio"].weight.grad


def test_ema_lets_a_fiftieth_of_the_alignment_through_and_none_nothing(gappy):
    found = {
        how: encoder_gradient(make_head(steps=2, sequences=gappy, cal_gradient=how), gappy, "cal")
        for how in ("straight_through", "ema", "none")
    }
    assert found["none"] is None
    assert found["straight_through"].abs().max() > 1e-6
    torch.testing.assert_close(found["ema"], 0.02 * found["straight_through"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("term", PaSEHead.loss_names)
def test_every_loss_reaches_the_encoders(term, gappy):
    assert encoder_gradient(make_head(steps=2, sequences=gappy), gappy, term).any()


def test_the_gradient_of_the_alignment_is_that_of_its_value(gappy):
    """Against finite differences, under "ema", where nothing is made to pass."""
    head = make_head(steps=2, sequences=gappy, cal_gradient="ema", momentum=0.3, epsilon=0.5)
    gradient = encoder_gradient(head, gappy, "cal").clone()
    weight = head.projections["audio"].weight
    place = divmod(gradient.abs().argmax().item(), gradient.shape[1])
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            weight[place] += shift
            values.append(head(gappy, SCORES).losses["cal"].item())
            weight[place] -= shift
    assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


def test_the_unimodal_loss_counts_the_samples_that_have_the_modality(gappy):
    head = make_head()
    output = head(gappy, SCORES)
    means = []
    for name in MODALITIES:
        errors = [
            (output.modality_logits[name][n, 0] - SCORES[n]).square().item()
            for n in range(8)
            if gappy[name].present[n]
        ]
        means.append(sum(errors) / len(errors))
    assert output.losses["unimodal"].item() == pytest.approx(sum(means) / 3)


def check_finite(head: nn.Module, sequences, labels: Tensor) -> None:
    for _ in range(3):
        head.zero_grad()
        output = head(sequences, labels)
        sum(output.losses.values()).backward()
        head.end_step(taken=True)
        for name, value in (output.losses | output.diagnostics).items():
            assert torch.isfinite(value), name
        for name, value in head.named_parameters():
            assert value.grad is None or torch.isfinite(value.grad).all(), name
        assert torch.isfinite(head.prototypes.means).all()


@every_gate
@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=3)))
def test_a_batch_without_a_modality_stays_finite(gate, present, make_sequences):
    """From the first batch on, so that nothing of that modality was ever seen."""
    check_finite(make_head(gate=gate), make_sequences(8, present), SCORES)


@every_gate
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_of_one_class_stays_finite(gate, outputs, batch, make_sequences):
    labels = torch.full((batch,), 1.2) if outputs == 1 else torch.full((batch,), 3)
    check_finite(make_head(outputs, gate=gate), make_sequences(batch, GAPS[:batch]), labels)


@pytest.mark.parametrize("cal_gradient", ["straight_through", "ema", "none"])
def test_a_class_that_never_occurs_takes_no_part(cal_gradient, gappy):
    labels = torch.tensor([0, 1, 3, 3, 0, 1, 1, 0])
    head = make_head(4, cal_gradient=cal_gradient)
    check_finite(head, gappy, labels)
    assert not head.prototypes.known[:, 2].any() and not head.prototypes.means[:, 2].any()
    assert head.prototypes.known[:, [0, 1, 3]].all()


def test_a_modality_that_was_never_seen_in_training_can_be_predicted_from(make_sequences):
    head = make_head()
    check_finite(head, make_sequences(8, (True, True, False)), SCORES)
    head.eval()
    for present in ((True, True, True), (False, False, True)):
        assert torch.isfinite(head(make_sequences(8, present)).logits).all()


@every_gate
def test_gradients_of_gradients_are_finite_where_modalities_are_absent(gate, gappy):
    """A modulator may compare the gradients by the features and train on what it finds."""
    head = make_head(gate=gate, steps=2, sequences=gappy)
    output = head(gappy, SCORES)
    wanted = torch.autograd.grad(output.losses["task"], output.features.values(), create_graph=True)
    sum(gradient.square().sum() for gradient in wanted).backward()
    for name, value in head.named_parameters():
        assert value.grad is None or torch.isfinite(value.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_losses_are_those_of_fp32(dtype, make_sequences):
    """Cosines over a temperature of 0.1, sums over a class and transport would not bear half precision."""
    sequences = make_sequences(8, GAPS, dtype=torch.float32)
    head = make_head().float()
    for _ in range(2):
        head(sequences, SCORES)
        head.end_step(taken=True)
    exact = head(sequences, SCORES)
    with torch.autocast("cpu", dtype=dtype):
        half = head(sequences, SCORES)
        sum(half.losses.values()).backward()
    for name, value in half.losses.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(exact.losses[name].item(), rel=0.05, abs=0.02), name
    assert half.logits.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    head.end_step(taken=True)
    assert head.prototypes.means.dtype == torch.float32
    # the states alone are rounded: from them on everything is as exact as if they had come in fp32
    states = torch.stack([half.features[name] for name in MODALITIES]).detach()
    present = torch.stack([sequence.present for sequence in sequences.values()])
    with torch.autocast("cpu", dtype=dtype):
        inside = head._weights(states, present)
    torch.testing.assert_close(inside, head._weights(states.float(), present), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gate", ["entropy", "learned", "uniform"])
def test_a_head_in_half_precision_predicts_nearly_the_same(gappy, gate):
    """A model may be saved, and is then loaded, in bf16."""
    head = make_head(steps=2, sequences=gappy, gate=gate).eval()
    with torch.no_grad():
        whole = head(gappy).logits
        half = head.bfloat16()(
            {name: replace(sequence, values=sequence.values.bfloat16()) for name, sequence in gappy.items()}
        )
    torch.testing.assert_close(half.logits.double(), whole, atol=0.05, rtol=0.05)


def test_a_modality_without_any_prototype_is_favoured_least():
    """Not less than one that is as unsure as can be: exp(-1)."""
    similarity = torch.randn(3, 4, 5)
    favour = EntropyGate()(similarity, torch.tensor([True, False, True]).unsqueeze(1).expand(3, 5), 0.1)
    torch.testing.assert_close(favour[1], torch.full((4,), math.exp(-1)))
    assert (favour >= math.exp(-1) - 1e-6).all() and (favour <= 1).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bins": 4}, "bins=4"),
        ({"gate": "x"}, "gate='x'"),
        ({"cal_gradient": "batch"}, "cal_gradient='batch'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": math.nan}, "momentum=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"symmetry": -1.0}, "symmetry=-1.0"),
        ({"depth": 0}, "depth=0"),
        ({"heads": 0}, "heads=0"),
        ({"regression_loss": "huber"}, "regression_loss='huber' must be one of mse, l1"),
        ({"hidden_size": 9}, "hidden_size=9 is not a multiple of heads=2"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_naming_it(settings, named):
    with pytest.raises(ValueError, match=named):
        HEADS["pase"](WIDTHS, 1, **settings)
