# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  --help is answered before the imports that take seconds
"""Train a model: `accelerate launch --quiet train.py CONFIG [key=value ...]`.

A run in order: read the configuration, prepare the data, build the model, train and validate epoch by
epoch, keep the best, and finish with the test split and a model card.
"""

import sys

import msa_online_cli

if __name__ == "__main__" and (status := msa_online_cli.answer_training_help(sys.argv[1:])) is not None:
    sys.exit(status)

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: DDP warns of a flag that stages need

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from msa_online.batching import in_order
from msa_online.errors import run_command
from msa_online.evaluation.attribution import modality_shares
from msa_online.evaluation.conditions import evaluate_conditions, selection_score, validate
from msa_online.evaluation.tables import conditions_table, epoch_line, open_console, shares_table, show
from msa_online.missing.modalities import FixedCondition
from msa_online.missing.rates import SplitMask, rates_table
from msa_online.modalities import COMPLETE, CONDITIONS, MISSING_RATES
from msa_online.model_card import write_model_card
from msa_online.modeling_msa import MSAModel
from msa_online.training.arguments import RunArguments, TrainingArguments, read_arguments
from msa_online.training.build import (
    build_model,
    class_names,
    fit_encoders,
    fit_modulator,
    loaders_report,
    make_loaders,
    make_modulator,
    prepare_data,
    read_data,
    seed_everything,
    start_accelerator,
)
from msa_online.training.checkpoint import RunFolder, require_space
from msa_online.training.divergence import ConstantModel, check_epoch, constant_line
from msa_online.training.loop import TrainingLoop
from msa_online.training.masking import draw_split_masks, make_input_masks, occurring_modalities
from msa_online.training.optimizer import make_optimizer, make_scheduler
from msa_online.training.stages import make_schedule
from msa_online.training.teacher import appoint_teacher


def train(arguments: RunArguments, command: str) -> None:
    """Carry out the run that `arguments` describe; `command` is how it was called, for the record."""
    accelerator = start_accelerator(arguments.training)
    carry_out(arguments, command, accelerator)
    # the wrapped model goes first: as the last to hold the process group it may wait for its threads for ever
    accelerator.free_memory()
    accelerator.end_training()


def carry_out(arguments: RunArguments, command: str, accelerator: Accelerator) -> None:
    """A whole run, from the data to the model card.

    Everything that can be wrong with the input is found before the first step, the quick checks before the
    slow extraction of features, and before anything of an earlier run is touched.
    """
    training = arguments.training
    console = open_console(quiet=not accelerator.is_main_process)
    folder = RunFolder(training.output_dir, accelerator)
    folder.check(arguments)
    corpus = read_data(arguments.data)
    seed_everything(training.seed)
    model, processor = build_model(arguments, class_names(corpus, arguments.data), console)
    schedule = make_schedule(training, model.head.stages)
    modulator = make_modulator(training, model, schedule.total_epochs, accelerator)
    require_space(folder.path, model)
    data = prepare_data(corpus, arguments.data, processor and processor.limits, accelerator, console)
    masks = draw_split_masks(data, arguments.data.missing)
    if masks:
        show(rates_table(masks), console)
    fit_encoders(model, data, arguments, masks)
    occurring = occurring_modalities(data, training, masks, len(schedule.stages))
    fit_modulator(modulator, training, occurring, console)
    input_masks = make_input_masks(data, training, masks, model, processor)
    loaders = make_loaders(data, processor, model.config, arguments, accelerator)
    for line in loaders_report(loaders, schedule.total_epochs):
        console.print(line, soft_wrap=True, highlight=False)
    folder.open(arguments)

    sampler = loaders["train"].batch_sampler
    for_teacher = input_masks["teacher"].over(accelerator.prepare(in_order(loaders["train"])))
    optimizer = make_optimizer(
        model,
        learning_rate=training.learning_rate,
        text_learning_rate=training.text_learning_rate,
        weight_decay=training.weight_decay,
    )
    scheduler = make_scheduler(
        optimizer, steps=sampler.steps * schedule.total_epochs, warmup=training.warmup, decay=training.decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
    for_validation = input_masks["valid"].over(loaders["valid"])
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
    )
    parts = {
        "optimizer": optimizer,
        "scheduler": scheduler,
        "schedule": schedule,
        "modulator": loop.modulator,
        "progress": loop.progress,
    }
    accelerator.init_trackers("msa_online")
    if not accelerator.is_main_process:
        seed_everything(training.seed + accelerator.process_index)  # the model is alike, dropout need not be
    if training.resume:
        folder.load_state(loop.bare_model, parts)
        console.print(f"resuming after epoch {schedule.epoch}")

    constant = ConstantModel.fit(loaders["train"].dataset.labels, loop.bare_model.config)
    stage, condition = None, COMPLETE
    while not schedule.finished:
        if schedule.stage != stage:
            stage = schedule.stage
            loop.bare_model.head.start_stage(stage.name)
            loop.teacher = appoint_teacher(loop.bare_model, schedule, folder, for_teacher, accelerator)
            if schedule.is_last_stage and training.condition:
                condition = training.condition
                loop.input_mask = FixedCondition(CONDITIONS[condition])
        epoch, last_stage = schedule.epoch, schedule.is_last_stage
        sampler.start_epoch(epoch)
        title = f"epoch {epoch + 1}/{schedule.total_epochs}"
        losses = loop.train_epoch(loaders["train"], stage=stage.name, epoch=epoch, title=title)
        metrics = validate(loop.bare_model, for_validation, accelerator, condition)
        check_epoch(title, losses, metrics, arguments.data.label_range, accelerator.scaler)
        score = selection_score(metrics, loop.bare_model.config.is_regression)
        loop.modulator.on_validation(score)
        best = schedule.advance(score)
        loop.progress.history.append(
            {"epoch": epoch + 1, "stage": stage.name, "losses": losses, "valid": metrics}
        )
        accelerator.log({f"valid/{name}": value for name, value in metrics.items()}, step=loop.progress.step)
        if best and last_stage:
            folder.publish(loop.bare_model, processor)
        elif best and stage.name in loop.bare_model.head.teachers.values():
            folder.keep_stage(stage.name, loop.bare_model)
        folder.save_state(loop.bare_model, parts)
        folder.write_history(loop.progress.history)
        line = epoch_line(title, losses, metrics, best=best, skipped=loop.progress.skipped)
        console.print(line, soft_wrap=True)

    record = {
        "data": arguments.data.path,
        "label_column": arguments.data.label_column,
        "split_column": arguments.data.split_column,
        "splits": data.sizes,
        "seed": training.seed,
        "mixed_precision": str(accelerator.mixed_precision),
        "modulator": training.modulator,
        "protocol": protocol_of(training, masks),
        "epoch": schedule.best_epoch,
        "skipped_steps": loop.progress.skipped,
        "command": command,
    }
    if processor:
        frames, limits = processor.settings.num_frames, processor.limits
        record["limits"] = {
            "text tokens": limits.max_text_tokens,
            "seconds of sound": limits.max_audio_seconds,
            "frames": frames,
        }
    if masks:
        drawn = {split: mask.record for split, mask in masks.items()}
        record["missing"] = {**asdict(arguments.data.missing), "splits": drawn}
    accelerator.wait_for_everyone()  # the main process has published the best epoch
    folder.load_best(loop.bare_model)
    loop.bare_model.head.start_stage(loop.bare_model.head.stages[-1])  # the one it predicts in
    conditions = (training.condition,) if training.condition else tuple(CONDITIONS)
    finish(loop.bare_model, folder, loaders, accelerator, record, conditions, masks, constant, console)


