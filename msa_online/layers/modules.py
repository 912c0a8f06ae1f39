# SPDX-License-Identifier: Apache-2.0
"""Layers that several methods share, and the mean and deviation over valid steps."""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.modalities import MODALITIES, ModalitySequence

LEAST_DEVIATION = 1e-3


class MissingTokens(nn.Module):
    """One learned state for each modality, used where the modality is absent.

    Args:
        hidden_size: Width of the states.
        names: Modalities that have one.
    """

    def __init__(self, hidden_size: int, names: Sequence[str] = MODALITIES) -> None:
        super().__init__()
        self.names = tuple(names)
        self.tokens = nn.Parameter(torch.empty(len(self.names), hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start small, so that an absent modality has little influence at first."""
        nn.init.normal_(self.tokens, std=0.02)

    def forward(self, name: str, states: Tensor, present: Tensor) -> Tensor:
        """Replace states `(..., hidden)` by the token of `name` where `present` `(...)` is False."""
        return torch.where(present.unsqueeze(-1), states, self.tokens[self.names.index(name)])

    def stand_in(self, name: str, sequence: ModalitySequence) -> ModalitySequence:
        """Give absent samples of a sequence, states `(batch, time, hidden)`, one step that holds the token.

        `present` is unchanged: the token is no observation.
        """
        absent = ~sequence.present.unsqueeze(-1)
        first = torch.arange(sequence.mask.shape[1], device=sequence.mask.device) == 0
        step = absent & first  # (batch, time)
        token = self.tokens[self.names.index(name)].to(sequence.values.dtype)
        values = torch.where(step.unsqueeze(-1), token, sequence.values)
        return ModalitySequence(values, sequence.mask | step, sequence.present)


class LearnedScalar(nn.Module):
    """A scalar that is learned within bounds, or a constant.

    Args:
        start: Initial value.
        bounds: Smallest and largest value that `forward` returns.
        learned: Make it a parameter.
    """

    def __init__(self, start: float, bounds: tuple[float, float] = (0.0, math.inf), learned: bool = True):
        super().__init__()
        self.start, self.bounds = start, bounds
        self.value = nn.Parameter(torch.empty(())) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial value."""
        if self.value is not None:
            nn.init.constant_(self.value, self.start)

    def forward(self) -> Tensor | float:
        """The scalar, within its bounds."""
        if self.value is None:
            return self.start
        # straight-through gradient: that of the clamp is zero beyond a bound, where the value would get stuck
        return self.value + (self.value.clamp(*self.bounds) - self.value).detach()


class Dropout(nn.Dropout):
    """`nn.Dropout` with an fp32 mask. On a CPU, the original draws doubles and takes three times as long.

    Args:
        share: Share of the values to drop, in [0, 1).

    Raises:
        ValueError: `share` is out of range.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"dropout={share} must be at least 0 and below 1")
        super().__init__(share)

    def forward(self, values: Tensor) -> Tensor:
        """Zero a share of `values`, any shape, and scale up the rest."""
        if not self.training or self.p == 0:
            return values
        factors = torch.rand(values.shape, device=values.device).ge_(self.p).div_(1 - self.p)
        return values * factors.to(values.dtype)


class Projection(nn.Sequential):
    """The layers between the mean state of a modality and the fusion: norm, linear, GELU, dropout.

    Args:
        width: Input width.
        hidden_size: Output width.
        dropout: Share of the output dropped in training.
        input_norm: Begin with a LayerNorm.
    """

    def __init__(self, width: int, hidden_size: int, dropout: float, *, input_norm: bool) -> None:
        norm = nn.LayerNorm(width) if input_norm else nn.Identity()
        super().__init__(norm, nn.Linear(width, hidden_size), nn.GELU(), Dropout(dropout))


class StackedLinear(nn.Module):
    """Several linear layers of one shape, computed in one batched product.

    Args:
        stacks: Number of layers.
        inputs: Input width.
        outputs: Output width.
    """

    def __init__(self, stacks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stacks, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(stacks, 1, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every layer as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, states: Tensor, stack: int | None = None) -> Tensor:
        """Map `(stacks, rows, inputs)`, each stack by its layer; or `(1, rows, inputs)` by layer `stack`."""
        if stack is None:
            return torch.baddbmm(self.bias, states, self.weight)
        # unbind, not indexing: its gradient is stacked once instead of summed over padded slices
        weight, bias = self.weight.unbind()[stack], self.bias.unbind()[stack]
        return torch.addmm(bias, states.squeeze(0), weight).unsqueeze(0)


class ExpertStacks(nn.Module):
    """A stack of attention layers for each modality (docs/methods/ebmc.md, "Reading a modality").

    All stacks have one shape and are computed in parallel. The steps of all modalities are concatenated, so
    that three modalities pass three stacks in a few batched products a layer, whatever their lengths.

    Args:
        hidden_size: Width of the states.
        depth: Layers in a stack.
        heads: Attention heads.
        dropout: Share dropped in the MLP of a layer.
    """

    def __init__(self, hidden_size: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ExpertLayer(len(MODALITIES), hidden_size, heads, dropout) for _ in range(depth)
        )

    def own(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, Tensor]:
        """Pass each modality, states `(batch, time, hidden)`, through its own stack; keeps the shapes."""
        passed = {}
        for number, name in enumerate(MODALITIES):
            states = [sequences[name].values.unsqueeze(0)]
            for layer in self.layers:
                states = layer(states, [sequences[name].mask], stack=number)
            passed[name] = states[0].squeeze(0)
        return passed

    def every(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, Tensor]:
        """Pass each modality through all stacks: `(batch, time, hidden)` to `(stacks, batch, ...)`."""
        masks = [sequences[name].mask for name in MODALITIES]
        states = [sequences[name].values.expand(len(MODALITIES), -1, -1, -1) for name in MODALITIES]
        for layer in self.layers:
            states = layer(states, masks)
        return dict(zip(MODALITIES, states, strict=True))


class ExpertLayer(nn.Module):
    """One layer of each stack: x + u + MLP(u) with u = attention(x); no norm, no output projection.

    Args:
        stacks: Number of stacks.
        hidden_size: Width of the states.
        heads: Attention heads.
        dropout: Share dropped in the MLP.

    Raises:
        ValueError: `heads` does not divide `hidden_size`.
    """

    def __init__(self, stacks: int, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
        self.heads = heads
        self.query_key = StackedLinear(stacks, hidden_size, 2 * hidden_size)
        self.value = StackedLinear(stacks, hidden_size, hidden_size)
        self.widen = StackedLinear(stacks, hidden_size, hidden_size)
        self.narrow = StackedLinear(stacks, hidden_size, hidden_size)
        self.dropout = Dropout(dropout)

    def forward(
        self, states: Sequence[Tensor], masks: Sequence[Tensor], stack: int | None = None
    ) -> list[Tensor]:
        """Map sequences `(stacks, batch, time, hidden)` with masks `(batch, time)`; lengths may differ."""
        rows = torch.cat([values.flatten(1, 2) for values in states], dim=1)  # (stacks, all steps, hidden)
        lengths = [mask.numel() for mask in masks]
        attended = self._attend(rows, masks, stack)
        inner = self.dropout(F.gelu(self.widen(attended, stack)))
        rows = rows + attended + self.dropout(self.narrow(inner, stack))
        return [
            steps.unflatten(1, mask.shape)
            for steps, mask in zip(rows.split(lengths, dim=1), masks, strict=True)
        ]

    def _attend(self, rows: Tensor, masks: Sequence[Tensor], stack: int | None) -> Tensor:
        """Attention of each sample over its valid steps; zero if it has none.

        With one step per sequence, attention returns the value itself, so queries and keys are skipped. The
        attention kernel sums logits in fp32.
        """
        values = self.value(rows, stack)
        if all(mask.shape[1] == 1 for mask in masks):
            return values * torch.cat(list(masks)).to(values.dtype)
        lengths = [mask.numel() for mask in masks]
        parts = zip(
            self.query_key(rows, stack).split(lengths, dim=1),
            values.split(lengths, dim=1),
            masks,
            strict=True,
        )
        return torch.cat([self._attend_within(*part) for part in parts], dim=1)

    def _attend_within(self, query_key: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention within one modality: `(stacks, batch * time, ...)` with a mask `(batch, time)`."""
        query, key = rearrange(
            query_key, "s (b t) (two h d) -> two (s b) h t d", b=mask.shape[0], two=2, h=self.heads
        )
        value = rearrange(values, "s (b t) (h d) -> (s b) h t d", b=mask.shape[0], h=self.heads)
        observed = mask.any(dim=1)
        keys = (mask | ~observed.unsqueeze(-1)).repeat(values.shape[0], 1)  # no row without a key: NaN
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None])
        attended = attended * observed.repeat(values.shape[0])[:, None, None, None]
        return rearrange(attended, "(s b) h t d -> s (b t) (h d)", s=values.shape[0])


def masked_mean(sequence: ModalitySequence) -> Tensor:
    """Mean of the observed steps, `(batch, time, width)` to `(batch, width)`; zero where there are none.

    Steps outside the mask never count, whatever values they hold.
    """
    count = sequence.mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(sequence.mask.unsqueeze(-1), sequence.values, 0.0).sum(dim=1) / count


def masked_deviation(sequence: ModalitySequence) -> Tensor:
    """Standard deviation over the observed steps, `(batch, time, width)` to `(batch, width)`.

    It is computed in fp32 or wider. Where at most one step is observed it is `LEAST_DEVIATION`, which keeps
    the gradient finite.
    """
    mean = masked_mean(sequence).unsqueeze(1)
    values = torch.where(sequence.mask.unsqueeze(-1), sequence.values, mean)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    count = sequence.mask.sum(dim=1, keepdim=True).clamp(min=1)
    variance = (values - mean).square().sum(dim=1) / count
    return (variance + LEAST_DEVIATION**2).sqrt()
