# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from msa_online.layers.losses import mean_where, sample_losses, task_loss
from msa_online.layers.modules import (
    Dropout,
    ExpertLayer,
    ExpertStacks,
    LearnedScalar,
    MissingTokens,
    StackedLinear,
    masked_mean,
)
from msa_online.layers.precision import in_fp32
from msa_online.modalities import MODALITIES, ModalitySequence

HIDDEN, BATCH = 6, 3
STEPS = {"text": 4, "audio": 5, "vision": 2}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequences(steps: dict[str, int] = STEPS) -> dict[str, ModalitySequence]:
    """Random states; the second sample lacks its last step, the third has none at all."""
    made = {}
    for name, length in steps.items():
        mask = torch.ones(BATCH, length, dtype=torch.bool)
        mask[1, -1] = length == 1
        mask[2] = False
        made[name] = ModalitySequence.of(random(BATCH, length, HIDDEN, seed=length), mask)
    return made


@pytest.fixture
def stacks() -> ExpertStacks:
    torch.manual_seed(0)
    return ExpertStacks(HIDDEN, depth=2, heads=2, dropout=0.0).double()


def test_layers_side_by_side_are_as_many_linear_layers():
    torch.manual_seed(0)
    together = StackedLinear(3, HIDDEN, 4).double()
    layers = [nn.Linear(HIDDEN, 4).double() for _ in range(3)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(together.weight[number].T)
            layer.bias.copy_(together.bias[number, 0])
    for modality in range(3):  # each of three modalities through each of three layers: nine passes
        rows = random(7, HIDDEN, seed=modality)
        passed = together(rows.expand(3, 7, HIDDEN))
        for number, layer in enumerate(layers):
            torch.testing.assert_close(passed[number], layer(rows), **EXACT)
            torch.testing.assert_close(together(rows.unsqueeze(0), number)[0], layer(rows), **EXACT)


def test_layers_side_by_side_start_as_linear_layers_do():
    torch.manual_seed(0)
    together, alone = StackedLinear(3, 100, 50), nn.Linear(100, 50)
    for one, other in ((together.weight, alone.weight), (together.bias, alone.bias)):
        assert one.abs().max() <= 0.1
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.2)


