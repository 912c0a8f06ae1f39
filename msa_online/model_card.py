# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint, in its folder and on the Hub."""

import json
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from feature_extractors.clip import printable
from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.tables import HEADLINES, markdown_table, markdown_text

RUN_FILES = "Everything else is in `run.yaml` beside this file, and every epoch in `history.json`."
REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")

CLIP_USAGE = """\
Trained with `msa_online`; the checkpoint contains its processor.

```python
from msa_online import MSAPipeline

pipeline = MSAPipeline.from_pretrained({name})
prediction = pipeline("clip.mp4", text="what is said in it")
print(prediction)
print(prediction.baseline, prediction.contributions)  # prediction without input; what each modality adds
print(prediction.cut, prediction.warning)  # parts of a long clip that were not read; if all was missing
```"""
FEATURE_USAGE = """\
Trained with `msa_online`; the checkpoint contains the statistics that standardise its features.

```
msa-online evaluate {name} FEATURES   # a folder of `msa-online convert-features`, or an .npz file
```"""


def write_model_card(folder: Path, config: MSAConfig, repository: str | None = None) -> None:
    """Write the README.md of a trained checkpoint.

    Args:
        folder: Folder of the checkpoint.
        config: Its configuration, with the record of its training in `trained_on`.
        repository: Repository on the Hub that the card is for; by default the card names the folder.
    """
    name = repository or folder.name
    published = config.to_dict()  # without local paths
    record: dict[str, Any] = published["trained_on"]
    template = Template(files("msa_online").joinpath("model_card_template.md").read_text(encoding="utf-8"))
    task = "regression" if config.is_regression else "classification"
    outputs = (
        f"a score in {config.label_range}"
        if config.is_regression
        else "one of " + ", ".join(map(markdown_text, config.id2label.values()))
    )
    card = template.substitute(
        metadata=yaml.safe_dump(
            _card_metadata(config, published["text_encoder"], task), sort_keys=False
        ).strip(),
        name=markdown_text(name),
        task=task,
        outputs=outputs,
        **_card_inputs(name, config, published["text_encoder"], record.get("limits", {})),
        head=config.head,
        modulator=record["modulator"],
        calibrator=config.calibrator,
        data=markdown_text(record["data"]),
        splits=", ".join(f"{name} {count}" for name, count in record["splits"].items()),
        seed=record["seed"],
        precision=record["mixed_precision"],
        selection=record["selection"],
        epoch=record["epoch"],
        protocol=record["protocol"],
        findings=_findings(record.get("findings", {})),
        results="\n\n".join(
            f"**{split}**\n\n{markdown_table(conditions)}{_undefined(record, split)}"
            for split, conditions in record["results"].items()
        ),
        comparison="\n".join(f"- {markdown_text(line)}" for line in record["comparison"]),
        command=printable(record["command"]),
        files="" if repository else RUN_FILES,
    )
    (folder / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def _findings(counts: Mapping[str, int | str]) -> str:
    """What was found in the clips, as a row of the table; nothing for precomputed features."""
    if not counts:
        return ""
    return f"\n| found in the clips | {', '.join(f'{name}: {count}' for name, count in counts.items())} |"


def _undefined(record: Mapping[str, Any], split: str) -> str:
    """Why metrics of a split are undefined, as a paragraph; nothing if none is."""
    reasons = record.get("undefined", {}).get(split, {})
    if not reasons:
        return ""
    return "\n\nUndefined: " + "; ".join(f"{HEADLINES[name]} ({why})" for name, why in reasons.items())


def _card_inputs(
    name: str, config: MSAConfig, text_encoder: str | None, limits: Mapping[str, float]
) -> dict[str, str]:
    """Inputs and usage, of a model of raw clips or of precomputed features."""
    if config.feature_widths is None:
        most = ", ".join(f"{number:g} {unit}" for unit, number in limits.items())
        return {
            "inputs": "a clip of a person talking: text, audio and face",
            "usage": CLIP_USAGE.format(name=json.dumps(printable(name))),
            "front_end": f"text encoder | {markdown_text(text_encoder)}"
            + (f" |\n| reads at most | {most}" if most else ""),
        }
    widths = ", ".join(f"{modality} {width}" for modality, width in config.widths.items())
    return {
        "inputs": f"precomputed features of a person talking ({widths})",
        "usage": FEATURE_USAGE.format(name=shlex.quote(printable(name))),
        "front_end": f"features | {widths}",
    }


def _card_metadata(config: MSAConfig, text_encoder: str | None, task: str) -> Mapping[str, Any]:
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
        **({"base_model": text_encoder} if REPOSITORY.fullmatch(text_encoder or "") else {}),
    }
