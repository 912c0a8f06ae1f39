# SPDX-License-Identifier: Apache-2.0
"""Everything a run needs before its first step: processes and precision, data, model."""

import ctypes
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, parse_flag_from_env
from rich.console import Console
from torch.utils.data import DataLoader

from feature_extractors import FeatureCache
from msa_online.batching import BucketBatchSampler, make_loader
from msa_online.configuration_msa import MSAConfig, without_path
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.prepared_corpus import findings_table
from msa_online.corpora.reading import Corpus, read_corpus, require_splits
from msa_online.corpora.validation import check_class_names
from msa_online.encoders.text import load_tokenizer
from msa_online.evaluation.tables import show
from msa_online.hub import load_config, load_for_fine_tuning
from msa_online.methods import MODULATORS, GradientModulator
from msa_online.missing.rates import SplitMask
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel, MSAOutput
from msa_online.precomputed.corpus import FeatureCorpus, features_table, require_feature_splits
from msa_online.precomputed.files import means_features
from msa_online.precomputed.reading import read_features
from msa_online.processing_msa import InputLimits, MSAProcessor
from msa_online.training.arguments import ConfigurationError, DataArguments, RunArguments, TrainingArguments
from msa_online.training.precision import choose_precision
from msa_online.training.run_data import ClipData, FeatureData
from msa_online.training.turns import in_turn

# how Accelerate's environment names ways to divide a model, and the sizes in it that do so
SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
DIVIDED = ("DP_SHARD", "TP", "CP", "SP")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SMALL_SPLIT = 100  # samples: the standard error of an accuracy is then at most 0.05
RETURNED_FROM = 4 << 20  # bytes; smaller blocks are reused by malloc itself


