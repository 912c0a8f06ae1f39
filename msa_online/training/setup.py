# SPDX-License-Identifier: Apache-2.0
"""Everything a run needs before its first step: processes and precision, data, model."""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from torch.utils.data import DataLoader

from feature_extractors import FeatureCache
from msa_online.configuration_msa import MSAConfig
from msa_online.data.collate import BucketBatchSampler, ClipDataset, make_loader
from msa_online.data.datasets import SPLITS, Corpus, Sample, read_corpus, require_splits
from msa_online.data.prepare import Preparation, findings_table, prepare
from msa_online.encoders.text import load_tokenizer
from msa_online.hub import load_config, load_for_fine_tuning
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor
from msa_online.training.arguments import ConfigurationError, DataArguments, RunArguments, TrainingArguments

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_FROM = 4 << 20  # bytes; smaller blocks are reused by malloc itself


def start_accelerator(training: TrainingArguments) -> Accelerator:
    """Accelerate with what the configuration says, and what `accelerate launch` said for the rest.

    Raises:
        ConfigurationError: fp16 without a GPU, which would silently compute in fp32.
    """
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.accumulation,
        log_with=training.log_with,
        project_dir=f"{training.output_dir}/logs",
        step_scheduler_with_optimizer=False,
        # stages, and heads that ignore part of an encoder, leave parameters without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError("fp16 needs a GPU: on a CPU say training.mixed_precision=bf16, or no")
    if accelerator.device.type == "cpu" and sys.platform == "linux":
        _return_freed_memory()
    return accelerator


def _return_freed_memory() -> None:
    """Have glibc give freed tensors back to the system at once; other C libraries are left alone.

    Left to itself it keeps what the batch of the longest texts once needed: a process that trains MPNet-base
    then holds 5.7 GB instead of 3 to 4.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)


def read_data(data: DataArguments) -> Corpus:
    """The corpus of a run, read and checked but not decoded.

    Raises:
        CorpusError: Rows cannot be used and `skip_broken` is not said, or a split is empty.
    """
    corpus = read_corpus(
        data.path,
        label_column=data.label_column,
        label_range=data.legal_range,
        skip_broken=data.skip_broken,
        seed=data.split_seed,
    )
    require_splits(corpus, ("train", "valid"))
    return corpus


def class_names(corpus: Corpus, data: DataArguments) -> tuple[str, ...]:
    """Names of the labels in sorted order; none for regression."""
    return tuple(sorted({sample.label for sample in corpus.samples})) if data.task == "classification" else ()


@dataclass(frozen=True)
class RunData:
    """The corpus of a run, its features in the cache.

    Attributes:
        preparation: Usable samples, their cache keys, and what was found.
        cache: Where the features are.
    """

    preparation: Preparation
    cache: FeatureCache

    def split(self, name: str) -> tuple[Sample, ...]:
        """Usable samples of a split."""
        return self.preparation.corpus.split(name)

    @property
    def sizes(self) -> dict[str, int]:
        """Usable samples in each split that has any."""
        return {name: len(samples) for name in SPLITS if (samples := self.split(name))}


def prepare_data(corpus: Corpus, data: DataArguments, accelerator: Accelerator, console: Console) -> RunData:
    """Extract what is not in the cache yet and show what was found; every rank ends with the same samples.

    Raises:
        CorpusError: Clips cannot be used and `skip_broken` is not said, or a split is empty without them.
    """
    cache = FeatureCache()
    with accelerator.main_process_first():  # the others find everything in the cache
        preparation = prepare(corpus, cache, data.extraction, data.prepare_workers, data.skip_broken)
    require_splits(preparation.corpus, ("train", "valid"))
    console.print(findings_table(preparation))
    return RunData(preparation, cache)


def build_model(arguments: RunArguments, classes: Sequence[str]) -> tuple[MSAModel, MSAProcessor]:
    """A new model with a pretrained text encoder, or one fine-tuned from `init_from`, and its processor.

    Raises:
        TextEncoderError: The text encoder is not to be had.
        CheckpointError: `init_from` is no checkpoint.
        ConfigurationError: `init_from` has another text encoder than the configuration names.
    """
    training, data = arguments.training, arguments.data
    if training.init_from:
        config = _inherit(arguments, classes)
        model, tokenizer = load_for_fine_tuning(training.init_from, config)
    else:
        name = arguments.model["text_encoder"]
        config = arguments.model_config(classes)
        tokenizer = load_tokenizer(name)
        model = MSAModel.from_pretrained_text(config, name)
    if training.freeze_text_encoder:
        model.encoders["text"].freeze()
    extraction = {setting.name: getattr(data.extraction, setting.name) for setting in fields(data.extraction)}
    return model, MSAProcessor(tokenizer, extraction, data.max_text_tokens, data.max_audio_seconds)


def _inherit(arguments: RunArguments, classes: Sequence[str]) -> MSAConfig:
    """The configuration of `init_from`, changed by what the `model:` section says, with this run's labels."""
    source = arguments.training.init_from
    config = load_config(source)
    named = arguments.model.get("text_encoder", config.text_encoder)
    if named != config.text_encoder:
        raise ConfigurationError(
            f"training.init_from={source} has text encoder {config.text_encoder!r}, but model.text_encoder "
            f"says {named!r}"
        )
    inherited: dict[str, Any] = {**config.to_dict(), **arguments.model, "trained_on": None}
    for outputs in ("id2label", "label2id", "num_labels", "label_range"):
        inherited.pop(outputs, None)
    if inherited["head"] != config.head:
        inherited["head_kwargs"] = arguments.model.get("head_kwargs")
    return MSAConfig(**inherited, **arguments.output_fields(classes))


def make_loaders(
    data: RunData, processor: MSAProcessor, config: MSAConfig, arguments: RunArguments, processes: int
) -> dict[str, DataLoader]:
    """A loader for each split that has samples: the training split shuffled by seed, the others by length.

    Raises:
        ConfigurationError: The training split is smaller than one optimizer step.
    """
    training = arguments.training
    label2id = None if config.is_regression else config.label2id
    per_step = training.accumulation * processes
    loaders = {}
    for name in data.sizes:
        dataset = ClipDataset(data.split(name), data.preparation.keys, data.cache, processor, label2id)
        shuffled = {"batches_per_step": per_step, "seed": training.seed} if name == "train" else {}
        sampler = BucketBatchSampler(dataset.text_lengths, training.batch_size, **shuffled)
        loaders[name] = make_loader(dataset, sampler, arguments.data.loader_workers)
    if len(loaders["train"]) == 0:
        raise ConfigurationError(
            f"the training split has {data.sizes['train']} samples, fewer than one optimizer step takes: "
            f"training.batch_size={training.batch_size} x training.accumulation={training.accumulation} x "
            f"{processes} processes; lower one of them"
        )
    return loaders


def seed_everything(seed: int) -> None:
    """Seed torch's random numbers: what a model starts from, and its dropout."""
    torch.manual_seed(seed)
