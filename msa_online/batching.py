# SPDX-License-Identifier: Apache-2.0
"""From samples to padded batches, of clips and of precomputed features: the last step before the model."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from feature_extractors import CacheError, FeatureCache
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.corpus import Sample
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample, require_widths
from msa_online.processing_msa import MSADataCollator, MSAProcessor, at_least_one, mask_of

EXCESS = 0.035  # most overlap of two epochs above that of a random order; a higher bound would save padding
MEASURED = 128  # optimizer steps on which the overlap is measured


class FeatureProcessor:
    """Pads features of several samples to a batch, as `MSAProcessor` does with the features of clips."""

    def pad(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join samples into the batch that `MSAModel.forward` documents.

        Args:
            samples: Of each `<modality>_values` `(time, width)` and `modality_present` `(3,)`.

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


class SplitDataset(Dataset):
    """Samples of one split as inputs of a model, each with its `labels` and its `index`.

    Args:
        samples: The samples, in a fixed order: `index` in a batch counts along it.
        lengths: Length of each sample, by which batches are cut.
        label2id: Number of each class; None for regression.

    Attributes:
        unit: What `lengths` count.
        processor: Pads samples to a batch.
    """

    unit: ClassVar[str]
    processor: "MSAProcessor | FeatureProcessor"

    def __init__(
        self,
        samples: Sequence[Sample | FeatureSample],
        lengths: Sequence[int],
        label2id: Mapping[str, int] | None,
    ) -> None:
        self.samples = samples
        self.lengths = lengths
        self.labels = [sample.label if label2id is None else label2id[sample.label] for sample in samples]
        self.label_type = torch.float32 if label2id is None else torch.int64

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample, with its `labels` and `index`."""
        label = torch.tensor(self.labels[index], dtype=self.label_type)
        return {**self.inputs(index), "labels": label, "index": torch.tensor(index)}

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample, before padding."""
        raise NotImplementedError


class ClipDataset(SplitDataset):
    """Raw clips, whose features are read from the cache when they are asked for.

    Args:
        samples: The samples.
        keys: Cache key of each sample, by sample id.
        cache: Store that `prepare` has filled.
        processor: The model's processor.
        label2id: Number of each class; None for regression.
    """

    unit = "text tokens"

    def __init__(
        self,
        samples: Sequence[Sample],
        keys: Mapping[str, str],
        cache: FeatureCache,
        processor: MSAProcessor,
        label2id: Mapping[str, int] | None,
    ) -> None:
        super().__init__(samples, [len(processor.tokenize(sample.text)) for sample in samples], label2id)
        self.keys = [keys[sample.id] for sample in samples]
        self.cache = cache
        self.processor = processor

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample as `MSAProcessor.encode` gives them.

        Raises:
            CacheError: Its entry has left the cache since `prepare`.
        """
        sample = self.samples[index]
        features = self.cache.load(self.keys[index])
        if features is None:
            raise CacheError(
                f"the features of {sample.clip.path} have left the cache {self.cache.folder}: start again to "
                "renew them"
            )
        return self.processor.encode(features, sample.text)


class FeatureDataset(SplitDataset):
    """Precomputed features, read when they are asked for; a sample is as long as its longest modality.

    Args:
        corpus: The corpus.
        samples: Samples of it.
        widths: Width of each modality in the model.
        label2id: Number of each class; None for regression. Raises `CorpusError` where a width differs from
            that of the corpus.
    """

    unit = "steps"

    def __init__(
        self,
        corpus: FeatureCorpus,
        samples: Sequence[FeatureSample],
        widths: Mapping[str, int],
        label2id: Mapping[str, int] | None,
    ) -> None:
        require_widths(corpus, widths)
        lengths = [corpus.lengths(name, samples) for name in MODALITIES]
        super().__init__(samples, [max(of_sample) for of_sample in zip(*lengths, strict=True)], label2id)
        self.steps = corpus.steps
        self.widths = widths
        self.processor = FeatureProcessor()

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Features of one sample: `<modality>_values` `(time, width)` and `modality_present` `(3,)` bool.

        A modality that the sample lacks is one step of zeros, and not present.
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
    data: PreparedCorpus | FeatureCorpus, split: str, processor: MSAProcessor | None, config: MSAConfig
) -> SplitDataset:
    """A split as samples for a model of `config`; precomputed features need no processor.

    Raises:
        CorpusError: Precomputed features have other widths than the model.
    """
    if isinstance(data, FeatureCorpus):
        return FeatureDataset(data, data.split(split), config.widths, label2id_of(config))
    return ClipDataset(data.split(split), data.keys, data.cache, processor, label2id_of(config))


def label2id_of(config: MSAConfig) -> dict[str, int] | None:
    """Number of each class; None for regression."""
    return None if config.is_regression else config.label2id


