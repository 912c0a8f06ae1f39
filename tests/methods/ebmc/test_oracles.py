# SPDX-License-Identifier: Apache-2.0
"""EBMC implemented again from docs/methods/ebmc.md: one sample, one modality and one time step at a time.

Nothing here is batched, padded or masked: what is absent is left out. Forward, every loss and the gradient of
every parameter have to agree with the head's; gradients of energies are found by differentiating twice.
"""

import math
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from msa_online.methods.ebmc import READINGS, dependence_loss, disentanglement_loss, invariance_loss
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

FACTORS = {  # all different and none 1, so that one left out or put in the wrong place shows
    "temperature": 0.3,
    "decorrelation": 0.4,
    "private_task": 0.7,
    "energy_norm": 0.5,
    "energy_loss": 1.5,
    "energy_uncertainty": 0.8,
    "energy_gradient": 0.2,
    "trust_floor": 0.15,
    "distillation_temperature": 2.0,
}
SETTINGS = {
    "paper": {},
    "reference": {
        "cce": "shared",
        "uncertainty": "disagreement",
        "learned_scalars": True,
        "missing_tokens": True,
    },
    "nothing filled": {"cce": "shared", "enhanced": "off"},
    "tokens, nothing filled": {
        "enhanced": "off",
        "missing_tokens": True,
        "uncertainty": "disagreement",
    },
    "replaced": {"enhanced": "replace", "readings": ["private_independent", "gap_one_sided"]},
    "every other reading": {
        "enhanced": "residual",
        "teacher": "state",
        "energy_step": 0.7,
        "missing_tokens": True,
        "readings": list(READINGS),
    },
}
PRESENT = {
    "complete": [[True, True, True]] * 5,
    "mixed": [
        [True, True, True],
        [False, True, True],
        [True, False, False],
        [False, False, False],
        [True, True, False],
    ],
    "no audio": [[True, False, True]] * 5,
}
LOSSES = {"task": "1.16", "unimodal": "1.16", "msd": "1.4", "cce": "1.6", "emc": "1.9"}
"""Number of the equation of each loss; that of `imtd` depends on the task."""
HEADS = 2
DEPTH = 2


def mean(values: list[Tensor]) -> Tensor:
    """Mean of scalars; zero of none."""
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.norm() * other.norm())


