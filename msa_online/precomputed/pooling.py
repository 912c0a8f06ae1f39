# SPDX-License-Identifier: Apache-2.0
"""Sequences of features to one vector a sample."""

from collections.abc import Mapping

import numpy as np

from msa_online.precomputed.corpus import FeatureSteps

LEVELS = ("sequence", "utterance")
"""What features are kept as: their steps, or one vector for each sample."""


def pool(steps: Mapping[str, FeatureSteps]) -> dict[str, FeatureSteps]:
    """One step a sample: the mean over time of text, mean and standard deviation of audio and vision.

    Samples without steps stay without. A modality that has one step a sample already stays as it is.
    """
    return {name: _pooled(of_modality, name != "text") for name, of_modality in steps.items()}


def _pooled(steps: FeatureSteps, with_deviation: bool) -> FeatureSteps:
    if (steps.lengths <= 1).all():
        return steps
    moments = (np.mean, np.std) if with_deviation else (np.mean,)
    width = len(moments) * steps.width
    vectors = [
        np.concatenate([moment(values, axis=0, dtype=np.float64) for moment in moments])[None]
        if len(values)
        else np.zeros((0, width))
        for values in (steps.of(row).numpy() for row in range(len(steps.lengths)))
    ]
    return FeatureSteps.join(vectors, width)
