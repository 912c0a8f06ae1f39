# SPDX-License-Identifier: Apache-2.0
"""Dialogue context: the part of a model that lets an utterance see the other turns of its dialogue.

It acts between calibrator and head, so it works with every head. Equation numbers are those of
docs/methods/context.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.modules import Dropout, masked_mean
from msa_online.modalities import MODALITIES, ModalitySequence

FARTHEST = 16  # turns apart; larger distances share one bias
JOINT = "joint"
"""Name of the one network of a context that reads the modalities together."""


class Context(nn.Module):
    """Adds what the other turns of a dialogue say to each utterance. This base class adds nothing ("none").

    Args:
        widths: Width of each modality's states.

    Attributes:
        exchange: What carries states from turn to turn; None adds nothing.
    """

    reads_speakers: ClassVar[bool] = False
    """Whether each turn of a dialogue must have a speaker."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.exchange: Exchange | None = None

    def forward(self, sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Map states `(batch, time, width)` to states of the same shapes; absent modalities stay absent.

        Samples with the same `dialogue` see each other, in the order of `turn`. A batch without dialogues has
        one utterance in each.
        """
        return sequences if self.exchange is None else self.exchange(sequences)

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Parameters that process one modality alone; the others are shared."""
        if self.exchange is None:
            return {name: [] for name in MODALITIES}
        return self.exchange.modality_parameters()


class GRUContext(Context):
    """A GRU over the turns of a dialogue, in both directions unless `causal` (20.4).

    Args:
        widths: Width of each modality's states.
        hidden_size: Width of a turn's state, and of the GRU in each direction.
        layers: Layers of the GRU.
        causal: See no later turns.
        joint: One GRU reads all modalities together, so that an utterance gets what other turns have in a
            modality that it lacks itself. Otherwise each modality has its own GRU and sees itself alone.
        dropout: Share of a turn's state dropped in training.

    Raises:
        ValueError: A size is below 1 or `dropout` is out of range.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        hidden_size: int = 128,
        layers: int = 1,
        causal: bool = False,
        joint: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths)
        _check_sizes(hidden_size=hidden_size, layers=layers)
        self.exchange = Exchange(
            widths, hidden_size, joint, dropout, lambda: Recurrence(hidden_size, hidden_size, layers, causal)
        )


class TransformerContext(Context):
    """Attention between the turns of a dialogue, with a learned bias for their distance (20.5).

    Args:
        widths: Width of each modality's states.
        hidden_size: Width of a turn's state.
        layers: Layers of the transformer.
        heads: Attention heads.
        causal: See no later turns.
        joint: As in `GRUContext`.
        dropout: Share dropped of a turn's state, and in the layers.

    Raises:
        ValueError: A size is below 1, `heads` does not divide `hidden_size`, or `dropout` is out of range.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        hidden_size: int = 128,
        layers: int = 2,
        heads: int = 4,
        causal: bool = False,
        joint: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths)
        _check_sizes(hidden_size=hidden_size, layers=layers, heads=heads)
        if hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
        self.exchange = Exchange(
            widths,
            hidden_size,
            joint,
            dropout,
            lambda: Attention(hidden_size, layers, heads, causal, dropout),
        )


class GraphContext(Context):
    """Graphs over the turns around a turn, by order and by speaker, like GCNet's ((20.7) to (20.10)).

    Args:
        widths: Width of each modality's states.
        hidden_size: Width of a turn's state, of the GRUs in each direction and of the graphs.
        layers: Layers of each GRU.
        window: Turns on each side that a turn has an edge to.
        causal: See no later turns.
        joint: As in `GRUContext`.
        dropout: Share of a turn's state dropped in training.

    Raises:
        ValueError: A size is below 1 or `dropout` is out of range.
    """

    reads_speakers = True

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        hidden_size: int = 128,
        layers: int = 1,
        window: int = 6,
        causal: bool = False,
        joint: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths)
        _check_sizes(hidden_size=hidden_size, layers=layers, window=window)
        self.exchange = Exchange(
            widths, hidden_size, joint, dropout, lambda: Graphs(hidden_size, layers, window, causal)
        )


CONTEXTS: dict[str, type[Context]] = {
    "none": Context,
    "gru": GRUContext,
    "transformer": TransformerContext,
    "graph": GraphContext,
}


