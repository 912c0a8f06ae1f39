# SPDX-License-Identifier: Apache-2.0
"""A training run in three steps: build and check, fit epoch by epoch, finish with scores and a card."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from feature_extractors import FeatureCache
from feature_extractors.clip import printable
from msa_online.batching import BucketBatchSampler, in_order
from msa_online.confidence import shortfall_line, too_few_line
from msa_online.corpora.prepared_corpus import findings_counts
from msa_online.evaluation.attribution import modality_shares
from msa_online.evaluation.conditions import (
    ConditionPredictions,
    predict_conditions,
    selection_score,
    undefined_of,
    validate,
)
from msa_online.evaluation.json_text import without_nan
from msa_online.evaluation.metrics import METRIC_TITLES
from msa_online.evaluation.tables import (
    HEADLINES,
    conditions_table,
    confidence_table,
    epoch_line,
    open_console,
    selection_metric,
    shares_table,
    show,
)
from msa_online.missing.modalities import FixedCondition, MaskedBatches
from msa_online.missing.rates import SplitMask, rates_table
from msa_online.modalities import COMPLETE, CONDITIONS, MISSING_RATES, NOTHING
from msa_online.model_card import write_model_card
from msa_online.processing_msa import MSAProcessor
from msa_online.publishing import check_destination, publish
from msa_online.training.accelerator import device_name, seed_everything, start_accelerator
from msa_online.training.checkpoint import RunFolder, require_space
from msa_online.training.config import RunArguments, TrainingArguments
from msa_online.training.data import (
    check_word_times,
    class_names,
    fingerprint,
    make_loaders,
    prepare_data,
    read_data,
    steps_line,
    transcripts_record,
)
from msa_online.training.diagnostics import GRADIENTS, measure_epoch
from msa_online.training.divergence import ConstantModel, check_epoch, constant_line
from msa_online.training.frozen_states import compute_frozen_states
from msa_online.training.loop import TrainingLoop
from msa_online.training.masking import (
    draw_split_masks,
    make_input_masks,
    occurring_modalities,
    selection_conditions,
)
from msa_online.training.model import (
    build_model,
    count_parameters,
    fit_encoders,
    parameters_line,
    require_encoders,
    require_fused,
)
from msa_online.training.modulator import fit_modulator, make_modulator
from msa_online.training.optimizer import make_optimizer, make_scheduler, restart_decay
from msa_online.training.stages import StageSchedule, make_schedule
from msa_online.training.state import Stateful
from msa_online.training.teacher import appoint_teacher
from msa_online.transcription import transcriber_of


@dataclass(frozen=True)
class Run:
    """All objects of a run, built and checked.

    Attributes:
        arguments: Configuration of the run.
        accelerator: The started Accelerator.
        console: Console of the main process; silent in the others.
        folder: The run's folder.
        processor: Makes inputs of raw clips; None for precomputed features.
        schedule: Stages and the best epoch so far.
        loop: Trains one epoch.
        loaders: Loader of each split, prepared by Accelerate, without masks.
        sampler: Batch sampler of the training split. A prepared loader of several processes has only a shard.
        masks: Mask of each split of a run with missing rates; else empty.
        selection: Conditions whose mean validation score selects the best epoch of the last stage.
        for_teacher: Training split in a fixed order, with the masks of a teacher.
        for_validation: Validation split with the masks of validation.
        findings: Number of clips with each finding; empty for precomputed features.
        transcripts: How many texts a recogniser made; empty if it made none.
    """

    arguments: RunArguments
    accelerator: Accelerator
    console: Console
    folder: RunFolder
    processor: MSAProcessor | None
    schedule: StageSchedule
    loop: TrainingLoop
    loaders: Mapping[str, DataLoader]
    sampler: BucketBatchSampler
    masks: Mapping[str, SplitMask]
    selection: tuple[str, ...]
    for_teacher: MaskedBatches
    for_validation: MaskedBatches
    findings: Mapping[str, int | str]
    transcripts: Mapping[str, Any]

    @property
    def parts(self) -> dict[str, Stateful]:
        """State that a resumed run restores in addition to the weights, by name."""
        samples = self.loop.bare_model.head.samples
        return {
            "optimizer": self.loop.optimizer,
            "scheduler": self.loop.scheduler,
            "schedule": self.schedule,
            "modulator": self.loop.modulator,
            "progress": self.loop.progress,
            **({} if samples is None else {"samples": samples}),
        }

    @property
    def selected_by(self) -> str:
        """What selects the best epoch, for the record."""
        metric = HEADLINES[selection_metric(self.loop.bare_model.config.is_regression)]
        mean = f", mean of {len(self.selection)} conditions" if len(self.selection) > 1 else ""
        return f"validation {metric}{mean}"

    @property
    def constant(self) -> ConstantModel:
        """The constant model that the trained one is compared with."""
        return ConstantModel.fit(self.loaders["train"].dataset.labels, self.loop.bare_model.config)


def train(arguments: RunArguments, command: str) -> None:
    """Carry out the run that `arguments` describe, and publish it if they say so.

    Args:
        arguments: The run.
        command: The command line, for the record.
    """
    training = arguments.training
    accelerator = start_accelerator(training)
    main_process = accelerator.is_main_process
    if training.push_to_hub and main_process:
        check_destination(training.push_to_hub, private=training.hub_private)
    carry_out(arguments, command, accelerator)
    # free the wrapped model first: if it is freed after the process group, it may wait for threads forever
    accelerator.free_memory()
    accelerator.end_training()
    if training.push_to_hub and main_process:  # last, because other processes do not wait for a slow upload
        address = publish(Path(training.output_dir), training.push_to_hub, private=training.hub_private)
        open_console().print(f"published: {address}", soft_wrap=True)


def carry_out(arguments: RunArguments, command: str, accelerator: Accelerator) -> None:
    """A complete run, from the data to the model card, with a started Accelerator."""
    run = build(arguments, accelerator)
    fit(run)
    finish(run, command)


def best_validation_score(arguments: RunArguments) -> tuple[float, int]:
    """Train a run and leave it unfinished: nothing is scored on the test split.

    Returns:
        The best validation score of its last stage, see `selection_score`; and the epochs trained.
    """
    accelerator = start_accelerator(arguments.training)
    run = build(arguments, accelerator)
    fit(run)
    score, epochs = run.schedule.best_score, run.schedule.epoch
    accelerator.free_memory()
    accelerator.end_training()
    return score, epochs


def build(arguments: RunArguments, accelerator: Accelerator) -> Run:
    """Read the data, build the model, and check that they match.

    All problems of the input are found here: quick checks come before the slow extraction of features, and
    all checks before anything of an earlier run is changed.
    """
    training = arguments.training
    console = open_console(quiet=not accelerator.is_main_process)
    folder = RunFolder(training.output_dir, accelerator)
    folder.check(arguments)
    require_encoders(arguments)
    transcriber = transcriber_of(arguments.data.transcribe, arguments.data.language, FeatureCache())
    corpus = read_data(arguments.data)
    seed_everything(training.seed)
    model, processor = build_model(arguments, class_names(corpus, arguments.data), console)
    schedule = make_schedule(training, model.head.stages)
    modulator = make_modulator(training, model, schedule.total_epochs, accelerator)
    require_space(folder.path, model)
    longest = model.config.dialogue_turns
    speakers = model.context.reads_speakers
    data = prepare_data(
        corpus, arguments.data, processor, accelerator, console, transcriber, longest, speakers
    )
    if model.head.needs_word_times:
        check_word_times(data, console)
    masks = draw_split_masks(data, arguments.data.missing, training.condition)
    if masks:
        show(rates_table(masks), console)
    fit_encoders(model, data, arguments, masks)
    occurring = occurring_modalities(data, training, masks, len(schedule.stages))
    require_fused(model, training.condition, occurring)
    fit_modulator(modulator, training, occurring, console)
    input_masks = make_input_masks(data, training, masks, model, processor)
    if line := input_masks["train"].line:
        console.print(line, soft_wrap=True, highlight=False)
    states = compute_frozen_states(model, processor, data, training, accelerator, console)
    loaders = make_loaders(data, processor, model.config, arguments, accelerator, states)
    console.print(parameters_line(model), highlight=False)
    console.print(steps_line(loaders, schedule.total_epochs), soft_wrap=True, highlight=False)
    folder.open(arguments, fingerprint(data, turns=longest is not None, speakers=speakers))

    optimizer = make_optimizer(
        model,
        learning_rate=training.learning_rate,
        learning_rates=training.learning_rates,
        layer_decay=training.layer_decay,
        weight_decay=training.weight_decay,
    )
    sampler = loaders["train"].batch_sampler
    scheduler = make_scheduler(
        optimizer,
        steps=sampler.steps * schedule.total_epochs,
        warmup=training.warmup,
        decay=training.decay,
    )
    every_train_sample = accelerator.prepare(in_order(loaders["train"]))
    model, optimizer = accelerator.prepare(model, optimizer)
    loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
    loop = TrainingLoop(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        modulator=modulator,
        input_mask=input_masks["train"],
        clip_norm=training.clip_norm,
        seed=training.seed,
        measure_gradients=training.measure_gradients,
        measure_modalities=GRADIENTS in training.diagnostics,
    )
    train_labels = torch.tensor(loaders["train"].dataset.labels, device=accelerator.device)
    loop.bare_model.head.start_training(train_labels)
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        console=console,
        folder=folder,
        processor=processor,
        schedule=schedule,
        loop=loop,
        loaders=loaders,
        sampler=sampler,
        masks=masks,
        selection=selection_conditions(training, masks, occurring),
        for_teacher=input_masks["teacher"].over(every_train_sample),
        for_validation=input_masks["valid"].over(loaders["valid"]),
        findings=findings_counts(data, processor.limits) if processor else {},
        transcripts=transcripts_record(data, arguments.data.language),
    )


def fit(run: Run) -> None:
    """Train and validate all epochs of all stages; the run's folder then contains the best epoch."""
    training, accelerator = run.arguments.training, run.accelerator
    folder, schedule, loop = run.folder, run.schedule, run.loop
    accelerator.init_trackers("msa_online")
    if not accelerator.is_main_process:
        seed_everything(training.seed + accelerator.process_index)  # models are equal, dropout may differ
    if training.resume:
        folder.load_state(loop.bare_model, run.parts)
        run.console.print(f"resuming after epoch {schedule.epoch}")

    stage, conditions = None, (COMPLETE,)
    while not schedule.finished:
        if schedule.stage != stage:
            stage = schedule.stage
            loop.bare_model.head.start_stage(stage.name)
            loop.teacher = appoint_teacher(loop.bare_model, schedule, folder, run.for_teacher, accelerator)
            if schedule.is_last_stage:
                conditions = run.selection
                if training.condition and not run.masks:
                    loop.input_mask = FixedCondition(CONDITIONS[training.condition])
        started = time.monotonic()
        epoch, last_stage = schedule.epoch, schedule.is_last_stage
        run.sampler.start_epoch(epoch)
        loop.bare_model.head.start_epoch(schedule.elapsed)
        title = f"epoch {epoch + 1}/{schedule.total_epochs}"
        losses = loop.train_epoch(run.loaders["train"], stage=stage.name, epoch=epoch, title=title)
        metrics = validate(loop.bare_model, run.for_validation, accelerator, conditions)
        check_epoch(title, losses, metrics, run.arguments.data.label_range, accelerator.scaler)
        losses |= measure_epoch(
            training.diagnostics, loop.bare_model, run.for_teacher, run.for_validation, accelerator
        )
        score = selection_score(metrics, loop.bare_model.config.is_regression)
        starts_phase = loop.modulator.on_validation(score) or (
            schedule.patience_ends_with(score) and loop.modulator.on_patience_end()
        )
        best = schedule.advance(score, bool(starts_phase))
        entry = {"epoch": epoch + 1, "stage": stage.name, "losses": losses, "valid": metrics}
        undefined = undefined_of(run.loaders["valid"].dataset.labels, loop.bare_model.config)
        loop.progress.history.append(entry | ({"undefined": undefined} if undefined else {}))
        accelerator.log({f"valid/{name}": value for name, value in metrics.items()}, step=loop.progress.step)
        loop.progress.seconds += time.monotonic() - started
        if schedule.phase_starts:
            restart_decay(loop.scheduler)
        with folder.writing():
            if best and last_stage:
                folder.publish(loop.bare_model, run.processor)
            elif best and stage.name in loop.bare_model.head.teachers.values():
                folder.keep_stage(stage.name, loop.bare_model)
            if schedule.phase_starts and last_stage:
                folder.keep_phase(len(schedule.earlier_phases))
            folder.save_state(loop.bare_model, run.parts)
            folder.write_history(loop.progress.history)
        line = epoch_line(title, losses, metrics, best=best, skipped=loop.progress.skipped)
        run.console.print(line, soft_wrap=True)
        if schedule.phase_starts:
            run.console.print(
                f"the next phase of training.modulator={training.modulator} starts: best epoch, patience and "
                "decay of the learning rates start again",
                soft_wrap=True,
            )


