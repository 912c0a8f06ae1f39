# SPDX-License-Identifier: Apache-2.0
"""Datasets, batch sampling and padding, for clips and for precomputed features."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from feature_extractors import FeatureCache
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.cache_filling import load_features
from msa_online.corpora.corpus import ReadyCorpus, Sample
from msa_online.corpora.dialogues import places_of, windows_of
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample, require_widths
from msa_online.precomputed.states import SampleStates
from msa_online.processing_msa import MSADataCollator, MSAProcessor, at_least_one, mask_of

EXCESS = 0.035  # allowed overlap of two epochs above that of a random order; a larger value saves padding
MEASURED = 128  # number of optimizer steps on which the overlap is measured


class FeatureProcessor:
    """Pads precomputed features to a batch, as `MSAProcessor` does for clips."""

    def pad(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad samples to the batch that `MSAModel.forward` documents.

        Args:
            samples: Each with `<modality>_values` `(time, width)` and `modality_present` `(3,)`.

        Returns:
            `<modality>_values` `(batch, time, width)`, `<modality>_mask` `(batch, time)` bool and
            `modality_present` `(batch, 3)`.
        """
        batch = {"modality_present": torch.stack([sample["modality_present"] for sample in samples])}
        for name in MODALITIES:
            values = [sample[f"{name}_values"] for sample in samples]
            batch[f"{name}_values"] = pad_sequence(values, batch_first=True)
            batch[f"{name}_mask"] = mask_of(values)
        return batch


class SplitDataset(Dataset, ABC):
    """Samples of one split as inputs of a model, each with its `labels` and its `index`.

    Args:
        samples: The samples, in a fixed order; `index` in a batch refers to it.
        lengths: Length of each sample, for batches of similar length.
        label2id: Number of each class; None for regression.
        longest: Most turns of a dialogue that the model reads together; None for a model without context.

    Attributes:
        unit: Unit of `lengths`.
        processor: Pads samples to a batch.
        windows: Samples that a batch never separates, see `windows_of`; None for a model without context.
            Each sample then has `dialogue`, the number of its window, `turn`, its place in it, and `speaker`,
            the number of its speaker within it.
    """

    unit: ClassVar[str]
    processor: "MSAProcessor | FeatureProcessor"

    def __init__(
        self,
        samples: Sequence[Sample | FeatureSample],
        lengths: Sequence[int],
        label2id: Mapping[str, int] | None,
        longest: int | None = None,
    ) -> None:
        self.samples = samples
        self.lengths = lengths
        self.windows = None if longest is None else windows_of(samples, longest)
        self.places = {
            sample: {name: torch.tensor(value) for name, value in place.items()}
            for sample, place in places_of(samples, self.windows or ()).items()
        }
        self.labels = [sample.label if label2id is None else label2id[sample.label] for sample in samples]
        self.label_type = torch.float32 if label2id is None else torch.int64

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample with its `labels`, its `index`, and its place in a window if there are any."""
        label = torch.tensor(self.labels[index], dtype=self.label_type)
        place = self.places.get(index, {})
        return {**self.inputs(index), **place, "labels": label, "index": torch.tensor(index)}

    @abstractmethod
    def inputs(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample, before padding."""


