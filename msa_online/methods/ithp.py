# SPDX-License-Identifier: Apache-2.0
"""ITHP: the text is compressed twice, to what predicts the audio and then the vision (ICLR 2024).

"Neuro-Inspired Information-Theoretic Hierarchical Perception for Multimodal Learning", arXiv 2404.09403.
Equation numbers are those of docs/methods/ithp.md.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.alignment import ALIGNMENTS, resample, word_steps
from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, task_loss
from msa_online.layers.modules import Dropout, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

LOG_VARIANCE = 5.0  # bound of (10.1)


class ITHPHead(BalancingHead):
    """Two bottlenecks compress the prime modality; what they keep has to predict the other two modalities.

        X_text ─┬─ b_0 ─┬─ b_1 ── expansion ─┐
                │       │   └── vision^      │
                │       └────── audio^       │
                └────────────────────────── (+) ── norm, pool ── h ── s

    At each step of the prime modality, b_0 and b_1 are samples of Gaussians (10.1). Audio and vision are
    targets of reconstruction (10.3) and no inputs: the fused prediction s is that of the prime modality
    alone, in training and in use. Without it the prediction is a constant.

    Losses, unweighted (10.5): `task` on s; `bottleneck`, the divergences and reconstruction errors of both
    levels (10.4); `unimodal`, the sum of the task losses of the predictions of the other two modalities
    alone. These and their loss are ours: encoders of the other two are trained by nothing else.

    Relations: `CPSLHead` shifts token states likewise, but by the states of audio and vision.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of b_0; b_1 has half of it, and the layers before them twice.
        order: The prime modality, then the targets of the first and of the second level.
        beta: Weight of the first reconstruction.
        gamma: Weight of the second reconstruction.
        second_level: lambda, weight of the second level.
        residual: Weight of the expanded b_1 beside the states it is added to.
        dropout: Share dropped in bottlenecks and decoders.
        classifier_dropout: Share dropped before and after pooling.
        pooling: "mean" over the steps, or "first": the first token, as in the published code.
        regression_loss: "mse" or "l1".
        alignment: "even": all tokens take equally long. "words": a token takes the steps of audio and vision
            during its word, where a recogniser measured its time.

    Raises:
        ValueError: A setting is not among its choices or out of range; `order` does not name each modality
            once; or `alignment` is "words" and the prime modality is not the text.
    """

    loss_names = ("task", "unimodal", "bottleneck")
    fuses = ("text",)
    paper = (
        "Xiao, Liu, Gupta, Cao, Li, Li, Fang, Cheng, Bogdan: Neuro-Inspired Information-Theoretic "
        "Hierarchical Perception for Multimodal Learning, ICLR 2024, https://arxiv.org/abs/2404.09403"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 128,
        order: Sequence[str] = MODALITIES,
        beta: float = 8.0,
        gamma: float = 32.0,
        second_level: float = 0.3,
        residual: float = 1.0,
        dropout: float = 0.3,
        classifier_dropout: float = 0.5,
        pooling: str = "mean",
        regression_loss: str = "mse",
        alignment: str = "even",
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, ("mean", "first"))
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        check_choice("alignment", alignment, ALIGNMENTS)
        if sorted(order) != sorted(MODALITIES):
            raise ValueError(f"order={list(order)} must name each of {', '.join(MODALITIES)} once")
        if alignment == "words" and order[0] != "text":
            raise ValueError(f"alignment='words' needs the text as prime modality, not order={list(order)}")
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= second_level < math.inf:
            raise ValueError(f"second_level={second_level} must be at least 0")
        if hidden_size < 2:
            raise ValueError(f"hidden_size={hidden_size} must be at least 2")
        self.prime, *self.targets = order
        self.fuses = (self.prime,)
        self.beta, self.gamma, self.second_level, self.residual = beta, gamma, second_level, residual
        self.pooling, self.regression_loss, self.alignment = pooling, regression_loss, alignment
        self.needs_word_times = alignment == "words"
        width, sizes = widths[self.prime], (hidden_size, hidden_size // 2)
        self.bottlenecks = nn.ModuleList(
            Bottleneck(inputs, size, 2 * hidden_size, dropout)
            for inputs, size in zip((width, sizes[0]), sizes, strict=True)
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(
                nn.Linear(size, 2 * hidden_size),
                nn.ReLU(),
                Dropout(dropout),
                nn.Linear(2 * hidden_size, widths[name]),
            )
            for size, name in zip(sizes, self.targets, strict=True)
        )
        self.expansion = nn.Linear(sizes[1], width)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(classifier_dropout)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_labels)
        self.predictors = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(widths[name], hidden_size),
                    nn.GELU(),
                    Dropout(dropout),
                    nn.Linear(hidden_size, num_labels),
                )
                for name in self.targets
            }
        )

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        prime = sequences[self.prime]
        state, gaussians, latents = prime.values, [], []
        for bottleneck in self.bottlenecks:
            gaussians.append(bottleneck(state))
            state = self._sample(*gaussians[-1])  # b_0, b_1, (batch, steps, hidden)
            latents.append(state)
        shifted = self.norm(prime.values + self.residual * self.expansion(state))
        pooled = {name: masked_mean(sequences[name]) for name in self.targets}
        pooled[self.prime] = self._pool(self.dropout(shifted), prime)  # h, (batch, width)
        features = {name: pooled[name] for name in MODALITIES}
        fused = torch.tanh(self.pooler(features[self.prime]))
        logits = self.classifier(self.dropout(fused))
        alone = {name: self.predictors[name](features[name]) for name in self.targets}
        alone[self.prime] = logits
        output = HeadOutput(
            logits=logits,
            modality_logits={name: alone[name] for name in MODALITIES},
            features=features,
            fused=fused,
        )
        if labels is not None:
            targets = [self._target(prime, name, sequences[name]) for name in self.targets]
            rebuilt = [decoder(latent) for decoder, latent in zip(self.decoders, latents, strict=True)]
            present = {name: sequences[name].present for name in self.targets}
            with without_autocast(labels.device):
                terms = bottleneck_terms(gaussians, rebuilt, targets, prime.mask)
                others = {name: alone[name] for name in self.targets}
                output.losses = {
                    "task": task_loss(logits, labels, regression_loss=self.regression_loss),
                    "unimodal": loss_alone(others, labels, present, self.regression_loss),
                    "bottleneck": self._weighted(terms),
                }
            names = ("kl/first", "mse/first", "kl/second", "mse/second")
            output.diagnostics = {name: term.detach() for name, term in zip(names, terms, strict=True)}
        return output

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Bottlenecks, expansion and norm belong to the prime modality; the others take no part in s."""
        parts = (self.bottlenecks, self.expansion, self.norm)
        own = [parameter for part in parts for parameter in part.parameters()]
        return {name: own if name == self.prime else [] for name in MODALITIES}

    def _sample(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """A sample of the Gaussian in training, else its mean (10.1)."""
        if not self.training:
            return mean
        noise = torch.randn_like(log_variance) * (log_variance / 2).exp()
        return mean + noise.to(mean.dtype)

    def _pool(self, states: Tensor, prime: ModalitySequence) -> Tensor:
        """Pool over the observed steps, `(batch, steps, width)` to `(batch, width)`; 0 if there are none."""
        if self.pooling == "mean":
            return masked_mean(prime.with_values(states))
        first = states[torch.arange(len(states), device=states.device), prime.mask.long().argmax(dim=1)]
        return first * prime.mask.any(dim=1, keepdim=True)

    def _target(self, prime: ModalitySequence, name: str, sequence: ModalitySequence) -> ModalitySequence:
        """A modality on the steps of the prime one, each normalised; constants (10.2)."""
        spans = word_steps(prime, name, sequence) if self.alignment == "words" else None
        averaged = resample(sequence, prime.mask, spans)
        values = in_fp32(averaged.values.detach())
        return averaged.with_values(F.layer_norm(values, values.shape[-1:]))

    def _weighted(self, terms: Sequence[Tensor]) -> Tensor:
        """L_bottleneck (10.4) from its four terms."""
        first_divergence, first_error, second_divergence, second_error = terms
        second = second_divergence + self.gamma * second_error
        total = first_divergence + self.beta * first_error + self.second_level * second
        return 2 / (self.beta + self.gamma) * total


class Bottleneck(nn.Module):
    """Maps a step to the mean and the log variance of a Gaussian (10.1).

    Args:
        inputs: Width of the steps.
        size: Width of the Gaussian.
        hidden_size: Width of the hidden layer.
        dropout: Share of the hidden layer dropped.
    """

    def __init__(self, inputs: int, size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, hidden_size), nn.ReLU(), Dropout(dropout))
        self.mean = nn.Linear(hidden_size, size)
        self.log_variance = nn.Linear(hidden_size, size)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(..., inputs)` to the mean, and to the log variance in fp32, `(..., size)` each."""
        hidden = self.trunk(values)
        raw = in_fp32(self.log_variance(hidden))
        return self.mean(hidden), LOG_VARIANCE * torch.tanh(raw / LOG_VARIANCE)


def bottleneck_terms(
    gaussians: Sequence[tuple[Tensor, Tensor]],
    rebuilt: Sequence[Tensor],
    targets: Sequence[ModalitySequence],
    mask: Tensor,
) -> list[Tensor]:
    """Divergence from the standard normal and squared error (10.3) of the first level, and of the second.

    Args:
        gaussians: Means and log variances of each level, `(batch, steps, size)`.
        rebuilt: Reconstruction of each level, `(batch, steps, width)`.
        targets: Target of each level, with the same shapes; an error counts the steps that it has.
        mask: Observed steps of the prime modality, `(batch, steps)` bool; divergences count these.
    """
    terms = []
    for (mean, log_variance), values, target in zip(gaussians, rebuilt, targets, strict=True):
        divergence = (in_fp32(mean).square() + log_variance.exp() - log_variance - 1).mean(dim=-1) / 2
        error = (in_fp32(values) - target.values).square().mean(dim=-1)
        terms += [
            mean_where(divergence.flatten(), mask.flatten()),
            mean_where(error.flatten(), target.mask.flatten()),
        ]
    return terms
