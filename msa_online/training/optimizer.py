# SPDX-License-Identifier: Apache-2.0
"""AdamW with a learning rate for each encoder and one for the rest; linear warm-up and decay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.lora import adapted_modalities
from msa_online.modeling_msa import PROBES, MSAModel

PRETRAINED_RATE = 2e-5
"""Default learning rate of a pretrained encoder."""
ADAPTER_RATE = 1e-4
"""Default learning rate of the adapters of LoRA."""


def make_optimizer(
    model: MSAModel,
    *,
    learning_rate: float,
    learning_rates: Mapping[str, float] = MappingProxyType({}),
    layer_decay: float = 1.0,
    weight_decay: float,
) -> AdamW:
    """AdamW over the trainable parameters, in groups of equal learning rate, weight decay and modality.

    The `name` of a group is "<modality>_encoder", "probes" (of a modulator) or "rest"; with a layer decay,
    also "<modality>_encoder/embeddings" and "<modality>_encoder/layer 1". Its `modality` is that of its
    parameters, None for shared ones. Vectors (biases, norms, scalings) have no weight decay. What is frozen
    is in no group. The step is torch's fused kernel, a single pass over memory; the meta device has none and
    uses the default.

    Args:
        model: The model; what is frozen has no `requires_grad`.
        learning_rate: Peak learning rate of all that has none of its own.
        learning_rates: Peak learning rates of encoders by modality; by default `PRETRAINED_RATE` for
            pretrained encoders, `ADAPTER_RATE` for those with adapters. Encoders that train from scratch are
            part of the rest unless named, and so are layers that the model adds to a pretrained encoder.
        layer_decay: Learning rate of each layer of a pretrained encoder, relative to that above.
        weight_decay: Weight decay of matrices.
    """
    parts = _parts(model, learning_rate, learning_rates, layer_decay)
    owners = {
        id(parameter): modality
        for modality, owned in model.modality_parameters().items()
        for parameter in owned
    }
    groups: dict[tuple[Part, str | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name.endswith("bias")  # stacked biases are matrices
            key = (parts[name], owners.get(id(parameter)), 0.0 if is_vector else weight_decay)
            groups.setdefault(key, []).append(parameter)
    is_meta = any(parameter.is_meta for parameters in groups.values() for parameter in parameters)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": part.rate,
                "weight_decay": decay,
                "name": part.name,
                "modality": modality,
            }
            for (part, modality, decay), parameters in groups.items()
        ],
        fused=None if is_meta else True,
    )


class Part(NamedTuple):
    """Part of the model with a learning rate of its own.

    Attributes:
        name: Name of its groups.
        rate: Peak learning rate.
    """

    name: str
    rate: float


def _parts(
    model: MSAModel, learning_rate: float, learning_rates: Mapping[str, float], layer_decay: float
) -> dict[str, Part]:
    """The part that each parameter belongs to, by its name."""
    names = [name for name, _ in model.named_parameters()]
    parts = {name: Part("probes" if name.startswith(PROBES) else "rest", learning_rate) for name in names}
    adapted = adapted_modalities(model)
    for modality, encoder in model.encoders.items():
        part, prefix = f"{modality}_encoder", f"encoders.{modality}."
        if isinstance(encoder, PretrainedEncoder):
            default = ADAPTER_RATE if modality in adapted else PRETRAINED_RATE
            rate, top = learning_rates.get(modality, default), len(encoder.layers)
            for name, depth in encoder.depths().items():
                place = f"/layer {depth}" if depth else "/embeddings"
                own_name = f"{part}{place}" if layer_decay < 1 and depth <= top else part
                own_rate = rate * layer_decay ** max(top - depth, 0)
                parts[f"{prefix}model.{name}"] = Part(own_name, own_rate)
        elif modality in learning_rates:
            own = Part(part, learning_rates[modality])
            parts |= {name: own for name in names if name.startswith(prefix)}
    return parts


@contextmanager
def scaled_rates(optimizer: Optimizer, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply the learning rate of each modality's parameters by its factor within a `with` block."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factors.get(group["modality"], 1.0)
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


@dataclass
class WarmupAndDecay:
    """Factor on all peak learning rates, by the number of optimizer steps taken.

    The fields are plain data, which torch saves with the state of the scheduler.

    Attributes:
        warmup: Steps in which it rises to 1.
        steps: Steps of the run.
        decay: "linear" falls to zero at the last step, "constant" stays at 1.
        start: Step at which the decay starts.
    """

    warmup: int
    steps: int
    decay: str
    start: int

    def __call__(self, step: int) -> float:
        """The factor after `step` steps, in [0, 1]."""
        if step < self.warmup:
            return step / self.warmup
        if self.decay == "constant":
            return 1.0
        return max(0.0, (self.steps - step) / max(1, self.steps - self.start))


def make_scheduler(optimizer: AdamW, *, steps: int, warmup: float, decay: str = "linear") -> LambdaLR:
    """Learning rate that rises over the first `warmup` share of `steps` optimizer steps.

    After that, `decay` "linear" falls to zero at the last step, and "constant" stays.
    """
    rising = round(warmup * steps)
    return LambdaLR(optimizer, WarmupAndDecay(rising, steps, decay, start=rising))


def restart_decay(scheduler: LambdaLR) -> None:
    """Let the decay start again now, at the peak learning rates; it ends at the same step as before.

    The warm-up is not repeated, and one that has not ended goes on.
    """
    for factor in scheduler.lr_lambdas:
        factor.start = max(factor.warmup, scheduler.last_epoch)
        rates = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