def start_accelerator(training: TrainingArguments) -> Accelerator:
    """Start Accelerate as the configuration and `accelerate launch` ask, and print processes and precision.

    Raises:
        ConfigurationError: fp16 without a GPU, which would silently compute in fp32; a launch that divides
            the model among processes; or settings that do not work with torch.compile.
    """
    _refuse_divided_models()
    try:
        precision = choose_precision(training.mixed_precision, "training.mixed_precision")
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    accelerator = Accelerator(
        mixed_precision=precision.name,
        gradient_accumulation_steps=training.accumulation,
        log_with=training.log_with,
        project_dir=f"{training.output_dir}/logs",
        step_scheduler_with_optimizer=False,
        # stages, and heads that ignore part of an encoder, leave parameters without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    accelerator.print(f"{processes} on {accelerator.device.type}, {precision}")
    if precision.warning:
        accelerator.print(f"warning: {precision.warning}")
    _check_compilation(training, accelerator)
    if accelerator.device.type == "cpu" and sys.platform == "linux":
        _return_freed_memory()
    return accelerator


def _refuse_divided_models() -> None:
    """Refuse launches that leave a part of the model on each process, which would be published as a whole."""
    used = [name for key, name in SHARDING.items() if parse_flag_from_env(f"ACCELERATE_USE_{key}")]
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {key: os.environ.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1") for key in DIVIDED}
        used += [f"{key.lower()}_size={size}" for key, size in sizes.items() if size != "1"]
    if used:
        raise ConfigurationError(
            f"{', '.join(used)}: a process would hold a part of the model only, and checkpoints would hold "
            "that part; launch with data parallelism alone (--multi_gpu), or on one process"
        )


def _is_compiled(accelerator: Accelerator) -> bool:
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def _check_compilation(training: TrainingArguments, accelerator: Accelerator) -> None:
    if not _is_compiled(accelerator):
        return
    if accelerator.state.dynamo_plugin.use_regional_compilation:
        raise ConfigurationError(
            "regional compilation replaces layers that heads address by name: launch without "
            "--dynamo_use_regional_compilation, which compiles the whole model"
        )
    if training.measure_gradients:
        raise ConfigurationError(
            "training.measure_gradients=true goes back through the model once for each loss, which "
            "torch.compile does not allow: launch with --dynamo_backend no"
        )


def _return_freed_memory() -> None:
    """Have glibc give freed tensors back to the system at once; other C libraries are left alone.

    Left to itself it keeps what the batch of the longest texts once needed: a process that trains MPNet-base
    then holds 5.7 GB instead of 3 to 4.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)


def read_data(data: DataArguments) -> Corpus | FeatureCorpus:
    """The corpus of a run, of raw clips or of features, read and checked but not decoded.

    Raises:
        CorpusError: Rows cannot be used and `skip_broken` is not said, or a split is empty.
        ConfigurationError: Clips are to be split by another column than "split".
    """
    if means_features(data.path):
        features = read_features(
            data.path,
            label_column=data.label_column,
            split_column=data.split_column,
            label_range=data.legal_range,
            skip_broken=data.skip_broken,
        )
        require_feature_splits(features, ("train", "valid"))
        return features
    if data.split_column != "split":
        raise ConfigurationError(
            f"data.split_column={data.split_column} chooses among columns of features, but {data.path} means "
            "clips: call the column of their metadata 'split'"
        )
    corpus = read_corpus(
        data.path,
        label_column=data.label_column,
        label_range=data.legal_range,
        skip_broken=data.skip_broken,
        seed=data.split_seed,
    )
    require_splits(corpus, ("train", "valid"))
    return corpus


def class_names(corpus: Corpus | FeatureCorpus, data: DataArguments) -> tuple[str, ...]:
    """Names of the labels in sorted order; none for regression.

    Raises:
        CorpusError: The labels are scores, not classes, or all of one class.
    """
    if data.task != "classification":
        return ()
    names = {sample.label for sample in corpus.samples}
    check_class_names(corpus.source, data.label_column, names)
    return tuple(sorted(names))


def prepare_data(
    corpus: Corpus | FeatureCorpus,
    data: DataArguments,
    limits: InputLimits | None,
    accelerator: Accelerator,
    console: Console,
) -> ClipData | FeatureData:
    """Make the corpus ready for loading and show what was found; every rank ends with the same samples.

    Of clips, features are extracted that are not in the cache yet: by the main process, for which the others
    wait however long it takes. `limits` is the most that a model reads of a clip; None for one of features.

    Raises:
        CorpusError: Clips cannot be used and `skip_broken` is not said, or a split is empty without them.
        SystemExit: Extraction failed in another process, which reports it.
    """
    if isinstance(corpus, FeatureCorpus):
        show(features_table(corpus), console)
        return FeatureData(corpus)
    cache = FeatureCache()
    prepared = in_turn(
        lambda: prepare(corpus, cache, data.extraction, data.prepare_workers, data.skip_broken), accelerator
    )
    require_splits(prepared.corpus, ("train", "valid"))
    show(findings_table(prepared, limits), console)
    return ClipData(prepared, cache)


def fit_encoders(
    model: MSAModel, data: ClipData | FeatureData, arguments: RunArguments, masks: Mapping[str, SplitMask]
) -> None:
    """Have encoders of features standardise by the training split; those of clips learn their scaling.

    Fine-tuning goes on with the statistics of `init_from`, which its weights are used to. What `masks` hide
    from training counts nowhere.

    Raises:
        CorpusError: The features have other widths than the model.
    """
    if arguments.data.standardize and not arguments.training.init_from:
        for name, (mean, deviation) in data.statistics(model.config, masks).items():
            model.encoders[name].standardize_by(mean, deviation)


def build_model(
    arguments: RunArguments, classes: Sequence[str], console: Console
) -> tuple[MSAModel, MSAProcessor | None]:
    """A new model with a pretrained text encoder, or one fine-tuned from `init_from`, and its processor.

    Fine-tuning prints what was loaded and what is new. A model of precomputed features has no processor.

    Raises:
        TextEncoderError: The text encoder is unavailable.
        CheckpointError: `init_from` is no checkpoint, is damaged, or has no encoder that can be used.
        ConfigurationError: `init_from` has another text encoder or other widths than the configuration names,
            or the data are clips where the model reads features, or the reverse.
    """
    training, data = arguments.training, arguments.data
    if training.init_from:
        config = _inherit(arguments, classes)
        _require_same_kind(config.feature_widths, data)
        start = load_for_fine_tuning(training.init_from, config)
        model, tokenizer = start.model, start.tokenizer
        console.print(f"fine-tuning from {training.init_from}\n{start}", soft_wrap=True, highlight=False)
    else:
        _require_same_kind(arguments.model.get("feature_widths"), data)
        config = arguments.model_config(classes)
        if config.feature_widths is not None:
            return MSAModel(config), None
        tokenizer = load_tokenizer(config.text_encoder)
        model = MSAModel.from_pretrained_text(config, config.text_encoder)
    if tokenizer is None:
        return model, None
    if training.freeze_text_encoder:
        model.encoders["text"].freeze()
    extraction = {setting.name: getattr(data.extraction, setting.name) for setting in fields(data.extraction)}
    return model, MSAProcessor(tokenizer, extraction, data.max_text_tokens, data.max_audio_seconds)


def _require_same_kind(widths: Mapping[str, int] | None, data: DataArguments) -> None:
    """Check that model and data are both of raw clips, or both of features."""
    if widths is None and means_features(data.path):
        raise ConfigurationError(
            f"data.path={data.path} holds features made elsewhere, but the model reads raw clips: say "
            "model.text_encoder=null and their widths in model.feature_widths, or name a corpus of clips"
        )
    if widths is not None and not means_features(data.path):
        raise ConfigurationError(
            f"data.path={data.path} means raw clips, but the model reads features made elsewhere "
            f"(model.feature_widths): make them with `msa-online extract-features {data.path} FOLDER "
            "--text-encoder NAME`, or name a model.text_encoder in place of the widths"
        )


def _inherit(arguments: RunArguments, classes: Sequence[str]) -> MSAConfig:
    """The configuration of `init_from`, changed by what the `model:` section says, with this run's labels."""
    source = arguments.training.init_from
    config = load_config(source)
    for key in ("text_encoder", "feature_widths"):
        before = getattr(config, key)
        if without_path(named := arguments.model.get(key, before)) != without_path(before):
            raise ConfigurationError(
                f"training.init_from={source} has {key} {before!r}, but model.{key} says {named!r}"
            )
    inherited: dict[str, Any] = {**config.to_dict(), **arguments.model, "trained_on": None}
    for outputs in ("id2label", "label2id", "num_labels", "label_range"):
        inherited.pop(outputs, None)
    if inherited["head"] != config.head:
        inherited["head_kwargs"] = arguments.model.get("head_kwargs")
    return MSAConfig(**inherited, **arguments.output_fields(classes))


def make_modulator(
    training: TrainingArguments, model: MSAModel, epochs: int, accelerator: Accelerator
) -> GradientModulator:
    """The modulator of a run, which has to fit the model and the schedule.

    Args:
        training: Names it.
        model: Whose gradients it is to change.
        epochs: Epochs of the run.
        accelerator: Knows whether the model is compiled.

    Raises:
        ConfigurationError: The model has nothing of a modality that the modulator acts on, or no unimodal
            predictions that it needs; its window lies behind the last epoch; the model is compiled and the
            modulator needs its inner states; or the modulator itself does not fit the model.
    """
    modulator = MODULATORS[training.modulator](**training.modulator_kwargs)
    name = f"training.modulator={training.modulator}"
    if modulator.differentiates_features and _is_compiled(accelerator):
        raise ConfigurationError(
            f"{name} takes gradients by states inside the model, which torch.compile leaves out: launch with "
            "--dynamo_backend no, or say training.modulator=identity"
        )
    owned = model.modality_parameters()
    for modality in modulator.modalities:
        if not any(parameter.requires_grad for parameter in owned[modality]):
            able = [other for other in MODALITIES if any(value.requires_grad for value in owned[other])]
            remedy = f"say training.modulator_kwargs.modalities={able}".replace("'", "")
            if "modalities" not in signature(type(modulator)).parameters:
                remedy = "take another head, or training.modulator=identity"
            raise ConfigurationError(
                f"{name} acts on {modality}, but model.head={model.config.head} has no trained parameters of "
                f"its own for {modality}: {remedy}"
            )
    answer = _answer_to_nothing(model)
    if modulator.needs_modality_logits:
        lacking = set(modulator.modalities) - set(answer.modality_logits)
        if lacking:
            raise ConfigurationError(
                f"{name} compares modalities by their own predictions, but model.head={model.config.head} "
                f"predicts nothing from {', '.join(sorted(lacking))} alone: take a head with unimodal "
                "predictors, like late_fusion, or training.modulator=identity"
            )
    if modulator.epochs is not None and modulator.epochs[0] >= epochs:
        raise ConfigurationError(
            f"{name} acts from epoch {modulator.epochs[0]} on, but the run has {epochs} epochs, counted from "
            "0: lower training.modulator_kwargs.epochs, or say null for all epochs"
        )
    widths = {name: state.shape[-1] for name, state in answer.features.items()}
    try:
        modulator.attach(model, widths, answer.fused.shape[-1])
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    return modulator


def fit_modulator(
    modulator: GradientModulator, training: TrainingArguments, occurring: Sequence[str], console: Console
) -> None:
    """Have a modulator leave out the modalities that never occur in training, and print which.

    Args:
        modulator: The modulator, attached to the model.
        training: Names it, and possibly its modalities.
        occurring: Modalities that training shows.
        console: Where the line goes.

    Raises:
        ConfigurationError: The configuration names a modality that never occurs, or fewer than two are left.
    """
    absent = [name for name in modulator.modalities if name not in occurring]
    if not absent:
        return
    left = [name for name in modulator.modalities if name in occurring]
    none_has = f"no training sample has {' or '.join(absent)}"
    if training.condition:
        none_has += f" under training.condition={training.condition}"
    if len(left) < 2:
        raise ConfigurationError(
            f"training.modulator={training.modulator} compares {', '.join(modulator.modalities)}, but "
            f"{none_has}, which leaves fewer than two to compare: say training.modulator=identity"
        )
    if "modalities" in training.modulator_kwargs:
        raise ConfigurationError(
            f"training.modulator_kwargs.modalities names {', '.join(absent)}, but {none_has}: say "
            f"training.modulator_kwargs.modalities=[{', '.join(left)}]"
        )
    modulator.leave_out(absent)
    console.print(
        f"training.modulator={training.modulator} acts on {' and '.join(left)}: {none_has}", soft_wrap=True
    )


@torch.no_grad()
def _answer_to_nothing(model: MSAModel) -> MSAOutput:
    """What a model's head says of one empty sample: it shows what the head reports, and how wide."""
    nothing = {
        name: ModalitySequence.of(torch.zeros(1, 1, width), torch.zeros(1, 1, dtype=torch.bool))
        for name, width in model.config.widths.items()
    }
    training = model.training
    answer = model.eval().decide(nothing)
    model.train(training)
    return answer


def make_loaders(
    data: ClipData | FeatureData,
    processor: MSAProcessor | None,
    config: MSAConfig,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> dict[str, DataLoader]:
    """A loader for each split that has samples: the training split shuffled by seed, the others by length.

    Raises:
        ConfigurationError: The training split has fewer samples than an optimizer step has micro-batches.
        CorpusError: Features have other widths than the model.
    """
    training = arguments.training
    processes, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    per_step = processes * accumulation
    if data.sizes["train"] < per_step:
        raise ConfigurationError(
            f"the training split has {data.sizes['train']} samples, but one optimizer step takes {per_step} "
            f"batches of at least one sample (processes {processes} x training.accumulation={accumulation}): "
            "lower training.accumulation, or launch fewer processes"
        )
    loaders = {}
    for name in data.sizes:
        dataset = data.dataset(name, processor, config)
        shuffled = {"batches_per_step": per_step, "seed": training.seed, "processes": processes}
        settings = shuffled if name == "train" else {}
        sampler = BucketBatchSampler(dataset.lengths, training.batch_size, **settings)
        loaders[name] = make_loader(dataset, sampler, arguments.data.loader_workers)
    return loaders


def loaders_report(loaders: Mapping[str, DataLoader], epochs: int) -> list[str]:
    """How the training split is cut into steps, and a warning for each split that is too small.

    Args:
        loaders: Loader of each split, as `make_loaders` gives them.
        epochs: Epochs of the run.
    """
    sampler = loaders["train"].batch_sampler
    samples, steps, processes = len(sampler.lengths), sampler.steps, sampler.processes
    accumulation = sampler.batches_per_step // processes
    effective = sampler.largest * sampler.batches_per_step
    lines = [
        f"train: {samples} samples; steps: {steps} per epoch, {steps * epochs} in all; effective batch: "
        f"{effective} = processes {processes} x batch {sampler.largest} x accumulation {accumulation} "
        f"({samples / steps:.1f} samples a step on average); padding: {sampler.padding():.0%} of the "
        f"{loaders['train'].dataset.unit} in batches"
    ]
    for name, loader in loaders.items():
        if (size := len(loader.batch_sampler.lengths)) < SMALL_SPLIT:
            lines.append(f"warning: {name} has only {size} samples: {_why_small(name, size)}")
    return lines


def _why_small(split: str, size: int) -> str:
    if split == "train":
        return f"below {SMALL_SPLIT}, results depend more on these samples and the seed than on the method"
    purpose = "the choice of the best epoch" if split == "valid" else "a comparison of models"
    error = 0.5 / math.sqrt(size)
    return (
        f"an accuracy of 0.5 has a standard error of {error:.2f}, too much for {purpose}; have at least "
        f"{SMALL_SPLIT} (0.05)"
    )


def seed_everything(seed: int) -> None:
    """Seed torch's random numbers: what a model starts from, and its dropout."""
    torch.manual_seed(seed)