@dataclass(frozen=True)
class Turns:
    """Where the samples of a batch are in their dialogues.

    Attributes:
        dialogue: Row of each sample's dialogue, `(batch,)`, from 0.
        turn: Place of each sample in its dialogue, `(batch,)`, from 0.
        lengths: Turns of each dialogue, `(dialogues,)`.
        longest: Turns of the longest dialogue.
        speaker: Number of each sample's speaker within its dialogue, `(batch,)`; None if unknown.
    """

    dialogue: Tensor
    turn: Tensor
    lengths: Tensor
    longest: int
    speaker: Tensor | None

    @classmethod
    def of(cls, sequence: ModalitySequence) -> "Turns":
        """Places of the samples of a sequence; each is a dialogue of its own if it has none."""
        if sequence.dialogue is None:
            rows = torch.arange(len(sequence.present), device=sequence.present.device)
            return cls(rows, torch.zeros_like(rows), torch.ones_like(rows), 1, torch.zeros_like(rows))
        names, rows = torch.unique(sequence.dialogue, return_inverse=True)
        lengths = rows.new_zeros(len(names)).scatter_reduce(0, rows, sequence.turn + 1, "amax")
        return cls(rows, sequence.turn, lengths, int(lengths.max()), sequence.speaker)

    def spread(self, states: Tensor) -> Tensor:
        """Arrange `(batch, ...)` by dialogue and turn, `(dialogues, longest, ...)`; padding is zero."""
        grid = states.new_zeros(len(self.lengths), self.longest, *states.shape[1:])
        return grid.index_put((self.dialogue, self.turn), states)

    def collect(self, grid: Tensor) -> Tensor:
        """Bring `(dialogues, longest, ...)` back to the order of the batch, `(batch, ...)`."""
        return grid[self.dialogue, self.turn]

    def reversed(self, grid: Tensor) -> Tensor:
        """Reverse the turns of each dialogue in `(dialogues, longest, ...)`; padding stays at the end."""
        steps = torch.arange(self.longest, device=grid.device)
        places = (self.lengths.unsqueeze(1) - 1 - steps) % self.longest
        return grid[torch.arange(len(grid), device=grid.device).unsqueeze(1), places]


