# SPDX-License-Identifier: Apache-2.0
"""The data of a run: raw clips or features made elsewhere, which training tells apart nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from feature_extractors import FeatureCache
from msa_online.batching import ClipDataset
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.corpus import Sample
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.corpora.splits import SPLITS
from msa_online.missing.rates import SplitMask
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample, require_widths
from msa_online.precomputed.dataset import FeatureDataset
from msa_online.processing_msa import MSAProcessor


@dataclass(frozen=True)
class ClipData:
    """Raw clips, their features in the cache.

    Attributes:
        prepared: Usable samples, their cache keys, and what was found.
        cache: Where the features are.
    """

    prepared: PreparedCorpus
    cache: FeatureCache

    def split(self, name: str) -> tuple[Sample, ...]:
        """Usable samples of a split."""
        return self.prepared.corpus.split(name)

    @property
    def sizes(self) -> dict[str, int]:
        """Usable samples in each split that has any."""
        return {name: len(samples) for name in SPLITS if (samples := self.split(name))}

    def dataset(self, name: str, processor: MSAProcessor, config: MSAConfig) -> ClipDataset:
        """A split as samples that can be batched for a model of `config`."""
        return ClipDataset(self.split(name), self.prepared.keys, self.cache, processor, label2id_of(config))

    def present(self, name: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""
        return self.prepared.present(self.split(name))

    def statistics(
        self, config: MSAConfig, masks: Mapping[str, SplitMask]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Nothing: the front-ends of raw clips learn their scaling."""
        return {}


@dataclass(frozen=True)
class FeatureData:
    """Features made elsewhere.

    Attributes:
        corpus: Usable samples and their features.
    """

    corpus: FeatureCorpus

    def split(self, name: str) -> tuple[FeatureSample, ...]:
        """Usable samples of a split."""
        return self.corpus.split(name)

    @property
    def sizes(self) -> dict[str, int]:
        """Usable samples in each split that has any."""
        return {name: len(samples) for name in SPLITS if (samples := self.split(name))}

    def dataset(self, name: str, processor: None, config: MSAConfig) -> FeatureDataset:
        """A split as samples that can be batched for a model of `config`; features need no processor.

        Raises:
            CorpusError: The features have other widths than the model.
        """
        return FeatureDataset(self.corpus, self.split(name), config.widths, label2id_of(config))

    def present(self, name: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""
        return self.corpus.present(self.split(name))

    def statistics(
        self, config: MSAConfig, masks: Mapping[str, SplitMask]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and deviation of each feature over the training split, `(width,)` each, by modality.

        What `masks` hide from training is not counted.

        Raises:
            CorpusError: The features have other widths than the model.
        """
        require_widths(self.corpus, config.widths)
        seen = masks["train"].seen if masks else self.present("train")
        rows = [sample.row for sample in self.split("train")]
        return {
            name: steps.statistics([row for row, has in zip(rows, seen[:, column], strict=True) if has])
            for column, name in enumerate(MODALITIES)
            if (steps := self.corpus.steps.get(name))
        }


def label2id_of(config: MSAConfig) -> dict[str, int] | None:
    """Number of each class; None for regression."""
    return None if config.is_regression else config.label2id
