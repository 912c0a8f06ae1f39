# SPDX-License-Identifier: Apache-2.0
"""The spatial term of BALM (3.9) computed again, one sample at a time, and compared with the form on weights.

The published code compares the last weights of head and probes. docs/methods/balm.md reads "direction" as
that of their gradients, or of the gradients by the states. With linear last layers the three are related.
The head is late fusion: test_contract.py checks for every head what this term needs of it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from msa_online import MSAConfig, MSAModel
from msa_online.layers.losses import task_loss
from msa_online.layers.modules import masked_mean
from msa_online.methods import HEADS, MODULATORS, HeadOutput
from msa_online.methods.base import BalancingHead
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAOutput
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 5, "vision": 4}  # those of the encoded batches
KAPPA = {"text": 0.5, "audio": 0.9, "vision": 0.6}
MIXED = [[True, True, True], [True, False, True], [False, True, True], [True, True, False], [True] * 3]
NO_AUDIO = [[True, False, True]] * 5

every_task = pytest.mark.parametrize("outputs", [1, 3])


class Case:
    """A model with probes in evaluation mode, in float64, and a batch for it."""

    def __init__(self, head: str, outputs: int, sequences, **settings) -> None:
        torch.manual_seed(0)
        classes = (
            {} if outputs == 1 else {"id2label": {number: f"class {number}" for number in range(outputs)}}
        )
        kwargs = {"hidden_size": 8} if head != "linear" else {}
        config = MSAConfig(feature_widths=WIDTHS, head=head, head_kwargs=kwargs, **classes)
        self.model = MSAModel(config).double().eval()
        assert config.num_labels == outputs
        self.sequences = {
            name: replace(sequence, values=sequence.values.clone().requires_grad_())
            for name, sequence in sequences.items()
        }  # as from an encoder that is trained
        generator = torch.Generator().manual_seed(1)
        count = len(sequences["text"].present)
        self.labels = (
            torch.randn(count, generator=generator, dtype=torch.float64)
            if outputs == 1
            else torch.randint(outputs, (count,), generator=generator)
        )
        self.modulator = MODULATORS["rebalance"](**{"spatial_weight": 1.0, **settings})
        with torch.no_grad():
            shown = self.model.decide(sequences)
        widths = {name: state.shape[-1] for name, state in shown.features.items()}
        self.modulator.attach(self.model, widths, shown.fused.shape[-1])
        self.model.double()
        self.modulator.kappa = dict(KAPPA)

    def ask(self) -> MSAOutput:
        return self.model.decide(self.sequences, self.labels)

    def spatial(self) -> Tensor:
        return self.modulator.extra_losses(self.ask(), self.labels)["balm"]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss.backward()
        named = self.model.named_parameters()
        return {name: value.grad.clone() for name, value in named if value.grad is not None}


def error_of(logits: Tensor, label: Tensor) -> Tensor:
    """Squared error of one sample's score, or cross-entropy of its classes, `(outputs,)`."""
    if len(logits) == 1:
        return (logits[0] - label) ** 2
    return torch.log(torch.exp(logits).sum()) - logits[label]


def cosine(one: Tensor, other: Tensor) -> float:
    """0 beside a vector of zeros, as the gradient by a probe's input is whose hidden units are all off."""
    dot, squares, other_squares = 0.0, 0.0, 0.0
    for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
        dot, squares, other_squares = dot + a * b, squares + a * a, other_squares + b * b
    return dot / math.sqrt(squares * other_squares) if squares and other_squares else 0.0


def cosines(case: Case) -> dict[str, list[float]]:
    """cos of what the task and what the probe want of z_m, for each sample that has m."""
    output = case.ask()
    found: dict[str, list[float]] = {name: [] for name in MODALITIES}
    for row, label in enumerate(case.labels):
        for name in MODALITIES:
            if output.present[name][row]:
                wanted = torch.autograd.grad(
                    error_of(output.logits[row], label), output.features[name], retain_graph=True
                )[0][row]
                state = output.features[name][row].detach().requires_grad_()
                hidden, _, last = case.model.probes[name]
                inner = torch.clamp(hidden.weight @ state + hidden.bias, min=0)
                missed = error_of(last.weight @ inner + last.bias, label)
                found[name].append(cosine(wanted, torch.autograd.grad(missed, state)[0]))
    return found