class Exchange(nn.Module):
    """Carries what modalities say from turn to turn.

        u_i^m   = W_m LayerNorm(mean_t x_{i,t}^m)     state of turn i; zero where it lacks m         (20.1)
        c_i^m   = network_m(u_1^m, ..., u_n^m)_i      over the dialogue of n turns                   (20.2)
        x'_i,t^m = x_{i,t}^m + V_m c_i^m              for the steps that turn i has                  (20.3)

    `joint` reads sum_m u_i^m with one network in place of three. V_m starts at zero, so a new context
    changes nothing.

    Args:
        widths: Width of each modality's states.
        hidden_size: Width of u.
        joint: Read all modalities together.
        dropout: Share of u dropped in training.
        make_network: Makes a network, whose attribute `width` is the width of c.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        hidden_size: int,
        joint: bool,
        dropout: float,
        make_network: Callable[[], "Recurrence | Attention | Graphs"],
    ) -> None:
        super().__init__()
        self.read = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(widths[name]), ScaledLinear(widths[name], hidden_size))
                for name in MODALITIES
            }
        )
        self.dropout = Dropout(dropout)
        self.networks = nn.ModuleDict({name: make_network() for name in ((JOINT,) if joint else MODALITIES)})
        width = next(iter(self.networks.values())).width
        self.write = nn.ModuleDict({name: ClosedLinear(width, widths[name]) for name in MODALITIES})

    def forward(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Add the context to states `(batch, time, width)` of each modality."""
        turns = Turns.of(sequences[MODALITIES[0]])
        states = {
            name: self.dropout(self.read[name](masked_mean(sequences[name]))) for name in MODALITIES
        }  # (batch, hidden) each
        present = {name: sequences[name].present for name in MODALITIES}
        states = {name: state * present[name].unsqueeze(-1) for name, state in states.items()}
        if JOINT in self.networks:
            together = torch.stack(list(states.values())).sum(dim=0)
            present_at_all = torch.stack(list(present.values())).any(dim=0)
            context = dict.fromkeys(MODALITIES, self._over(JOINT, together, present_at_all, turns))
        else:
            context = {name: self._over(name, states[name], present[name], turns) for name in MODALITIES}
        return {
            name: sequence.with_values(sequence.values + self.write[name](context[name]).unsqueeze(1))
            for name, sequence in sequences.items()
        }

    def _over(self, network: str, states: Tensor, present: Tensor, turns: Turns) -> Tensor:
        """Context c of each sample, `(batch, width)`, from its u, `(batch, hidden)`."""
        return turns.collect(self.networks[network](turns.spread(states), turns.spread(present), turns))

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Everything of a modality, unless modalities are read together."""
        if JOINT in self.networks:
            return {name: [] for name in MODALITIES}
        parts = (self.read, self.networks, self.write)
        return {
            name: [parameter for part in parts for parameter in part[name].parameters()]
            for name in MODALITIES
        }


class Recurrence(nn.Module):
    """A GRU from the first turn on, and another from the last turn back unless `causal`.

    Args:
        inputs: Width of the input.
        hidden_size: Width of each GRU.
        layers: Layers of each GRU.
        causal: See no later turns.
    """

    def __init__(self, inputs: int, hidden_size: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.forwards = nn.GRU(inputs, hidden_size, layers, batch_first=True)
        self.backwards = None if causal else nn.GRU(inputs, hidden_size, layers, batch_first=True)
        self.width = hidden_size * (1 if causal else 2)

    def forward(self, states: Tensor, present: Tensor, turns: Turns) -> Tensor:
        """Map `(dialogues, turns, hidden)` to `(dialogues, turns, width)`; absent turns are zero inputs."""
        before, _ = self.forwards(states)
        if self.backwards is None:
            return before
        after, _ = self.backwards(turns.reversed(states))
        return torch.cat([before, turns.reversed(after)], dim=-1)


class Attention(nn.Module):
    """A transformer over the turns of a dialogue; it sees those that have the modality, and itself.

    Args:
        hidden_size: Width of the states.
        layers: Number of layers.
        heads: Attention heads.
        causal: See no later turns.
        dropout: Share dropped in a layer.
    """

    def __init__(self, hidden_size: int, layers: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal = causal
        self.bias = DistanceBias(heads, causal)
        self.layers = nn.ModuleList(AttentionLayer(hidden_size, heads, dropout) for _ in range(layers))
        self.width = hidden_size

    def forward(self, states: Tensor, present: Tensor, turns: Turns) -> Tensor:
        """Map `(dialogues, turns, hidden)`, where `(dialogues, turns)` are `present`, to the same shape."""
        steps = torch.arange(turns.longest, device=states.device)
        apart = steps - steps.unsqueeze(1)  # by query and key; below 0 the key is an earlier turn
        seen = present.unsqueeze(1) | (apart == 0)  # itself always, so that no query is without a key
        if self.causal:
            seen = seen & (apart <= 0)
        mask = torch.where(seen.unsqueeze(1), self.bias(apart), -torch.inf)  # (dialogues, heads, ...)
        for layer in self.layers:
            states = layer(states, mask)
        return states


class DistanceBias(nn.Module):
    """Bias of attention by the distance of two turns, learned for each head (20.6).

    It starts with each head at one of the nearest turns: one before, one after, two before and so on; with
    `causal`, one before, two before and so on.

    Args:
        heads: Attention heads.
        causal: See no later turns.
    """

    def __init__(self, heads: int, causal: bool) -> None:
        super().__init__()
        steps = range(1, heads + 1)
        self.nearest = [-step if causal else -(step + 1) // 2 if step % 2 else step // 2 for step in steps]
        self.weight = nn.Parameter(torch.empty(2 * FARTHEST + 1, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a learned part."""
        nn.init.zeros_(self.weight)

    def forward(self, apart: Tensor) -> Tensor:
        """Bias `(heads, queries, keys)` of distances `(queries, keys)`, below 0 where the key is earlier."""
        apart = apart.clamp(-FARTHEST, FARTHEST)
        from_nearest = apart.unsqueeze(-1) - torch.tensor(self.nearest, device=apart.device)
        return rearrange(self.weight[apart + FARTHEST] - from_nearest.abs(), "q k h -> h q k")


