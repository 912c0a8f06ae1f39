# SPDX-License-Identifier: Apache-2.0
"""CP/SL: conflict-aware penalty and statistical loss (Dai, Liang and Mai); METHODS 4 has the equations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

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
"""The modalities that are encoded as Gaussians and fused into the text."""

SMALL = 1e-6  # under roots and beside variances; 1e-8 is zero in fp16
LOG_VARIANCE = (-6.0, 2.0)  # bounds within which diversity is rewarded (METHODS 11, A19)
MOMENTUM = 0.1  # of the running extremes


class CPSLHead(BalancingHead):
    """Audio and vision shift the token states of the text, and keep the statistics of what they encode.

        audio  ── to the token grid ── AME ── Z_a ─┐
        vision ── to the token grid ── AME ── Z_v ─┴─ gate ── P ── T + beta P ── norm, pool ── s
                                       └── A^, V^, statistics
        audio, vision ── own steps ── AME ── pool ── s_a, s_v            T ── pool ── s_t

    Losses, unweighted: `task` on s; `recon` of the inputs from Z; `unimodal`, the sum of the task losses of
    s_t, s_a, s_v; `div`, the negative entropy of the latents (absent without AME); `stat`, L_stat (4.5). The
    paper weighs them 1, 1, 0.5, 0.1, 0.1.

    Deviations and readings (METHODS 4.3): inputs are scaled by running minima and maxima and not by those of
    the batch, so that a sample is judged alone; targets of `recon` and `stat` are held fixed, because a
    learned front-end could meet them by shrinking; the latents have no noise in evaluation; a learned state
    stands in for what is absent; s_a and s_v come from the same encoders on the steps of audio and vision
    themselves, because on the token grid the number of words would change them (A32).

    Relations: `ConflictModulator` is the other half of the method; both work without the other.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of the encoders' trunk and of the latents Z.
        fusion_size: Width of the gated state F.
        dropout: Share dropped in encoders and decoders.
        classifier_dropout: Share dropped before and after pooling.
        residual: beta, weight of the shift P; 0 leaves the text alone.
        ame: Draw the latents from the Gaussians; False takes their means, and variances serve `stat` only.
        pooling: "mean" over the tokens, or "first" token, as the ancestor ITHP pools.
        regression_loss: "mse" or "l1".

    Raises:
        ValueError: `pooling` or `regression_loss` has no such setting.
    """

    loss_names = ("task", "recon", "unimodal", "div", "stat")

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
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, ("mean", "first"))
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        self.residual, self.ame, self.pooling = residual, ame, pooling
        self.regression_loss = regression_loss
        text_width = widths["text"]
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
        grid = token_grid(sequences["text"])
        inputs, means, variances, latents = {}, {}, {}, {}
        for name in ENCODED:
            inputs[name] = self.scaling[name](resample(sequences[name], grid))  # (batch, tokens, width)
            means[name], variances[name] = self.encoders[name](inputs[name].values)
            drawn = self._draw(means[name], variances[name])
            latents[name] = self.missing(name, drawn, inputs[name].mask)  # (batch, tokens, hidden)
        features = {
            "text": self._pool(sequences["text"].values, grid),
            **{name: masked_mean(ModalitySequence.of(latents[name], grid)) for name in ENCODED},
        }
        features["text"], text = through(features["text"], sequences["text"].values)
        for name in ENCODED:
            features[name], latents[name] = through(features[name], latents[name])
        shift = self.fusion(latents["audio"], latents["vision"])  # (batch, tokens, text width)
        fused = self._pool(self.dropout(self.norm(text + self.residual * shift)), grid)
        fused = torch.tanh(self.pooler(fused))
        output = HeadOutput(
            logits=self.classifier(self.dropout(fused)),
            modality_logits=self._alone(sequences, features["text"]),
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
        """Trunk, mean and variance of the Gaussian encoders (4.10); the text has an encoder only."""
        return {"text": [], **{name: list(self.encoders[name].parameters()) for name in ENCODED}}

    def _alone(self, sequences: Mapping[str, ModalitySequence], text: Tensor) -> dict[str, Tensor]:
        """s_t from the pooled text `(batch, width)`, s_a and s_v from their own steps: `(batch, outputs)`."""
        states = {"text": text}
        for name in ENCODED:
            own = self.scaling[name].scale(sequences[name])
            pooled = masked_mean(own.with_values(self._draw(*self.encoders[name](own.values))))
            states[name] = self.missing(name, pooled, own.present)
        return {name: self.predictors[name](state) for name, state in states.items()}

    def _draw(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Z = mu + eps sqrt(sigma^2): eps normal in training with AME, else 0 (4.1)."""
        if not (self.training and self.ame):
            return mean
        return mean + (torch.randn_like(variance) * (variance + SMALL).sqrt()).to(mean.dtype)

    def _pool(self, states: Tensor, grid: Tensor) -> Tensor:
        """One state for a sample from those on its grid, `(batch, tokens, width)` to `(batch, width)`."""
        if self.pooling == "mean":
            return masked_mean(ModalitySequence.of(states, grid))
        return states[torch.arange(grid.shape[0], device=grid.device), grid.long().argmax(dim=1)]


