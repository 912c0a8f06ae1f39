# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint, in its folder and on the Hub."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from feature_extractors.clip import printable
from msa_online.confidence import Confidence, shortfall_line, too_few_line
from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.tables import (
    HEADLINES,
    Results,
    conditions_in_order,
    confidence_markdown,
    format_metric,
    markdown_table,
    markdown_text,
    selection_metric,
)
from msa_online.methods import CALIBRATORS, HEADS, MODULATORS
from msa_online.modalities import COMPLETE, MODALITIES

RUN_FILES = "Everything else is in `run.yaml` beside this file, and every epoch in `history.json`."
REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
PICTURE = "robustness.png"
HUB_METRICS = {
    "mae": "mae",
    "corr": "pearsonr",
    **dict.fromkeys(("acc2_has0", "acc2_non0", "acc7", "acc3_sims", "acc5_sims", "accuracy"), "accuracy"),
    **dict.fromkeys(("f1_non0", "f1_weighted", "f1_macro"), "f1"),
}
"""Names that the Hub has for the metrics in tables."""
SOFTWARE = "The software is `msa_online` (Apache-2.0); its file CITATION.cff has its reference."

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

INTERVALS = """\
`prediction.interval` is the score plus and minus a half-width, within the range of the labels. It was fitted
on the {split} split by split conformal prediction, for each set of modalities that a clip can show. On clips
drawn like those of this split, {level} of the intervals contain the label: on average over clips, not for
each kind of clip. Other languages or recordings are not covered. Measured:"""
PROBABILITIES = """\
Probabilities are calibrated: logits are divided by a temperature that was fitted on the {split} split, for
each set of modalities that a clip can show. `prediction.confidence` is the probability of the predicted
class. This holds for clips drawn like those of this split. ECE is the mean distance of confidence and
accuracy, in bins; "before" is without temperatures. Measured:"""