def expected_spatial(found: dict[str, list[float]], kappa: dict[str, float], form: str) -> float:
    total = 0.0
    for name, values in found.items():
        mean = sum(values) / len(values) if values else 0.0
        total += abs(kappa[name] * mean) if form == "abs" else abs(kappa[name]) - kappa[name] * mean
    return total / len(kappa)


@every_task
@pytest.mark.parametrize("form", ["cggm", "abs"])
@pytest.mark.parametrize("present", [MIXED, NO_AUDIO], ids=["mixed", "no audio"])
def test_the_spatial_term_is_what_one_sample_at_a_time_gives(outputs, form, present, make_gappy):
    case = Case("late_fusion", outputs, make_gappy(5, present), mod_form=form)
    found = cosines(case)
    assert max(abs(value) for values in found.values() for value in values) > 0.05
    expected = expected_spatial(found, KAPPA, form)
    assert_equation("3.9", "spatial term", case.spatial(), expected, atol=1e-12)
    logged = case.modulator.extra_losses(case.ask(), case.labels)
    for name, values in found.items():
        mean = sum(values) / max(len(values), 1)
        assert_equation("3.9", f"cosine of {name}", logged[f"cosine/{name}"].item(), mean, atol=1e-12)


@pytest.mark.parametrize("form", ["cggm", "abs"])
def test_coefficients_below_zero_turn_the_wanted_direction_round(form, make_gappy):
    """The printed coefficients can be that (`guard: none`)."""
    case = Case("late_fusion", 1, make_gappy(5), mod_form=form)
    case.modulator.kappa = {"text": -2.0, "audio": 5.0, "vision": -1.0}
    expected = expected_spatial(cosines(case), case.modulator.kappa, form)
    assert_equation("3.9", "spatial term with coefficients below zero", case.spatial(), expected, atol=1e-12)


def directions_of_probes(case: Case) -> dict[str, Tensor]:
    """Where the probes want each state, `(batch, width)`."""
    found = {}
    for name, state in case.ask().features.items():
        state = state.detach().requires_grad_()
        missed = sum(map(error_of, case.model.probes[name](state), case.labels))
        (found[name],) = torch.autograd.grad(missed, state)
    return found


def spatial_beside(case: Case, directions: dict[str, Tensor], form: str) -> float:
    """The term with the directions of the probes as they were."""
    output = case.ask()
    found = {}
    for name, direction in directions.items():
        missed = sum(map(error_of, output.logits, case.labels))
        (wanted,) = torch.autograd.grad(missed, output.features[name], retain_graph=True)
        pairs = zip(wanted, direction, output.present[name], strict=True)
        found[name] = [cosine(one, other) for one, other, there in pairs if there]
    return expected_spatial(found, KAPPA, form)


@every_task
@pytest.mark.parametrize("form", ["cggm", "abs"])
def test_its_gradient_is_that_of_finite_differences_and_reaches_no_probe(outputs, form, make_gappy):
    """The directions of the probes are held fixed."""
    case = Case("late_fusion", outputs, make_gappy(5, MIXED), mod_form=form)
    gradients = case.gradients(case.spatial())
    directions = directions_of_probes(case)
    assert not any(name.startswith("probes.") and value.any() for name, value in gradients.items())
    checked = []
    for name, parameter in case.model.named_parameters():
        gradient = gradients.get(name)
        if gradient is None or not gradient.abs().max() > 1e-7:
            continue
        place = gradient.abs().flatten().argmax()
        ends = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.view(-1)[place] += shift
            ends.append(spatial_beside(case, directions, form))
            with torch.no_grad():
                parameter.view(-1)[place] -= shift
        slope = (ends[0] - ends[1]) / 2e-6
        steepest = gradient.view(-1)[place]
        quantity = f"gradient of the spatial term by {name}"
        assert_equation("3.9", quantity, steepest, slope, rtol=1e-4, atol=1e-8)
        checked.append(name)
    owned = case.model.modality_parameters()
    names = {id(parameter): name for name, parameter in case.model.named_parameters()}
    for modality in MODALITIES:
        assert {names[id(value)] for value in owned[modality]} & set(checked), modality
    assert "head.classifier.weight" in checked or outputs == 1


