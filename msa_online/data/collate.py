# SPDX-License-Identifier: Apache-2.0
"""From prepared samples to padded batches: the last step before the model."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from feature_extractors import CacheError, FeatureCache
from msa_online.data.datasets import Sample
from msa_online.processing_msa import MSADataCollator, MSAProcessor

# effective batches among which lengths are sorted: long enough to save padding, short enough to stay random
POOL = 16


class ClipDataset(Dataset):
    """Prepared samples of one split, read from the feature cache when they are asked for.

    Args:
        samples: The samples, in a fixed order: `index` in a batch counts along it.
        keys: Cache key of each sample, by sample id.
        cache: Store that `prepare` has filled.
        processor: The model's processor.
        label2id: Number of each class; None for regression.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        keys: Mapping[str, str],
        cache: FeatureCache,
        processor: MSAProcessor,
        label2id: Mapping[str, int] | None,
    ) -> None:
        self.samples = samples
        self.keys = [keys[sample.id] for sample in samples]
        self.cache = cache
        self.processor = processor
        self.labels = [sample.label if label2id is None else label2id[sample.label] for sample in samples]
        self.label_type = torch.float32 if label2id is None else torch.int64
        self.lengths = [len(processor.tokenize(sample.text)) for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Inputs of one sample as `MSAProcessor.encode` gives them, with its `labels` and `index`.

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
        inputs = self.processor.encode(features, sample.text)
        inputs["labels"] = torch.tensor(self.labels[index], dtype=self.label_type)
        inputs["index"] = torch.tensor(index)
        return inputs


class BucketBatchSampler:
    """Batches of samples of similar length, in an order that depends on seed and epoch alone.

    Batches are cut from *effective* batches (all that contribute to one optimizer step, over ranks and
    accumulation), so that two processes, or two accumulated halves, see exactly the samples that one process
    sees.

    Args:
        lengths: Length of each sample.
        batch_size: Samples in a batch.
        batches_per_step: Batches in an effective batch.
        seed: Seed of the order; None keeps all samples in order of length, for evaluation.
    """

    drop_last = False

    def __init__(
        self, lengths: Sequence[int], batch_size: int, batches_per_step: int = 1, seed: int | None = None
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.effective = batch_size * batches_per_step
        self.seed = seed
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Take the order of epoch number `epoch`.

        Not called `set_epoch`: Accelerate calls that with epochs counted from the start of the process, which
        would undo a resumed run's.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(self.lengths) // self.batch_size)
        return len(self.lengths) // self.effective * self.effective // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = np.argsort(self.lengths, kind="stable")
            yield from (
                order[at : at + self.batch_size].tolist() for at in range(0, len(order), self.batch_size)
            )
            return
        random = np.random.default_rng([self.seed, self.epoch])
        for step in random.permutation(self._effective_batches(random)):
            yield from step.reshape(-1, self.batch_size).tolist()

    def _effective_batches(self, random: np.random.Generator) -> np.ndarray:
        """Sample numbers, `(steps, effective batch)`; the samples that fill no step sit out this epoch."""
        steps = len(self.lengths) // self.effective
        order = random.permutation(len(self.lengths))[: steps * self.effective]
        pool = POOL * self.effective
        pools = [order[at : at + pool] for at in range(0, len(order), pool)]
        sorted_pools = [chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in pools]
        return np.concatenate([*sorted_pools, order[:0]]).reshape(steps, self.effective)


def make_loader(dataset: ClipDataset, sampler: BucketBatchSampler, workers: int = 0) -> DataLoader:
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
    sampler = BucketBatchSampler(loader.dataset.lengths, loader.batch_sampler.batch_size)
    return DataLoader(
        loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
