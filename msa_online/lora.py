# SPDX-License-Identifier: Apache-2.0
"""LoRA through peft: adapt a pretrained encoder by small matrices beside its frozen weights.

A run publishes complete weights, with the adapters merged. Beside them its folder `adapter/` holds what was
trained, in peft's format: the adapters, and every other trained part.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msa_online.configuration_msa import width_of, without_path
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.modeling_msa import PROBES, MSAModel

NAME = "default"
"""Name of the adapters inside the layers, as peft names them."""
PREFIX = "base_model.model."
"""Prefix of all names in a file of peft."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS_BY_TYPE = {"wavlm": ["intermediate_dense", "output_dense"]}
"""Layers to adapt where the default would have no effect: WavLM's attention reads the weights of its layers
without calling them."""


UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
"""Errors that peft, safetensors and torch raise on files that are damaged or of another model."""


class AdapterError(ValueError):
    """LoRA cannot be applied to an encoder, or an adapter to a model; the message says why."""


@dataclass(frozen=True)
class LoraSettings:
    """How an encoder is adapted.

    Attributes:
        r: Rank of the update of each weight matrix.
        alpha: The update is scaled by alpha / r; by default alpha is 2 r.
        dropout: Dropout of the adapters' inputs, in [0, 1).
        target_modules: Layers to adapt: last parts of their names, or a regular expression for whole names;
            by default those that peft knows for the encoder's type, else the linear layers of its attention.
    """

    r: int = 8
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None


def add_lora(encoder: PretrainedEncoder, settings: LoraSettings) -> list[str]:
    """Freeze the pretrained network of an encoder, and add trainable adapters to it.

    Args:
        encoder: The encoder; it is changed. What is on top of its network (norms, read-outs) trains as usual.
        settings: How.

    Returns:
        Names of the adapted layers in the network.

    Raises:
        AdapterError: No layer matches, or peft cannot adapt one that does.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a while to import
    from peft.tuners.lora.layer import _ConvNd

    network = encoder.model
    if settings.r > (width := width_of(network.config)):
        raise AdapterError(f"r is {settings.r:,}: at most the width of the encoder, {width:,}")
    targets = _default_targets(network) if settings.target_modules is None else settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha or 2 * settings.r,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    network.requires_grad_(False)
    try:
        inject_adapter_in_model(config, network, NAME)
    except (ValueError, re.error) as error:
        linear = sorted({name.rpartition(".")[2] for name, _ in _linear_layers(network)})
        raise AdapterError(
            f"no adapters for {targets!r} ({_first_line(error)}): name linear layers of the encoder in "
            f"target_modules: {', '.join(linear)}"
        ) from error
    adapted = [name for name, _ in _adapted_layers(network)]
    if odd := [name for name, layer in _adapted_layers(network) if isinstance(layer, _ConvNd)]:
        raise AdapterError(
            f"target_modules names {odd[0]}, a convolution, whose adapter cannot always be merged: name "
            "linear layers"
        )
    if network.config.model_type == "wavlm" and any(".attention." in name for name in adapted):
        raise AdapterError(
            "WavLM's attention reads the weights of its layers without calling them, so adapters there have "
            f"no effect: name others in target_modules, like {TARGETS_BY_TYPE['wavlm']}"
        )
    return adapted


def _default_targets(network: nn.Module) -> list[str] | None:
    """Layers to adapt; None for types whose layers peft knows."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = network.config.model_type
    if kind in TARGETS_BY_TYPE or kind in KNOWN:
        return TARGETS_BY_TYPE.get(kind)
    attention = [
        f"{name}." for name, module in network.named_modules() if type(module).__name__.endswith("Attention")
    ]
    found = [name for name, _ in _linear_layers(network) if name.startswith(tuple(attention))]
    if not found:
        raise AdapterError(f"an encoder of type {kind} has no attention: name layers in target_modules")
    return found


def _linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that are called; torch's own attention reads the weights of its output layer."""
    inside = tuple(
        f"{name}." for name, it in network.named_modules() if isinstance(it, nn.MultiheadAttention)
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(inside):
            yield name, module


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def adapted_modalities(model: MSAModel) -> list[str]:
    """Modalities whose encoder has adapters."""
    return [name for name, encoder in model.encoders.items() if any(_adapted_layers(encoder))]


def merged_weights(model: MSAModel) -> dict[str, Tensor]:
    """Weights of the model with the adapters merged, under the names of a model without adapters.

    The model is not changed: to merge in place and undo it would round its weights.
    """
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(PROBES)}
    for name, layer in _adapted_layers(model):
        own = {each.removeprefix(f"{name}."): each for each in weights if each.startswith(f"{name}.")}
        values = {each: weights.pop(full) for each, full in own.items()}
        for each, value in values.items():
            if each.startswith("base_layer."):
                weights[f"{name}.{each.removeprefix('base_layer.')}"] = value
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(NAME).detach()
    return weights