def finish(run: Run, command: str) -> None:
    """Score the best epoch, write its card and print the tables.

    The test split is used here for the first time.
    """
    accelerator, folder, loaders = run.accelerator, run.folder, run.loaders
    model, training = run.loop.bare_model, run.arguments.training
    parameters = count_parameters(model)  # before adapters are removed
    accelerator.wait_for_everyone()  # the main process has published the best epoch
    model.head.start_stage(model.head.stages[-1])  # the stage that predicts

    conditions = (training.condition,) if training.condition else tuple(CONDITIONS)
    condition = MISSING_RATES if run.masks else conditions[-1]  # as in validation
    splits = [split for split in ("valid", "test") if split in loaders]
    names = conditions if training.condition else (NOTHING, *conditions)
    phases = []
    for number, phase in enumerate(run.schedule.earlier_phases, 1):
        folder.load_phase(number, model)
        scored = {split: _predict(run, split, conditions).metrics(model.config) for split in splits}
        phases.append({"epoch": phase["epoch"], "results": without_nan(scored)})
    folder.load_best(model)
    predictions = {split: _predict(run, split, names) for split in splits}
    folder.write_predictions(predictions)
    results = {split: of_split.metrics(model.config) for split, of_split in predictions.items()}
    confidence = predictions["valid"].fit_confidence("valid")
    measured = {}
    if confidence.fitted:
        model.config.confidence = confidence.to_dict()
        measured = {
            split: of_split.measure_confidence(confidence, model.config)
            for split, of_split in predictions.items()
            if split != confidence.split
        }
    shares = {}
    if set(conditions) == set(CONDITIONS):  # a model of one condition cannot predict without a modality
        shares = {split: modality_shares(model, loaders[split], accelerator) for split in splits}
    constant = run.constant
    floors = {split: constant.metrics(loaders[split].dataset.labels) for split in splits}
    comparison = [
        constant_line(split, scores[condition], floors[split], constant.title)
        for split, scores in results.items()
    ]
    model.config.trained_on = {
        **_record(run, command, parameters),
        "selection": run.selected_by,
        "results": without_nan(results),
        **({"earlier_phases": phases} if phases else {}),
        "undefined": {
            split: reasons
            for split in splits
            if (reasons := undefined_of(loaders[split].dataset.labels, model.config))
        },
        "shares": shares,
        **({"confidence": without_nan(measured)} if measured else {}),
        "constant": without_nan(floors),
        "comparison": comparison,
    }
    if accelerator.is_main_process:
        with folder.writing():
            folder.save_config(model.config)
            write_model_card(folder.path, model.config)
        folder.forget_state()
    for split, scores in results.items():
        show(conditions_table(scores, f"{split}, best epoch {run.schedule.best_epoch}"), run.console)
        for name, reason in model.config.trained_on["undefined"].get(split, {}).items():
            run.console.print(f"undefined: {METRIC_TITLES[name]} ({reason})", soft_wrap=True)
        if split in shares:
            show(shares_table(shares[split], f"{split}: what the predictions come from"), run.console)
    for split, measures in measured.items():
        show(confidence_table(confidence, measures, f"{split}: {confidence.kind}"), run.console)
        if short := shortfall_line(confidence, measures, split):
            run.console.print(short, soft_wrap=True)
    if lacking := too_few_line(confidence):
        run.console.print(lacking, soft_wrap=True)
    run.console.print(Text("\n".join(map(printable, comparison))), soft_wrap=True)
    for line in phase_lines([*phases, {"epoch": run.schedule.best_epoch, "results": results}], condition):
        run.console.print(line, soft_wrap=True, highlight=False)
    run.console.print(f"checkpoint and model card: {folder.path}", soft_wrap=True)


