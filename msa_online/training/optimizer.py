# SPDX-License-Identifier: Apache-2.0
"""AdamW with a learning rate for the text encoder and one for the rest; linear warm-up and decay."""

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

from msa_online.modeling_msa import MSAModel


def make_optimizer(
    model: MSAModel, *, learning_rate: float, text_learning_rate: float, weight_decay: float
) -> AdamW:
    """AdamW over the trainable parameters in four groups: {text encoder, rest} x {matrices, vectors}.

    Vectors (biases, norms, scalings) are not decayed. A frozen text encoder contributes no group.
    """
    text = {id(parameter) for parameter in model.encoders["text"].parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    for rate, members in (
        (text_learning_rate, [parameter for parameter in trainable if id(parameter) in text]),
        (learning_rate, [parameter for parameter in trainable if id(parameter) not in text]),
    ):
        groups += _by_decay(members, rate, weight_decay)
    return AdamW(groups)


def _by_decay(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_scheduler(optimizer: AdamW, *, steps: int, warmup: float) -> LRScheduler:
    """Learning rate rising over the first `warmup` share of `steps` optimizer steps, then falling to zero."""
    return get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
