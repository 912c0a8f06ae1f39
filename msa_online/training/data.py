# SPDX-License-Identifier: Apache-2.0
"""The data of a run: reading, preparation and loaders."""

import hashlib
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import DataLoader

from feature_extractors import FeatureCache
from msa_online.batching import make_dataset, make_loader, make_sampler
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus, ReadyCorpus, Sample, require_splits
from msa_online.corpora.dialogues import check_dialogues, dialogue_warnings
from msa_online.corpora.prepared_corpus import PreparedCorpus, findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.split_checks import copy_warnings, corpus_warnings, refuse_warnings, size_warnings
from msa_online.corpora.validation import check_class_names
from msa_online.evaluation.tables import show
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample, features_table
from msa_online.precomputed.files import is_precomputed_path
from msa_online.precomputed.reading import read_features
from msa_online.precomputed.states import SampleStates
from msa_online.processing_msa import MSAProcessor
from msa_online.training.config import DataArguments, RunArguments
from msa_online.training.turns import in_turn
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.transcription import Transcriber


def read_data(data: DataArguments) -> Corpus | FeatureCorpus:
    """Read and validate the corpus of a run, of clips or precomputed features, without decoding clips.

    Raises:
        CorpusError: Rows cannot be used and `skip_broken` is not set, or a split is empty.
        ConfigurationError: `split_column` is set for clips, or `transcribe` for features.
    """
    if is_precomputed_path(data.path):
        if data.transcribe is not None:
            raise ConfigurationError(
                f"data.transcribe={data.transcribe} needs clips, but {data.path} holds precomputed features"
            )
        features = read_features(
            data.path,
            label_column=data.label_column,
            split_column=data.split_column,
            label_range=data.legal_range,
            skip_broken=data.skip_broken,
        )
        require_splits(features, ("train", "valid"))
        return features
    if data.split_column != "split":
        raise ConfigurationError(
            f"data.split_column={data.split_column} applies to precomputed features only, but {data.path} "
            "means clips: name the column of their metadata 'split'"
        )
    corpus = read_corpus(
        data.path,
        label_column=data.label_column,
        label_range=data.legal_range,
        skip_broken=data.skip_broken,
        seed=data.split_seed,
        audio_track=data.audio_track,
        texts_optional=data.transcribe is not None,
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
    processor: MSAProcessor | None,
    accelerator: Accelerator,
    console: Console,
    transcriber: Transcriber | None = None,
    longest: int | None = None,
    speakers: bool = False,
) -> ReadyCorpus:
    """Prepare the corpus for loading and print the findings; all ranks return the same samples.

    Features of clips that are not in the cache are extracted by the main process, while the others wait.
    `processor` is that of the model of clips; None for precomputed features. `transcriber` makes the texts of
    clips that have none. `longest` is the number of turns that a model with context reads together; None for
    other models, and `speakers` says whether its context needs the speaker of each turn.

    Raises:
        CorpusError: Clips cannot be used and `skip_broken` is not set, a split is empty without them, there
            are warnings and `strict` is set, or dialogues are needed and have no order (`check_dialogues`).
        SystemExit: Extraction failed in another process, which reports it.
    """
    warnings = [*corpus_warnings(corpus, data.legal_range), *size_warnings(corpus.sizes)]
    if longest is not None:
        check_dialogues(corpus, speakers=speakers)
        warnings += dialogue_warnings(corpus, longest)
    if data.strict:
        refuse_warnings(corpus.source, warnings)  # before clips are decoded
    if isinstance(corpus, FeatureCorpus):
        prepared = corpus
        show(features_table(corpus), console)
    else:
        prepared = in_turn(
            lambda: prepare(
                corpus,
                FeatureCache(),
                processor.settings,
                data.prepare_workers,
                data.skip_broken,
                processor.max_audio_seconds,
                transcriber,
            ),
            accelerator,
        )
        require_splits(prepared, ("train", "valid"))
        show(findings_table(prepared, processor.limits), console)
    copies = copy_warnings(prepared, prepared.contents)
    for line in (*warnings, *copies):
        console.print(f"warning: {line}", soft_wrap=True, highlight=False)
    if data.strict:
        refuse_warnings(corpus.source, copies)
    return prepared


def check_word_times(data: ReadyCorpus, console: Console) -> None:
    """Check that training samples have times of words, for a head that needs them; prints how many lack them.

    Raises:
        ConfigurationError: None has any.
    """
    samples = data.split("train")
    heard = data.transcripts if isinstance(data, PreparedCorpus) else {}
    timed = sum(sample.id in heard and bool(heard[sample.id].words) for sample in samples)
    if not timed:
        raise ConfigurationError(
            f"model.head_kwargs.alignment=words needs the times of words, and none of the {len(samples):,} "
            f"training samples of {data.source} has any: train on clips whose speech is recognised "
            "(data.transcribe), or set model.head_kwargs.alignment=even"
        )
    if timed < len(samples):
        console.print(
            f"times of words: {timed:,} of {len(samples):,} training samples have them; the words of the "
            "others take equally long",
            soft_wrap=True,
            highlight=False,
        )


