# SPDX-License-Identifier: Apache-2.0
"""MISA: a shared and a private state of each modality, fused by attention (ACM Multimedia 2020).

"MISA: Modality-Invariant and -Specific Representations for Multimodal Sentiment Analysis", arXiv 2005.03545.
Equation numbers are those of docs/methods/misa.md.
"""

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, task_loss
from msa_online.layers.modules import Dropout, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

PAIRS = tuple(combinations(MODALITIES, 2))
MOMENTS = 5  # K of (6.5)
TINY = 1e-12


class MISAHead(BalancingHead):
    """Splits each modality into a shared and a private state; a transformer layer fuses the six.

        u_m = LayerNorm(ReLU(W_m mean_t X_m))                     (6.1)
        c_m = sigmoid(E u_m), p_m = sigmoid(E_m u_m)              (6.2); shared and private state
        s   = V ReLU(W transformer([c_text .. p_vision]))         (6.3); fused prediction
        s_m = U_m [c_m; p_m]                                      (6.4); prediction of m alone

    Losses, unweighted: `task` on s; `unimodal`, the sum over modalities of the task loss of s_m; `similarity`
    (6.5), which aligns the shared states; `difference` (6.6), which keeps the states apart;
    `reconstruction` (6.7) of u_m from c_m + p_m.

    An absent modality takes no part in the attention, and zeros stand for its two states in the fusion.

    Deviations: the encoders' states are averaged over time, where the paper reads audio and vision with
    LSTMs. s_m and its loss are ours; modulators compare modalities by them.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of u_m, c_m and p_m.
        depth: Transformer layers over the six states.
        heads: Attention heads.
        dropout: Share dropped in the transformer and in the fusion.
        regression_loss: "mse" or "l1".

    Raises:
        ValueError: `regression_loss` is neither, `depth` is below 1, or `heads` does not divide
            `hidden_size`.
    """

    loss_names = ("task", "unimodal", "similarity", "difference", "reconstruction")
    paper = (
        "Hazarika, Zimmermann, Poria: MISA: Modality-Invariant and -Specific Representations for Multimodal "
        "Sentiment Analysis, ACM Multimedia 2020, https://arxiv.org/abs/2005.03545"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 128,
        depth: int = 1,
        heads: int = 2,
        dropout: float = 0.2,
        regression_loss: str = "mse",
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        if heads < 1 or hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
        self.regression_loss = regression_loss
        self.projections = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(widths[name], hidden_size), nn.ReLU(), nn.LayerNorm(hidden_size)
                )
                for name in MODALITIES
            }
        )
        self.shared = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Sigmoid())
        self.private = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Sigmoid()) for name in MODALITIES}
        )
        self.decoders = nn.ModuleDict({name: nn.Linear(hidden_size, hidden_size) for name in MODALITIES})
        self.predictors = nn.ModuleDict({name: nn.Linear(2 * hidden_size, num_labels) for name in MODALITIES})
        self.transformer = nn.ModuleList(FusionLayer(hidden_size, heads, dropout) for _ in range(depth))
        slots = 2 * len(MODALITIES)
        self.fusion = nn.Sequential(
            nn.Linear(slots * hidden_size, slots // 2 * hidden_size), nn.ReLU(), Dropout(dropout)
        )
        self.classifier = nn.Linear(slots // 2 * hidden_size, num_labels)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        present = {name: sequences[name].present for name in MODALITIES}
        pooled = {name: self.projections[name](masked_mean(sequences[name])) for name in MODALITIES}  # u_m
        features = {
            name: torch.cat([self.shared(state), self.private[name](state)], dim=-1)
            * present[name].unsqueeze(-1)
            for name, state in pooled.items()
        }  # [c_m; p_m], (batch, 2 * hidden)
        halves = {name: state.chunk(2, dim=-1) for name, state in features.items()}
        states = torch.stack([halves[name][part] for part in (0, 1) for name in MODALITIES], dim=1)
        visible = torch.stack([*present.values()] * 2, dim=1)  # (batch, 6)
        for layer in self.transformer:
            states = layer(states, visible)  # (batch, 6, hidden)
        fused = self.fusion((states * visible.unsqueeze(-1)).flatten(1))  # (batch, 3 * hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.predictors[name](state) for name, state in features.items()},
            features=features,
            fused=fused,
        )
        if labels is not None:
            rebuilt = {name: self.decoders[name](sum(halves[name])) for name in MODALITIES}
            shared, private = ({name: in_fp32(halves[name][part]) for name in MODALITIES} for part in (0, 1))
            with without_autocast(labels.device):
                output.losses = {
                    "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                    "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
                    "similarity": similarity(shared, present),
                    "difference": difference(shared, private, present),
                    "reconstruction": reconstruction(pooled, rebuilt, present),
                }
        return output

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection and private encoder of each modality; the shared encoder belongs to none."""
        return {
            name: [*self.projections[name].parameters(), *self.private[name].parameters()]
            for name in MODALITIES
        }


class FusionLayer(nn.Module):
    """Transformer layer over the states of a sample, with norms after the sums.

    The attention is written out: fused kernels cannot be differentiated twice, and there are six states.

    Args:
        hidden_size: Width of the states.
        heads: Attention heads; divides `hidden_size`.
        dropout: Share dropped of the attention weights, in the MLP and before each sum.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = nn.Linear(hidden_size, 2 * hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.widen = nn.Linear(hidden_size, 4 * hidden_size)
        self.narrow = nn.Linear(4 * hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """Map states `(batch, slots, hidden)`; attention reads `visible` ones, `(batch, slots)`."""
        query, key = rearrange(self.query_key(states), "b s (two h d) -> two b h s d", two=2, h=self.heads)
        value = rearrange(self.value(states), "b s (h d) -> b h s d", h=self.heads)
        scores = in_fp32(query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        keys = visible | ~visible.any(dim=1, keepdim=True)  # no row without a key: NaN
        weights = scores.masked_fill(~keys[:, None, None], -math.inf).softmax(dim=-1)
        attended = rearrange(self.dropout(weights.to(value.dtype)) @ value, "b h s d -> b s (h d)")
        states = self.attention_norm(states + self.dropout(self.output(attended)))
        inner = self.dropout(F.relu(self.widen(states)))
        return self.norm(states + self.dropout(self.narrow(inner)))


def similarity(shared: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    """Mean over the pairs of the central moment discrepancy of their shared states (6.5), a scalar.

    Args:
        shared: c_m `(batch, hidden)` each, with values in (0, 1).
        present: `(batch,)` bool each. A pair counts 0 if no sample of the batch has one of the two.
    """
    moments = {name: central_moments(state, present[name]) for name, state in shared.items()}
    terms = []
    for one, other in PAIRS:
        distances = torch.linalg.vector_norm(moments[one] - moments[other], dim=-1)  # (MOMENTS,)
        terms.append(distances.sum() * (present[one].any() & present[other].any()))
    return torch.stack(terms).mean()


def central_moments(states: Tensor, counted: Tensor) -> Tensor:
    """Mean and central moments 2 to K of states `(batch, hidden)`, `(K, hidden)`.

    Only samples where `counted` `(batch,)` is True enter; zeros if there are none.
    """
    count = counted.sum().clamp(min=1)
    mean = (states * counted.unsqueeze(-1)).sum(dim=0) / count
    centred = (states - mean) * counted.unsqueeze(-1)
    return torch.stack([mean, *(centred.pow(order).sum(dim=0) / count for order in range(2, MOMENTS + 1))])


def difference(
    shared: Mapping[str, Tensor], private: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> Tensor:
    """Sum of the overlaps of shared and private states, and of private states in pairs (6.6), a scalar.

    Args:
        shared: c_m `(batch, hidden)` each.
        private: p_m `(batch, hidden)` each.
        present: `(batch,)` bool each. An overlap counts the samples that have both.
    """
    within = [overlap(shared[name], private[name], present[name]) for name in MODALITIES]
    between = [overlap(private[one], private[other], present[one] & present[other]) for one, other in PAIRS]
    return torch.stack([*within, *between]).sum()


def overlap(one: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """Mean square of the cross-correlations of states `(batch, hidden)` over `counted` samples, a scalar."""
    first, second = (_unit_rows(states, counted) for states in (one, other))
    return (first.mT @ second).square().mean()


def _unit_rows(states: Tensor, counted: Tensor) -> Tensor:
    """Centre states over the counted samples and scale each row to norm 1; other rows are zero."""
    weight = counted.unsqueeze(-1)
    centred = (states - (states * weight).sum(dim=0) / counted.sum().clamp(min=1)) * weight
    return centred / (centred.square().sum(dim=-1, keepdim=True) + TINY).sqrt()


def reconstruction(
    pooled: Mapping[str, Tensor], rebuilt: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> Tensor:
    """Mean over modalities of the squared error of u_m, per value and sample that has m (6.7), a scalar.

    Args:
        pooled: u_m `(batch, hidden)` each.
        rebuilt: The decoders' outputs, `(batch, hidden)` each.
        present: `(batch,)` bool each.
    """
    errors = {name: (in_fp32(pooled[name]) - in_fp32(rebuilt[name])).square().mean(-1) for name in pooled}
    return torch.stack([mean_where(error, present[name]) for name, error in errors.items()]).mean()
