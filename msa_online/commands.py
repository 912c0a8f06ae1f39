# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands of `msa-online` do; the command line itself is read in `msa_online_cli`."""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.text import Text

from feature_extractors import ClipError, ExtractionSettings, FeatureCache
from feature_extractors.assets import get_asset
from feature_extractors.catalogue import ASSETS, AssetError
from feature_extractors.clip import REMEDIES, printable
from msa_online.batching import BucketBatchSampler, label2id_of, make_dataset, make_loader
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus, CorpusError, require_splits
from msa_online.corpora.prepared_corpus import PreparedCorpus, findings_record, findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.validation import why_not_writable
from msa_online.describe import describe, description_tables, record_lines
from msa_online.encoders.text import load_tokenizer
from msa_online.errors import UnfinishedError, run_command
from msa_online.evaluation.conditions import evaluate_conditions, evaluate_frame_rates
from msa_online.evaluation.tables import conditions_table, frame_rates_table, open_console, shares_table, show
from msa_online.hub import load_checkpoint
from msa_online.missing.frames import FrameDrop, stand_ins_of
from msa_online.modalities import MODALITIES
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.corpus import FeatureCorpus, features_table
from msa_online.precomputed.extraction import extract_features
from msa_online.precomputed.files import is_precomputed_path, require_new_folder
from msa_online.precomputed.reading import read_features
from msa_online.processing_msa import MAX_TEXT_TOKENS, InputLimits, MSAProcessor
from msa_online.training.precision import choose_precision

LONGEST_BAR = 16
PERCENT = ".1%"
LEGEND_OF_SCORES = "prediction = score with nothing seen + the Shapley values"
LEGEND_OF_CLASSES = "prediction = its probability with nothing seen + the Shapley values"


def run(options: Namespace) -> int:
    """Carry out the sub-command in `options.command`; returns the exit status."""
    return run_command(lambda: COMMANDS[options.command](options, open_console()))


def run_prepare(options: Namespace, console: Console) -> None:
    """Extract every clip of a corpus into the cache and show what was found."""
    corpus = read_corpus(options.data, label_column=None, skip_broken=options.skip_broken)
    settings = ExtractionSettings(num_frames=options.num_frames, face_size=options.face_size)
    prepared = prepare(corpus, FeatureCache(), settings, options.workers, options.skip_broken)
    tokenizer = load_tokenizer(options.text_encoder) if options.text_encoder else None
    limits = InputLimits(options.max_text_tokens, options.max_audio_seconds, tokenizer)
    show(findings_table(prepared, limits), console)


def run_evaluate(options: Namespace, console: Console) -> None:
    """Score a checkpoint on a split under the seven modality conditions, or at rates of missing frames."""
    if options.json not in (None, "-"):
        target = Path(options.json)
        if reason := "it is a folder" if target.is_dir() else why_not_writable(target):
            options.refuse(f"--json {target} cannot be written: {reason}")
    try:
        precision = choose_precision(options.mixed_precision, "--mixed-precision")
    except ValueError as error:
        options.refuse(str(error))
    if precision.warning:
        Console(stderr=True).print(f"warning: {precision.warning}", soft_wrap=True)
    accelerator = Accelerator(mixed_precision=precision.name)
    model, processor = load_checkpoint(options.checkpoint)
    prepared = None
    if model.config.feature_widths is None:
        data = prepared = _clips_to_score(options, model.config, processor)
    else:
        data = _features_to_score(options, model.config)
    dataset = make_dataset(data, options.split, processor, model.config)
    sampler = BucketBatchSampler(dataset.lengths, options.batch_size)
    loader = accelerator.prepare(make_loader(dataset, sampler))
    model.to(accelerator.device)
    report = {"checkpoint": options.checkpoint, "data": options.data, "split": options.split}
    report |= {"samples": len(dataset), "mixed_precision": precision.name}
    title = f"{options.checkpoint} on {options.split} ({len(dataset)} samples)"
    if level := options.frame_rates:
        stand_ins = stand_ins_of(model, processor) if level == "input" else {}
        ids = [sample.id for sample in dataset.samples]
        choices = {"seed": options.frame_seed, "nested": options.nested}
        drop = FrameDrop(ids, stand_ins, split=options.split, **choices)
        results = evaluate_frame_rates(model, loader, accelerator, drop, level=level)
        report |= {"level": level, **choices, "frame_rates": results}
        table = frame_rates_table(results, f"{title}, at {level} level")
    else:
        results = evaluate_conditions(model, loader, accelerator)
        report["conditions"] = results
        table = conditions_table(results, title)
    if options.json:
        if prepared:
            report |= findings_record(prepared, processor.limits)
        _write_json(report, options.json, console)
    if options.json != "-":
        if prepared:
            show(findings_table(prepared, processor.limits), console)
        show(table, console)


