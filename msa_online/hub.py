# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints from folders or from the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

from feature_extractors.sources import why_hub_is_silent
from msa_online.configuration_msa import MSAConfig
from msa_online.encoders import ENCODERS, require_fitting_sound, require_fitting_tokens
from msa_online.encoders.pretrained import NO_CODE, EncoderError
from msa_online.lora import CONFIG as ADAPTER_CONFIG
from msa_online.lora import WEIGHTS as ADAPTER_WEIGHTS
from msa_online.lora import AdapterError, open_adapter, read_adapter_config
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

COMPILED = "_orig_mod."  # prefix that torch.compile adds to the names of a model's tensors
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""Errors that transformers raises on files that are missing, damaged or of another version."""


class CheckpointError(ValueError):
    """A folder or repository is not a usable checkpoint of this project; the message says why."""


def load_config(source: str | Path, **options: Any) -> MSAConfig:
    """Configuration of a checkpoint.

    Args:
        source: Folder or Hub repository.
        options: `revision` and `token` of the Hub.

    Raises:
        CheckpointError: `source` does not exist, or has no configuration, or that of another kind of model.
    """
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file; give the folder of the checkpoint")
    if adapter := _find_adapter(source, options):
        if adapter.base and not adapter.has_config:
            with adapter.explained():
                return load_config(adapter.base, token=options.get("token"))
        source = folder = adapter.folder
    if folder.is_dir() and not (folder / "config.json").is_file():
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder}: not a checkpoint, config.json is missing (the folder contains {present})"
        )
    try:
        config = AutoConfig.from_pretrained(
            source, local_files_only=_only_local(source), **NO_CODE, **options
        )
    except UNREADABLE as error:
        raise CheckpointError(
            f"{source}: neither a checkpoint folder nor a readable repository ({_first_line(error)})"
        ) from error
    if not isinstance(config, MSAConfig):
        kind = config.model_type
        modality = next((name for name, table in ENCODERS.items() if kind in table), "text")
        raise CheckpointError(
            f"{source}: a checkpoint of type {kind!r}, not {MSAConfig.model_type!r}; to train from a "
            f"pretrained encoder, name it in a configuration as model.{modality}_encoder"
        )
    return config


def load_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[MSAModel, MSAProcessor | None]:
    """Load the model, in evaluation mode, and the processor of a checkpoint.

    A model of precomputed features has no processor.

    Args:
        source: Folder or Hub repository.
        revision: Branch, tag or commit of the repository.
        token: Access token of a private repository; by default that of `hf auth login`.
        dtype: Type of the weights as in transformers; by default fp32, whatever the checkpoint has.
        device_map: Devices of the parts as in transformers; by default all are on the CPU.

    Raises:
        CheckpointError: As in `load_config`; or the weights or the processor are missing or damaged, or do
            not match the configuration.
    """
    of_hub = {"revision": revision or "main", "token": token}
    config = load_config(source, **of_hub)
    options = {"dtype": dtype or torch.float32, "device_map": device_map}
    model, found, processor = _load(source, config, of_hub, options)
    _require_fit(source, config, model, found)
    return model.eval(), processor


@dataclass(frozen=True)
class FineTuning:
    """A model that starts from the weights of a checkpoint.

    Attributes:
        model: The model, in fp32.
        processor: Processor of the checkpoint; None for a model of precomputed features.
        loaded: For each part, the number of tensors loaded from the checkpoint, and of all its tensors.
        before: Configuration of the checkpoint.
    """

    model: MSAModel
    processor: MSAProcessor | None
    loaded: dict[str, tuple[int, int]]
    before: MSAConfig

    def __str__(self) -> str:
        """One line for each part: how many tensors were loaded, how many are new, and why."""
        before, now = self.before, self.model.config
        kinds = {
            part: (getattr(before, part), getattr(now, part)) for part in ("calibrator", "context", "head")
        }
        lines = []
        for part, (loaded, total) in self.loaded.items():
            old, new = kinds.get(part, ("", ""))
            counts = [f"{loaded} tensors loaded"] * bool(loaded) + [f"{total - loaded} new"] * (
                loaded < total
            )
            lines.append(f"  {part}: {', '.join(counts)}" + (f" ({old} -> {new})" if old != new else ""))
        return "\n".join(lines)


def load_for_fine_tuning(source: str | Path, config: MSAConfig) -> FineTuning:
    """Build a model of another configuration, with all weights of a checkpoint that match it.

    Raises:
        CheckpointError: The weights or the processor are missing or damaged, or do not match the checkpoint's
            own configuration; or no layer of an encoder matches the new configuration.
    """
    before = load_config(source)
    model, found, processor = _load(source, config, {}, {"dtype": torch.float32})
    _require_fit(source, before, model, found)
    new = found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}
    loaded: dict[str, tuple[int, int]] = {}
    for name in model.state_dict():
        part = _part_of(name)
        count, total = loaded.get(part, (0, 0))
        loaded[part] = count + (name not in new), total + 1
    for modality, encoder in model.encoders.items():
        tensors = {f"encoders.{modality}.{name}": value for name, value in encoder.state_dict().items()}
        matrices = {name for name, value in tensors.items() if value.ndim > 1} or tensors.keys()
        if matrices <= new:
            raise CheckpointError(
                f"{source}: no layer of the {modality} encoder matches the new configuration; use the "
                "checkpoint's settings of this encoder in the `model:` section, or train without "
                "training.init_from"
            )
    return FineTuning(model, processor, loaded, before)


def require_own_weights(folder: Path, model: MSAModel) -> None:
    """Check names and shapes of the weights in a checkpoint folder; reads only their header.

    Args:
        folder: The checkpoint.
        model: A model of its configuration; it may be on the meta device.

    Raises:
        CheckpointError: The weights are damaged, or belong to another model.
    """
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: the weights cannot be read ({_first_line(error)})") from error
    expected = _shapes_of(model)
    if found and found != expected:
        _refuse(folder, [name for name in {**found, **expected} if found.get(name) != expected.get(name)])


def _require_fit(source: str | Path, own: MSAConfig, model: MSAModel, found: dict[str, set]) -> None:
    """Check that the tensors that were not loaded are exactly those in which the two configurations differ.

    Args:
        source: The checkpoint.
        own: Configuration of the checkpoint.
        model: The model, of the same or another configuration.
        found: Loading report of transformers.

    Raises:
        CheckpointError: Other tensors were not loaded; the weights do not match the checkpoint's
            configuration.
    """
    try:
        with torch.device("meta"):
            weights = _shapes_of(MSAModel(own))
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: no model can be built from it ({_first_line(error)})") from error
    needed = _shapes_of(model)
    missing, unexpected = needed.keys() - weights.keys(), weights.keys() - needed.keys()
    other = {name: weights[name] for name in needed.keys() & weights.keys() if needed[name] != weights[name]}
    reported = {name: tuple(shape) for name, shape, _ in found["mismatched_keys"]}
    differing = (missing ^ found["missing_keys"]) | (unexpected ^ found["unexpected_keys"])
    differing |= {name for name in other.keys() | reported.keys() if other.get(name) != reported.get(name)}
    if differing:
        _refuse(source, sorted(differing))


def _refuse(source: str | Path, names: Sequence[str]) -> None:
    if compiled := [name for name in names if name.startswith(COMPILED)]:
        raise CheckpointError(
            f"{source}: an earlier version saved these weights from a compiled model ({compiled[0]}, ...): "
            f"remove {COMPILED!r} from the names of the tensors, or train again"
        )
    raise CheckpointError(
        f"{source}: the weights do not match config.json in {len(names)} tensors, for example {min(names)}"
    )


def _shapes_of(model: MSAModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _part_of(name: str) -> str:
    top, part, *_ = name.split(".")
    return f"{part} encoder" if top == "encoders" else top


def _load(
    source: str | Path, config: MSAConfig, of_hub: dict[str, Any], options: dict[str, Any]
) -> tuple[MSAModel, dict[str, set], MSAProcessor | None]:
    processor, weights, of_processor = None, None, source
    if adapter := _find_adapter(source, of_hub):
        weights, of_processor = _merged_weights(adapter), adapter.source_of_processor
        of_hub = {}
    try:
        model, found = MSAModel.from_pretrained(
            None if adapter else source,
            config=config,
            state_dict=weights,
            use_safetensors=True,  # never a pickle, which could execute code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report; the error of transformers names none
            local_files_only=_only_local(source),
            **of_hub,
            **options,
        )
        if config.feature_widths is None:
            processor = MSAProcessor.from_pretrained(
                of_processor, local_files_only=_only_local(of_processor), **NO_CODE, **of_hub
            )
            require_fitting_tokens(config, processor.tokenizer)
            require_fitting_sound(config, processor.audio_feature_extractor)
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: the checkpoint cannot be read ({_first_line(error)})") from error
    model.name_or_path = str(source)
    return model, found, processor


@dataclass(frozen=True)
class _Adapter:
    """A folder with an adapter in peft's format, on this machine.

    Attributes:
        source: The folder or repository as given, for messages.
        folder: The folder.
        base: The checkpoint that the adapter applies to; None if it applies to the encoders that its own
            configuration names.
        token: Access token of the Hub.
    """

    source: str | Path
    folder: Path
    base: str | None
    token: str | bool | None

    @property
    def has_config(self) -> bool:
        """Whether the folder has the configuration of the model."""
        return (self.folder / CONFIG_NAME).is_file()

    @property
    def source_of_processor(self) -> str | Path:
        """The folder, or the base if the folder has no processor."""
        return self.folder if (self.folder / PROCESSOR_NAME).is_file() else self.base or self.folder

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Report errors of the base with the adapter that needs it."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.source}: the base model of this adapter cannot be opened ({_first_line(error)}): put "
                f"its folder or repository into {ADAPTER_CONFIG} as base_model_name_or_path"
            ) from error
        except EncoderError as error:
            raise CheckpointError(
                f"{self.source}: this adapter needs its base encoder ({_first_line(error)}) For another "
                f"folder, name it in {CONFIG_NAME} of the adapter, or use the merged checkpoint"
            ) from error
        except AdapterError as error:
            raise CheckpointError(f"{self.source}: {_first_line(error)}") from error


def _find_adapter(source: str | Path, of_hub: Mapping[str, Any]) -> _Adapter | None:
    """The adapter in a folder or repository; None if it has complete weights, or no adapter."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            config = cached_file(
                str(source),
                ADAPTER_CONFIG,
                local_files_only=_only_local(source),
                _raise_exceptions_for_missing_entries=False,
                **of_hub,
            )
        except UNREADABLE:  # no repository either; whatever is opened next reports it
            return None
        if config is None:
            return None
        folder = Path(config).parent
    if not (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("model*.safetensors")):
        return None
    if not Path(source).is_dir():
        folder = Path(
            snapshot_download(
                str(source),
                allow_patterns=["*.json", "*.txt", "*.model", ADAPTER_WEIGHTS],
                local_files_only=_only_local(source),
                **of_hub,
            )
        )
    try:
        base = read_adapter_config(folder).get("base_model_name_or_path") or None
    except AdapterError as error:
        raise CheckpointError(f"{source}: {_first_line(error)}") from error
    adapter = _Adapter(source, folder, base, of_hub.get("token"))
    if adapter.has_config:
        own = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        return replace(adapter, base=None) if base in (None, *own.encoder_names.values()) else adapter
    if base is None:
        raise CheckpointError(
            f"{source}: {ADAPTER_CONFIG} names no base model: set base_model_name_or_path to the checkpoint "
            "that it was made for"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file() and not any(Path(base).glob("model*.safetensors")):
        raise CheckpointError(f"{source}: its base model {base} is an adapter too: merge that one first")
    return adapter


def _merged_weights(adapter: _Adapter) -> dict[str, torch.Tensor]:
    """Complete weights of the model of an adapter, in fp32."""
    with adapter.explained():
        if adapter.base is None:
            config = load_config(adapter.folder)
            base = MSAModel.from_pretrained_encoders(config)
        elif adapter.has_config:
            base = load_for_fine_tuning(adapter.base, load_config(adapter.folder)).model
        else:
            base, _ = load_checkpoint(adapter.base, token=adapter.token)
        return open_adapter(base, adapter.folder).state_dict()


def _only_local(source: str | Path) -> bool:
    return Path(source).is_dir() or bool(why_hub_is_silent())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