class AttentionLayer(nn.Module):
    """A layer of a transformer, with the norm before attention and MLP.

    Args:
        hidden_size: Width of the states.
        heads: Attention heads.
        dropout: Share of each result dropped in training.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden_size)
        self.query_key_value = ScaledLinear(hidden_size, 3 * hidden_size)
        self.merge = ScaledLinear(hidden_size, hidden_size)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(hidden_size),
            ScaledLinear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            ScaledLinear(2 * hidden_size, hidden_size),
        )
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map `(dialogues, turns, hidden)`; `mask` `(dialogues, heads, turns, turns)` is added to logits."""
        query, key, value = rearrange(
            self.query_key_value(self.norm(states)), "d t (three h w) -> three d h t w", three=3, h=self.heads
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        states = states + self.dropout(self.merge(rearrange(attended, "d h t w -> d t (h w)")))
        return states + self.dropout(self.perceptron(states))


class Graphs(nn.Module):
    """A GRU over the turns, then a graph by order and a graph by speaker, whose results are added.

    Args:
        hidden_size: Width of the states, of the GRUs in each direction and of the graphs.
        layers: Layers of each GRU.
        window: Turns on each side that a turn has an edge to.
        causal: See no later turns.
    """

    def __init__(self, hidden_size: int, layers: int, window: int, causal: bool) -> None:
        super().__init__()
        self.window = window
        self.causal = causal
        self.order = Recurrence(hidden_size, hidden_size, layers, causal)
        kinds = {"order": 2 if causal else 3, "speaker": 2}  # relations of each graph
        self.graphs = nn.ModuleDict(
            {
                name: TurnGraph(self.order.width, hidden_size, relations, layers, causal)
                for name, relations in kinds.items()
            }
        )
        self.width = hidden_size

    def forward(self, states: Tensor, present: Tensor, turns: Turns) -> Tensor:
        """Map `(dialogues, turns, hidden)` to the same shape; absent turns are zero inputs.

        Raises:
            ValueError: The batch has dialogues and no speakers.
        """
        nodes = self.order(states, present, turns)  # x (20.7)
        edges = self._edges(turns)
        results = [self.graphs[name](nodes, edges[name], present, turns) for name in self.graphs]
        return torch.stack(results).sum(dim=0)

    def _edges(self, turns: Turns) -> dict[str, Tensor]:
        """Edges to turn i from turn j by relation, `(relations, dialogues, i, j)` bool, of each graph."""
        if turns.speaker is None:
            raise ValueError("a graph of turns needs their speakers: `speaker` beside `dialogue` and `turn`")
        steps = torch.arange(turns.longest, device=turns.turn.device)
        apart = steps - steps.unsqueeze(1)  # below 0 the neighbour is an earlier turn
        order = [apart == 0, apart < 0, *([] if self.causal else [apart > 0])]
        near = (apart.abs() <= self.window) & torch.stack(order).any(dim=0)
        there = turns.spread(torch.ones_like(turns.turn, dtype=torch.bool))
        near = near & there.unsqueeze(1)  # (dialogues, i, j)
        speakers = turns.spread(turns.speaker)
        same = speakers.unsqueeze(2) == speakers.unsqueeze(1)
        return {
            "order": torch.stack([near & relation for relation in order]),
            "speaker": torch.stack([near & same, near & ~same]),
        }


class TurnGraph(nn.Module):
    """A convolution by relation, one over all neighbours, and a GRU over nodes and results.

        g_i = W x_i + w + sum_r mean_{j in N_i^r} W_r x_j            (20.8)
        h_i = K g_i + k + mean_{j in N_i} V g_j                      (20.9)
        c_i = ReLU(M GRU([x; h])_i + m)                              (20.10)

    Args:
        inputs: Width of x.
        hidden_size: Width of g, h, c, and of the GRU in each direction.
        relations: Number of relations r.
        layers: Layers of the GRU.
        causal: See no later turns.
    """

    def __init__(self, inputs: int, hidden_size: int, relations: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.own = ScaledLinear(inputs, hidden_size)
        self.by_relation = nn.ModuleList(
            ScaledLinear(inputs, hidden_size, bias=False) for _ in range(relations)
        )
        self.keep = ScaledLinear(hidden_size, hidden_size)
        self.gather = ScaledLinear(hidden_size, hidden_size, bias=False)
        self.order = Recurrence(inputs + hidden_size, hidden_size, layers, causal)
        self.merge = ScaledLinear(self.order.width, hidden_size)

    def forward(self, nodes: Tensor, edges: Tensor, present: Tensor, turns: Turns) -> Tensor:
        """Map `(dialogues, turns, inputs)` to c `(dialogues, turns, hidden)`.

        `edges` `(relations, dialogues, i, j)` says which j are neighbours of i.
        """
        local = self.own(nodes)
        for relation, of_relation in zip(self.by_relation, edges, strict=True):
            local = local + relation(_mean_over(of_relation, nodes))
        spread = self.keep(local) + self.gather(_mean_over(edges.any(dim=0), local))
        return F.relu(self.merge(self.order(torch.cat([nodes, spread], dim=-1), present, turns)))


def _mean_over(edges: Tensor, nodes: Tensor) -> Tensor:
    """Mean of the neighbours of each turn, `(dialogues, turns, width)`; zero without any."""
    shares = edges.to(nodes.dtype)
    return (shares / shares.sum(dim=-1, keepdim=True).clamp(min=1)) @ nodes


class ScaledLinear(nn.Linear):
    """A linear layer that starts as in torch: its output is of the size of its input, whatever the widths.

    transformers would give `nn.Linear` weights of 0.02, so that narrow features start near zero.
    """


class ClosedLinear(nn.Module):
    """A linear layer without a bias that starts at zero, so that what it adds starts at nothing.

    Args:
        inputs: Input width.
        outputs: Output width.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Map everything to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Map `(..., inputs)` to `(..., outputs)`."""
        return F.linear(states, self.weight)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