def _clips_to_score(options: Namespace, config: MSAConfig, processor: MSAProcessor) -> PreparedCorpus:
    if is_precomputed_path(options.data):
        raise CorpusError(
            f"{options.data} means precomputed features, but {options.checkpoint} reads raw clips: give "
            "such clips"
        )
    corpus = read_corpus(options.data, **_labels_to_read(options, config), skip_broken=options.skip_broken)
    require_splits(corpus, (options.split,))
    corpus = replace(corpus, samples=corpus.split(options.split))  # the other splits need not be extracted
    _require_known_labels(corpus, config)
    return prepare(corpus, FeatureCache(), processor.settings, options.workers, options.skip_broken)


def _features_to_score(options: Namespace, config: MSAConfig) -> FeatureCorpus:
    corpus = read_features(
        options.data,
        **_labels_to_read(options, config),
        split_column=options.split_column or (config.trained_on or {}).get("split_column", "split"),
        skip_broken=options.skip_broken,
    )
    require_splits(corpus, (options.split,))
    corpus = replace(corpus, samples=corpus.split(options.split))
    _require_known_labels(corpus, config)
    return corpus


def _labels_to_read(options: Namespace, config: MSAConfig) -> dict[str, Any]:
    return {
        "label_column": options.label_column or (config.trained_on or {}).get("label_column", "label"),
        "label_range": config.label_range if config.is_regression else None,
    }


def _require_known_labels(corpus: Corpus | FeatureCorpus, config: MSAConfig) -> None:
    known = label2id_of(config)
    if known is not None and (unknown := sorted({sample.label for sample in corpus.samples} - known.keys())):
        raise CorpusError(
            f"{corpus.source}: label {unknown[0]!r} is not among the checkpoint's: {', '.join(known)}"
        )


def run_convert_features(options: Namespace, console: Console) -> None:
    """Make a corpus of features out of a file of others."""
    with Console(stderr=True).status(f"reading {options.source}"):
        convert_features(
            Path(options.source),
            Path(options.folder),
            metadata=Path(options.metadata) if options.metadata else None,
            label_column=options.label_column,
            split_column=options.split_column,
            level=options.level,
            non_finite=options.non_finite,
            valid_share=options.valid_share,
            skip_broken=options.skip_broken,
        )
    _show_features(options.folder, console)


def run_extract_features(options: Namespace, console: Console) -> None:
    """Make a corpus of features out of raw clips."""
    require_new_folder(Path(options.folder))
    corpus = read_corpus(options.data, label_column=options.label_column, skip_broken=options.skip_broken)
    prepared = extract_features(
        corpus,
        Path(options.folder),
        text_encoder=options.text_encoder,
        level=options.level,
        settings=ExtractionSettings(num_frames=options.num_frames),
        workers=options.workers,
        skip_broken=options.skip_broken,
    )
    limits = InputLimits(MAX_TEXT_TOKENS, math.inf, load_tokenizer(options.text_encoder))
    show(findings_table(prepared, limits), console)
    _show_features(options.folder, console)


def _show_features(folder: str, console: Console) -> None:
    corpus = read_features(folder)
    show(features_table(corpus), console)
    known = {name: steps.width for name, steps in corpus.steps.items()}
    # where a modality is not in the data, any width will do
    widths = ", ".join(f"{name}: {known.get(name, 1)}" for name in MODALITIES)
    console.print(f"train on it: 'model.feature_widths={{{widths}}}' data.path={folder}", soft_wrap=True)


def run_predict(options: Namespace, console: Console) -> None:
    """Predict for clips, or for text alone."""
    texts = options.text or [None] * len(options.clips)
    clips = options.clips or [None] * len(texts)
    if not clips:
        options.refuse("nothing to predict: give clips, or --text alone")
    if len(clips) != len(texts):
        options.refuse(f"{len(clips)} clips but {len(texts)} --text: give one for each clip, or none at all")
    results: list[Prediction | ClipError] = []
    broken = 0
    stopped = None
    for result in MSAPipeline.from_pretrained(options.model).stream(clips, texts):
        if isinstance(result, ClipError):
            broken += 1
            if not options.skip_broken:
                stopped = result
                break
        results.append(result)
    if options.json and results:
        _write_json([_as_json(result) for result in results], "-", console)
    elif results:
        for line in prediction_lines(results):
            console.print(Text(line), soft_wrap=True)
    if stopped is not None:
        if len(clips) == 1:
            raise stopped
        raise UnfinishedError(
            f"{stopped} (stopped here: {len(results):,} of {len(clips):,} predicted; --skip-broken goes on "
            "with the other clips)"
        )
    if broken:
        raise UnfinishedError(f"{broken:,} of {len(clips):,} clips cannot be used, as listed")


