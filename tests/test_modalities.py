# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from msa_online.modalities import ModalitySequence

MASK = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])


def is_zero_where_unobserved(sequence: ModalitySequence) -> bool:
    return not sequence.values[~sequence.mask].any()


def test_other_values_leave_unobserved_steps_at_zero():
    """A layer's bias in padding would reach attention and means."""
    torch.manual_seed(0)
    sequence, layer = ModalitySequence.of(torch.randn(3, 3, 4), MASK), nn.Linear(4, 5)
    assert layer(sequence.values)[~MASK].all()  # the bias
    mapped = sequence.with_values(layer(sequence.values))
    assert mapped.values.shape == (3, 3, 5) and is_zero_where_unobserved(mapped)
    assert torch.equal(mapped.values[MASK], layer(sequence.values)[MASK])
    assert torch.equal(mapped.mask, sequence.mask) and torch.equal(mapped.present, sequence.present)


@pytest.mark.parametrize("left_over", [7.0, math.inf, math.nan])
def test_no_way_of_making_a_sequence_lets_padding_through(left_over):
    values = torch.where(MASK.unsqueeze(-1), torch.ones(3, 3, 2), left_over)
    sequence = ModalitySequence.of(values, MASK)
    assert is_zero_where_unobserved(sequence)
    assert is_zero_where_unobserved(sequence.with_values(values))
    assert sequence.present.tolist() == [True, True, False]


def test_a_hidden_sample_is_absent_and_the_others_stay_as_they_were():
    sequence = ModalitySequence.of(torch.ones(3, 3, 2), MASK)
    hidden = sequence.only(torch.tensor([False, True, True]))
    assert hidden.present.tolist() == [False, True, False]
    assert is_zero_where_unobserved(hidden) and not hidden.mask[0].any()
    assert torch.equal(hidden.values[1:], sequence.values[1:])


def test_values_outside_the_mask_have_no_gradient():
    values = torch.ones(3, 3, 2, requires_grad=True)
    ModalitySequence.of(values, MASK).with_values(values * 2).values.sum().backward()
    assert torch.equal(values.grad.bool().all(dim=-1), MASK)
