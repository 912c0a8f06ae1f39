# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from msa_online import MSAModel


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture
def model(tiny_model) -> MSAModel:
    """The tiny model with random missing tokens, so that every hidden modality makes a difference."""
    torch.manual_seed(1)
    torch.nn.init.normal_(tiny_model.head.missing.tokens)
    return tiny_model
