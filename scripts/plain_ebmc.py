# SPDX-License-Identifier: Apache-2.0
"""A straightforward implementation of EBMC's second stage, the reference of `benchmark_ebmc.py --offline`."""

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.methods.ebmc import LENDERS
from msa_online.modalities import MODALITIES


class PlainLayer(nn.Module):
    """One attention layer of an expert stack, written in the simplest way."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.widen, self.narrow = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Map states `(batch, time, hidden)` to the same shape."""
        query, key, value = (
            linear(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )  # (batch, heads, time, width)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        attended = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        inner = self.dropout(F.gelu(self.widen(attended)))
        return states + attended + self.dropout(self.narrow(inner))


class PlainEBMC(nn.Module):
    """EBMC's second stage (docs/methods/ebmc.md) without optimisations, for complete samples of a regression.

    Every part is a module, the nine passes through the stacks are sequential, and the gradients of the
    energies are differentiated twice. It computes the losses of `EBMCHead(cce="shared",
    uncertainty="disagreement")`; parameters outside the stacks have the same names.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        hidden_size: int,
        depth: int,
        dropout: float,
        heads: int = 2,
        **_: str,
    ) -> None:
        super().__init__()

        def linear(inputs: int = hidden_size, outputs: int = hidden_size) -> nn.Linear:
            return nn.Linear(inputs, outputs)

        def perceptron(inputs: int = hidden_size, outputs: int = hidden_size) -> nn.Sequential:
            return nn.Sequential(linear(inputs), nn.ReLU(), linear(outputs=outputs))

        def for_each(make: Callable[[], nn.Module]) -> nn.ModuleDict:
            return nn.ModuleDict({name: make() for name in MODALITIES})

        joint = len(MODALITIES) * hidden_size
        self.projections = nn.ModuleDict({name: linear(widths[name]) for name in MODALITIES})
        self.stacks = for_each(
            lambda: nn.Sequential(*(PlainLayer(hidden_size, heads, dropout) for _ in range(depth)))
        )
        self.routers = for_each(lambda: perceptron(outputs=len(MODALITIES)))
        self.shared, self.private = for_each(perceptron), for_each(perceptron)
        self.norms = for_each(lambda: nn.LayerNorm(hidden_size))
        self.generators = perceptron(2 * hidden_size)
        self.predictors, self.private_predictors = (for_each(lambda: linear(outputs=1)) for _ in range(2))
        self.fusion = nn.Sequential(linear(joint, joint), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = linear(joint, 1)

    def forward(self, features: Mapping[str, Tensor], labels: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            features: `(batch, time, width)` of each modality.
            labels: `(batch,)`.
            teacher: Scores, `(batch, modalities, 1)`.
        """
        states = {name: self._read(name, features[name]) for name in MODALITIES}  # (batch, hidden) each
        shared = {name: self.norms[name](self.shared[name](states[name])) for name in MODALITIES}
        private = {name: self.norms[name](self.private[name](states[name])) for name in MODALITIES}
        rebuilt = {
            name: self.generators(torch.cat([shared[LENDERS[name]], private[name]], dim=-1))
            for name in MODALITIES
        }
        logits = self._predict(states)
        return {
            "task": F.mse_loss(logits, labels),
            "unimodal": sum(
                F.mse_loss(self.predictors[name](states[name]).squeeze(-1), labels) for name in MODALITIES
            ),
            "msd": self._msd(shared, private, labels),
            "cce": sum(
                F.mse_loss(rebuilt[name], states[name].detach())
                + F.mse_loss(self._predict({**states, name: rebuilt[name]}), labels)
                for name in MODALITIES
            )
            / len(MODALITIES),
            "emc": self._emc(states, labels),
            "imtd": self._imtd(logits, teacher.squeeze(-1)),
        }

    def _read(self, name: str, features: Tensor) -> Tensor:
        projected = self.projections[name](features)
        weights = self.routers[name](projected)
        mixed = 0.0
        for number, (owner, stack) in enumerate(self.stacks.items()):
            mixed = mixed + (weights[..., number, None] + (owner == name)) * stack(projected)
        return mixed.mean(dim=1)

    def _predict(self, states: Mapping[str, Tensor]) -> Tensor:
        joint = torch.cat([states[name] for name in MODALITIES], dim=-1)
        return self.classifier(joint + self.fusion(joint)).squeeze(-1)

    def _msd(self, shared: Mapping[str, Tensor], private: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        directions = {name: F.normalize(state.float(), dim=-1) for name, state in shared.items()}
        total = 0.0
        for name in MODALITIES:
            anchors = F.normalize(sum(directions[other] for other in MODALITIES if other != name), dim=-1)
            similarity = directions[name] @ anchors.T / 0.05
            total = total + F.cross_entropy(similarity, torch.arange(len(labels), device=labels.device))
            total = total + 0.1 * F.mse_loss(self.private_predictors[name](private[name]).squeeze(-1), labels)
        for one, other in combinations(MODALITIES, 2):
            total = total + 0.1 * F.cosine_similarity(private[one], private[other], dim=-1).square().mean()
        return total / len(MODALITIES)

    def _emc(self, states: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        predicted = {
            name: F.linear(
                states[name], self.predictors[name].weight.detach(), self.predictors[name].bias.detach()
            ).squeeze(-1)
            for name in MODALITIES
        }
        centre = sum(predicted.values()).detach() / len(MODALITIES)
        energies, steepness = [], 0.0
        for name in MODALITIES:
            energy = states[name].square().mean(dim=-1) + (predicted[name] - labels).square()
            energy = energy + (predicted[name] - centre).square()
            (slope,) = torch.autograd.grad(energy.sum(), states[name], create_graph=True)
            steepness = steepness + slope.square().sum(dim=-1).mean()
            energies.append(energy.mean())
        gap = sum((one - other).square() for one, other in combinations(energies, 2))
        return gap + 0.01 * steepness

    def _imtd(self, logits: Tensor, taught: Tensor) -> Tensor:
        variance = (taught - taught.mean(dim=1, keepdim=True)).square()
        trust = (-variance.sqrt() - torch.log(torch.log1p(variance) + 0.1)).softmax(dim=1)
        return (trust * (logits.unsqueeze(1) - taught).square()).sum(dim=1).mean()