class GaussianEncoder(nn.Module):
    """AME (4.1): a step of a modality to the mean and the variance of a latent.

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
        """The mean, and the variance above 0 in fp32, `(..., hidden)` each, of `(..., width)`."""
        states = self.trunk(values)
        return self.mean(states), F.softplus(in_fp32(self.variance(states))) + SMALL


class GatedFusion(nn.Module):
    """A gated multimodal unit and its way into the text's states (4.2).

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
        """P `(..., text width)` in (-1, 1) of Z_a and Z_v, `(..., hidden)`."""
        gate = torch.sigmoid(self.gate(torch.cat([audio, vision], dim=-1)))
        fused = gate * torch.tanh(self.audio(audio)) + (1 - gate) * torch.tanh(self.vision(vision))
        return torch.tanh(self.project(fused))


class RunningMinMax(nn.Module):
    """Steps scaled feature by feature from the range seen in training to [0, 1] (METHODS 4.3, C7).

    The extremes follow those of the training batches, over all ranks, and stand still in evaluation: what a
    sample becomes does not depend on its batch. A feature that never moves is shifted only.

    Args:
        width: Features in a step.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(width, dtype=torch.float32))
        self.register_buffer("high", torch.empty(width, dtype=torch.float32))
        self.register_buffer("batches", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Leave features as they are until the first training batch."""
        nn.init.zeros_(self.low)
        nn.init.ones_(self.high)
        nn.init.zeros_(self.batches)

    def forward(self, sequence: ModalitySequence) -> ModalitySequence:
        """Scale the observed steps of `(batch, time, width)`, in training by the range that includes them."""
        if self.training:
            self._follow(sequence)
        return self.scale(sequence)

    def scale(self, sequence: ModalitySequence) -> ModalitySequence:
        """Scale the observed steps of `(batch, time, width)` by the range seen so far."""
        spread = self.high - self.low
        values = (sequence.values - self.low) / torch.where(spread > SMALL, spread, 1.0)
        return sequence.with_values(values.to(sequence.values.dtype))

    @torch.no_grad()
    def _follow(self, sequence: ModalitySequence) -> None:
        """Move the extremes towards those of a batch; the first batch that has any sets them.

        A batch that overflowed leaves them alone.
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


def token_grid(text: ModalitySequence) -> Tensor:
    """Steps that carry the fusion, `(batch, tokens)` bool: the text's; a single one where it is absent."""
    first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0
    return text.mask | (first & ~text.present.unsqueeze(-1))