def test_probes_are_trained_by_their_own_errors_and_nothing_else_is(make_gappy):
    """(3.5): on the samples that have the modality, whatever else the model learns."""
    case = Case("late_fusion", 1, make_gappy(5, MIXED))
    output = case.ask()
    probe = case.modulator.extra_losses(output, case.labels)["probe"]
    expected = 0.0
    for name in MODALITIES:
        rows = [row for row in range(5) if output.present[name][row]]
        errors = [error_of(output.probe_logits[name][row], case.labels[row]).item() for row in rows]
        expected += sum(errors) / len(errors)
    assert_equation("3.5", "loss of the probes", probe, expected, rtol=1e-6, atol=1e-12)
    assert all(name.startswith("probes.") for name in case.gradients(probe))
    everyone = {name for name, _ in case.model.named_parameters() if name.startswith("probes.")}
    assert case.gradients(case.modulator.extra_losses(case.ask(), case.labels)["probe"]).keys() == everyone


def test_the_coefficients_are_those_of_the_step_before(make_gappy):
    """(3.10): none in the first step, where L_mod is 0."""
    case = Case("late_fusion", 1, make_gappy(5), spatial_weight=0.4)
    weighted = case.spatial().item()
    expected = 0.4 * expected_spatial(cosines(case), KAPPA, "cggm")
    assert_equation("3.10", "weighted spatial term", weighted, expected, rtol=1e-6, atol=1e-12)
    case.modulator.observe(case.ask(), case.labels)  # what this step will bring counts in the next
    assert case.spatial().item() == weighted
    case.modulator.kappa = None
    assert case.spatial().item() == 0.0


@pytest.mark.parametrize("why", ["off", "nothing fused"])
def test_there_is_no_spatial_term_where_it_is_off_or_nothing_is_fused_yet(why, make_gappy, monkeypatch):
    monkeypatch.setitem(HEADS, "linear", LinearHead)
    case = Case("linear", 1, make_gappy(5), **({"spatial": "off"} if why == "off" else {}))
    assert LinearHead.fused_valid and Case("linear", 1, make_gappy(5)).spatial().item() != 0.0
    monkeypatch.setattr(LinearHead, "fused_valid", why == "off")
    spatial = case.spatial()
    assert spatial.item() == 0.0 and not spatial.requires_grad


def test_following_the_spatial_term_turns_a_state_to_where_its_probe_wants_it(make_gappy):
    case = Case("late_fusion", 1, make_gappy(5))
    owned = [value for values in case.model.modality_parameters().values() for value in values]
    optimizer = torch.optim.SGD([*owned, *case.model.head.classifier.parameters()], lr=0.3)
    before = cosines(case)
    for _ in range(15):
        optimizer.zero_grad()
        case.spatial().backward()
        optimizer.step()
    after = cosines(case)
    assert sum(map(sum, after.values())) > sum(map(sum, before.values())) + 0.5


# beside the published code's form


class LinearHead(BalancingHead):
    """s = W (z_text + z_audio + z_vision) + b, with z_m the mean of a projection."""

    fused_valid = True

    def __init__(self, widths, num_labels) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(width, 8) for name, width in widths.items()})
        self.classifier = nn.Linear(8, num_labels)

    def forward(self, sequences, labels=None, teacher=None) -> HeadOutput:
        features = {name: self.projections[name](masked_mean(each)) for name, each in sequences.items()}
        fused = sum(features.values())
        output = HeadOutput(self.classifier(fused), {}, features, fused, fused_valid=self.fused_valid)
        if labels is not None:
            output.losses = {"task": task_loss(output.logits, labels)}
        return output


def linear_case(outputs: int, sequences, monkeypatch, form: str = "abs") -> Case:
    """Head and probes are linear."""
    monkeypatch.setitem(HEADS, "linear", LinearHead)
    case = Case("linear", outputs, sequences, mod_form=form)
    torch.manual_seed(2)
    case.model.probes.update({name: nn.Linear(8, outputs).double() for name in MODALITIES})
    return case


def weight_cosine(case: Case, name: str) -> float:
    return cosine(case.model.head.classifier.weight.detach(), case.model.probes[name].weight.detach())


