# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as others meet them: opening one, and the model card that goes with it."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase

from feature_extractors.sources import why_hub_is_silent
from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.report import markdown_table
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""What transformers raises, all over its layers, on files that are missing, damaged or of another version."""

CLIP_USAGE = """\
Trained with `msa_online`; the checkpoint carries its own processor.

```python
from msa_online import MSAPipeline

pipeline = MSAPipeline.from_pretrained("{name}")  # this folder, or the repository it was pushed to
prediction = pipeline("clip.mp4", text="what is said in it")
print(prediction)
print(prediction.baseline, prediction.contributions)  # the answer with nothing seen; what each modality adds
```"""
FEATURE_USAGE = """\
Trained with `msa_online`; the checkpoint carries the statistics by which it standardises features.

```
msa-online evaluate {name} FEATURES   # a folder of `msa-online convert-features`, or an .npz file
```"""


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
    """Model, in evaluation mode, and processor of a checkpoint folder or Hub repository.

    A model that takes features made elsewhere has no processor.

    Raises:
        CheckpointError: As `load_config`; or the weights or the processor are missing, damaged or do not fit.
    """
    model, found, processor = _load(source, load_config(source), ignore_mismatched_sizes=False, dtype="auto")
    if strange := sorted(found["missing_keys"] | found["unexpected_keys"]):
        raise CheckpointError(f"{source}: the weights do not fit config.json, for example {strange[0]}")
    return model.eval(), processor


def load_for_fine_tuning(
    source: str | Path, config: MSAConfig
) -> tuple[MSAModel, PreTrainedTokenizerBase | None]:
    """Model of another configuration with whatever weights of a checkpoint fit it, and the tokenizer.

    The model is in fp32, even if the checkpoint was saved in half precision. A model of precomputed features
    has no tokenizer.

    Raises:
        CheckpointError: The weights or the processor are missing or damaged.
    """
    model, _, processor = _load(source, config, ignore_mismatched_sizes=True, dtype=torch.float32)
    return model, processor and processor.tokenizer


def _load(
    source: str | Path, config: MSAConfig, ignore_mismatched_sizes: bool, dtype: torch.dtype | str
) -> tuple[MSAModel, dict[str, set], MSAProcessor | None]:
    processor = None
    try:
        model, found = MSAModel.from_pretrained(
            source,
            config=config,
            use_safetensors=True,  # or nothing: a pickle could execute what it likes
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            dtype=dtype,
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


def write_model_card(folder: Path, config: MSAConfig) -> None:
    """Write the README.md of a checkpoint from what its configuration says it was trained on."""
    record: dict[str, Any] = config.trained_on or {}
    template = Template(files("msa_online").joinpath("model_card_template.md").read_text(encoding="utf-8"))
    task = "regression" if config.is_regression else "classification"
    outputs = (
        f"a score in {config.label_range}"
        if config.is_regression
        else "one of " + ", ".join(config.id2label.values())
    )
    card = template.substitute(
        metadata=yaml.safe_dump(_card_metadata(config, task), sort_keys=False).strip(),
        name=folder.name,
        task=task,
        outputs=outputs,
        **_card_inputs(folder.name, config),
        head=config.head,
        modulator=record["modulator"],
        calibrator=config.calibrator,
        data=record["data"],
        splits=", ".join(f"{name} {count}" for name, count in record["splits"].items()),
        seed=record["seed"],
        precision=record["mixed_precision"],
        selection=record["selection"],
        epoch=record["epoch"],
        protocol=record["protocol"],
        results="\n\n".join(
            f"**{split}**\n\n{markdown_table(conditions)}" for split, conditions in record["results"].items()
        ),
        comparison="\n".join(f"- {line}" for line in record["comparison"]),
        command=record["command"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card_inputs(name: str, config: MSAConfig) -> dict[str, str]:
    """What a model reads and how it is used: raw clips, or features made elsewhere."""
    if config.feature_widths is None:
        return {
            "inputs": "a clip of a person talking: text, audio and face",
            "usage": CLIP_USAGE.format(name=name),
            "front_end": f"text encoder | {config.text_encoder}",
        }
    widths = ", ".join(f"{modality} {width}" for modality, width in config.widths.items())
    return {
        "inputs": f"features of a person talking, made elsewhere ({widths})",
        "usage": FEATURE_USAGE.format(name=name),
        "front_end": f"features | {widths}",
    }


def _card_metadata(config: MSAConfig, task: str) -> Mapping[str, Any]:
    return {
        "library_name": "msa_online",
        **({"pipeline_tag": "video-classification"} if config.feature_widths is None else {}),
        "tags": [
            "multimodal",
            "sentiment-analysis",
            "missing-modality",
            "audio-classification",
            task,
            config.head,
        ],
        **({"base_model": config.text_encoder} if REPOSITORY.fullmatch(config.text_encoder or "") else {}),
    }
