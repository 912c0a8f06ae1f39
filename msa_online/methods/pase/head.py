# SPDX-License-Identifier: Apache-2.0
"""The head of PaSE: prototypes calibrate, align and weigh the modalities (AAAI 2026).

"Prototype-aligned Calibration and Shapley-based Equilibrium for Multimodal Sentiment Analysis", arXiv
2511.17585. Numbers of equations like (2.5) and of choices like P2 are those of docs/methods/pase.md.
"""

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, task_loss
from msa_online.layers.modules import Dropout, ExpertLayer, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.methods.pase.prototypes import (
    UNKNOWN,
    PrototypeBanks,
    Prototypes,
    prototype_contrast,
    prototype_cost,
)
from msa_online.methods.pase.transport import transport_plan
from msa_online.modalities import MODALITIES, ModalitySequence

PAIRS = tuple(combinations(MODALITIES, 2))
TRANSPORTS = tuple(f"transport/{one}+{other}" for one, other in PAIRS)  # L_inter of each pair
BINS = (2, 3, 5, 7)
TINY = 1e-9  # e of (2.8)


class PaSEHead(BalancingHead):
    """Keeps a prototype of each class in each modality, to calibrate, align and weigh the modalities.

        X_m ─ f_m ─ own stack ─ h_m ─┬─ s_m
                                     ├─ PCL: to the prototype of its class, away from the others
                                     └─ PGF: h_m |M| alpha_m ─ concatenated ─ fusion ─ s
               prototypes c^m_k ─ CAL: those of m transported onto those of n

        L = l(s, y) + w_u mean_m l(s_m, y) + lambda sum_m PCL_m + mu sum_{m<n} CAL_mn      (2.6)

    Losses, unweighted: `task`, `unimodal`, `pcl`, `cal`. The published weights are lambda = 0.01 (`pcl`) and
    mu = 0.1 (`cal`).

    Deviations and readings: the prototypes of CAL and the states of PCL have gradients; in the published code
    both are constants (P1, P2). Prototypes are normalised for the transport cost, otherwise every plan would
    be uniform, and epsilon is absolute (P4). A plan is compared with the identity after its rows are scaled
    to sum to 1 (P6). |M| counts the modalities that a sample has. In a regression, bins of the score serve as
    classes (P15). The gate never sees a label; the published one does in training (P16).

    Relations: `ShapleyModulator` is the other half of the method; each works without the other. The stacks
    are those of `EBMCHead` without its router.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width D of all states.
        depth: Layers of a modality's stack.
        heads: Attention heads of a layer.
        dropout: Share dropped in the MLPs of stacks and fusion.
        bins: Number of classes of a score in -3 .. 3. 5 rounds it to -2 .. 2, 7 to -3 .. 3; 3 takes its sign,
            2 whether it is negative.
        momentum: gamma of the prototypes (2.1).
        temperature: tau of the similarities with prototypes (2.2), (2.5).
        gate: Source of the weights alpha (2.5). "entropy": exp(-H) of the modality's distribution over
            prototypes. "learned": an MLP on the highest similarity, as in the published code. "uniform":
            no weights, plain concatenation.
        cal_gradient: Gradient of CAL that reaches the encoders (P2). "straight_through": the full gradient by
            the batch means. "ema": 1 - gamma of it, the share by which the batch moves the prototypes.
            "none": no gradient.
        epsilon: Weight of the entropy in the transport (2.3).
        symmetry: alpha of (2.4).
        diagonal: beta of (2.4).
        regression_loss: "mse" or "l1".

    Raises:
        ValueError: A setting is not among its choices or out of range.
    """

    loss_names = ("task", "unimodal", "pcl", "cal")
    paper = (
        "He, Chen, Ding, Li, Teng, Ji: PaSE: Prototype-aligned Calibration and Shapley-based Equilibrium for "
        "Multimodal Sentiment Analysis, AAAI 2026, https://arxiv.org/abs/2511.17585"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 256,
        depth: int = 4,
        heads: int = 2,
        dropout: float = 0.5,
        bins: int = 5,
        momentum: float = 0.98,
        temperature: float = 0.1,
        gate: str = "entropy",
        cal_gradient: str = "straight_through",
        epsilon: float = 0.05,
        symmetry: float = 0.1,
        diagonal: float = 0.05,
        regression_loss: str = "mse",
    ) -> None:
        super().__init__()
        check_choice("gate", gate, ("entropy", "learned", "uniform"))
        check_choice("cal_gradient", cal_gradient, ("straight_through", "ema", "none"))
        check_choice("bins", bins, BINS)
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        for name, value in (("temperature", temperature), ("epsilon", epsilon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        for name, value in (("symmetry", symmetry), ("diagonal", diagonal)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0")
        self.num_labels, self.bins = num_labels, bins
        self.temperature, self.cal_gradient, self.epsilon = temperature, cal_gradient, epsilon
        self.symmetry, self.diagonal = symmetry, diagonal
        self.regression_loss = regression_loss
        self.projections = nn.ModuleDict({name: nn.Linear(widths[name], hidden_size) for name in MODALITIES})
        self.experts = nn.ModuleDict(
            {
                name: nn.ModuleList(ExpertLayer(1, hidden_size, heads, dropout) for _ in range(depth))
                for name in MODALITIES
            }
        )
        self.prototypes = PrototypeBanks(bins if num_labels == 1 else num_labels, hidden_size, momentum)
        self.gate = GATES[gate]()
        # s_m; newer heads call it `predictors`, published checkpoints of this one contain `unimodal`
        self.unimodal = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in MODALITIES})
        joint = len(MODALITIES) * hidden_size
        self.fusion = nn.Sequential(nn.Linear(joint, joint), nn.ReLU(), Dropout(dropout))
        self.classifier = nn.Linear(joint, num_labels)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        present = torch.stack([sequences[name].present for name in MODALITIES])  # (modalities, batch)
        features = {name: self._read(name, sequences[name]) for name in MODALITIES}  # h_m
        states = torch.stack(list(features.values()))  # (modalities, batch, hidden)
        weights = self._weights(states, present)
        joint = torch.cat((weights.to(states.dtype).unsqueeze(-1) * states).unbind(), dim=-1)
        fused = joint + self.fusion(joint)  # (batch, 3 * hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.unimodal[name](state) for name, state in features.items()},
            features=features,
            fused=fused,
        )
        if labels is not None:
            with without_autocast(present.device):  # all losses in fp32
                terms = self._losses(output, in_fp32(states), labels, present)
            means = mean_where(weights.detach(), present)
            terms |= {f"weight/{name}": mean for name, mean in zip(MODALITIES, means, strict=True)}
            output.losses = {name: term for name, term in terms.items() if name in self.loss_names}
            output.diagnostics = {name: term.detach() for name, term in terms.items() if "/" in name}
        return output

    def end_step(self, taken: bool) -> None:
        """Update the prototypes with the states of the step."""
        self.prototypes.end_step(taken)

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection and stack of each modality."""
        return {
            name: [*self.projections[name].parameters(), *self.experts[name].parameters()]
            for name in MODALITIES
        }

    def _read(self, name: str, sequence: ModalitySequence) -> Tensor:
        """Compute h_m `(batch, hidden)`: project, pass the own stack, average over time; zero if absent."""
        states = [self.projections[name](sequence.values).unsqueeze(0)]
        for layer in self.experts[name]:
            states = layer(states, [sequence.mask])
        return masked_mean(sequence.with_values(states[0].squeeze(0)))

    def _weights(self, states: Tensor, present: Tensor) -> Tensor:
        """PGF (2.5): |M| alpha_m, `(modalities, batch)`, with mean 1 over the modalities a sample has."""
        with without_autocast(present.device):
            # absent states are zero, where the second derivative of a normalised vector is not finite
            states = in_fp32(states).masked_fill(~present.unsqueeze(-1), 1.0)
            similarity = self.prototypes.similarity(states)
            weights = self.gate(similarity, self.prototypes.known, self.temperature) * present
            count = present.sum(dim=0)
            return weights * count / weights.sum(dim=0).clamp(min=TINY)

    def _losses(
        self, output: HeadOutput, states: Tensor, labels: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        classes = score_bins(labels, self.bins) if self.num_labels == 1 else labels
        one_hot = F.one_hot(classes, self.prototypes.classes).bool()  # (batch, classes)
        member = one_hot & present.unsqueeze(-1)  # (modalities, batch, classes)
        prototypes = self.prototypes.with_batch(states, member)
        if self.training:
            self.prototypes.collect(states, member)
        present_by_name = dict(zip(MODALITIES, present, strict=True))
        alone = loss_alone(output.modality_logits, labels, present_by_name, self.regression_loss)
        intra = prototype_contrast(states, prototypes, member, self.temperature)  # (modalities,)
        inter = self._align(prototypes)
        return {
            "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
            "unimodal": alone / len(MODALITIES),
            "pcl": intra.sum(),
            "cal": sum(inter[name] for name in TRANSPORTS),
            **inter,
            **{f"pcl/{name}": value for name, value in zip(MODALITIES, intra, strict=True)},
            **{f"spread/{name}": value for name, value in zip(MODALITIES, prototypes.spread(), strict=True)},
        }

    def _align(self, prototypes: Prototypes) -> dict[str, Tensor]:
        """CAL (2.3), (2.4): L_inter of each pair as "transport/<m>+<n>", and the means of its three parts."""
        one, other = zip(*PAIRS, strict=True)
        values = dict(zip(MODALITIES, prototypes.with_gradient(self.cal_gradient), strict=True))
        known = dict(zip(MODALITIES, prototypes.known, strict=True))
        cost = prototype_cost(*(torch.stack([values[name] for name in side]) for side in (one, other)))
        shared = torch.stack([known[name] for name in one]) & torch.stack([known[name] for name in other])
        count = shared.sum(dim=-1, keepdim=True)
        mass = shared / count.clamp(min=1)
        plans = transport_plan(
            torch.cat([cost, cost.mT]), torch.cat([mass, mass]), torch.cat([mass, mass]), epsilon=self.epsilon
        )
        forth, back = plans.chunk(2)
        match = 0.5 * (forth * cost + back * cost.mT).sum(dim=(-2, -1))
        asymmetry = (forth - back.mT).square().sum(dim=(-2, -1))
        identity, scale = torch.diag_embed(shared.to(cost)), count.unsqueeze(-1)
        omega = 0.5 * sum((scale * plan - identity).square().sum(dim=(-2, -1)) for plan in (forth, back))
        total = match + self.symmetry * asymmetry + self.diagonal * omega
        return {
            **dict(zip(TRANSPORTS, total, strict=True)),
            "cal/match": match.mean(),
            "cal/reg": asymmetry.mean(),
            "cal/omega": omega.mean(),
        }


class EntropyGate(nn.Module):
    """exp(-H / log K_p), the certainty that a state belongs to one prototype (2.5)."""

    def forward(self, similarity: Tensor, known: Tensor, temperature: float) -> Tensor:
        """Unnormalised weight of each modality, `(modalities, batch)`, above 0.

        Args:
            similarity: Cosine with the prototypes, `(modalities, batch, classes)`.
            known: Which prototypes exist, `(modalities, classes)` bool.
            temperature: tau.
        """
        logits = (similarity / temperature).masked_fill(~known.unsqueeze(1), UNKNOWN).log_softmax(dim=-1)
        entropy = -(logits.exp() * logits).sum(dim=-1)
        count = known.sum(dim=-1, keepdim=True)
        count = count.where(count > 0, known.shape[-1])  # no prototype yet: uniform over all classes
        return torch.exp(-entropy / count.clamp(min=2).log())


class LearnedGate(nn.Sequential):
    """An MLP on the highest similarity. In training the published one uses the similarity of the label."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, similarity: Tensor, known: Tensor, temperature: float) -> Tensor:
        """Unnormalised weight of each modality, `(modalities, batch)` in (0, 1); see `EntropyGate`."""
        highest = similarity.masked_fill(~known.unsqueeze(1), -1.0).amax(dim=-1, keepdim=True)
        return super().forward(highest.to(self[0].weight.dtype)).squeeze(-1)


class UniformGate(nn.Module):
    """Equal weights."""

    def forward(self, similarity: Tensor, known: Tensor, temperature: float) -> Tensor:
        """1 for each modality, `(modalities, batch)`; see `EntropyGate`."""
        return torch.ones_like(similarity[..., 0])


GATES = {"entropy": EntropyGate, "learned": LearnedGate, "uniform": UniformGate}


def score_bins(scores: Tensor, bins: int) -> Tensor:
    """Map scores `(batch,)` in -3 .. 3 to classes `(batch,)` int64; halves round to even, as in Acc-5."""
    if bins == 2:
        return (scores >= 0).long()
    if bins == 3:
        return scores.sign().long() + 1
    limit = (bins - 1) // 2
    return scores.clamp(-limit, limit).round().long() + limit
