# SPDX-License-Identifier: Apache-2.0
"""Pool sequences of features to one vector per sample."""

from collections.abc import Mapping

import numpy as np

from msa_online.precomputed.corpus import FeatureSteps


def pool(steps: Mapping[str, FeatureSteps]) -> dict[str, FeatureSteps]:
    """Pool to one step per sample: mean over time of text, mean and standard deviation of audio and vision.

    Samples without steps stay without. A modality with at most one step per sample is not changed.
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
