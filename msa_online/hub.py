# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints, from folders or from the Hub."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase

from feature_extractors.sources import why_hub_is_silent
from msa_online.configuration_msa import MSAConfig
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""What transformers raises, all over its layers, on files that are missing, damaged or of another version."""


class CheckpointError(ValueError):
    """A folder or repository is no checkpoint of this project; the message says what it is instead."""


def load_config(source: str | Path) -> MSAConfig:
    """Configuration of a checkpoint.

    Raises:
        CheckpointError: `source` is not there, holds no configuration, or one of another kind of model.
    """
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file; give the folder of the checkpoint")
    if folder.is_dir() and not (folder / "config.json").is_file():
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder}: no checkpoint, config.json is missing (the folder holds {present})")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=_only_local(source))
    except UNREADABLE as error:
        raise CheckpointError(
            f"{source}: neither a checkpoint folder nor a repository that can be read ({_first_line(error)})"
        ) from error
    if not isinstance(config, MSAConfig):
        raise CheckpointError(
            f"{source}: a checkpoint of kind {config.model_type!r}, not {MSAConfig.model_type!r}; a text "
            "encoder to train from goes into a configuration, as model.text_encoder"
        )
    return config


def load_checkpoint(source: str | Path) -> tuple[MSAModel, MSAProcessor | None]:
    """Model, in fp32 and in evaluation mode, and processor of a checkpoint folder or Hub repository.

    A model of precomputed features has no processor.

    Raises:
        CheckpointError: As `load_config`; or the weights or the processor are missing, damaged or do not fit.
    """
    model, found, processor = _load(source, load_config(source), ignore_mismatched_sizes=False)
    if strange := sorted(found["missing_keys"] | found["unexpected_keys"]):
        raise CheckpointError(f"{source}: the weights do not fit config.json, for example {strange[0]}")
    return model.eval(), processor


def load_for_fine_tuning(
    source: str | Path, config: MSAConfig
) -> tuple[MSAModel, PreTrainedTokenizerBase | None]:
    """Model of another configuration with whatever weights of a checkpoint fit it, and the tokenizer.

    The model is in fp32. A model of precomputed features has no tokenizer.

    Raises:
        CheckpointError: The weights or the processor are missing or damaged.
    """
    model, _, processor = _load(source, config, ignore_mismatched_sizes=True)
    return model, processor and processor.tokenizer


def _load(
    source: str | Path, config: MSAConfig, ignore_mismatched_sizes: bool
) -> tuple[MSAModel, dict[str, set], MSAProcessor | None]:
    processor = None
    try:
        model, found = MSAModel.from_pretrained(
            source,
            config=config,
            use_safetensors=True,  # or nothing: a pickle could execute what it likes
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            dtype=torch.float32,  # of a checkpoint saved in half precision too; autocast does the rest
            local_files_only=_only_local(source),
        )
        if config.feature_widths is None:
            processor = MSAProcessor.from_pretrained(source, local_files_only=_only_local(source))
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: the checkpoint cannot be read ({_first_line(error)})") from error
    return model, found, processor


def _only_local(source: str | Path) -> bool:
    return Path(source).is_dir() or bool(why_hub_is_silent())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