def test_for_linear_layers_the_abs_form_is_that_of_the_published_code(make_gappy, monkeypatch):
    """1/|M| sum |kappa_m cos(W_m, W)|: where probe and head err to the same side, and of one score."""
    case = linear_case(1, make_gappy(5), monkeypatch)
    case.labels = torch.linspace(20, 30, 5, dtype=torch.float64)  # all predictions are too low
    published = sum(abs(KAPPA[name] * weight_cosine(case, name)) for name in MODALITIES) / 3
    assert_equation("3.9", "spatial term of linear layers, abs form", case.spatial(), published, atol=1e-12)
    cggm = linear_case(1, make_gappy(5), monkeypatch, "cggm")
    cggm.labels = case.labels
    ancestor = sum(KAPPA[name] * (1 - weight_cosine(cggm, name)) for name in MODALITIES) / 3
    assert_equation("3.9", "spatial term of linear layers, cggm form", cggm.spatial(), ancestor, atol=1e-12)


def test_for_linear_layers_the_cosine_is_that_of_the_weights_times_that_of_their_gradients(
    make_gappy, monkeypatch
):
    """The sample's weight gradients on the same state, (p - y) z^T, tell on which side each errs."""
    case = linear_case(1, make_gappy(8), monkeypatch)
    output = case.ask()
    total, signs = 0.0, set()
    for name in MODALITIES:
        probe, values = case.model.probes[name], []
        for row, label in enumerate(case.labels):
            state = output.features[name][row].detach()
            of_probe = torch.autograd.grad(error_of(probe(state), label), probe.weight)[0]
            residual = 2 * (output.logits[row].detach() - label)
            of_head = torch.outer(residual, state)  # G_pred, on the state of m alone
            sides = cosine(of_head, of_probe)
            signs.add(round(sides, 9))
            values.append(sides * weight_cosine(case, name))
        total += abs(KAPPA[name] * sum(values) / len(values))
    assert signs == {1.0, -1.0}
    assert_equation("3.9", "spatial term by gradients of the weights", case.spatial(), total / 3, atol=1e-12)


def test_of_classes_under_orthonormal_weights_the_cosine_is_that_of_the_weight_gradients(
    make_gappy, monkeypatch
):
    """Head and probe then share a hidden basis, and bases are all that the two cosines differ in."""
    case = linear_case(3, make_gappy(6), monkeypatch)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q.T  # rows are orthonormal
    with torch.no_grad():
        for layer in (case.model.head.classifier, *case.model.probes.values()):
            layer.weight.copy_(basis)
    output = case.ask()
    total = 0.0
    for name in MODALITIES:
        probe, values = case.model.probes[name], []
        for row, label in enumerate(case.labels):
            state = output.features[name][row].detach()
            of_probe = torch.autograd.grad(error_of(probe(state), label), probe.weight)[0]
            residual = output.logits[row].detach().softmax(dim=-1)
            residual[label] -= 1
            values.append(cosine(torch.outer(residual, state), of_probe))
        total += abs(KAPPA[name] * sum(values) / len(values))
    assert_equation("3.9", "spatial term of classes", case.spatial(), total / 3, atol=1e-12)
    with torch.no_grad():  # in a basis of its own, the probe's weight gradients no longer compare
        turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
        case.model.probes["text"].weight.copy_(basis @ turn)
    assert case.spatial().item() != pytest.approx(total / 3, rel=1e-2)


@every_task
def test_the_closed_form_of_the_weight_gradient_is_that_of_the_task_loss(outputs, make_gappy):
    """Choice B7 on the last layer of late fusion: (1/B) sum (p - y) h^T; for a score, twice the residual."""
    case = Case("late_fusion", outputs, make_gappy(5, MIXED))
    output = case.ask()
    (found,) = torch.autograd.grad(output.losses["task"], case.model.head.classifier.weight)
    expected = torch.zeros_like(found)
    for row, label in enumerate(case.labels):
        logits = output.logits[row].detach()
        residual = 2 * (logits - label) if outputs == 1 else logits.softmax(dim=-1)
        if outputs > 1:
            residual[label] -= 1
        expected += torch.outer(residual, output.fused[row].detach()) / 5
    torch.testing.assert_close(found, expected)
