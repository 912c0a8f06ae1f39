# SPDX-License-Identifier: Apache-2.0
"""EBMC: first strengthen every modality, then keep any of them from dominating (CVPR 2026).

"Enhance-then-Balance Modality Collaboration for Robust Multimodal Sentiment Analysis", arXiv 2604.12518.
Numbers of equations like (1.7) and of choices like E7 are those of docs/methods/ebmc.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import mean_where, sample_losses, task_loss
from msa_online.layers.modules import Dropout, ExpertStacks, LearnedScalar, MissingTokens, masked_mean
from msa_online.layers.precision import in_fp32, no_wider, without_autocast
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

LOG_VARIANCE = (-6.0, 3.0)  # bounds of a predicted log-variance; the likelihood is unbounded without them
LENDERS = {"text": "audio", "audio": "text", "vision": "text"}
"""Modality whose shared part `cce: shared` reads to rebuild each modality."""


class EBMCHead(BalancingHead):
    """Trains every modality alone in stage "enhance", then fuses and balances them in stage "balance".

                        ┌ shared z^c ┐                          task (fused)
        X_m ─ f_m ─ stacks ─ z_m ─ MSD        CCE ─ z~_m ─ fusion ─ s
                        │   └ private z^s ┘                  │
                        └ s_m, E(m): EMC           IMTD: frozen T_m(z^s), weighted by trust

    In "enhance" each modality passes its own expert stack. MSD splits z_m into a shared and a private part,
    CCE rebuilds z_m from the other modalities. In "balance" each modality passes all stacks and the states
    are fused. EMC equalises the energies E(m). IMTD distils the unimodal predictions of the best "enhance"
    model into the fused prediction, weighted by their certainty. The rebuilt z~_m replaces an absent z_m.

        enhance   L = sum_m l(s_m, y)                 + zeta MSD + beta CCE
        balance   L = l(s, y) + 0.1 sum_m l(s_m, y)   + zeta MSD + beta CCE + gamma EMC + eta IMTD   (1.16)

    Losses, unweighted: `task` (first term), `unimodal` (second term, in "balance"), `msd`, `cce`, `emc`,
    `imtd`. The published weights are zeta = 0.5, beta = gamma = eta = 0.1.

    Deviations and readings: what the paper leaves open is settled by the choices E1 to E24. In addition:
    1 is added to the router's weight of a modality's own stack, so that "balance" starts where "enhance"
    ended. In "enhance" the task term of CCE uses the modality's own predictor, because no fused one is
    trained yet. The log-variance is predicted from z_m, for the energy and for the trust, and trained with
    the error detached. With `uncertainty: disagreement`, u_m and the teacher's variance are the squared
    distance from the mean over modalities. Classification needs no log-variance: in both settings it uses
    the entropy and the variance of the classes.

    Relations: expert stacks and readout are those of `PaSEHead`, which has no router.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width D of all states.
        depth: Layers of an expert stack.
        heads: Attention heads of a layer.
        dropout: Share dropped in the MLPs of stacks and fusion.
        cce: "paper": one generator for each modality; it reads the modality's shared part, and the shared and
            private parts of the others. "shared": one small generator for all; it reads the shared part of
            another modality and the modality's own private part. "shared" gives the published parameter
            counts (E5).
        uncertainty: "probabilistic": regression predictors have a second output, the log-variance.
            "disagreement": they have none (E9).
        cce_in_fusion: "fill" replaces z_m by z~_m where m is absent; "off" leaves the token, or zero (E7).
        learned_scalars: Learn the temperature of the alignment and a gain of the fused logits.
        missing_tokens: Represent an absent modality by one learned step, not by an empty sequence (E22).
        temperature: tau of (1.1), or its initial value.
        decorrelation: lambda_1 of (1.4).
        private_task: lambda_2 of (1.4).
        energy_norm: alpha of the energy (1.7).
        energy_loss: beta_e of the energy (1.7).
        energy_uncertainty: gamma_e of the energy (1.7).
        energy_gradient: delta, weight of the energies' gradient norms (1.9).
        trust_floor: kappa of the trust weights (1.12).
        distillation_temperature: tau of the distillation in classification (1.14).

    Raises:
        ValueError: A setting is not among its choices, or `heads` does not divide `hidden_size`.
    """

    stages = ("enhance", "balance")
    teachers = {"balance": "enhance"}
    loss_names = ("task", "unimodal", "msd", "cce", "emc", "imtd")
    paper = (
        "He, Ding, Wang, Li, Teng, Ji: Enhance-then-Balance Modality Collaboration for Robust Multimodal "
        "Sentiment Analysis, CVPR 2026, https://arxiv.org/abs/2604.12518"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 256,
        depth: int = 4,
        heads: int = 2,
        dropout: float = 0.55,
        cce: str = "paper",
        uncertainty: str = "probabilistic",
        cce_in_fusion: str = "fill",
        learned_scalars: bool = False,
        missing_tokens: bool = False,
        temperature: float = 0.05,
        decorrelation: float = 0.1,
        private_task: float = 0.1,
        energy_norm: float = 1.0,
        energy_loss: float = 1.0,
        energy_uncertainty: float = 1.0,
        energy_gradient: float = 0.01,
        trust_floor: float = 0.1,
        distillation_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("cce", cce, ("paper", "shared"))
        check_choice("uncertainty", uncertainty, ("probabilistic", "disagreement"))
        check_choice("cce_in_fusion", cce_in_fusion, ("fill", "off"))
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self.num_labels = num_labels
        self.cce, self.fills = cce, cce_in_fusion == "fill"
        self.decorrelation, self.private_task = decorrelation, private_task
        self.energy = EnergyFactors(energy_norm, energy_loss, energy_uncertainty)
        self.energy_gradient = energy_gradient
        self.trust_floor = trust_floor
        self.distillation_temperature = distillation_temperature
        self.balancing = True

        def for_each(make: Callable[[], nn.Module]) -> nn.ModuleDict:
            return nn.ModuleDict({name: make() for name in MODALITIES})

        def perceptron(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
            )

        self.projections = nn.ModuleDict({name: nn.Linear(widths[name], hidden_size) for name in MODALITIES})
        self.missing = MissingTokens(hidden_size) if missing_tokens else None
        self.stacks = ExpertStacks(hidden_size, depth, heads, dropout)
        self.routers = for_each(
            lambda: nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, len(MODALITIES))
            )
        )
        self.shared = for_each(lambda: perceptron(hidden_size))
        self.private = for_each(lambda: perceptron(hidden_size))
        self.norms = for_each(lambda: nn.LayerNorm(hidden_size))
        self.generators = (
            for_each(lambda: perceptron((2 * len(MODALITIES) - 1) * hidden_size))
            if cce == "paper"
            else perceptron(2 * hidden_size)
        )
        with_variance = uncertainty == "probabilistic" and num_labels == 1
        self.predictors = for_each(lambda: nn.Linear(hidden_size, num_labels + with_variance))
        self.private_predictors = for_each(lambda: nn.Linear(hidden_size, num_labels))  # T_m
        joint = len(MODALITIES) * hidden_size
        self.fusion = nn.Sequential(nn.Linear(joint, joint), nn.ReLU(), Dropout(dropout))
        self.classifier = nn.Linear(joint, num_labels)
        self.temperature = LearnedScalar(temperature, (0.01, 0.5), learned_scalars)
        self.gain = LearnedScalar(1.0, learned=learned_scalars)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences; in "enhance" the fused logits are zeros and `fused_valid` is False.

        Args:
            sequences: States `(batch, time, width)` of each modality.
            labels: `(batch,)`.
            teacher: Output of `teach`, `(batch, modalities, outputs)`; without it there is no `imtd`.
        """
        present = torch.stack([sequences[name].present for name in MODALITIES])  # (modalities, batch)
        features = self._read(sequences)
        states = torch.stack(list(features.values()))  # z_m: (modalities, batch, hidden)
        shared, private = self._disentangle(states)
        rebuilt = self._rebuild(shared, private, present)  # z~_m
        filled = torch.where(present.unsqueeze(-1), states, rebuilt) if self.fills else states
        fused = self._fuse(filled)  # (batch, 3 * hidden)
        predicted = _each(self.predictors, states)  # (modalities, batch, outputs [+ 1])
        logits = self._classify(fused)
        if not self.balancing:
            fused, logits = torch.zeros_like(fused), torch.zeros_like(logits)
        output = HeadOutput(
            logits=logits,
            modality_logits=dict(zip(MODALITIES, predicted[..., : self.num_labels], strict=True)),
            features=features,
            fused=fused,
            fused_valid=self.balancing,
        )
        if labels is None:
            return output
        with without_autocast(present.device):  # all losses in fp32
            alone = self._alone(predicted, labels, present)
            msd = self._msd(shared, private, labels, present)
            cce = self._cce(states, rebuilt, filled, labels, present)
            if self.balancing:
                terms = {"task": task_loss(logits, labels), "unimodal": alone}
                terms |= {**msd, **cce, **self._emc(states, labels, present)}
                terms |= {} if teacher is None else self._imtd(logits, teacher, present)
            else:
                terms = {"task": alone, **msd, **cce}
        output.losses = {name: term for name, term in terms.items() if name in self.loss_names}
        output.diagnostics = {name: term.detach() for name, term in terms.items() if "/" in name}
        return output

    def teach(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Predict with T_m from the private part of each modality, `(batch, modalities, outputs)`.

        A probabilistic regression appends the log-variance predicted from z_m.
        """
        states = torch.stack(list(self._read(sequences).values()))
        _, private = self._disentangle(states)
        means = _each(self.private_predictors, private)
        log_variance = _each(self.predictors, states)[..., self.num_labels :]
        return torch.cat([means, log_variance], dim=-1).transpose(0, 1)

    def start_stage(self, name: str) -> None:
        """Enter "enhance" or "balance"."""
        self.balancing = name == "balance"

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection, router and MSD of each modality; stacks and generators are shared by all modalities."""
        unimodal = [self.projections, self.routers, self.shared, self.private, self.norms]
        return {
            name: [parameter for modules in unimodal for parameter in modules[name].parameters()]
            for name in MODALITIES
        }

    def _read(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, Tensor]:
        """Compute z_m, `(batch, hidden)` each: project, pass the expert stacks, average over time."""
        projected = {
            name: sequences[name].with_values(self.projections[name](sequences[name].values))
            for name in MODALITIES
        }
        if self.missing is not None:
            projected = {name: self.missing.stand_in(name, sequence) for name, sequence in projected.items()}
        if self.balancing:
            passed = self.stacks.every(projected)
            mixed = {name: self._route(name, projected[name].values, passed[name]) for name in MODALITIES}
        else:
            mixed = self.stacks.own(projected)
        return {name: masked_mean(projected[name].with_values(mixed[name])) for name in MODALITIES}

    def _route(self, name: str, projected: Tensor, passed: Tensor) -> Tensor:
        """Weighted sum over the stacks, `(stacks, batch, time, hidden)`; the weights are not normalised."""
        weights = self.routers[name](projected)  # (batch, time, stacks)
        own = torch.arange(len(MODALITIES), device=weights.device) == MODALITIES.index(name)
        return torch.einsum("sbth,bts->bth", passed, weights + own)

    def _disentangle(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """MSD: z_m^c and z_m^s, `(modalities, batch, hidden)` each, with one LayerNorm per modality."""
        shared, private = (_each(parts, states) for parts in (self.shared, self.private))
        return _each(self.norms, shared), _each(self.norms, private)

    def _rebuild(self, shared: Tensor, private: Tensor, present: Tensor) -> Tensor:
        """CCE: z~_m from shared and private parts, all `(modalities, batch, hidden)` (1.5)."""
        if self.missing is None:  # absent modalities have no token: their parts are zero
            shared, private = (parts * present.unsqueeze(-1) for parts in (shared, private))
        if self.cce == "shared":
            lent = [MODALITIES.index(LENDERS[name]) for name in MODALITIES]
            return self.generators(torch.cat([shared[lent], private], dim=-1))
        inputs = []
        for own in range(len(MODALITIES)):
            others = [other for other in range(len(MODALITIES)) if other != own]
            parts = [shared[own], *(shared[other] for other in others), *(private[other] for other in others)]
            inputs.append(torch.cat(parts, dim=-1))
        return _each(self.generators, inputs)

    def _fuse(self, states: Tensor) -> Tensor:
        """Fused state, `(modalities, ..., hidden)` to `(..., modalities * hidden)`."""
        joint = torch.cat(states.unbind(), dim=-1)
        return joint + self.fusion(joint)

    def _classify(self, fused: Tensor) -> Tensor:
        return self.gain() * self.classifier(fused)

    def _alone(self, predicted: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """sum_m l(s_m, y), plus the Gaussian likelihood that trains the log-variance if there is one."""
        predicted = in_fp32(predicted)
        losses = sample_losses(predicted[..., : self.num_labels], labels)
        for log_variance in predicted[..., self.num_labels :].unbind(-1):
            bounded = log_variance.clamp(*LOG_VARIANCE)
            losses = losses + 0.5 * (torch.exp(-bounded) * losses.detach() + bounded)  # (1.13)
        return mean_where(losses, present).sum()

    def _msd(self, shared: Tensor, private: Tensor, labels: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_MSD = L_inv + lambda_1 L_dis + lambda_2 L_uni (1.4)."""
        invariance = invariance_loss(in_fp32(shared), present, self.temperature())
        disentangled = disentanglement_loss(in_fp32(private), present)
        losses = sample_losses(_each(self.private_predictors, in_fp32(private)), labels)
        private_task = mean_where(losses, present).mean()  # (1.3)
        total = invariance + self.decorrelation * disentangled + self.private_task * private_task
        return {"msd": total, "msd/inv": invariance, "msd/dis": disentangled, "msd/uni": private_task}

    def _cce(
        self, states: Tensor, rebuilt: Tensor, filled: Tensor, labels: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """L_CCE: distance of each z~_m from z_m, and task loss of predictions from z~_m (1.6)."""
        states, rebuilt, filled = in_fp32(states), in_fp32(rebuilt), in_fp32(filled)
        distance = (rebuilt - states.detach()).square().mean(dim=-1)
        reconstruction = mean_where(distance, present).mean()
        if self.balancing:
            swapped = filled.expand(len(MODALITIES), *filled.shape).clone()  # (swapped, modalities, ...)
            swapped.diagonal(dim1=0, dim2=1).copy_(rebuilt.movedim(0, -1))
            predicted = self._classify(self._fuse(no_wider(swapped.transpose(0, 1), self.classifier)))
        else:
            predicted = _each(self.predictors, rebuilt)[..., : self.num_labels]
        task = mean_where(sample_losses(predicted, labels), present).mean()
        return {"cce": reconstruction + task, "cce/rec": reconstruction, "cce/task": task}

    def _emc(self, states: Tensor, labels: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_EMC = L_gap + delta sum_m G(m) (1.9); the predictors inside the energy are constants (E23)."""
        weights = in_fp32(torch.stack([self.predictors[name].weight.detach() for name in MODALITIES]))
        biases = in_fp32(torch.stack([self.predictors[name].bias.detach() for name in MODALITIES]))
        states = in_fp32(states)
        outputs = torch.baddbmm(biases.unsqueeze(1), states, weights.mT)
        energies, slopes = self.energy(states, outputs, weights, labels, present)
        energy = mean_where(energies, present)  # E(m), (modalities,)
        gap = energy_gap(energy, present.any(dim=1))
        steepness = mean_where(slopes.square().sum(dim=-1), present).sum()
        return {
            "emc": gap + self.energy_gradient * steepness,
            "emc/gap": gap,
            "emc/gradient": steepness,
            **{f"energy/{name}": value for name, value in zip(MODALITIES, energy, strict=True)},
        }

    def _imtd(self, logits: Tensor, teacher: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_IMTD: distance of the fused prediction from each teacher's, weighted by trust (1.14), (1.15)."""
        present = present.T  # (batch, modalities)
        teacher = in_fp32(teacher)
        means, log_variance = teacher[..., : self.num_labels], teacher[..., self.num_labels :]
        variance = teacher_variance(means, log_variance, present)
        trust = trust_weights(variance, present, self.trust_floor)
        distances = distillation_distances(in_fp32(logits), means, self.distillation_temperature)
        return {
            "imtd": (trust * distances).sum(dim=1).mean(),
            **{
                f"trust/{name}": value
                for name, value in zip(MODALITIES, mean_where(trust.T, present.T), strict=True)
            },
        }


def invariance_loss(shared: Tensor, present: Tensor, temperature: Tensor | float) -> Tensor:
    """L_inv (1.1): InfoNCE between a modality's shared part and the sample's other modalities.

    The anchor of a sample is the normalised mean over its *other* modalities. If the anchor contained the
    modality itself, the loss would be small without any alignment (E1).

    Args:
        shared: z_m^c, `(modalities, batch, hidden)`.
        present: `(modalities, batch)` bool; a pair (m, sample) counts if it has m and another modality.
        temperature: tau.
    """
    directions = F.normalize(shared, dim=-1) * present.unsqueeze(-1)
    anchors = F.normalize(directions.sum(dim=0) - directions, dim=-1)
    anchored = (present.sum(dim=0) - present.long()) > 0  # (modalities, batch): has another modality
    similarity = directions @ anchors.mT / temperature  # (modalities, batch, batch): by anchor
    similarity = similarity.masked_fill(~anchored.unsqueeze(1), torch.finfo(similarity.dtype).min)
    losses = -similarity.log_softmax(dim=-1).diagonal(dim1=1, dim2=2)
    return mean_where(losses.flatten(), (present & anchored).flatten())


def disentanglement_loss(private: Tensor, present: Tensor) -> Tensor:
    """L_dis (1.2): mean squared cosine between private parts of a sample, `(modalities, batch, hidden)`."""
    directions = F.normalize(private, dim=-1)
    losses = []
    for one, other in combinations(range(len(private)), 2):
        cosine = (directions[one] * directions[other]).sum(dim=-1)
        losses.append(mean_where(cosine.square(), present[one] & present[other]))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class EnergyFactors:
    """Energy of a modality on a sample, E_i(m) = alpha ||z||^2 / D + beta_e l + gamma_e u (1.7).

    Attributes:
        norm: alpha.
        loss: beta_e, weight of the supervised loss l of the modality's own prediction.
        uncertainty: gamma_e, weight of u: entropy in classification; variance in a probabilistic regression;
            else the squared distance from the mean over modalities.
    """

    norm: float = 1.0
    loss: float = 1.0
    uncertainty: float = 1.0

    def __call__(
        self, states: Tensor, outputs: Tensor, weights: Tensor, labels: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energies and their gradients by z in closed form (1.11); no second derivative is needed.

        Args:
            states: z_m, `(modalities, batch, hidden)`.
            outputs: Linear predictions from z_m, `(modalities, batch, outputs)`; the second output of a
                regression is the log-variance.
            weights: Weights of these linear maps, `(modalities, outputs, hidden)`.
            labels: `(batch,)`; floats mean regression.
            present: `(modalities, batch)` bool.

        Returns:
            Energies `(modalities, batch)` and gradients `(modalities, batch, hidden)`.
        """
        by_output, slope = (
            self._regression(outputs, labels, present)
            if labels.is_floating_point()
            else self._classification(outputs, labels)
        )
        energies = self.norm * states.square().mean(dim=-1) + by_output
        gradients = 2 * self.norm / states.shape[-1] * states + slope @ weights
        return energies, gradients

    def _regression(self, outputs: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        mean, *log_variance = outputs.unbind(-1)
        error = mean - labels
        if log_variance:
            bounded = log_variance[0].clamp(*LOG_VARIANCE)
            uncertainty = bounded.exp()
            inside = bounded == log_variance[0]  # beyond the bounds the gradient is 0
            slope = torch.stack([self.loss * 2 * error, self.uncertainty * uncertainty * inside], dim=-1)
        else:
            distance = mean - mean_where(mean.detach().T, present.T)
            uncertainty = distance.square()
            slope = (2 * self.loss * error + 2 * self.uncertainty * distance).unsqueeze(-1)
        return self.loss * error.square() + self.uncertainty * uncertainty, slope

    def _classification(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p = outputs.log_softmax(dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(dim=-1)
        truth = F.one_hot(labels, outputs.shape[-1])
        slope = self.loss * (p - truth) - self.uncertainty * p * (log_p + entropy.unsqueeze(-1))
        return self.loss * sample_losses(outputs, labels) + self.uncertainty * entropy, slope


def energy_gap(energy: Tensor, available: Tensor) -> Tensor:
    """L_gap (1.8): sum of the squared differences of the energies `(modalities,)` over `available` pairs."""
    differences = energy.unsqueeze(0) - energy.unsqueeze(1)
    pairs = available.unsqueeze(0) & available.unsqueeze(1)
    return (differences.square() * pairs).sum() / 2  # each pair occurs twice


def teacher_variance(means: Tensor, log_variance: Tensor, present: Tensor) -> Tensor:
    """Variance of each teacher's prediction, `(batch, modalities, classes or 1)` (1.13).

    Args:
        means: Logits, or the predicted score, `(batch, modalities, outputs)`.
        log_variance: `(batch, modalities, 1)`; or `(batch, modalities, 0)` for the squared distance from the
            mean over modalities.
        present: `(batch, modalities)` bool.
    """
    if means.shape[-1] > 1:
        p = means.softmax(dim=-1)
        return p * (1 - p)
    if log_variance.shape[-1]:
        return log_variance.clamp(*LOG_VARIANCE).exp()
    score = means.squeeze(-1)
    return (score - mean_where(score, present).unsqueeze(-1)).square().unsqueeze(-1)


def trust_weights(variance: Tensor, present: Tensor, floor: float) -> Tensor:
    """alpha_m^i (1.12): trust in each teacher on each sample, `(batch, modalities)`.

    Sums to 1 over the modalities present; absent ones get 0. Computed in log space, because exp(-sigma)
    underflows.

    Args:
        variance: `(batch, modalities, outputs)`, not negative.
        present: `(batch, modalities)` bool.
        floor: kappa, above 0; keeps the trust finite at zero variance.
    """
    deviation = variance.mean(dim=-1).sqrt()
    score = -deviation - torch.log(torch.log1p(variance.sum(dim=-1)) + floor)
    score = score.masked_fill(~present, torch.finfo(score.dtype).min)
    return score.softmax(dim=-1) * present


def distillation_distances(logits: Tensor, means: Tensor, temperature: float) -> Tensor:
    """Distance of the fused prediction from each teacher's, `(batch, modalities)` (1.14), (1.15).

    KL(student || teacher) at a temperature in classification, squared difference in regression.

    Args:
        logits: `(batch, outputs)`.
        means: `(batch, modalities, outputs)`.
        temperature: tau, used in classification only.
    """
    student = logits.unsqueeze(1)
    if means.shape[-1] == 1:
        return (student - means).square().squeeze(-1)
    student, taught = (values.div(temperature).log_softmax(dim=-1) for values in (student, means))
    return (student.exp() * (student - taught)).sum(dim=-1)


def _each(modules: nn.ModuleDict, values: Iterable[Tensor]) -> Tensor:
    """Apply each modality's module to its values and stack: `(modalities, batch, width)`."""
    pairs = zip(MODALITIES, values, strict=True)
    return torch.stack([modules[name](no_wider(value, modules[name])) for name, value in pairs])
