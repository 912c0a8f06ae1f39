# SPDX-License-Identifier: Apache-2.0
"""Samples of a corpus of features as a model takes them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample, require_widths
from msa_online.processing_msa import at_least_one


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
            lengths = torch.tensor([len(each) for each in values])
            batch[f"{name}_values"] = pad_sequence(values, batch_first=True)
            batch[f"{name}_mask"] = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        return batch


class FeatureDataset(Dataset):
    """Samples of one split, their features read when they are asked for.

    Args:
        corpus: The corpus.
        samples: Samples of it, in a fixed order: `index` in a batch counts along it.
        widths: Width of each modality in the model.
        label2id: Number of each class; None for regression. Raises `CorpusError` where a width differs from
            that of the corpus.

    Attributes:
        lengths: Steps of the longest modality of each sample, by which batches are cut.
        unit: What `lengths` count.
        processor: Makes batches of samples.
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
        self.samples = samples
        self.steps = corpus.steps
        self.widths = widths
        self.labels = [sample.label if label2id is None else label2id[sample.label] for sample in samples]
        self.label_type = torch.float32 if label2id is None else torch.int64
        lengths = [corpus.lengths(name, samples) for name in MODALITIES]
        self.lengths = [max(of_sample) for of_sample in zip(*lengths, strict=True)]
        self.processor = FeatureProcessor()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Features of one sample, `<modality>_values` `(time, width)`, with its `labels` and `index`.

        A modality that it lacks is one step of zeros, and False in `modality_present` `(3,)`.
        """
        row = self.samples[index].row
        values = {
            name: self.steps[name].of(row) if name in self.steps else torch.zeros(0, self.widths[name])
            for name in MODALITIES
        }
        return {
            **{f"{name}_values": at_least_one(values[name]) for name in MODALITIES},
            "modality_present": torch.tensor([len(values[name]) > 0 for name in MODALITIES]),
            "labels": torch.tensor(self.labels[index], dtype=self.label_type),
            "index": torch.tensor(index),
        }