class Oracle:
    """What the equations say of a batch, from a head's weights.

    Every table below is a list over samples of dicts over modalities.
    """

    def __init__(self, head, stage: str, outputs: int, settings: dict, sequences: dict) -> None:
        self.weights = dict(head.named_parameters())
        self.outputs, self.settings = outputs, settings
        self.balancing = stage == "balance"
        self.tokens = settings.get("missing_tokens", False)
        self.readings = settings.get("readings", ())
        first = sequences["text"]
        self.batch = range(len(first.present))
        self.present = [{m: bool(sequences[m].present[i]) for m in MODALITIES} for i in self.batch]
        steps = [{m: self.observed(sequences[m], i) for m in MODALITIES} for i in self.batch]
        self.z = [{m: self.read(m, row[m]) for m in MODALITIES} for row in steps]
        self.shared = [{m: self.part("shared", m, row[m]) for m in MODALITIES} for row in self.z]
        self.private = [{m: self.part("private", m, row[m]) for m in MODALITIES} for row in self.z]
        self.rebuilt = [{m: self.rebuild(m, i) for m in MODALITIES} for i in self.batch]
        self.predicted = [{m: self.linear(f"predictors.{m}", row[m]) for m in MODALITIES} for row in self.z]
        self.entering = [{m: self.enter(m, i) for m in MODALITIES} for i in self.batch]
        self.logits = [self.fused(row) for row in self.entering]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def perceptron(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.2", F.relu(self.linear(f"{name}.0", x)))

    def scalar(self, name: str, bounds: tuple[float, float], otherwise: float) -> Tensor:
        learned = self.weights.get(f"{name}.value")
        return torch.tensor(otherwise, dtype=torch.float64) if learned is None else learned.clamp(*bounds)

    @staticmethod
    def observed(sequence, sample: int) -> list[Tensor]:
        return [
            value for value, seen in zip(sequence.values[sample], sequence.mask[sample], strict=True) if seen
        ]

    def read(self, m: str, steps: list[Tensor]) -> Tensor:
        """z_m: projection, expert stacks, routing, mean over time ("Reading a modality", E22)."""
        projected = [self.linear(f"projections.{m}", step) for step in steps]
        if not projected:
            if not self.tokens:
                return torch.zeros(self.weights["projections.text.bias"].shape).double()
            projected = [self.weights["missing.tokens"][MODALITIES.index(m)]]
        own = MODALITIES.index(m)
        if not self.balancing:
            return torch.stack(self.stack(own, projected)).mean(dim=0)
        passed = [self.stack(number, projected) for number in range(3)]
        routed = []
        for step, state in enumerate(projected):
            weights = self.perceptron(f"routers.{m}", state)
            routed.append(sum((weights[k] + (k == own)) * passed[k][step] for k in range(3)))
        return torch.stack(routed).mean(dim=0)

    def stack(self, number: int, steps: list[Tensor]) -> list[Tensor]:
        """One expert stack over the observed steps of one sample."""
        for layer in range(DEPTH):

            def through(part: str, x: Tensor, layer: int = layer) -> Tensor:
                name = f"stacks.layers.{layer}.{part}"
                return x @ self.weights[f"{name}.weight"][number] + self.weights[f"{name}.bias"][number, 0]

            pieces = [(*through("query_key", step).chunk(2), through("value", step)) for step in steps]
            after = []
            for step, (query, _, _) in zip(steps, pieces, strict=True):
                attended = []
                for head in range(HEADS):
                    width = len(query) // HEADS
                    cut = slice(head * width, (head + 1) * width)
                    scores = [torch.exp(query[cut] @ key[cut] / math.sqrt(width)) for _, key, _ in pieces]
                    weighted = [s * value[cut] for s, (_, _, value) in zip(scores, pieces, strict=True)]
                    attended.append(sum(weighted) / sum(scores))
                u = torch.cat(attended)
                after.append(step + u + through("narrow", F.gelu(through("widen", u))))
            steps = after
        return steps

    def part(self, which: str, m: str, z: Tensor) -> Tensor:
        raw = self.perceptron(f"{which}.{m}", z)
        normal = (raw - raw.mean()) / torch.sqrt(raw.var(unbiased=False) + 1e-5)
        return normal * self.weights[f"norms.{m}.weight"] + self.weights[f"norms.{m}.bias"]

    def rebuild(self, m: str, i: int) -> Tensor:
        """z~_m (1.5): what is absent enters as zeros, or as its token makes it."""

        def known(parts: list[dict[str, Tensor]], name: str) -> Tensor:
            there = self.present[i][name] or self.tokens
            return parts[i][name] if there else torch.zeros_like(parts[i][name])

        if self.settings.get("cce") == "shared":
            lender = "audio" if m == "text" else "text"
            inputs = [known(self.shared, lender), known(self.private, m)]
            return self.perceptron("generators", torch.cat(inputs))
        others = [name for name in MODALITIES if name != m]
        inputs = [known(self.shared, m)]
        inputs += [known(self.shared, name) for name in others]
        inputs += [known(self.private, name) for name in others]
        return self.perceptron(f"generators.{m}", torch.cat(inputs))

    def enter(self, m: str, i: int) -> Tensor:
        """What enters the fusion (E7), after a step down the energy (1.19)."""
        z, rebuilt, there = self.z[i][m], self.rebuilt[i][m], self.present[i][m]
        if there and (size := self.settings.get("energy_step")):
            (slope,) = torch.autograd.grad(self.energy(m, i, z, None), z, create_graph=True)
            z = z - size * slope
        match self.settings.get("enhanced", "fill"):
            case "fill":
                return z if there else rebuilt
            case "replace":
                return rebuilt
            case "residual":
                return z + rebuilt if there else rebuilt
            case "off":
                return z

    def fused(self, states: dict[str, Tensor]) -> Tensor:
        joint = torch.cat([states[m] for m in MODALITIES])
        hidden = joint + F.relu(self.linear("fusion.0", joint))
        return self.scalar("gain", (0.0, math.inf), 1.0) * self.linear("classifier", hidden)

    def task(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.outputs == 1:
            return (logits[0] - label) ** 2
        return -torch.log(torch.exp(logits[label]) / torch.exp(logits).sum())

    def with_modality(self, m: str) -> list[int]:
        return [i for i in self.batch if self.present[i][m]]

    def losses(self, labels: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """All losses of the stage, unweighted (1.16)."""
        alone = sum(
            mean([self.alone(self.predicted[i][m], labels[i]) for i in self.with_modality(m)])
            for m in MODALITIES
        )
        common = {"msd": self.msd(labels), "cce": self.cce(labels)}
        if not self.balancing:
            return {"task": alone, **common}
        return {
            "task": mean([self.task(self.logits[i], labels[i]) for i in self.batch]),
            "unimodal": alone,
            **common,
            "emc": self.emc(labels),
            "imtd": self.imtd(teacher, labels),
        }

    def alone(self, predicted: Tensor, label: Tensor) -> Tensor:
        """l(s_m, y), and the Gaussian negative log-likelihood of 1.13 for a log-variance, the mean fixed."""
        loss = self.task(predicted[: self.outputs], label)
        if len(predicted) == self.outputs:
            return loss
        v = predicted[-1].clamp(-6, 3)
        return loss + 0.5 * (torch.exp(-v) * (predicted[0].detach() - label) ** 2 + v)

    def msd(self, labels: Tensor) -> Tensor:
        told = [
            mean([
                self.task(self.linear(f"private_predictors.{m}", self.private[i][m]), labels[i])
                for i in self.with_modality(m)
            ])
            for m in MODALITIES
        ]  # fmt: skip
        return (
            self.invariance()
            + FACTORS["decorrelation"] * self.decorrelation()
            + FACTORS["private_task"] * mean(told)
        )

    def temperature(self) -> Tensor:
        return self.scalar("temperature", (0.01, 0.5), FACTORS["temperature"])

    def invariance(self) -> Tensor:
        """L_inv (1.1)."""
        tau = self.temperature()
        invariance = []
        for m in MODALITIES:
            anchors = {i: anchor for i in self.batch if (anchor := self.anchor(m, i)) is not None}
            for i in self.with_modality(m):
                if i in anchors:
                    similar = {k: torch.exp(cosine(self.shared[i][m], a) / tau) for k, a in anchors.items()}
                    invariance.append(-torch.log(similar[i] / sum(similar.values())))
        return mean(invariance)

    def dependence(self) -> Tensor:
        """L_dis as the dependence of private parts (1.17), its sums written out."""
        apart = []
        for one, other in combinations(MODALITIES, 2):
            both = [i for i in self.batch if self.present[i][one] and self.present[i][other]]
            shared, *own = (self.criterion(both, *pair) for pair in ((one, other), (one,) * 2, (other,) * 2))
            apart.append(F.relu(shared) / (own[0] * own[1]).sqrt() if len(both) > 3 else shared * 0)
        return mean(apart)

    def criterion(self, samples: list[int], one: str, other: str) -> Tensor:
        """Mean over different samples i, j, q, r of K_ij (L_ij + L_qr - 2 L_iq)."""
        zero = torch.zeros((), dtype=torch.float64)

        def alike(m: str, i: int, j: int) -> Tensor:
            return self.private[i][m] @ self.private[j][m]

        terms = [
            alike(one, i, j) * (alike(other, i, j) + alike(other, q, r) - 2 * alike(other, i, q))
            for i, j, q, r in permutations(samples, 4)
        ]
        return torch.stack(terms).mean() if terms else zero

    def decorrelation(self) -> Tensor:
        """L_dis (1.2)."""
        if "private_independent" in self.readings:
            return self.dependence()
        apart = []
        for one, other in combinations(MODALITIES, 2):
            both = [i for i in self.batch if self.present[i][one] and self.present[i][other]]
            apart.append(mean([cosine(self.private[i][one], self.private[i][other]) ** 2 for i in both]))
        return mean(apart)

    def anchor(self, m: str, i: int) -> Tensor | None:
        """agg_i of 1.1 without m itself; None where the sample has no other modality."""
        others = [F.normalize(self.shared[i][n], dim=0) for n in MODALITIES if n != m and self.present[i][n]]
        return torch.stack(others).mean(dim=0) if others else None

    def cce(self, labels: Tensor) -> Tensor:
        terms = []
        for m in MODALITIES:
            near, useful = [], []
            for i in self.with_modality(m):
                near.append(((self.rebuilt[i][m] - self.z[i][m].detach()) ** 2).mean())
                predicted = (
                    self.fused({**self.entering[i], m: self.rebuilt[i][m]})
                    if self.balancing
                    else self.linear(f"predictors.{m}", self.rebuilt[i][m])[: self.outputs]
                )
                useful.append(self.task(predicted, labels[i]))
            terms.append(mean(near) + mean(useful))
        return mean(terms)

    def energy(self, m: str, i: int, z: Tensor, label: Tensor | None) -> Tensor:
        """E_i(m) (1.7), without a label without the loss; the predictor's weights are constants (E23)."""
        weight = self.weights[f"predictors.{m}.weight"].detach()
        bias = self.weights[f"predictors.{m}.bias"].detach()
        predicted = weight @ z + bias
        if self.outputs > 1:
            p = torch.softmax(predicted, dim=0)
            uncertainty = -sum(value * torch.log(value) for value in p)
        elif len(predicted) == 2:
            uncertainty = torch.exp(predicted[1].clamp(-6, 3))
        else:
            seen = [self.predicted[i][n][0].detach() for n in MODALITIES if self.present[i][n]]
            uncertainty = (predicted[0] - mean(seen)) ** 2
        without_loss = FACTORS["energy_norm"] * (z**2).sum() / len(z)
        if label is None:
            return without_loss + FACTORS["energy_uncertainty"] * uncertainty
        if "energy_constant_uncertainty" in self.readings:
            uncertainty = uncertainty.detach()
        return (
            without_loss
            + FACTORS["energy_loss"] * self.task(predicted[: self.outputs], label)
            + FACTORS["energy_uncertainty"] * uncertainty
        )

    def emc(self, labels: Tensor) -> Tensor:
        energies, steepness = {}, []
        for m in MODALITIES:
            of_samples, norms = [], []
            for i in self.with_modality(m):
                z = self.z[i][m]
                if "energy_fixed_norm" in self.readings:
                    z = z / z.norm() * z.norm().detach()
                energy = self.energy(m, i, z, labels[i])
                (slope,) = torch.autograd.grad(energy, z, create_graph=True)
                of_samples.append(energy)
                norms.append((slope**2).sum())
            if of_samples:
                energies[m] = mean(of_samples)
            steepness.append(mean(norms))
        gap = 0
        for pair in combinations(energies.values(), 2):
            low, high = sorted(pair, key=Tensor.item)
            gap += (high - (low.detach() if "gap_one_sided" in self.readings else low)) ** 2
        return gap + FACTORS["energy_gradient"] * sum(steepness)

    def imtd(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """(1.12) to (1.15); a sample without any modality has no teacher."""
        samples = []
        for i in self.batch:
            there = [m for m in MODALITIES if self.present[i][m]]
            said = {m: teacher[i, MODALITIES.index(m)] for m in there}
            variances = {m: self.variance(said, m) for m in there}
            if "trust_against_fused" in self.readings:
                variances["fused"] = self.squared_error(self.logits[i].detach(), labels[i])
            trust = {
                m: torch.exp(-v.mean().sqrt()) / (torch.log(1 + v.sum()) + FACTORS["trust_floor"])
                for m, v in variances.items()
            }
            if "distil_where_better" in self.readings:
                error = self.task(self.logits[i], labels[i])
                there = [m for m in there if self.task(said[m][: self.outputs], labels[i]) < error]
            terms = [trust[m] / sum(trust.values()) * self.distance(i, said[m]) for m in there]
            samples.append(sum(terms, torch.zeros(()).double()))
        return mean(samples)

    def squared_error(self, logits: Tensor, label: Tensor) -> Tensor:
        """Squared error of the score, or of the probability of each class (1.18)."""
        if self.outputs == 1:
            return (logits - label) ** 2
        truth = torch.tensor([float(number == label) for number in range(self.outputs)]).double()
        return (torch.softmax(logits, dim=0) - truth) ** 2

    def variance(self, said: dict[str, Tensor], m: str) -> Tensor:
        if self.outputs > 1:
            p = torch.softmax(said[m], dim=0)
            return p * (1 - p)
        if self.settings.get("uncertainty") == "disagreement":
            return (said[m] - mean([other[0] for other in said.values()])) ** 2
        return torch.exp(said[m][1:].clamp(-6, 3))

    def distance(self, i: int, said: Tensor) -> Tensor:
        if self.outputs == 1:
            return (self.logits[i][0] - said[0]) ** 2
        said = said[: self.outputs]
        tau = FACTORS["distillation_temperature"]
        student, taught = torch.softmax(self.logits[i] / tau, dim=0), torch.softmax(said / tau, dim=0)
        return sum(a * torch.log(a / b) for a, b in zip(student, taught, strict=True))

    def teaching(self) -> Tensor:
        """T_m(z^s) of every sample, with the log-variance that the predictor on z_m gives."""
        rows = []
        for i in self.batch:
            answers = []
            for m in MODALITIES:
                told = self.linear(f"private_predictors.{m}", self.private[i][m])
                if self.settings.get("teacher") == "state":
                    told = self.predicted[i][m][: self.outputs]
                answers.append(torch.cat([told, self.predicted[i][m][self.outputs :]]))
            rows.append(torch.stack(answers))
        return torch.stack(rows)


@pytest.fixture
def trial(request, make_head, make_sequences):
    """A head and the oracle on one batch: (head, oracle, sequences, labels, teacher)."""
    stage, outputs, setting, present = request.param
    settings = SETTINGS[setting]
    head = make_head("ebmc", outputs, stage, hidden_size=4, depth=DEPTH, heads=HEADS, **settings, **FACTORS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms start as the identity, tokens near zero: make every weight count
        for name, parameter in head.named_parameters():
            if "norms" in name or "missing" in name or "gain" in name:
                parameter += torch.rand(parameter.shape, generator=generator) * 0.5
    sequences = make_sequences(5, PRESENT[present])
    labels = torch.arange(5) % outputs if outputs > 1 else torch.tensor([-3.0, -0.4, 0.0, 1.5, 3.0]).double()
    answers = outputs + (outputs == 1 and settings.get("uncertainty") != "disagreement")
    teacher = torch.randn(5, 3, answers, generator=generator).double() * 2
    return head, Oracle(head, stage, outputs, settings, sequences), sequences, labels, teacher


CASES = [
    (stage, outputs, setting, present)
    for stage in ("enhance", "balance")
    for outputs in (1, 4)
    for setting in SETTINGS
    for present in PRESENT
    if present != "no audio" or setting in ("paper", "reference")
]


@pytest.mark.parametrize("trial", CASES, indirect=True, ids=lambda case: ", ".join(map(str, case)))
def test_the_equations_taken_sample_by_sample_give_what_the_head_gives(trial):
    head, oracle, sequences, labels, teacher = trial
    output = head(sequences, labels, teacher)
    for i in oracle.batch:
        for m in MODALITIES:
            assert_equation(
                "Reading a modality", f"z of {m}, sample {i}", output.features[m][i], oracle.z[i][m]
            )
            alone = oracle.predicted[i][m][: oracle.outputs]
            assert_equation(
                "1.7", f"linear prediction from z of {m}, sample {i}", output.modality_logits[m][i], alone
            )
        if oracle.balancing:
            assert_equation(
                "Fusion and total", f"fused prediction of sample {i}", output.logits[i], oracle.logits[i]
            )

    shared, private = (
        torch.stack([torch.stack([row[m] for row in rows]) for m in MODALITIES])
        for rows in (oracle.shared, oracle.private)
    )
    present = torch.tensor([[row[m] for row in oracle.present] for m in MODALITIES])
    tau = oracle.temperature()
    assert_equation("1.1", "alignment", invariance_loss(shared, present, tau), oracle.invariance())
    apart = dependence_loss if "private_independent" in oracle.readings else disentanglement_loss
    # the estimate of the dependence cancels large sums
    close = {"rtol": 1e-7, "atol": 1e-7} if "private_independent" in oracle.readings else {}
    assert_equation("1.2", "decorrelation", apart(private, present), oracle.decorrelation(), **close)

    expected = oracle.losses(labels, teacher)
    assert list(output.losses) == list(expected)
    equations = LOSSES | {"imtd": "1.14" if oracle.outputs > 1 else "1.15"}
    for name, loss in expected.items():
        assert_equation(equations[name], f"loss {name}", output.losses[name], loss, **close)

    # each loss with a weight of its own, so that no two errors cancel
    totals = [
        sum(weight * loss for weight, loss in enumerate(losses.values(), 1))
        for losses in (output.losses, expected)
    ]
    parameters = dict(head.named_parameters())
    found, wanted = (
        torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for total in totals
    )
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert_equation("1.16", f"gradient of the weighted losses by {name}", one, other, **close)


@pytest.mark.parametrize(
    "trial",
    [("enhance", outputs, setting, "mixed") for outputs in (1, 4) for setting in SETTINGS],
    indirect=True,
    ids=lambda case: ", ".join(map(str, case)),
)
def test_a_teacher_says_what_its_private_predictors_say_and_how_sure_it_is(trial):
    head, oracle, sequences, _, _ = trial
    assert_equation(
        "1.13", "predictions and log-variances of the teacher", head.teach(sequences), oracle.teaching()
    )