def resample(sequence: ModalitySequence, grid: Tensor) -> ModalitySequence:
    """Average a sequence over the stretch of time that each token takes if all take the same.

    Adaptive average pooling through both masks: token j of n covers the steps from floor(j T / n) to
    ceil((j + 1) T / n), where T steps reach to the last observed one; of those the observed ones count.

    Args:
        sequence: States `(batch, time, width)`.
        grid: Tokens that are there, `(batch, tokens)` bool.

    Returns:
        States `(batch, tokens, width)`; a token in whose time nothing was observed is masked out.
    """
    steps = torch.arange(sequence.mask.shape[1], device=grid.device)
    length = torch.where(sequence.mask, steps + 1, 0).amax(dim=1)[:, None]  # T of each sample
    count = grid.sum(dim=1, keepdim=True).clamp(min=1)
    place = grid.cumsum(dim=1) - 1  # j
    start = place * length // count
    stop = -(-(place + 1) * length // count)
    covered = (steps >= start.unsqueeze(-1)) & (steps < stop.unsqueeze(-1))
    covered &= sequence.mask.unsqueeze(1) & grid.unsqueeze(-1)  # (batch, tokens, time)
    observed = covered.sum(dim=-1, keepdim=True)
    weights = covered.to(sequence.values.dtype) / observed.clamp(min=1)  # sums would overflow in fp16
    values = weights @ sequence.values
    return ModalitySequence(values, observed.squeeze(-1) > 0, sequence.present)


def through(pooled: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `pooled` `(batch, width)`, and the same states `(batch, tokens, width)` computed from it.

    They are the copy plus their differences from the original: the copy then has a gradient of its own, the
    sum over the tokens, which says where the sample as a whole is wanted. That of `states` is as it was.
    """
    copy = pooled.clone()
    return copy, copy.unsqueeze(1) + (states - pooled.unsqueeze(1))


def statistical_loss(
    inputs: Mapping[str, ModalitySequence], means: Mapping[str, Tensor], variances: Mapping[str, Tensor]
) -> Tensor:
    """L_stat (4.4, 4.5): the latents of a step have the mean and the variance that its features have.

    Args:
        inputs: Scaled features of each modality, `(batch, tokens, width)`; held fixed.
        means: mu, `(batch, tokens, hidden)`.
        variances: sigma^2, of that shape.
    """
    terms = []
    for name, sequence in inputs.items():
        target = in_fp32(sequence.values.detach())
        of_mean = in_fp32(means[name]).mean(dim=-1) - target.mean(dim=-1)
        of_variance = variances[name].mean(dim=-1) - target.var(dim=-1, correction=0)
        terms += [_over_steps(error.square(), sequence) for error in (of_mean, of_variance)]
    return torch.stack(terms).mean()


def reconstruction_loss(inputs: Mapping[str, ModalitySequence], rebuilt: Mapping[str, Tensor]) -> Tensor:
    """L_recon (4.6): mean squared distance of what is rebuilt, `(batch, tokens, width)`, from the inputs."""
    terms = [
        _over_steps((in_fp32(rebuilt[name]) - sequence.values.detach()).square().mean(dim=-1), sequence)
        for name, sequence in inputs.items()
    ]
    return torch.stack(terms).mean()


def diversity_loss(inputs: Mapping[str, ModalitySequence], variances: Mapping[str, Tensor]) -> Tensor:
    """L_div (4.7): negative mean entropy of the Gaussians, the log-variance within bounds."""
    terms = [
        _over_steps(variances[name].log().clamp(*LOG_VARIANCE).mean(dim=-1), sequence)
        for name, sequence in inputs.items()
    ]
    return -0.5 * (math.log(2 * math.pi * math.e) + torch.stack(terms).mean())


def _over_steps(values: Tensor, sequence: ModalitySequence) -> Tensor:
    """Mean of `(batch, tokens)` over the observed steps."""
    return mean_where(values.flatten(), sequence.mask.flatten())


class ConflictModulator(GradientModulator):
    """Damps the better of audio and vision, more so where its gradients are larger too (4.8 - 4.10).

        GM   c_m  = 1 - tanh(alpha score_m / score_other)    where m predicts better, else 1
        CP   c_m <- eta c_m                                  where m also has the larger gradient norm
        GE   grad <- c_m grad + N(0, std(grad))

    The norms are those of whole, unscaled gradients before any modulation, over the encoder of a modality.

    Deviations (METHODS 4.3): a third modality is compared with the mean of the others; classification is
    scored by the probability of the true class; GE is OGM-GE's additive noise, since the paper names it only.

    Relations: without CP it is `OGMModulator` on two modalities.

    Args:
        modalities: Modalities to compare and to modulate; the paper leaves the text alone.
        strength: alpha.
        penalty: eta in (0, 1]; 1 is GM without CP.
        noise: Noise of GE in deviations of the gradient; 0 leaves GE out.
        epochs: First and last epoch of modulation, from 0; None for all. The paper modulates 0 to 25 of 30.
        shift: 0 as printed, where the coefficient jumps from 1 to 1 - tanh(alpha) at equal scores; 1 makes it
            continuous.
        norm: "mean" over tensors as printed, or "rms" over elements, fair to encoders of different size.
        apply: "gradient" as published, or "lr": under Adam only the latter slows a modality for long.

    Raises:
        ValueError: A setting is out of range.
    """

    needs_modality_logits = True

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
            raise ValueError(f"penalty={penalty}: above 0 and at most 1, which is no penalty")
        if shift not in (0, 1):
            raise ValueError(f"shift={shift}: 0 as printed, or 1")
        check_choice("norm", norm, NORMS)
        self.modalities = tuple(modalities)
        self.epochs = None if epochs is None else tuple(epochs)
        self.strength, self.penalty, self.noise = strength, penalty, noise
        self.shift, self.norm, self.apply = shift, norm, apply

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """How well each modality alone predicts the micro-batch."""
        return observe_quality(output, labels, self.modalities)

    def measure(self, modality_parameters: Mapping[str, list[Parameter]]) -> dict[str, Tensor]:
        """g_m, the average gradient norm of each encoder."""
        return {
            f"encoder_gradient/{name}": average_norm(modality_parameters[name], self.norm)
            for name in self.modalities
        }

    def modulate(self, context: ModulationContext) -> Modulation:
        """Damp, penalise, add noise; outside its epochs it only takes scores and norms."""
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
    """Which modalities predict better than the others and have larger gradients too (4.9).

    A modality without a score, because no sample of the step has it, is compared with none.
    """
    compared = {name: norms[name] for name in scores}

    def leads(values: Mapping[str, float], name: str) -> bool:
        others = mean_of_others(values, name)
        return others is not None and values[name] > others

    return {name: leads(scores, name) and leads(compared, name) for name in norms}