def phase_lines(phases: Sequence[Mapping[str, Any]], condition: str) -> list[str]:
    """One line for each phase of a modulator, the published one last; none if there was one phase.

    Args:
        phases: Number of the best epoch, and metrics by split and condition, of each phase.
        condition: The condition that selects the best epoch.
    """
    if len(phases) < 2:
        return []
    lines = []
    for number, phase in enumerate(phases, 1):
        scores = {split: of_split[condition] for split, of_split in phase["results"].items()}
        name = selection_metric("mae" in scores["valid"])
        shown = ", ".join(
            f"{split} {HEADLINES[name]} {metrics[name]:.3f}" for split, metrics in scores.items()
        )
        published = " (published)" if number == len(phases) else ""
        lines.append(f"phase {number}, best epoch {phase['epoch']}: {shown}{published}")
    return lines


def _predict(run: Run, split: str, conditions: tuple[str, ...]) -> ConditionPredictions:
    """Predictions by modality condition, and with the run's own mask if it has missing rates."""
    model, loader = run.loop.bare_model, run.loaders[split]
    predictions = predict_conditions(model, loader, run.accelerator, conditions)
    if run.masks:
        masked = predict_conditions(model, run.masks[split].over(loader), run.accelerator, (COMPLETE,))
        predictions.logits[MISSING_RATES] = masked.logits[COMPLETE]
        predictions.seen[MISSING_RATES] = masked.seen[COMPLETE]
    return predictions