class ClipDataset(SplitDataset):
    """Raw clips; their features are read from the cache on access.

    Args:
        samples: The samples.
        keys: Cache key of each sample, by sample id.
        cache: The cache that `prepare` has filled.
        processor: The model's processor.
        label2id: Number of each class; None for regression.
        states: Stored states of frozen encoders by modality, in place of their inputs.
        spans: `text_spans` of each sample, by sample id; None if no word has a time.
        longest: As in `SplitDataset`.
    """

    unit = "text tokens"

    def __init__(
        self,
        samples: Sequence[Sample],
        keys: Mapping[str, str],
        cache: FeatureCache,
        processor: MSAProcessor,
        label2id: Mapping[str, int] | None,
        states: Mapping[str, SampleStates] | None = None,
        spans: Mapping[str, Tensor] | None = None,
        longest: int | None = None,
    ) -> None:
        tokens = [len(processor.tokenize(sample.text)) for sample in samples]
        super().__init__(samples, tokens, label2id, longest)
        self.keys = [keys[sample.id] for sample in samples]
        self.cache = cache
        self.processor = processor
        self.states = states or {}
        self.spans = spans
        self.from_clip = tuple(name for name in MODALITIES if name not in self.states)

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample, from `MSAProcessor.encode`; of frozen encoders, `<modality>_states`.

        Raises:
            CacheError: Its cache entry was deleted after `prepare`.
        """
        sample = self.samples[index]
        reads_clip = any(name != "text" for name in self.from_clip)
        features = load_features(self.cache, self.keys[index], sample) if reads_clip else None
        inputs = self.processor.encode(features, sample.text, self.from_clip)
        if self.spans is not None:
            inputs["text_spans"] = self.spans[sample.id]
        for name, of_modality in self.states.items():
            values, mask = of_modality.of(sample.id)
            inputs[f"{name}_states"], inputs[f"{name}_states_mask"] = at_least_one(values), at_least_one(mask)
            inputs["modality_present"][MODALITIES.index(name)] = len(values) > 0
        return inputs


class FeatureDataset(SplitDataset):
    """Precomputed features, read on access. The length of a sample is that of its longest modality.

    Args:
        corpus: The corpus.
        samples: Samples of the corpus.
        widths: Width of each modality in the model.
        label2id: Number of each class; None for regression.
        longest: As in `SplitDataset`.

    Raises:
        CorpusError: The corpus has other widths.
    """

    unit = "steps"

    def __init__(
        self,
        corpus: FeatureCorpus,
        samples: Sequence[FeatureSample],
        widths: Mapping[str, int],
        label2id: Mapping[str, int] | None,
        longest: int | None = None,
    ) -> None:
        require_widths(corpus, widths)
        lengths = [corpus.lengths(name, samples) for name in MODALITIES]
        steps = [max(of_sample) for of_sample in zip(*lengths, strict=True)]
        super().__init__(samples, steps, label2id, longest)
        self.steps = corpus.steps
        self.widths = widths
        self.processor = FeatureProcessor()
        self._made: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample, made once: the features are in memory, and are not copied."""
        if index not in self._made:
            self._made[index] = super().__getitem__(index)
        return self._made[index]

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Features of one sample: `<modality>_values` `(time, width)` and `modality_present` `(3,)` bool.

        A modality that the sample lacks is one step of zeros and not present.
        """
        row = self.samples[index].row
        values = {
            name: self.steps[name].of(row) if name in self.steps else torch.zeros(0, self.widths[name])
            for name in MODALITIES
        }
        return {
            **{f"{name}_values": at_least_one(values[name]) for name in MODALITIES},
            "modality_present": torch.tensor([len(values[name]) > 0 for name in MODALITIES]),
        }


def make_dataset(
    data: ReadyCorpus,
    split: str,
    processor: MSAProcessor | None,
    config: MSAConfig,
    states: Mapping[str, SampleStates] | None = None,
) -> SplitDataset:
    """Dataset of a split for a model of `config`; precomputed features need no processor.

    `states` are those of frozen encoders, by modality, which then need no inputs.

    Raises:
        CorpusError: Precomputed features have other widths than the model.
    """
    if isinstance(data, FeatureCorpus):
        return FeatureDataset(
            data, data.split(split), config.widths, label2id_of(config), config.dialogue_turns
        )
    samples, heard = data.split(split), data.transcripts
    spans = None
    if any(transcript.words for transcript in heard.values()):
        spans = {
            sample.id: processor.word_spans(sample.text, heard.get(sample.id), data.extents[sample.id])
            for sample in samples
        }
    return ClipDataset(
        samples,
        data.keys,
        data.cache,
        processor,
        label2id_of(config),
        states,
        spans,
        config.dialogue_turns,
    )


def label2id_of(config: MSAConfig) -> dict[str, int] | None:
    """Number of each class; None for regression."""
    return None if config.is_regression else config.label2id


class BucketBatchSampler:
    """Batches of samples of similar length; every sample occurs once per epoch.

    An epoch is divided into optimizer steps of at most `batch_size * batches_per_step` samples, and each step
    into `batches_per_step` micro-batches; sizes differ by at most one. The samples of a step depend on
    lengths, seed, epoch and that product only, not on the division into processes and accumulation.
    Micro-batches are in the order in which Accelerate distributes them to processes.

    Samples are sorted by length plus exponential noise, then divided into steps. More noise means more
    padding and less `overlap` between the steps of two epochs. The noise is the smallest whose overlap is at
    most `EXCESS` above that of a random order. Within a step the longest samples come first. Micro-batches
    that run at the same time take turns in the order of length, so that all processes have similar work.

    With `windows`, the above holds for windows in place of samples: batches, steps and sizes count windows,
    and the length of a window is that of its longest sample. A window is never divided, so a model with
    context sees whole windows on every process.

    Args:
        lengths: Length of each sample.
        batch_size: Largest number of samples, or of windows, in a batch.
        batches_per_step: Micro-batches of an optimizer step, over all processes.
        seed: Seed of the order; None sorts all samples by length, for evaluation.
        processes: Number of processes that share the micro-batches; divides `batches_per_step`.
        windows: Positions of the samples of each window; None where each sample is a window.

    Attributes:
        largest: Largest number of samples, or of windows, in a batch.
        steps: Optimizer steps of an epoch.
        batch_size: None in training and with windows, which tells Accelerate that sizes vary.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        batches_per_step: int = 1,
        seed: int | None = None,
        processes: int = 1,
        windows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sample_lengths = np.asarray(lengths)
        self.windows = windows
        self.lengths = self.sample_lengths
        if windows is not None:
            self.lengths = np.array([self.sample_lengths[window].max() for window in windows], dtype=int)
        self.largest = batch_size
        self.batch_size = batch_size if seed is None and windows is None else None
        self.batches_per_step = batches_per_step
        self.processes = processes
        self.steps = -(-len(self.lengths) // (batch_size * batches_per_step))
        self.seed = seed
        self.noise = 0.0 if seed is None else _least_noise(self.lengths, self.steps)
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Use the order of epoch number `epoch`.

        It is not named `set_epoch`, because Accelerate calls a method of this name with epochs counted from
        the start of the process, which would be wrong in a resumed run.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        return map(self._samples_of, self._batches())

    def step_sizes(self) -> list[list[int]]:
        """Samples in each micro-batch of each step of the epoch, in their order; placeholders count 0."""
        sizes = micro_batch_sizes(len(self.lengths), self.steps, self.batches_per_step)
        if self.windows is None:
            return sizes
        batches = map(len, self)
        return [[next(batches) * (size > 0) for size in of_step] for of_step in sizes]

    def _samples_of(self, batch: Sequence[int]) -> list[int]:
        """Samples of a batch, which holds numbers of samples or of windows."""
        if self.windows is None:
            return list(batch)
        return [sample for number in batch for sample in self.windows[number]]

    def _batches(self) -> Iterator[list[int]]:
        """Batches of the epoch, of samples or of windows."""
        if self.seed is None:
            order = np.argsort(self.lengths, kind="stable")
            yield from (order[at : at + self.largest].tolist() for at in range(0, len(order), self.largest))
            return
        random = np.random.default_rng([self.seed, self.epoch])
        sizes = micro_batch_sizes(len(self.lengths), self.steps, self.batches_per_step)
        for step, parts in zip(self._samples_of_steps(random), sizes, strict=True):
            yield from self._micro_batches(step, parts, random)

    def padding(self) -> float:
        """Share of padding in the batches of the epoch, in [0, 1), in units of `lengths`."""
        batches = [self.sample_lengths[batch] for batch in self]
        padded = sum(len(batch) * batch.max() for batch in batches)
        return 1 - float(sum(batch.sum() for batch in batches) / max(padded, 1))

    def _samples_of_steps(self, random: np.random.Generator) -> list[np.ndarray]:
        """Indices of the samples of each step, in the order of the steps."""
        noise = random.exponential(self.noise, len(self.lengths))
        places = random.permutation(self.steps)
        steps = _cut(self.lengths + noise, self.steps, places)
        return [steps[rank] for rank in np.argsort(places)]

    def _micro_batches(
        self, step: np.ndarray, sizes: Sequence[int], random: np.random.Generator
    ) -> Iterator[list[int]]:
        """Micro-batches of a step; an empty one gets the shortest sample as a placeholder of weight zero."""
        longest_first = step[np.argsort(-self.lengths[step], kind="stable")]
        start = 0
        for first in range(0, len(sizes), self.processes):
            together = sizes[first : first + self.processes]
            stop = start + sum(together)
            rows = min(together)
            whole = longest_first[start : start + rows * self.processes].reshape(rows, self.processes)
            whole = whole[:, random.permutation(self.processes)]
            rest = longest_first[start + whole.size : stop]
            for rank, size in enumerate(together):
                batch = np.append(whole[:, rank], rest[rank : rank + size - rows])
                yield batch.tolist() or longest_first[-1:].tolist()
            start = stop


def micro_batch_sizes(samples: int, steps: int, parts: int) -> list[list[int]]:
    """Sizes of the `parts` micro-batches of each of the `steps` of an epoch; some may be 0."""
    return [_even_sizes(size, parts) for size in _even_sizes(samples, steps)]


def overlap(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Largest share of a step of `one` that is in a single step of `other`, averaged over steps.

    Args:
        one: Indices of the samples of each step of an epoch.
        other: The same for another epoch.

    Returns:
        The mean share, in (0, 1].
    """
    step_of = np.empty(sum(map(len, other)), dtype=int)
    for number, samples in enumerate(other):
        step_of[samples] = number
    return float(np.mean([np.bincount(step_of[samples]).max() / len(samples) for samples in one]))


def _least_noise(lengths: np.ndarray, steps: int) -> float:
    """Smallest scale of exponential noise on lengths that keeps the overlap of two epochs within `EXCESS`.

    The overlap is measured on pairs of epochs with `MEASURED` steps in total.
    """
    if steps < 2:
        return 1.0
    random = np.random.default_rng(0)
    pairs = [random.exponential(size=(2, len(lengths))) for _ in range(-(-MEASURED // steps))]
    places = np.arange(steps)

    def mean_overlap(known: float, noise: float) -> float:
        epochs = ([_cut(known * lengths + noise * drawn, steps, places) for drawn in pair] for pair in pairs)
        return float(np.mean([overlap(*pair) for pair in epochs]))

    most = mean_overlap(0.0, 1.0) + EXCESS
    scales = max(1.0, lengths.mean()) * 2.0 ** np.arange(-10, 10, 0.125)  # eight for each doubling
    enough = bisect_left(scales[:-1], True, key=lambda scale: mean_overlap(1.0, scale) <= most)
    return float(scales[enough])


def _cut(keys: np.ndarray, steps: int, places: np.ndarray) -> list[np.ndarray]:
    """Divide the samples, sorted by `keys`, into steps; `places` has the position of each in the epoch."""
    sizes = np.array(_even_sizes(len(keys), steps))[places]
    return np.split(np.argsort(keys, kind="stable"), np.cumsum(sizes)[:-1])


def _even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `total` that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def make_sampler(dataset: SplitDataset, batch_size: int, **order: int) -> BucketBatchSampler:
    """Sampler of a dataset, which keeps its windows whole; `order` as in `BucketBatchSampler`."""
    return BucketBatchSampler(dataset.lengths, batch_size, **order, windows=dataset.windows)


def make_loader(dataset: SplitDataset, sampler: BucketBatchSampler, workers: int = 0) -> DataLoader:
    """Loader of padded batches; `workers` processes prefetch and do not change the result."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=MSADataCollator(dataset.processor),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default is the generator of dropout
    )


def in_order(loader: DataLoader) -> DataLoader:
    """A loader of all samples of the dataset of `loader`, each once, sorted by length."""
    sampler = make_sampler(loader.dataset, loader.batch_sampler.largest)
    return DataLoader(
        loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
