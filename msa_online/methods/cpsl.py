# SPDX-License-Identifier: Apache-2.0
"""CP/SL: conflict-aware penalty and statistical loss (Dai, Liang and Mai, 2026), arXiv 2605.28575.

Numbers of equations like (4.2) and of choices like Q7 are those of docs/methods/cpsl.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.alignment import ALIGNMENTS, resample, token_grid, word_steps
from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, task_loss
from msa_online.layers.modules import Dropout, MissingTokens, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.layers.ranks import across_ranks_minimum
from msa_online.methods.base import (
    BalancingHead,
    GradientModulator,
    HeadOutput,
    Modulation,
    ModulationContext,
)
from msa_online.methods.gradients import (
    NORMS,
    apply_coefficients,
    average_norm,
    balance_log,
    check_settings,
    damping_coefficients,
    mean_of_others,
    observe_quality,
    quality_scores,
)
from msa_online.modalities import ModalitySequence

ENCODED = ("audio", "vision")
"""Modalities that are encoded as Gaussians and added to the text."""

SMALL = 1e-6  # under roots and beside variances; 1e-8 is zero in fp16
LOG_VARIANCE = (-6.0, 2.0)  # the diversity loss is clamped to these bounds (4.7)
MOMENTUM = 0.1  # of the running extremes
PAPER = (
    "Dai, Liang, Mai: A Conflict-Aware Penalty and Statistical Loss Framework for Balancing Modalities and "
    "Enhancing Stability in Multimodal Sentiment Analysis, 2026, https://arxiv.org/abs/2605.28575"
)


class CPSLHead(BalancingHead):
    """Audio and vision are encoded as Gaussians, fused by a gate, and shift the token states of the text.

        audio  ── to the token grid ── AME ── Z_a ─┐
        vision ── to the token grid ── AME ── Z_v ─┴─ gate ── P ── T + beta P ── norm, pool ── s
                                       └── A^, V^, statistics
        audio, vision ── own steps ── AME ── pool ── s_a, s_v            T ── pool ── s_t

    Losses, unweighted (4.6): `task` on s; `recon`, the reconstruction of the inputs from Z; `unimodal`, the
    sum of the task losses of s_t, s_a and s_v; `div`, the negative entropy of the latents (only with AME);
    `stat`, the statistical loss (4.5). The published weights are 1, 1, 0.5, 0.1, 0.1.

    Deviations and readings: inputs are scaled by running minima and maxima instead of those of the batch, so
    that a prediction does not depend on the batch (Q7). The targets of `recon` and `stat` are detached,
    because a learned front-end could meet them by shrinking (Q6). Latents are not sampled in evaluation
    (Q14). A learned state replaces absent latents (Q16). s_a and s_v are computed from the steps of audio and
    vision themselves: on the token grid, the number of words would change them (Q11).

    Relations: `ConflictModulator` is the other half of the method; each works without the other.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of the encoders' trunk and of the latents Z.
        fusion_size: Width of the gated state F.
        dropout: Share dropped in encoders and decoders.
        classifier_dropout: Share dropped before and after pooling.
        residual: beta, weight of the shift P; 0 predicts from the text alone.
        ame: Sample the latents from the Gaussians. False uses their means; the variances then serve `stat`
            only.
        pooling: "mean" over the tokens, or "first": the first token, as in ITHP (Q12).
        regression_loss: "mse" or "l1".
        alignment: "even": all tokens take equally long, as in the paper's even grid (Q11). "words": a token
            takes the steps of audio and vision during its word, where a recogniser measured its time.

    Raises:
        ValueError: `pooling`, `regression_loss` or `alignment` is not among its choices, or the text has
            width 1.
    """

    loss_names = ("task", "recon", "unimodal", "div", "stat")
    paper = PAPER

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 256,
        fusion_size: int = 512,
        dropout: float = 0.3,
        classifier_dropout: float = 0.5,
        residual: float = 1.0,
        ame: bool = True,
        pooling: str = "mean",
        regression_loss: str = "mse",
        alignment: str = "even",
    ) -> None:
        super().__init__()
        check_choice("alignment", alignment, ALIGNMENTS)
        check_choice("pooling", pooling, ("mean", "first"))
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        self.residual, self.ame, self.pooling = residual, ame, pooling
        self.alignment = alignment
        self.needs_word_times = alignment == "words"
        self.regression_loss = regression_loss
        text_width = widths["text"]
        if text_width < 2:
            raise ValueError(
                "the text has width 1: audio and vision reach the prediction as a shift of the text's state, "
                "and a layer norm makes a single number constant. Where no sample has text, set "
                "model.feature_widths.text=64"
            )
        self.scaling = nn.ModuleDict({name: RunningMinMax(widths[name]) for name in ENCODED})
        self.encoders = nn.ModuleDict(
            {name: GaussianEncoder(widths[name], hidden_size, dropout) for name in ENCODED}
        )
        self.missing = MissingTokens(hidden_size, ENCODED)
        self.fusion = GatedFusion(hidden_size, fusion_size, text_width)
        self.decoders = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(hidden_size, hidden_size),
                    nn.ReLU(),
                    Dropout(dropout),
                    nn.Linear(hidden_size, widths[name]),
                )
                for name in ENCODED
            }
        )
        self.norm = nn.LayerNorm(text_width)
        self.dropout = Dropout(classifier_dropout)
        self.pooler = nn.Linear(text_width, text_width)
        self.classifier = nn.Linear(text_width, num_labels)
        self.predictors = nn.ModuleDict(
            {name: nn.Linear(text_width if name == "text" else hidden_size, num_labels) for name in widths}
        )

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        text = sequences["text"]
        grid = token_grid(text)
        inputs, means, variances, latents = {}, {}, {}, {}
        for name in ENCODED:
            spans = word_steps(text, name, sequences[name]) if self.alignment == "words" else None
            averaged = resample(sequences[name], grid, spans)  # (batch, tokens, width)
            inputs[name] = self.scaling[name](averaged)
            means[name], variances[name] = self.encoders[name](inputs[name].values)
            sampled = self._sample(means[name], variances[name])
            latents[name] = self.missing(name, sampled, inputs[name].mask)  # (batch, tokens, hidden)
        features = {
            "text": self._pool(text.values, grid),
            **{name: masked_mean(ModalitySequence.of(latents[name], grid)) for name in ENCODED},
        }
        features["text"], states = route_through(features["text"], text.values)
        for name in ENCODED:
            features[name], latents[name] = route_through(features[name], latents[name])
        shift = self.fusion(latents["audio"], latents["vision"])  # (batch, tokens, text width)
        fused = self._pool(self.dropout(self.norm(states + self.residual * shift)), grid)
        fused = torch.tanh(self.pooler(fused))
        output = HeadOutput(
            logits=self.classifier(self.dropout(fused)),
            modality_logits=self._predict_alone(sequences, features["text"]),
            features=features,
            fused=fused,
        )
        if labels is not None:
            rebuilt = {name: self.decoders[name](latents[name]) for name in ENCODED}
            present = {name: sequence.present for name, sequence in sequences.items()}
            with without_autocast(labels.device):
                output.losses = {
                    "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                    "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
                    "recon": reconstruction_loss(inputs, rebuilt),
                    **({"div": diversity_loss(inputs, variances)} if self.ame else {}),
                    "stat": statistical_loss(inputs, means, variances),
                }
            output.diagnostics = {
                f"variance/{name}": mean_where(
                    variances[name].detach().mean(dim=-1).flatten(), inputs[name].mask.flatten()
                )
                for name in ENCODED
            }
        return output

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """The Gaussian encoders of audio and vision (4.10); the head has no parameters of the text alone."""
        return {"text": [], **{name: list(self.encoders[name].parameters()) for name in ENCODED}}

    def _predict_alone(self, sequences: Mapping[str, ModalitySequence], text: Tensor) -> dict[str, Tensor]:
        """s_t from the pooled text `(batch, width)`, s_a and s_v from their own steps: `(batch, outputs)`."""
        states = {"text": text}
        for name in ENCODED:
            own = self.scaling[name].scale(sequences[name])
            pooled = masked_mean(own.with_values(self._sample(*self.encoders[name](own.values))))
            states[name] = self.missing(name, pooled, own.present)
        return {name: self.predictors[name](state) for name, state in states.items()}

    def _sample(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Z = mu + eps sqrt(sigma^2); eps is normal in training with AME, else 0 (4.1)."""
        if not (self.training and self.ame):
            return mean
        return mean + (torch.randn_like(variance) * (variance + SMALL).sqrt()).to(mean.dtype)

    def _pool(self, states: Tensor, grid: Tensor) -> Tensor:
        """Pool the states on the token grid, `(batch, tokens, width)` to `(batch, width)` (4.3)."""
        if self.pooling == "mean":
            return masked_mean(ModalitySequence.of(states, grid))
        return states[torch.arange(grid.shape[0], device=grid.device), grid.long().argmax(dim=1)]