def transcripts_record(data: ReadyCorpus, language: str | None) -> dict[str, Any]:
    """How many texts a recogniser made, for the record of a run; empty if it made none."""
    heard = data.transcripts if isinstance(data, PreparedCorpus) else {}
    made = sum(bool(transcript.text) for transcript in heard.values())
    if not made:
        return {}
    model = next(iter(heard.values())).model
    return {"model": model, "language": language, "made": made, "of": len(data.samples)}


def fingerprint(data: ReadyCorpus, *, turns: bool = False, speakers: bool = False) -> dict[str, list[str]]:
    """Split, label, and hashes of text and content, by sample id; a resumed run must find the same.

    With `turns`, for a model that reads dialogues, a sample of one adds dialogue and turn, and with
    `speakers` its speaker.
    """
    return {
        sample.id: [
            sample.split,
            str(sample.label),
            hashlib.sha256(sample.text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
            data.contents[sample.id][:16],
            *([_place_of(sample, speakers)] if turns and sample.dialogue is not None else []),
        ]
        for sample in data.samples
    }


def _place_of(sample: Sample | FeatureSample, speakers: bool) -> str:
    """Dialogue and turn of a sample, and its speaker on request."""
    return " ".join([sample.dialogue, str(sample.turn), *([str(sample.speaker)] if speakers else [])])


def changed_data(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> str | None:
    """Differences between the data of the start and those of now, in one line; None if they are equal."""
    differences = []
    for what, ids in (("gone", before.keys() - now.keys()), ("new", now.keys() - before.keys())):
        if ids:
            samples = "1 sample is" if len(ids) == 1 else f"{len(ids):,} samples are"
            differences.append(f"{samples} {what} (for example {min(ids)!r})")
    both = sorted(before.keys() & now.keys())
    for place, name in enumerate(("splits", "labels", "transcripts", "files", "turns")):
        only = slice(place, place + 1)  # empty where a sample has no turn
        if changed := [each for each in both if before[each][only] != now[each][only]]:
            values = (part[changed[0]][only] for part in (before, now))
            shown = ", now ".join(repr(value[0]) if value else "none" for value in values)
            example = repr(changed[0]) if name in ("transcripts", "files") else f"{changed[0]!r}: {shown}"
            differences.append(f"{len(changed):,} of {len(both):,} {name} differ (for example {example})")
    if not differences:  # what a run keeps for each sample, it finds by the place of the sample
        places = enumerate(zip(before, now, strict=True), 1)
        if moved := next(
            (f"{at}: {was!r}, now {found!r}" for at, (was, found) in places if was != found), ""
        ):
            differences.append(f"the samples are in another order (number {moved})")
    return "; ".join(differences) or None


def make_loaders(
    data: ReadyCorpus,
    processor: MSAProcessor | None,
    config: MSAConfig,
    arguments: RunArguments,
    accelerator: Accelerator,
    states: Mapping[str, SampleStates] | None = None,
) -> dict[str, DataLoader]:
    """A loader for each split with samples; the training split is shuffled, the others sorted by length.

    `states` are those of frozen encoders, by modality.

    Raises:
        ConfigurationError: The training split has fewer samples, or dialogues, than an optimizer step has
            micro-batches.
        CorpusError: Features have other widths than the model.
    """
    training = arguments.training
    processes, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    per_step = processes * accumulation
    loaders = {}
    for name in data.sizes:
        dataset = make_dataset(data, name, processor, config, states)
        shuffled = {"batches_per_step": per_step, "seed": training.seed, "processes": processes}
        settings = shuffled if name == "train" else {}
        sampler = make_sampler(dataset, training.batch_size, **settings)
        if name == "train" and len(sampler.lengths) < per_step:
            what = "sample" if dataset.windows is None else "dialogue"
            raise ConfigurationError(
                f"the training split has {len(sampler.lengths)} {what}s, but one optimizer step takes "
                f"{per_step} batches of at least one {what} (processes {processes} x "
                f"training.accumulation={accumulation}): lower training.accumulation, or launch fewer "
                "processes"
            )
        loaders[name] = make_loader(dataset, sampler, arguments.data.loader_workers)
    return loaders


def steps_line(loaders: Mapping[str, DataLoader], epochs: int) -> str:
    """How the training split is divided into steps.

    Args:
        loaders: Loader of each split, from `make_loaders`.
        epochs: Epochs of the run.
    """
    sampler = loaders["train"].batch_sampler
    samples, steps, processes = len(loaders["train"].dataset), sampler.steps, sampler.processes
    accumulation = sampler.batches_per_step // processes
    effective = sampler.largest * sampler.batches_per_step
    windows = "" if sampler.windows is None else f" in {len(sampler.windows)} dialogues, which batches count"
    return (
        f"train: {samples} samples{windows}; steps: {steps} per epoch, {steps * epochs} in all; "
        f"effective batch: {effective} = processes {processes} x batch {sampler.largest} x accumulation "
        f"{accumulation} ({samples / steps:.1f} samples a step on average); padding: {sampler.padding():.0%} "
        f"of the {loaders['train'].dataset.unit} in batches"
    )
