# SPDX-License-Identifier: Apache-2.0
"""Encoded batches, and small heads that read them."""

import pytest
import torch

from msa_online.methods import HEADS, BalancingHead
from msa_online.modalities import MODALITIES, ModalitySequence
from tests.training_fixtures import (  # noqa: F401
    feature_rows,
    features_config,
    make_trial,
    on_two_processes,
    rows,
    still_config,
    train,
)

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
def make_head():
    """A function that makes a small head by its name, with random weights, in float64 and evaluation mode.

    `moved` are the starts of names of parameters that are moved off their start values: those of a norm are
    the identity, and tokens are near zero, where an error could hide.
    """

    def make(
        name: str,
        outputs: int = 1,
        stage: str | None = None,
        *,
        widths=WIDTHS,
        moved: tuple[str, ...] = (),
        **settings,
    ) -> BalancingHead:
        torch.manual_seed(0)
        head = HEADS[name](widths, outputs, **{"hidden_size": 8, **settings}).double().eval()
        if stage:
            head.start_stage(stage)
        with torch.no_grad():
            for key, parameter in head.named_parameters():
                if key.startswith(moved):
                    parameter += torch.rand_like(parameter) * 0.5
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