def _record(run: Run, command: str, parameters: Mapping[str, int]) -> dict[str, Any]:
    """Training record of a checkpoint, without the results."""
    data, training = run.arguments.data, run.arguments.training
    record: dict[str, Any] = {
        "data": data.path,
        "label_column": data.label_column,
        "split_column": data.split_column,
        "splits": {split: len(loader.dataset) for split, loader in run.loaders.items()},
        "seed": training.seed,
        "mixed_precision": str(run.accelerator.mixed_precision),
        "modulator": training.modulator,
        "protocol": protocol_of(training, run.masks),
        "epoch": run.schedule.best_epoch,
        "skipped_steps": run.loop.progress.skipped,
        "parameters": parameters,
        "effort": {
            "hours": round(run.loop.progress.seconds / 3600, 4),
            "steps": run.loop.progress.step,
            "epochs": run.schedule.epoch,
            "processes": run.accelerator.num_processes,
            "device": device_name(run.accelerator.device),
        },
        "command": command,
    }
    if run.processor:
        limits = run.processor.limits
        record["limits"] = {
            "text tokens": limits.max_text_tokens,
            "seconds of sound": limits.max_audio_seconds,
            "frames": run.processor.settings.num_frames,
        }
    if data.audio_track is not None:
        record["audio_track"] = data.audio_track
    if run.findings:
        record["findings"] = dict(run.findings)
    if run.transcripts:
        record["transcripts"] = dict(run.transcripts)
    if run.masks:
        drawn = {split: mask.record for split, mask in run.masks.items()}
        record["missing"] = {**asdict(data.missing), "splits": drawn}
    return record


def protocol_of(training: TrainingArguments, masks: Mapping[str, SplitMask]) -> str:
    """Name of the training protocol, for the record."""
    if masks:
        realised = masks["train"].realised
        rates = (
            f"{name} {masks['train'].rates[name]} ({realised[name]:.3f})" for name in masks["train"].used
        )
        used = f" ({training.condition})" if training.condition else ""
        return f"{MISSING_RATES}{used}: missing rates, in brackets realised in training: {', '.join(rates)}"
    if training.condition:
        return f"per_condition ({training.condition})"
    return "single_model, frames dropped in training" if training.frame_dropout else "single_model"