def write_model_card(
    folder: Path,
    config: MSAConfig,
    repository: str | None = None,
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
) -> None:
    """Write the README.md of a trained checkpoint, and the picture of its robustness.

    Args:
        folder: Folder for both files.
        config: Configuration of the checkpoint, with the record of its training in `trained_on`.
        repository: Repository on the Hub that the card is for; by default the card names the folder.
        license: Licence of the weights, as the Hub abbreviates it, like "cc-by-nc-4.0".
        languages: Languages of the speech and the texts, as codes, like "en".
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
    encoders = {modality: encoder for modality in MODALITIES if (encoder := published[f"{modality}_encoder"])}
    metadata = _metadata(name, config, record, encoders, task)
    metadata.license, metadata.language = license, list(languages) or None
    card = template.substitute(
        metadata=metadata.to_yaml(),
        name=markdown_text(name),
        task=task,
        outputs=outputs,
        **_card_inputs(name, config, encoders, record.get("limits", {})),
        head=config.head,
        modulator=record["modulator"],
        calibrator=config.calibrator,
        context=_context(config),
        data=markdown_text(record["data"]),
        splits=", ".join(f"{name} {count}" for name, count in record["splits"].items()),
        seed=record["seed"],
        precision=record["mixed_precision"],
        selection=record["selection"],
        epoch=_epoch(record),
        protocol=record["protocol"],
        findings=_findings(record.get("findings", {})) + _transcripts(record.get("transcripts")),
        picture=_picture(folder, config, record),
        results="\n\n".join(
            f"**{split}**\n\n{markdown_table(conditions)}{_undefined(record, split)}"
            for split, conditions in record["results"].items()
        ),
        comparison="\n".join(f"- {markdown_text(line)}" for line in record["comparison"]),
        confidence=_confidence(Confidence.of(config.confidence), record.get("confidence", {})),
        languages=_about_languages(languages),
        effort=_effort(record),
        command=printable(record["command"]),
        files="" if repository else RUN_FILES,
        citation=_citation(config, record),
    )
    card = re.sub(r"\n{3,}", "\n\n", card)  # of parts that this checkpoint does not have
    (folder / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def draw_robustness(
    results: Results, constant: Mapping[str, float], title: str, metric: str, target: Path
) -> None:
    """Draw one metric under each condition, and that of the constant model, as a PNG file.

    Args:
        results: Metrics of one split by condition.
        constant: Metrics of the constant model.
        title: Title of the picture.
        metric: Name of the metric, one of `HEADLINES`.
        target: The file.
    """
    from matplotlib.figure import Figure  # takes a second

    conditions = [name for name in conditions_in_order(results) if results[name][metric] is not None]
    values = [results[name][metric] for name in conditions]
    figure = Figure(figsize=(7.2, 1.3 + 0.36 * len(conditions)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(conditions))
    colours = ["#1f5fa8" if name == COMPLETE else "#7fa7d1" for name in conditions]
    axis.barh(rows, values, color=colours, height=0.62)
    for row, value in zip(rows, values, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        text = format_metric(metric, value)
        axis.annotate(text, (value, row), (5, 0), textcoords="offset points", va="center", bbox=box)
    if (floor := constant.get(metric)) is not None:
        axis.axvline(floor, color="#b3541e", linestyle="--", linewidth=1.4, label="constant prediction")
        figure.legend(loc="outside lower right", frameon=False)
    axis.set_yticks(rows, [name.replace("+", " + ") for name in conditions])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max([*values, floor or 0]) or 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left")
    figure.savefig(target, dpi=150)


def _picture(folder: Path, config: MSAConfig, record: Mapping[str, Any]) -> str:
    """Draw the results by condition, as a paragraph of the card; nothing for a single condition."""
    split, results = _scored(record)
    metric = selection_metric(config.is_regression)
    if len(results) < 2 or all(scores[metric] is None for scores in results.values()):
        return ""
    title = f"{HEADLINES[metric]} on {split} by visible modalities"
    title += " (lower is better)" if config.is_regression else " (higher is better)"
    draw_robustness(results, record.get("constant", {}).get(split, {}), title, metric, folder / PICTURE)
    return f"\n![{title}]({PICTURE})\n"


def _scored(record: Mapping[str, Any]) -> tuple[str, Results]:
    """Name and results of the split that describes the model: test, or validation without a test split."""
    results = record["results"]
    split = "test" if "test" in results else next(iter(results), "")
    return split, results.get(split, {})


def _about_languages(languages: Sequence[str]) -> str:
    if languages:
        return f"Languages: {', '.join(languages)}. Other languages were not tested."
    return "Only the languages of the training data were tested."


def _epoch(record: Mapping[str, Any]) -> str:
    """The published epoch, and the best of each earlier phase of the modulator."""
    earlier = [f"{phase['epoch']} before the last phase" for phase in record.get("earlier_phases", ())]
    return f"{record['epoch']}" + (f"; best epoch {', '.join(earlier)}" if earlier else "")


def _effort(record: Mapping[str, Any]) -> str:
    """Time and hardware of training, as a paragraph; records of earlier versions have none."""
    if not (effort := record.get("effort")):
        return ""
    processes = "1 process" if effort["processes"] == 1 else f"{effort['processes']} processes"
    return (
        f"{effort['hours']:.3g} hours for {effort['epochs']} epochs ({effort['steps']:,} optimizer steps) "
        f"with validation, on {markdown_text(effort['device'])} ({processes}). The extraction of features is "
        "not included. Energy was not measured."
    )


def _citation(config: MSAConfig, record: Mapping[str, Any]) -> str:
    """References of the methods in the model, as a list; parts of plug-ins may be unknown here."""
    parts = (HEADS.get(config.head), CALIBRATORS.get(config.calibrator), MODULATORS.get(record["modulator"]))
    papers = dict.fromkeys(part.paper for part in parts if part is not None and part.paper)
    return "\n".join(f"- {paper}" for paper in (*papers, SOFTWARE))


def _context(config: MSAConfig) -> str:
    """A row of the table for a model that reads dialogues."""
    if config.dialogue_turns is None:
        return ""
    return f"\n| context | {config.context} over up to {config.dialogue_turns} turns |"


def _findings(counts: Mapping[str, int | str]) -> str:
    """What was found in the clips, as a row of the table; nothing for precomputed features."""
    if not counts:
        return ""
    return f"\n| found in the clips | {', '.join(f'{name}: {count}' for name, count in counts.items())} |"


def _transcripts(made: Mapping[str, Any] | None) -> str:
    """Which texts a machine made, as a row of the table; nothing if it made none."""
    if not made:
        return ""
    language = f", language {made['language']}" if made["language"] else ""
    by = markdown_text(made["model"])
    return (
        f"\n| texts | {made['made']} of {made['of']} were recognised by {by}{language}; they have errors. "
        f"Predict with `--transcribe {printable(made['model'])}` |"
    )


def _undefined(record: Mapping[str, Any], split: str) -> str:
    """Why metrics of a split are undefined, as a paragraph; nothing if none is."""
    reasons = record.get("undefined", {}).get(split, {})
    if not reasons:
        return ""
    return "\n\nUndefined: " + "; ".join(f"{HEADLINES[name]} ({why})" for name, why in reasons.items())


def _confidence(confidence: Confidence | None, measured: Mapping[str, Any]) -> str:
    """Section about the certainty of the predictions; empty if nothing was fitted."""
    if confidence is None:
        return ""
    text = INTERVALS if confidence.half_widths else PROBABILITIES
    parts = ["", "## Confidence", text.format(level=f"{100 * confidence.level:g} %", split=confidence.split)]
    for split, measures in measured.items():
        parts += [f"**{split}**", confidence_markdown(confidence, measures)]
        if short := shortfall_line(confidence, measures, split):
            parts.append(f"**{short}**")
    if not measured:
        parts.append(confidence_markdown(confidence, {}))
    if lacking := too_few_line(confidence):
        parts.append(f"There are {lacking}.")
    return "\n\n".join(parts)


def _card_inputs(
    name: str, config: MSAConfig, encoders: Mapping[str, str], limits: Mapping[str, float]
) -> dict[str, str]:
    """Inputs and usage, of a model of raw clips or of precomputed features."""
    if config.feature_widths is None:
        most = ", ".join(f"{number:g} {unit}" for unit, number in limits.items())
        rows = [f"{modality} encoder | {markdown_text(encoder)}" for modality, encoder in encoders.items()]
        usage = CLIP_USAGE
        if config.plugins:
            usage = usage.replace("from msa_online", "\n".join((*_imports(config), "from msa_online")), 1)
        return {
            "inputs": "a clip of a person talking: text, audio and face",
            "usage": usage.format(name=json.dumps(printable(name))),
            "front_end": " |\n| ".join(rows + ([f"reads at most | {most}"] if most else [])),
        }
    widths = ", ".join(f"{modality} {width}" for modality, width in config.widths.items())
    return {
        "inputs": f"precomputed features of a person talking ({widths})",
        "usage": FEATURE_USAGE.format(name=shlex.quote(printable(name))),
        "front_end": f"features | {widths}",
    }


def _imports(config: MSAConfig) -> list[str]:
    return [f"import {plugin}  # registers parts of this model" for plugin in config.plugins]


def _metadata(
    name: str, config: MSAConfig, record: Mapping[str, Any], encoders: Mapping[str, str], task: str
) -> ModelCardData:
    """Metadata of the card, as the Hub reads them."""
    of_clips = config.feature_widths is None
    split, scores = _scored(record)
    results = [
        EvalResult(
            task_type="video-classification" if of_clips else "other",
            task_name=f"multimodal sentiment analysis ({task})",
            dataset_type=record["data"],
            dataset_name=record["data"],
            dataset_config=condition,
            dataset_split=split,
            metric_type=HUB_METRICS[metric],
            metric_name=HEADLINES[metric],
            metric_value=round(value, 4),
        )
        for condition in conditions_in_order(scores)
        for metric, value in scores[condition].items()
        if metric in HEADLINES and value is not None
    ]
    bases = [encoder for encoder in encoders.values() if REPOSITORY.fullmatch(encoder)]
    return ModelCardData(
        library_name="msa_online",
        pipeline_tag="video-classification" if of_clips else None,
        tags=[
            *("multimodal", "sentiment-analysis", "missing-modality", "audio-classification"),
            *(task, config.head),
        ],
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=[record["data"]] if REPOSITORY.fullmatch(record["data"]) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
