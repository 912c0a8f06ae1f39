# SPDX-License-Identifier: Apache-2.0
"""The fused states of a model on a split, and their picture by t-SNE."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.conditions import Batches, decide_under, over_split
from msa_online.modalities import CONDITIONS
from msa_online.modeling_msa import MSAModel

LEAST_SAMPLES = 5
PERPLEXITY = 30.0  # at most; a third of the samples if there are few
SIZE = 3.6  # inches of a panel's side


def fused_states(
    model: MSAModel, batches: Batches, accelerator: Accelerator, conditions: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the last layer of the fused prediction reads.

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Provides autocast, and gathers over ranks.
        conditions: Names in `CONDITIONS`.

    Returns:
        The states `(samples, width)` by condition, and the labels `(samples,)`.
    """

    def states(batch: Mapping[str, Tensor]) -> Tensor:
        sequences = model.encode(**batch)
        return torch.stack(
            [decide_under(model, sequences, CONDITIONS[name]).fused for name in conditions], dim=1
        )

    found, labels = over_split(model, batches, accelerator, states)
    return {name: found[:, number] for number, name in enumerate(conditions)}, labels


def embed(states: np.ndarray, seed: int) -> np.ndarray:
    """Two t-SNE coordinates for each of the states `(samples, width)`; equal seeds give equal ones.

    Raises:
        ValueError: There are fewer than five samples.
    """
    from sklearn.manifold import TSNE

    if len(states) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(states)} samples are too few for t-SNE: give a split of {LEAST_SAMPLES} or more"
        )
    perplexity = min(PERPLEXITY, (len(states) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(states.astype(np.float32))


def draw_states(
    coordinates: Mapping[str, np.ndarray], labels: np.ndarray, config: MSAConfig, title: str, target: Path
) -> None:
    """Draw a panel for each condition, points `(samples, 2)` coloured by label, to an image file.

    Args:
        coordinates: Coordinates by condition.
        labels: Scores or class numbers, `(samples,)`.
        config: Configuration of the model, for the label range or the names of the classes.
        title: Title of the picture.
        target: The image file.
    """
    from matplotlib.figure import Figure  # takes a second

    columns = min(4, len(coordinates))
    rows = -(-len(coordinates) // columns)
    figure = Figure(figsize=(SIZE * columns + 1.2, SIZE * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(coordinates) :]:
        axis.remove()
    drawn = list(axes.flat[: len(coordinates)])
    for axis, (condition, points) in zip(drawn, coordinates.items(), strict=True):
        if config.is_regression:
            low, high = config.label_range
            dots = axis.scatter(*points.T, c=labels, s=8, cmap="coolwarm", vmin=low, vmax=high)
        else:
            for number, name in config.id2label.items():
                axis.scatter(*points[labels == number].T, s=8, color=f"C{number % 10}", label=name)
        axis.set_title(condition, fontsize="small")
        axis.set_xticks([])
        axis.set_yticks([])
    if config.is_regression:
        figure.colorbar(dots, ax=drawn, label="label")
    else:
        figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.suptitle(title, fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
