# SPDX-License-Identifier: Apache-2.0
"""AdamW with a learning rate for the text encoder and one for the rest; linear warm-up and decay."""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from msa_online.modeling_msa import MSAModel


def make_optimizer(
    model: MSAModel, *, learning_rate: float, text_learning_rate: float, weight_decay: float
) -> AdamW:
    """AdamW over the trainable parameters in four groups: {text encoder, rest} x {matrices, vectors}.

    Vectors (biases, norms, scalings) are not decayed. A frozen text encoder contributes no group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = text_learning_rate if name.startswith("encoders.text.") else learning_rate
            is_vector = parameter.ndim <= 1 or name.endswith("bias")  # biases side by side are a matrix
            groups.setdefault((rate, 0.0 if is_vector else weight_decay), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]
    )


def make_scheduler(optimizer: AdamW, *, steps: int, warmup: float, decay: str = "linear") -> LRScheduler:
    """Learning rate rising over the first `warmup` share of `steps` optimizer steps, then as `decay` says.

    "linear" falls to zero at the last step; "constant" stays.
    """
    name = {"linear": "linear", "constant": "constant_with_warmup"}[decay]
    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