def protocol_of(training: TrainingArguments, masks: Mapping[str, SplitMask]) -> str:
    """What the run may see in training, for its record."""
    if masks:
        realised = masks["train"].realised
        rates = (f"{name} {rate} ({realised[name]:.3f})" for name, rate in masks["train"].rates.items())
        return f"{MISSING_RATES}: missing rates, in brackets realised in training: {', '.join(rates)}"
    if training.condition:
        return f"per_condition ({training.condition})"
    return "single_model, frames dropped in training" if training.frame_dropout else "single_model"


def finish(
    model: MSAModel,
    folder: RunFolder,
    loaders: Mapping[str, DataLoader],
    accelerator: Accelerator,
    record: dict[str, Any],
    conditions: Iterable[str],
    masks: Mapping[str, SplitMask],
    constant: ConstantModel,
    console: Console,
) -> None:
    """Score the best epoch and write its card; the test split is looked at here and nowhere before.

    Args:
        model: The model as it was after the best epoch.
        folder: Holds that epoch, and takes the scores and the card.
        loaders: Prepared loader of each split.
        accelerator: Gives precision and gathers over ranks.
        record: What the checkpoint is to remember of its training; the results join it.
        conditions: Modality conditions to score under, on splits of which nothing is hidden.
        masks: What a run with missing rates hides of each split; it is scored under that as well.
        constant: What the model is compared with.
        console: Where the tables go.
    """
    results = {
        split: evaluate_conditions(model, loaders[split], accelerator, conditions)
        for split in ("valid", "test")
        if split in loaders
    }
    if masks:
        for split, scores in results.items():
            incomplete = masks[split].over(loaders[split])
            scores[MISSING_RATES] = evaluate_conditions(model, incomplete, accelerator, (COMPLETE,))[COMPLETE]
    shares = {}
    if set(conditions) == set(CONDITIONS):  # else it never learned to do without a modality
        shares = {split: modality_shares(model, loaders[split], accelerator) for split in results}
    floors = {split: constant.metrics(loaders[split].dataset.labels) for split in results}
    judged_by = MISSING_RATES if masks else list(conditions)[-1]  # as in validation
    comparison = [
        constant_line(split, scores[judged_by], floors[split], constant.title)
        for split, scores in results.items()
    ]
    selection = "validation MAE" if model.config.is_regression else "validation weighted F1"
    model.config.trained_on = {
        **record,
        "selection": selection,
        "results": results,
        "shares": shares,
        "constant": floors,
        "comparison": comparison,
    }
    if accelerator.is_main_process:
        model.config.save_pretrained(folder.path)
        write_model_card(folder.path, model.config)
        folder.forget_state()
    for split, conditions in results.items():
        show(conditions_table(conditions, f"{split}, best epoch {record['epoch']}"), console)
        if split in shares:
            show(shares_table(shares[split], f"{split}: what the predictions come from"), console)
    console.print(Text("\n".join(comparison)), soft_wrap=True)
    console.print(f"checkpoint and model card: {folder.path}", soft_wrap=True)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    command = "accelerate launch --quiet train.py " + shlex.join(argv)
    return run_command(lambda: train(read_arguments(argv[0], argv[1:]), command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