class GaussianEncoder(nn.Module):
    """AME (4.1): maps a step of a modality to the mean and the variance of a latent.

    Args:
        width: Width of the steps.
        hidden_size: Width of the trunk and of the latent.
        dropout: Share of the trunk dropped.
    """

    def __init__(self, width: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(width, hidden_size), nn.ReLU(), Dropout(dropout))
        self.mean = nn.Linear(hidden_size, hidden_size)
        self.variance = nn.Linear(hidden_size, hidden_size)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(..., width)` to the mean and to the variance (above 0, fp32), `(..., hidden)` each."""
        states = self.trunk(values)
        return self.mean(states), F.softplus(in_fp32(self.variance(states))) + SMALL


class GatedFusion(nn.Module):
    """Gated multimodal unit and projection to the text's width (4.2).

        g = sigmoid(W_g [Z_a; Z_v])    F = g tanh(W_a Z_a) + (1 - g) tanh(W_v Z_v)    P = tanh(W_p F)

    Args:
        hidden_size: Width of Z_a and Z_v.
        fusion_size: Width of F.
        text_width: Width of P.
    """

    def __init__(self, hidden_size: int, fusion_size: int, text_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * hidden_size, fusion_size)
        self.audio = nn.Linear(hidden_size, fusion_size)
        self.vision = nn.Linear(hidden_size, fusion_size)
        self.project = nn.Linear(fusion_size, text_width)

    def forward(self, audio: Tensor, vision: Tensor) -> Tensor:
        """P, `(..., text width)` in (-1, 1), from Z_a and Z_v, `(..., hidden)`."""
        gate = torch.sigmoid(self.gate(torch.cat([audio, vision], dim=-1)))
        fused = gate * torch.tanh(self.audio(audio)) + (1 - gate) * torch.tanh(self.vision(vision))
        return torch.tanh(self.project(fused))


class RunningMinMax(nn.Module):
    """Scales each feature from its range in training to [0, 1] (Q7).

    The extremes are running means of the extremes of the training batches, over all ranks. They are fixed in
    evaluation, so the result does not depend on the batch. A constant feature is shifted but not scaled.

    Args:
        width: Number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(width, dtype=torch.float32))
        self.register_buffer("high", torch.empty(width, dtype=torch.float32))
        self.register_buffer("batches", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the range to [0, 1], which leaves features unchanged until the first training batch."""
        nn.init.zeros_(self.low)
        nn.init.ones_(self.high)
        nn.init.zeros_(self.batches)

    def forward(self, sequence: ModalitySequence) -> ModalitySequence:
        """Scale the observed steps of `(batch, time, width)`; in training, update the range first."""
        if self.training:
            self._update(sequence)
        return self.scale(sequence)

    def scale(self, sequence: ModalitySequence) -> ModalitySequence:
        """Scale the observed steps of `(batch, time, width)` by the range seen so far."""
        spread = self.high - self.low
        values = (sequence.values - self.low) / torch.where(spread > SMALL, spread, 1.0)
        return sequence.with_values(values.to(sequence.values.dtype))

    @torch.no_grad()
    def _update(self, sequence: ModalitySequence) -> None:
        """Move the extremes towards those of a batch; the first batch with observed steps sets them.

        A batch with values that are not finite is ignored.
        """
        observed, values = sequence.mask.unsqueeze(-1), in_fp32(sequence.values)
        low = values.masked_fill(~observed, math.inf).amin(dim=(0, 1))
        negated_high = (-values).masked_fill(~observed, math.inf).amin(dim=(0, 1))
        low, negated_high = across_ranks_minimum(torch.stack([low, negated_high]))
        seen = (low.isfinite() & negated_high.isfinite()).all()
        share = torch.where(self.batches == 0, 1.0, MOMENTUM)
        for extreme, of_batch in ((self.low, low), (self.high, -negated_high)):
            extreme.copy_(torch.where(seen, extreme + share * (of_batch - extreme), extreme))
        self.batches += seen


def route_through(pooled: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Make `states` `(batch, tokens, width)` depend on a copy of `pooled` `(batch, width)`; return both.

    The new states are the copy plus the differences of the old states from `pooled`, so their values are the
    same. The gradient by the copy is the sum of the gradients over the tokens: the direction in which the
    task wants to move the sample as a whole. The gradient by the old states is unchanged.
    """
    copy = pooled.clone()
    return copy, copy.unsqueeze(1) + (states - pooled.unsqueeze(1))


def statistical_loss(
    inputs: Mapping[str, ModalitySequence], means: Mapping[str, Tensor], variances: Mapping[str, Tensor]
) -> Tensor:
    """L_stat (4.4), (4.5): distance of mean and variance of a step's latents from those of its features.

    Args:
        inputs: Scaled features of each modality, `(batch, tokens, width)`; detached here.
        means: mu, `(batch, tokens, hidden)`.
        variances: sigma^2, `(batch, tokens, hidden)`.
    """
    terms = []
    for name, sequence in inputs.items():
        target = in_fp32(sequence.values.detach())
        of_mean = in_fp32(means[name]).mean(dim=-1) - target.mean(dim=-1)
        of_variance = variances[name].mean(dim=-1) - target.var(dim=-1, correction=0)
        terms += [_over_steps(error.square(), sequence) for error in (of_mean, of_variance)]
    return torch.stack(terms).mean()


def reconstruction_loss(inputs: Mapping[str, ModalitySequence], rebuilt: Mapping[str, Tensor]) -> Tensor:
    """L_recon (4.6): mean squared distance of `rebuilt`, `(batch, tokens, width)`, from the inputs."""
    terms = [
        _over_steps((in_fp32(rebuilt[name]) - sequence.values.detach()).square().mean(dim=-1), sequence)
        for name, sequence in inputs.items()
    ]
    return torch.stack(terms).mean()


def diversity_loss(inputs: Mapping[str, ModalitySequence], variances: Mapping[str, Tensor]) -> Tensor:
    """L_div (4.7): negative mean entropy of the Gaussians; the log-variance is clamped."""
    terms = [
        _over_steps(variances[name].log().clamp(*LOG_VARIANCE).mean(dim=-1), sequence)
        for name, sequence in inputs.items()
    ]
    return -0.5 * (math.log(2 * math.pi * math.e) + torch.stack(terms).mean())


def _over_steps(values: Tensor, sequence: ModalitySequence) -> Tensor:
    """Mean of `(batch, tokens)` over the observed steps."""
    return mean_where(values.flatten(), sequence.mask.flatten())


class ConflictModulator(GradientModulator):
    """Damps the better of audio and vision, and more strongly if its gradients are also larger.

        GM   c_m  = 1 - tanh(alpha score_m / score_other)    if m predicts better, else 1             (4.8)
        CP   c_m <- eta c_m                                  if m also has the larger gradient norm   (4.9)
        GE   grad <- c_m grad + N(0, std(grad))                                                       (4.10)

    The norms are those of the accumulated, unscaled gradients of a modality's parameters, before any
    modulation (Q3).

    Deviations and readings: with more than two modalities, each is compared with the mean of the others (Q5).
    Classification is scored by the probability of the true class. GE is the additive noise of OGM-GE, because
    the paper gives no formula.

    Relations: without CP it is `OGMModulator` on two modalities. `CPSLHead` is the other half of the method;
    each works without the other.

    Args:
        modalities: Modalities to compare and to modulate; the paper does not modulate the text.
        strength: alpha.
        penalty: eta in (0, 1]; 1 is GM without CP.
        noise: Standard deviation of the noise of GE, relative to that of the gradient; 0 leaves GE out.
        epochs: First and last epoch of modulation, from 0; None for all. The paper modulates 0 to 25 of 30.
        shift: 0 as printed: the coefficient jumps from 1 to 1 - tanh(alpha) at equal scores. 1 makes it
            continuous (Q1).
        norm: "mean" over tensors as printed; "rms" over elements is fair to encoders of different size (Q4).
        apply: "gradient" as published, or "lr": under Adam only "lr" has a lasting effect (Q18).

    Raises:
        ValueError: A setting is out of range.
    """

    needs_modality_logits = True
    paper = PAPER

    def __init__(
        self,
        *,
        modalities: Sequence[str] = ENCODED,
        strength: float = 1.0,
        penalty: float = 0.5,
        noise: float = 1.0,
        epochs: Sequence[int] | None = (0, 25),
        shift: float = 0.0,
        norm: str = "mean",
        apply: str = "gradient",
    ) -> None:
        check_settings(modalities, epochs, apply, noise, strength)
        if not 0 < penalty <= 1:
            raise ValueError(f"penalty={penalty} must be above 0 and at most 1, which is no penalty")
        if shift not in (0, 1):
            raise ValueError(f"shift={shift} must be 0, as printed, or 1")
        check_choice("norm", norm, NORMS)
        self.modalities = tuple(modalities)
        self.epochs = None if epochs is None else tuple(epochs)
        self.strength, self.penalty, self.noise = strength, penalty, noise
        self.shift, self.norm, self.apply = shift, norm, apply

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Measure how well each modality alone predicts the micro-batch."""
        return observe_quality(output, labels, self.modalities)

    def measure(self, modality_parameters: Mapping[str, list[Parameter]]) -> dict[str, Tensor]:
        """g_m, the average gradient norm of each modality (4.9)."""
        return {
            f"encoder_gradient/{name}": average_norm(modality_parameters[name], self.norm)
            for name in self.modalities
        }

    def modulate(self, context: ModulationContext) -> Modulation:
        """Damp, penalise and add noise; outside `epochs`, only record scores and norms."""
        scores = quality_scores(context.statistics, self.modalities)
        norms = {name: context.statistics[f"encoder_gradient/{name}"] for name in self.modalities}
        coefficients = dict.fromkeys(self.modalities, 1.0)
        conflicts = dict.fromkeys(self.modalities, False)
        rates: dict[str, float] = {}
        if self.acts_in(context.epoch):
            conflicts = find_conflicts(scores, norms)
            damping = damping_coefficients(scores, self.modalities, self.strength, self.shift)
            coefficients = {
                name: self.penalty * value if conflicts[name] else value for name, value in damping.items()
            }
            rates = apply_coefficients(coefficients, context, apply=self.apply, noise=self.noise)
        log = balance_log(scores, coefficients)
        log |= {f"encoder_gradient/{name}": value for name, value in norms.items()}
        log |= {f"conflict/{name}": float(value) for name, value in conflicts.items()}
        return Modulation(rates, log)


def find_conflicts(scores: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, bool]:
    """Which modalities predict better than the others and also have larger gradients (4.9).

    A modality without a score, because no sample of the step has it, takes no part in the comparison.
    """
    compared = {name: norms[name] for name in scores}

    def leads(values: Mapping[str, float], name: str) -> bool:
        others = mean_of_others(values, name)
        return others is not None and values[name] > others

    return {name: leads(scores, name) and leads(compared, name) for name in norms}