def remove_lora(model: MSAModel) -> None:
    """Remove the adapters without merging them; the names of the weights are those of `merged_weights`."""
    for modality in adapted_modalities(model):
        encoder = model.encoders[modality].model
        for name, layer in list(_adapted_layers(encoder)):
            encoder.set_submodule(name, layer.get_base_layer())
        del encoder.peft_config


def save_adapter(model: MSAModel, folder: Path) -> None:
    """Write what was trained in peft's format: the adapters of all encoders, and the other trained parts.

    Args:
        model: A model with adapters.
        folder: An existing folder.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    weights: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for modality in adapted_modalities(model):
        network, prefix = model.encoders[modality].model, f"encoders.{modality}.model."
        # without a look for the base model on the Hub
        adapters = get_peft_model_state_dict(network, adapter_name=NAME, save_embedding_layers=False)
        weights |= {f"{PREFIX}{prefix}{name}": value for name, value in adapters.items()}
        layers |= {f"{prefix}{name}": layer for name, layer in _adapted_layers(network)}
    frozen = _frozen_networks(model)
    rest = {
        name: value for name, value in model.state_dict().items() if not name.startswith((*frozen, PROBES))
    }
    weights |= {PREFIX + name: value for name, value in rest.items()}
    ranks = {name: layer.r[NAME] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[NAME] for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        # the checkpoint that training started from, or else the encoder
        base_model_name_or_path=without_path(
            model.name_or_path or model.config.encoder_names.get(adapted_modalities(model)[0])
        ),
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: other for name, other in ranks.items() if other != rank},
        alpha_pattern={name: other for name, other in alphas.items() if other != alpha},
        modules_to_save=_owners(model, rest),
    )
    config.target_modules = sorted(layers)  # given above, it would become a set, in another order every time
    config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)


def _frozen_networks(model: MSAModel) -> tuple[str, ...]:
    """Prefixes of the pretrained networks whose weights are those of the base: adapted or wholly frozen."""
    return tuple(
        f"encoders.{modality}.model."
        for modality, encoder in model.encoders.items()
        if isinstance(encoder, PretrainedEncoder)
        and (any(_adapted_layers(encoder)) or not any(it.requires_grad for it in encoder.model.parameters()))
    )


def _owners(model: MSAModel, names: Mapping[str, Tensor]) -> list[str]:
    """The largest modules whose whole state is in `names`."""
    owners: list[str] = []
    for module, _ in model.named_modules():
        prefix = f"{module}."
        own = [name for name in model.state_dict() if name.startswith(prefix)]
        inside = prefix.startswith(tuple(f"{owner}." for owner in owners))
        if module and own and not inside and all(name in names for name in own):
            owners.append(module)
    return owners


def open_adapter(model: MSAModel, folder: Path) -> MSAModel:
    """Apply an adapter in peft's format to the model it was made for, and merge it.

    Args:
        model: The model with the weights of the base, in fp32; it is changed.
        folder: Folder of `save_adapter`, or of peft's own `save_pretrained`.

    Returns:
        A model without adapters.

    Raises:
        AdapterError: The files are missing, damaged or of another kind than LoRA, or do not fit the model.
    """
    from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict

    settings = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder}: {WEIGHTS} is missing; save it with peft's default format, safetensors")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        # they are loaded by their names below; peft would take every module whose name ends like theirs
        config.modules_to_save = None
        adapted = LoraModel(model, config, NAME)
        expected = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
        found = {name.removeprefix(PREFIX): it for name, it in load_file(folder / WEIGHTS).items()}
        adapters = {name: found.pop(name) for name in expected if name in found}
        set_peft_model_state_dict(model, adapters, adapter_name=NAME)
        merged = adapted.merge_and_unload()
        others = {name.replace(".base_layer.", "."): value for name, value in found.items()}
        unknown = merged.load_state_dict(others, strict=False).unexpected_keys
    except UNREADABLE as error:
        raise AdapterError(f"{folder}: the adapter cannot be read ({_first_line(error)})") from error
    saved = tuple(f"{part}." for part in settings.get("modules_to_save") or ())
    lacking = [name for name in merged.state_dict() if name.startswith(saved) and name not in others]
    if odd := sorted([*(expected.keys() - adapters.keys()), *unknown, *lacking]):
        raise AdapterError(
            f"{folder}: {WEIGHTS} does not match {CONFIG} and the base model in {len(odd)} tensors, for "
            f"example {odd[0]}"
        )
    return merged


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's configuration says; raises `AdapterError` if it is damaged or of another kind."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / CONFIG}: cannot be read ({_first_line(error)})") from error
    if kind != "LORA" or settings.get("megatron_config"):  # for Megatron, peft imports what the file names
        raise AdapterError(f"{folder / CONFIG}: only adapters of type LORA without Megatron are supported")
    return settings


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
