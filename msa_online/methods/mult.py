# SPDX-License-Identifier: Apache-2.0
"""MulT: each modality reads the other two by cross-modal attention, without alignment (ACL 2019).

"Multimodal Transformer for Unaligned Multimodal Language Sequences", arXiv 1906.00295. Equation numbers are
those of docs/methods/mult.md.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, task_loss
from msa_online.layers.modules import Dropout, StackedLinear, masked_mean
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

LONGEST_WAVE = 10_000.0  # of the positions (7.2)


class MulTHead(BalancingHead):
    """Attends from every modality to the other two, then within each, and predicts from the last steps.

        Z_m     = sqrt(d) Conv1d_m(X_m) + positions           (7.1), (7.2)
        Z_n->m  = stack of cross-modal layers: Z_m reads Z_n   (7.3), (7.4)
        h_m     = last step of self-attention([Z_n->m; Z_k->m])  (7.5)
        s       = V (h + W2 ReLU(W1 h)), h = [h_text; h_audio; h_vision]  (7.6); fused prediction
        s_m     = U_m mean_t Conv1d_m(X_m)                    (7.7); prediction of m alone

    Losses, unweighted: `task` on s; `unimodal`, the sum over modalities of the task loss of s_m.

    Nothing is read from padding or from an absent modality. A modality that is absent itself has h_m = 0.

    Deviations: the masks; the paper pads. The two pairs that read into one modality are computed together.
    s_m and its loss are ours; modulators compare modalities by them. `modality_parameters` is empty: every
    parameter before the fusion affects the states of two modalities or more. So a modulator acts on the
    encoders only, and on precomputed features, which have none, it is refused.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width d of the sequences.
        depth: Cross-modal layers of a pair.
        memory_depth: Self-attention layers of a modality, of width 2d.
        heads: Attention heads.
        kernel_size: Steps that the convolution reads; odd.
        dropout: Share dropped before each sum and in the fusion.
        regression_loss: "mse" or "l1".

    Raises:
        ValueError: A setting is not among its choices or out of range.
    """

    loss_names = ("task", "unimodal")
    paper = (
        "Tsai, Bai, Liang, Kolter, Morency, Salakhutdinov: Multimodal Transformer for Unaligned Multimodal "
        "Language Sequences, ACL 2019, https://arxiv.org/abs/1906.00295"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 40,
        depth: int = 4,
        memory_depth: int = 3,
        heads: int = 8,
        kernel_size: int = 3,
        dropout: float = 0.1,
        regression_loss: str = "mse",
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        for name, value in (("depth", depth), ("memory_depth", memory_depth)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if heads < 1 or hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} must be an odd number, so that steps keep their place"
            )
        self.regression_loss = regression_loss
        self.projections = nn.ModuleDict(
            {
                name: nn.Conv1d(widths[name], hidden_size, kernel_size, padding=kernel_size // 2, bias=False)
                for name in MODALITIES
            }
        )
        self.crossings = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    AttentionLayer(len(MODALITIES) - 1, hidden_size, heads, dropout) for _ in range(depth)
                )
                for name in MODALITIES
            }
        )
        self.memories = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    AttentionLayer(1, 2 * hidden_size, heads, dropout) for _ in range(memory_depth)
                )
                for name in MODALITIES
            }
        )
        self.predictors = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in MODALITIES})
        joint = len(MODALITIES) * 2 * hidden_size
        self.fusion = nn.Sequential(
            nn.Linear(joint, joint), nn.ReLU(), Dropout(dropout), nn.Linear(joint, joint)
        )
        self.classifier = nn.Linear(joint, num_labels)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        projected = {name: self._project(name, sequences[name]) for name in MODALITIES}
        placed = {name: with_positions(sequence) for name, sequence in projected.items()}  # Z_m
        features = {name: self._read(name, placed) for name in MODALITIES}  # h_m, (batch, 2 * hidden)
        joint = torch.cat(list(features.values()), dim=-1)
        fused = joint + self.fusion(joint)  # (batch, 6 * hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={
                name: self.predictors[name](masked_mean(sequence)) for name, sequence in projected.items()
            },
            features=features,
            fused=fused,
        )
        if labels is not None:
            present = {name: sequence.present for name, sequence in sequences.items()}
            output.losses = {
                "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
            }
        return output

    def _project(self, name: str, sequence: ModalitySequence) -> ModalitySequence:
        """Bring a modality to the common width, (7.1)."""
        values = self.projections[name](sequence.values.mT).mT
        return sequence.with_values(values)

    def _read(self, name: str, placed: Mapping[str, ModalitySequence]) -> Tensor:
        """Read the other two modalities into one, then itself, up to its last step: (7.3) to (7.5)."""
        target = placed[name]
        sources = [placed[other] for other in MODALITIES if other != name]
        states = target.values.expand(len(sources), -1, -1, -1)  # (sources, batch, time, hidden)
        for layer in self.crossings[name]:
            states = layer(states, [source.values for source in sources], [source.mask for source in sources])
        memory = rearrange(normalised(states), "pair b t d -> 1 b t (pair d)")
        *layers, final = self.memories[name]
        for layer in layers:
            memory = layer(memory, [memory.squeeze(0)], [target.mask])
        memory = memory.squeeze(0)  # (batch, time, 2 * hidden)
        last = last_step(target.with_values(memory))[None, :, None]
        last = final(last, [memory], [target.mask])[0, :, 0]  # of the final layer, only this step is used
        return normalised(last) * target.present.unsqueeze(-1)


class AttentionLayer(nn.Module):
    """Transformer layer with norms before its parts: states read sources, then pass an MLP, (7.3) and (7.4).

    Several stacks of one shape, each with its own weights and source, are computed together. The norms have
    no weights, because linear layers follow them.

    Args:
        stacks: Number of stacks.
        hidden_size: Width of states and sources.
        heads: Attention heads; divides `hidden_size`.
        dropout: Share dropped before each sum.
    """

    def __init__(self, stacks: int, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = StackedLinear(stacks, hidden_size, hidden_size)
        self.key_value = StackedLinear(stacks, hidden_size, 2 * hidden_size)
        self.output = StackedLinear(stacks, hidden_size, hidden_size)
        self.widen = StackedLinear(stacks, hidden_size, 4 * hidden_size)
        self.narrow = StackedLinear(stacks, 4 * hidden_size, hidden_size)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, sources: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Map states `(stacks, batch, time, hidden)`.

        Args:
            states: What reads.
            sources: What each stack reads, `(batch, its time, hidden)`.
            masks: Steps of each source that are read, `(batch, its time)` bool. A sample whose source has
                none reads zeros.
        """
        shape = states.shape[1:3]
        rows = states.flatten(1, 2)  # (stacks, all steps, hidden)
        queries = self.query(normalised(rows)).unflatten(1, shape)
        parts = zip(range(len(sources)), queries.unbind(), sources, masks, strict=True)
        attended = torch.stack([self._attend(*part) for part in parts])
        rows = rows + self.dropout(self.output(attended.flatten(1, 2)))
        inner = F.relu(self.widen(normalised(rows)))
        return (rows + self.dropout(self.narrow(inner))).unflatten(1, shape)

    def _attend(self, stack: int, queries: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Attention of one stack: queries `(batch, time, hidden)` over the steps of its source."""
        rows = normalised(source).flatten(0, 1).unsqueeze(0)
        both = self.key_value(rows, stack).squeeze(0).unflatten(0, mask.shape)
        key, value = rearrange(both, "b t (two h d) -> two b h t d", two=2, h=self.heads)
        query = rearrange(queries, "b t (h d) -> b h t d", h=self.heads)
        observed = mask.any(dim=1)
        keys = mask | ~observed.unsqueeze(-1)  # no row without a key: NaN
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None])
        return rearrange(attended * observed[:, None, None, None], "b h t d -> b t (h d)")


def normalised(states: Tensor) -> Tensor:
    """Layer norm of the last axis without weights, any shape."""
    return F.layer_norm(states, states.shape[-1:])


def with_positions(sequence: ModalitySequence) -> ModalitySequence:
    """Scale states `(batch, time, hidden)` by the root of their width and add sines of their place, (7.2)."""
    _, time, width = sequence.values.shape
    place = torch.arange(time, device=sequence.mask.device, dtype=torch.float32).unsqueeze(-1)
    number = torch.arange(width, device=sequence.mask.device)
    angle = place / LONGEST_WAVE ** (2 * (number // 2) / width)
    waves = torch.where(number % 2 == 0, angle.sin(), angle.cos()).to(sequence.values.dtype)
    return sequence.with_values(sequence.values * width**0.5 + waves)


def last_step(sequence: ModalitySequence) -> Tensor:
    """State of the last observed step, `(batch, time, hidden)` to `(batch, hidden)`; zero if none is."""
    steps = torch.arange(sequence.mask.shape[1], device=sequence.mask.device)
    last = torch.where(sequence.mask, steps, -1).amax(dim=1, keepdim=True)
    return (sequence.values * (steps == last).unsqueeze(-1)).sum(dim=1)