class BucketBatchSampler:
    """Batches of samples of similar length; every sample is in one batch of each epoch.

    An epoch is cut into optimizer steps of at most `batch_size * batches_per_step` samples, and each step
    into `batches_per_step` micro-batches; sizes differ by at most one. The samples of a step depend only on
    lengths, seed, epoch and that product, not on how a step is divided among processes and accumulation.
    Micro-batches come in the order in which Accelerate distributes them over processes.

    Samples are sorted by length plus exponential noise, then cut into steps. More noise means more padding
    and less `overlap` between the steps of two epochs. The noise is the least whose overlap is at most
    `EXCESS` above that of a random order. Within a step the longest samples come first. Samples of
    micro-batches that run at the same time are dealt out to the processes one by one, so that all processes
    have similar work.

    Args:
        lengths: Length of each sample.
        batch_size: Most samples in a batch.
        batches_per_step: Micro-batches of an optimizer step, over all processes.
        seed: Seed of the order; None keeps all samples in order of length, for evaluation.
        processes: Processes that share the micro-batches; divides `batches_per_step`.

    Attributes:
        largest: Most samples in a batch.
        steps: Optimizer steps of an epoch.
        batch_size: None in training, which tells Accelerate that sizes vary.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        batches_per_step: int = 1,
        seed: int | None = None,
        processes: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.largest = batch_size
        self.batch_size = batch_size if seed is None else None
        self.batches_per_step = batches_per_step
        self.processes = processes
        self.steps = -(-len(self.lengths) // (batch_size * batches_per_step))
        self.seed = seed
        self.noise = 0.0 if seed is None else _least_noise(self.lengths, self.steps)
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Take the order of epoch number `epoch`.

        Not called `set_epoch`: Accelerate calls that with epochs counted from the start of the process, which
        would undo a resumed run's.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = np.argsort(self.lengths, kind="stable")
            yield from (order[at : at + self.largest].tolist() for at in range(0, len(order), self.largest))
            return
        random = np.random.default_rng([self.seed, self.epoch])
        sizes = micro_batch_sizes(len(self.lengths), self.steps, self.batches_per_step)
        for step, parts in zip(self._samples_of_steps(random), sizes, strict=True):
            yield from self._dealt(step, parts, random)

    def padding(self) -> float:
        """Share of padding in the batches of the epoch, in [0, 1), counted in the units of `lengths`."""
        batches = [self.lengths[batch] for batch in self]
        padded = sum(len(batch) * batch.max() for batch in batches)
        return 1 - float(sum(batch.sum() for batch in batches) / max(padded, 1))

    def _samples_of_steps(self, random: np.random.Generator) -> list[np.ndarray]:
        """Numbers of the samples of each step, in the order of the steps."""
        noise = random.exponential(self.noise, len(self.lengths))
        places = random.permutation(self.steps)
        steps = _cut(self.lengths + noise, self.steps, places)
        return [steps[rank] for rank in np.argsort(places)]

    def _dealt(
        self, step: np.ndarray, sizes: Sequence[int], random: np.random.Generator
    ) -> Iterator[list[int]]:
        """Micro-batches of a step. An empty one gets the shortest sample as a placeholder of weight zero."""
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
    """Samples in each of the `parts` micro-batches of each of the `steps` of an epoch; some may have none."""
    return [_even_sizes(size, parts) for size in _even_sizes(samples, steps)]


def overlap(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Largest share of a step of `one` that is found in a single step of `other`, averaged over steps.

    Args:
        one: Numbers of the samples of each step of an epoch.
        other: The same samples in the steps of another epoch.

    Returns:
        The mean share, in (0, 1].
    """
    step_of = np.empty(sum(map(len, other)), dtype=int)
    for number, samples in enumerate(other):
        step_of[samples] = number
    return float(np.mean([np.bincount(step_of[samples]).max() / len(samples) for samples in one]))


def _least_noise(lengths: np.ndarray, steps: int) -> float:
    """Least scale of exponential noise on lengths that keeps the overlap of two epochs within `EXCESS`.

    The overlap is measured on pairs of epochs with `MEASURED` steps in all.
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
    scales = max(1.0, lengths.mean()) * 2.0 ** np.arange(-10, 10, 0.125)
    enough = bisect_left(scales[:-1], True, key=lambda scale: mean_overlap(1.0, scale) <= most)
    return float(scales[enough])


def _cut(keys: np.ndarray, steps: int, places: np.ndarray) -> list[np.ndarray]:
    """Cut the samples, sorted by `keys`, into steps; `places` says which step of the epoch each becomes."""
    sizes = np.array(_even_sizes(len(keys), steps))[places]
    return np.split(np.argsort(keys, kind="stable"), np.cumsum(sizes)[:-1])


def _even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `total` that differ by at most one, the larger first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def make_loader(dataset: SplitDataset, sampler: BucketBatchSampler, workers: int = 0) -> DataLoader:
    """Loader of padded batches; `workers` processes read ahead and change no result."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=MSADataCollator(dataset.processor),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting it draws from the generator that dropout draws from
    )


def in_order(loader: DataLoader) -> DataLoader:
    """Another loader of all samples that `loader` draws its batches from, each once and by length."""
    sampler = BucketBatchSampler(loader.dataset.lengths, loader.batch_sampler.largest)
    return DataLoader(
        loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