def _as_json(result: Prediction | ClipError) -> dict[str, Any]:
    if isinstance(result, Prediction):
        return result.to_dict()
    return {"clip": str(result.path), "error": _reason(result)}


def _reason(error: ClipError) -> str:
    return f"{error.detail}; {REMEDIES[error.problem]}"


def prediction_lines(results: Sequence[Prediction | ClipError]) -> list[str]:
    """Predictions for the terminal, each as the sum of its baseline and what every modality adds.

    Names of clips stand in lines of their own, so that none is broken; the other lines are short. Bars have
    one scale for all clips.
    """
    predictions = [result for result in results if isinstance(result, Prediction)]
    added = [abs(value) for one in predictions for value in one.contributions.values()]
    lines = []
    for result in results:
        if isinstance(result, ClipError):
            lines += [f"{printable(result.path)}: error", f"  {_reason(result)}", ""]
        else:
            lines += [*_lines_of(result, max(added)), ""]
    if predictions:
        lines.append(LEGEND_OF_SCORES if predictions[0].label is None else LEGEND_OF_CLASSES)
    return lines


def _lines_of(one: Prediction, largest: float) -> list[str]:
    of_scores = one.label is None
    answer = f"{one.score:+.3f}" if of_scores else f"{one.label} ({one.probabilities[one.label]:{PERCENT}})"
    unit = ".3f" if of_scores else PERCENT
    lines = [
        f"{printable(one.clip or '(text only)')}: {answer}",
        f"  {'nothing seen':<12} {one.baseline:>+8{unit}}",
    ]
    for name, value in one.contributions.items():
        if name in one.missing:
            lines.append(f"  {name:<12} {'0':>8}  {one.missing[name]}")
        else:
            lines.append(f"  {name:<12} {value:>+8{unit}}  {_bar(value, largest)}".rstrip())
    lines += [f"  read of {name + ':':<8} {what}" for name, what in one.cut.items()]
    return lines + ([f"  warning: {one.warning}"] if one.warning else [])


def _bar(value: float, largest: float) -> str:
    """A bar of plus or minus signs, as long as the contribution is large beside the largest of all."""
    return ("+" if value > 0 else "-") * (round(LONGEST_BAR * abs(value) / largest) if largest else 0)


def run_describe(options: Namespace, console: Console) -> None:
    """Show the parts of a model, their parameters, the shapes inside, and how a checkpoint scored."""
    description = describe(options.source)
    if options.json:
        _write_json(asdict(description), "-", console)
        return
    for table in description_tables(description, options.source):
        show(table, console)
    for line in record_lines(description):
        console.print(Text(line), soft_wrap=True)
    for split, results in description.trained_on.get("results", {}).items():
        show(conditions_table(results, f"scores on {split}"), console)
    for split, shares in description.trained_on.get("shares", {}).items():
        show(shares_table(shares, f"what predictions on {split} come from"), console)
    for line in description.trained_on.get("comparison", ()):
        console.print(Text(line), soft_wrap=True)


def run_get_models(options: Namespace, console: Console) -> None:
    """Bring pretrained files into the cache."""
    if unknown := [name for name in options.names if name not in ASSETS]:
        raise AssetError(f"unknown model {unknown[0]!r}; known are {', '.join(ASSETS)}")
    for name in options.names or ASSETS:
        console.out(f"{name}: {get_asset(name, progress=console.out)}", highlight=False)


def run_synthesize(options: Namespace, console: Console) -> None:
    """Render the synthetic corpus."""
    from msa_online.synthetic.corpus import CorpusRecipe, render_corpus  # its libraries come with an extra

    strengths = {name: getattr(options, name) for name in ("text", "audio", "vision")}
    recipe = CorpusRecipe(clips=options.clips, seed=options.seed, strengths=strengths)
    console.print(f"corpus: {render_corpus(options.folder, recipe, workers=options.workers)}", soft_wrap=True)


def _write_json(content: object, target: str, console: Console) -> None:
    text = json.dumps(content, indent=2)
    if target == "-":
        console.out(text, highlight=False)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n", encoding="utf-8")


COMMANDS = {
    "prepare": run_prepare,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "describe": run_describe,
    "get-models": run_get_models,
    "synthesize": run_synthesize,
    "convert-features": run_convert_features,
    "extract-features": run_extract_features,
}
