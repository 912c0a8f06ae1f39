# SPDX-License-Identifier: Apache-2.0
"""A small EBMC head and encoded batches for it."""

import pytest
import torch

from msa_online.balancing import EBMCHead
from msa_online.modalities import MODALITIES, ModalitySequence

WIDTHS = {"text": 6, "audio": 5, "vision": 4}
STEPS = {"text": 3, "audio": 4, "vision": 2}


@pytest.fixture(scope="session")
def make_sequences():
    """A function that makes encoded batches; `present` is `(batch, 3)`, or one row for all."""

    def make(
        batch: int = 4, present=(True, True, True), *, seed: int = 0, dtype=torch.float64
    ) -> dict[str, ModalitySequence]:
        generator = torch.Generator().manual_seed(seed)
        there = torch.as_tensor(present).expand(batch, len(MODALITIES))
        sequences = {}
        for column, name in enumerate(MODALITIES):
            lengths = torch.randint(1, STEPS[name] + 1, (batch, 1), generator=generator)
            values = torch.randn(batch, STEPS[name], WIDTHS[name], generator=generator, dtype=torch.float64)
            sequence = ModalitySequence.of(values.to(dtype), torch.arange(STEPS[name]) < lengths)
            sequences[name] = sequence.only(there[:, column])
        return sequences

    return make


@pytest.fixture(scope="session")
def make_ebmc():
    """A function that makes a small head with random weights, in float64 and evaluation mode."""

    def make(outputs: int = 1, stage: str = "balance", **settings) -> EBMCHead:
        torch.manual_seed(0)
        head = EBMCHead(WIDTHS, outputs, **{"hidden_size": 8, "depth": 2, **settings}).double().eval()
        head.start_stage(stage)
        return head

    return make


GAPPY_STEPS = {"text": 4, "audio": 9, "vision": 3}


@pytest.fixture(scope="session")
def make_gappy():
    """A function that makes encoded batches with gaps: any step may be unobserved, the first one too."""

    def make(
        batch: int = 4, present=(True, True, True), *, seed: int = 0, dtype=torch.float64
    ) -> dict[str, ModalitySequence]:
        generator = torch.Generator().manual_seed(seed)
        there = torch.as_tensor(present).expand(batch, len(MODALITIES))
        sequences = {}
        for column, name in enumerate(MODALITIES):
            shape = (batch, GAPPY_STEPS[name])
            mask = torch.rand(shape, generator=generator) < 0.6
            one = torch.randint(GAPPY_STEPS[name], (batch, 1), generator=generator)
            mask |= torch.arange(GAPPY_STEPS[name]) == one  # at least one step of each sample
            values = torch.randn(*shape, WIDTHS[name], generator=generator, dtype=torch.float64)
            sequences[name] = ModalitySequence.of(values.to(dtype), mask).only(there[:, column])
        return sequences

    return make


@pytest.fixture(scope="session")
def make_cpsl():
    """A function that makes a small CP/SL head with random weights, in float64 and evaluation mode.

    It drops nothing, and no weight stands where it would not count.
    """
    from msa_online.balancing import CPSLHead

    def make(outputs: int = 1, widths=WIDTHS, **settings) -> CPSLHead:
        torch.manual_seed(0)
        small = {"hidden_size": 8, "fusion_size": 7, "dropout": 0.0, "classifier_dropout": 0.0}
        head = CPSLHead(widths, outputs, **{**small, **settings}).double().eval()
        with torch.no_grad():  # the norm starts as the identity, tokens near zero
            for parameter in (head.norm.weight, head.norm.bias, head.missing.tokens):
                parameter += torch.rand_like(parameter) * 0.5
        return head

    return make