def attention_by_hand(layer: ExpertLayer, stack: int, states: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of one sample `(time, hidden)` over the steps that are seen, head by head."""
    query, key = (states @ layer.query_key.weight[stack] + layer.query_key.bias[stack]).chunk(2, dim=-1)
    value = states @ layer.value.weight[stack] + layer.value.bias[stack]
    width = HIDDEN // layer.heads
    attended = torch.zeros_like(states)
    for step in range(len(states)):
        for head in range(layer.heads):
            cut = slice(head * width, (head + 1) * width)
            weights = {
                other: math.exp(query[step, cut] @ key[other, cut] / math.sqrt(width))
                for other in range(len(states))
                if seen[other]
            }
            for other, weight in weights.items():
                attended[step, cut] += weight / sum(weights.values()) * value[other, cut]
    return attended


@pytest.mark.parametrize("heads", [1, 2, 3])
@torch.no_grad()
def test_attention_is_a_softmax_over_the_steps_that_are_there(heads):
    torch.manual_seed(0)
    layer = ExpertLayer(3, HIDDEN, heads, dropout=0.0).double()
    for stacked in (layer.widen, layer.narrow):  # leave the perceptron out
        stacked.weight.zero_()
        stacked.bias.zero_()
    given = sequences()["text"]
    states = given.values.expand(3, *given.values.shape)
    (passed,) = layer([states], [given.mask])
    for stack in range(3):
        for sample in range(BATCH):
            attended = attention_by_hand(layer, stack, given.values[sample], given.mask[sample])
            torch.testing.assert_close(passed[stack, sample] - given.values[sample], attended, **EXACT)
    assert torch.equal(passed[:, 2], states[:, 2])  # nothing is there: attention adds exactly zero


@torch.no_grad()
def test_all_stacks_at_once_are_each_stack_by_itself(stacks):
    given = sequences()
    every = stacks.every(given)
    for name, sequence in given.items():
        assert every[name].shape == (3, *sequence.values.shape)
        for number, owner in enumerate(MODALITIES):
            alone = stacks.own({**given, owner: sequence})[owner]
            torch.testing.assert_close(every[name][number], alone, **EXACT)


@torch.no_grad()
def test_samples_of_one_step_pass_as_they_do_beside_longer_ones(stacks):
    short = sequences(dict.fromkeys(MODALITIES, 1))
    padded = {
        name: ModalitySequence(
            nn.functional.pad(sequence.values, (0, 0, 0, 1)),
            nn.functional.pad(sequence.mask, (0, 1)),
            sequence.present,
        )
        for name, sequence in short.items()
    }
    for passed, expected in (
        (stacks.every(short), stacks.every(padded)),
        (stacks.own(short), stacks.own(padded)),
    ):
        for name in MODALITIES:
            torch.testing.assert_close(passed[name], expected[name][..., :1, :], **EXACT)


def test_a_step_that_is_not_there_moves_no_other(stacks):
    given = sequences()
    values = given["text"].values.clone()
    values[1, -1] = 100.0
    spoilt = {**given, "text": ModalitySequence(values, given["text"].mask, given["text"].present)}
    one, other = (stacks.every(states)["text"] for states in (given, spoilt))
    torch.testing.assert_close(one[:, 1, :-1], other[:, 1, :-1], **EXACT)


def test_dropout_drops_its_share_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, ones = Dropout(0.3), torch.ones(200, 500)
    dropped = dropout(ones)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.max().item() == pytest.approx(1 / 0.7)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert dropout(ones.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(dropout.eval()(ones), ones)
    assert torch.equal(Dropout(0.0)(ones), ones)


def test_a_token_stands_in_as_one_step_of_what_is_absent():
    tokens = MissingTokens(HIDDEN).double()
    given = sequences()["audio"]
    stood_in = tokens.stand_in("audio", given)
    assert torch.equal(stood_in.values[2, 0], tokens.tokens[MODALITIES.index("audio")])
    assert stood_in.mask[2].tolist() == [True, False, False, False, False]
    assert torch.equal(stood_in.present, given.present)  # a token is no observation
    for sample in (0, 1):
        assert torch.equal(stood_in.values[sample], given.values[sample])
        assert torch.equal(stood_in.mask[sample], given.mask[sample])


def test_a_learned_scalar_moves_between_its_bounds_and_a_constant_does_not():
    learned, constant = LearnedScalar(0.05, (0.01, 0.5)), LearnedScalar(0.05, (0.01, 0.5), learned=False)
    assert learned().item() == pytest.approx(0.05) and constant() == 0.05
    assert not list(constant.parameters())
    for value, used in ((0.2, 0.2), (0.001, 0.01), (7.0, 0.5)):
        with torch.no_grad():
            learned.value.fill_(value)
        assert learned().item() == pytest.approx(used)
    learned.reset_parameters()
    assert learned().item() == pytest.approx(0.05)


def test_the_mean_over_time_counts_only_what_was_observed():
    pooled = masked_mean(sequences()["text"])
    values = sequences()["text"].values
    torch.testing.assert_close(pooled[0], values[0].mean(dim=0), **EXACT)
    torch.testing.assert_close(pooled[1], values[1, :3].mean(dim=0), **EXACT)
    assert not pooled[2].any()


@pytest.mark.parametrize("left_over", [3.0, math.inf, math.nan])
def test_the_mean_over_time_ignores_what_a_layer_left_in_padding(left_over):
    """One observed step of 1 and one padded step of 3 used to average to 4 / 1."""
    mask = torch.tensor([[True, False], [False, False]])
    sequence = ModalitySequence.of(torch.ones(2, 2, 1), mask)
    values = torch.where(mask.unsqueeze(-1), 1.0, left_over)
    assert masked_mean(replace(sequence, values=values)).tolist() == [[1.0], [0.0]]


def test_a_mean_of_nothing_is_zero():
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 6.0]])
    counted = torch.tensor([[True, False, True], [False, False, False]])
    assert mean_where(values, counted).tolist() == [3.5, 0.0]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_fp32_and_exact_numbers_stay_exact(half):
    assert in_fp32(torch.ones(2, dtype=half)).dtype == torch.float32
    assert in_fp32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    huge = torch.full((2, 1), 1000.0, dtype=half)  # its square overflows fp16
    assert task_loss(huge, torch.zeros(2)).item() == pytest.approx(1e6)


def test_the_supervised_loss_of_a_score_and_of_classes():
    scores, labels = torch.tensor([[1.0], [-2.0]]), torch.tensor([3.0, -1.0])
    assert sample_losses(scores, labels).tolist() == [4.0, 1.0]
    assert sample_losses(scores, labels, "l1").tolist() == [2.0, 1.0]
    assert task_loss(scores, labels).item() == 2.5
    assert task_loss(scores, labels, torch.tensor([False, True])).item() == 1.0
    assert task_loss(scores, labels, torch.tensor([False, False])).item() == 0.0
    logits, classes = random(5, 4), torch.arange(5) % 4
    expected = nn.functional.cross_entropy(logits, classes)
    torch.testing.assert_close(task_loss(logits, classes), expected)
    many = random(3, 5, 4)  # the same labels for each of three modalities
    for number in range(3):
        torch.testing.assert_close(
            sample_losses(many, classes)[number],
            nn.functional.cross_entropy(many[number], classes, reduction="none"),
        )
