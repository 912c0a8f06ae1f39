# SPDX-License-Identifier: Apache-2.0
"""`msa-online evaluate`: score a checkpoint."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from transformers.utils import CONFIG_NAME

from feature_extractors import FeatureCache
from msa_online.batching import label2id_of, make_dataset, make_loader, make_sampler
from msa_online.commands.json_output import write_json
from msa_online.confidence import Confidence, shortfall_line, too_few_line
from msa_online.configuration_msa import MSAConfig
from msa_online.context import CONTEXTS
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus, CorpusError, require_splits
from msa_online.corpora.dialogues import check_dialogues
from msa_online.corpora.prepared_corpus import PreparedCorpus, findings_record, findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.validation import why_not_writable
from msa_online.evaluation.conditions import evaluate_frame_rates, predict_conditions, undefined_of
from msa_online.evaluation.metrics import METRIC_TITLES
from msa_online.evaluation.tables import (
    classes_table,
    conditions_table,
    confidence_table,
    frame_rates_table,
    open_console,
    show,
)
from msa_online.hub import load_checkpoint
from msa_online.missing.frames import FrameDrop, stand_ins_of
from msa_online.modalities import VISIBLE_SETS
from msa_online.precomputed.corpus import FeatureCorpus
from msa_online.precomputed.files import is_precomputed_path
from msa_online.precomputed.reading import read_features
from msa_online.processing_msa import MSAProcessor
from msa_online.training.checkpoint import ADAPTER, write_atomically
from msa_online.training.config_reader import import_plugins
from msa_online.training.precision import choose_precision
from msa_online.transcription import transcriber_of

CLASS_METRICS = {
    "f1": "F1 of each class",
    "f1_binary": "F1 of each class against the rest, weighted (as RAVEN and MulT score emotions)",
}


def run(options: Namespace, console: Console) -> None:
    """Score a checkpoint on a split under the seven modality conditions, or at rates of missing frames."""
    import_plugins(options.plugin, "--plugin")
    if options.json not in (None, "-"):
        target = Path(options.json)
        if reason := "it is a folder" if target.is_dir() else why_not_writable(target):
            options.refuse(f"--json {target} cannot be written: {reason}")
    if options.calibrate:
        _require_calibration(options)
    try:
        precision = choose_precision(options.mixed_precision, "--mixed-precision")
    except ValueError as error:
        options.refuse(str(error))
    if precision.warning:
        open_console(stderr=True).print(f"warning: {precision.warning}", soft_wrap=True)
    accelerator = Accelerator(mixed_precision=precision.name)
    model, processor = load_checkpoint(options.checkpoint)
    _require_scoring(options, model.config)
    data = read_split(options, model.config, processor)
    prepared = data if isinstance(data, PreparedCorpus) else None
    dataset = make_dataset(data, options.split, processor, model.config)
    loader = accelerator.prepare(make_loader(dataset, make_sampler(dataset, options.batch_size)))
    model.to(accelerator.device)
    report = {"checkpoint": options.checkpoint, "data": options.data, "split": options.split}
    report |= {"samples": len(dataset), "mixed_precision": precision.name}
    notes: list[str] = []
    title = f"{options.checkpoint} on {options.split} ({len(dataset)} samples)"
    if level := options.frame_rates:
        stand_ins = stand_ins_of(model, processor) if level == "input" else {}
        ids = [sample.id for sample in dataset.samples]
        choices = {"seed": options.frame_seed, "nested": options.nested}
        drop = FrameDrop(ids, stand_ins, split=options.split, **choices)
        results = evaluate_frame_rates(model, loader, accelerator, drop, level=level)
        report |= {"level": level, **choices, "frame_rates": results}
        tables = [frame_rates_table(results, f"{title}, at {level} level")]
    else:
        predictions = predict_conditions(model, loader, accelerator, tuple(VISIBLE_SETS))
        if options.scoring == "nonzero":
            report |= {"scoring": "nonzero", "conditions": predictions.nonzero_metrics(model.config)}
            title += ", samples with label 0 left out"
        else:
            report["conditions"] = predictions.metrics(model.config)
        tables = [conditions_table(report["conditions"], title)]
        if options.scoring == "per_class":
            report["classes"] = classes = predictions.class_metrics(model.config)
            tables += [classes_table(classes, name, heading) for name, heading in CLASS_METRICS.items()]
        confidence = Confidence.of(model.config.confidence)
        if options.calibrate:
            confidence = predictions.fit_confidence(options.split)
            notes += filter(None, [too_few_line(confidence)])
            if confidence.fitted and accelerator.is_main_process:
                notes.append(_store(confidence, Path(options.checkpoint)))
        if confidence is not None and confidence.fitted:
            measured = {}
            if options.split != confidence.split:  # there, coverage is the level by construction
                measured = predictions.measure_confidence(confidence, model.config)
            notes += filter(None, [shortfall_line(confidence, measured, options.split)])
            report["confidence"] = {**confidence.to_dict(), "measured": measured}
            tables.append(confidence_table(confidence, measured, confidence.kind))
    report["undefined"] = undefined = undefined_of(dataset.labels, model.config)
    if options.json != "-":
        if prepared:
            show(findings_table(prepared, processor.limits), console)
        for table in tables:
            show(table, console)
        for name, reason in undefined.items():
            console.print(f"undefined: {METRIC_TITLES[name]} ({reason})", soft_wrap=True)
        for note in notes:
            console.print(note, soft_wrap=True)
    if options.json:  # last, so that scores are seen even if the file cannot be written
        if prepared:
            report |= findings_record(prepared, processor.limits)
        write_json(report, options.json, console)


def read_split(
    options: Namespace, config: MSAConfig, processor: MSAProcessor | None
) -> PreparedCorpus | FeatureCorpus:
    """The split that options of `evaluate` name, of clips or of features, as the checkpoint reads them.

    Of a model with context, clips without a dialogue are scored alone.
    """
    if config.feature_widths is None:
        return _clips_to_score(options, config, processor)
    return _features_to_score(options, config)


def _require_scoring(options: Namespace, config: MSAConfig) -> None:
    """Check that the task of the checkpoint has the chosen metrics."""
    if options.scoring != "standard" and options.frame_rates:
        options.refuse(f"--scoring {options.scoring} is for the seven conditions: leave out --frame-rates")
    if options.scoring == "nonzero" and not config.is_regression:
        options.refuse(f"--scoring nonzero is for scores, but {options.checkpoint} predicts classes")
    if options.scoring == "per_class" and config.is_regression:
        options.refuse(f"--scoring per_class is for classes, but {options.checkpoint} predicts scores")


def _require_calibration(options: Namespace) -> None:
    """Check that a fit can be made and stored."""
    if options.split != "valid" or options.frame_rates:
        options.refuse("--calibrate needs --split valid, and no --frame-rates")
    config = Path(options.checkpoint) / CONFIG_NAME
    if not config.is_file():
        options.refuse(
            f"--calibrate stores what it fits in {config}, which does not exist: give a local folder"
        )
    if reason := why_not_writable(config):
        options.refuse(f"--calibrate cannot write {config}: {reason}")


def _store(confidence: Confidence, folder: Path) -> str:
    """Write a fit into the configuration of a checkpoint and of its adapter; returns a line about it.

    Measures of an earlier fit are removed.
    """
    configs = [file for file in (folder / CONFIG_NAME, folder / ADAPTER / CONFIG_NAME) if file.is_file()]
    for file in configs:
        content = json.loads(file.read_text(encoding="utf-8"))
        (content.get("trained_on") or {}).pop("confidence", None)
        text = json.dumps({**content, "confidence": confidence.to_dict()}, indent=2, sort_keys=True)
        write_atomically(file, text + "\n")
    return f"{confidence.kind}: stored in {', '.join(map(str, configs))}"


def _clips_to_score(options: Namespace, config: MSAConfig, processor: MSAProcessor) -> PreparedCorpus:
    if is_precomputed_path(options.data):
        raise CorpusError(
            f"{options.data} means precomputed features, but {options.checkpoint} reads raw clips: give "
            "such clips"
        )
    transcriber = transcriber_of(options.transcribe, options.language, FeatureCache())
    corpus = read_corpus(
        options.data,
        **_labels_to_read(options, config),
        texts_optional=transcriber is not None,
        skip_broken=options.skip_broken,
        audio_track=options.audio_track or (config.trained_on or {}).get("audio_track"),
    )
    require_splits(corpus, (options.split,))
    corpus = replace(corpus, samples=corpus.split(options.split))  # the other splits need not be extracted
    _require_fit(corpus, config)
    return prepare(
        corpus,
        FeatureCache(),
        processor.settings,
        options.workers,
        options.skip_broken,
        processor.max_audio_seconds,
        transcriber,
    )


def _features_to_score(options: Namespace, config: MSAConfig) -> FeatureCorpus:
    if options.transcribe is not None:
        options.refuse("--transcribe needs clips, but this checkpoint reads precomputed features")
    corpus = read_features(
        options.data,
        **_labels_to_read(options, config),
        split_column=options.split_column or (config.trained_on or {}).get("split_column", "split"),
        skip_broken=options.skip_broken,
    )
    require_splits(corpus, (options.split,))
    corpus = replace(corpus, samples=corpus.split(options.split))
    _require_fit(corpus, config)
    return corpus


def _labels_to_read(options: Namespace, config: MSAConfig) -> dict[str, Any]:
    return {
        "label_column": options.label_column or (config.trained_on or {}).get("label_column", "label"),
        "label_range": config.label_range if config.is_regression else None,
    }


def _require_fit(corpus: Corpus | FeatureCorpus, config: MSAConfig) -> None:
    """Check that the checkpoint knows the labels, and that the dialogues it reads have what it needs."""
    if config.dialogue_turns is not None:
        check_dialogues(corpus, required=False, speakers=CONTEXTS[config.context].reads_speakers)
    known = label2id_of(config)
    if known is not None and (unknown := sorted({sample.label for sample in corpus.samples} - known.keys())):
        raise CorpusError(
            f"{corpus.source}: label {unknown[0]!r} is not among the checkpoint's: {', '.join(known)}"
        )
