# SPDX-License-Identifier: Apache-2.0
"""EBMC: first make every modality strong, then keep any of them from dominating (CVPR 2026).

"Enhance-then-Balance Modality Collaboration for Robust Multimodal Sentiment Analysis", arXiv 2604.12518.
Equation numbers are those of METHODS 1.3.
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

LOG_VARIANCE = (-6.0, 3.0)  # bounds of a predicted log-variance: its likelihood has none below
LENDERS = {"text": "audio", "audio": "text", "vision": "text"}  # whose shared part `cce: shared` reads


class EBMCHead(BalancingHead):
    """Enhance, then balance.

                        ┌ shared z^c ┐                          task (fused)
        X_m ─ f_m ─ stacks ─ z_m ─ MSD        CCE ─ z~_m ─ fusion ─ s
                        │   └ private z^s ┘                  │
                        └ s_m, E(m): EMC           IMTD: frozen T_m(z^s), weighted by trust

    Stage "enhance" passes each modality through its own expert stack and trains it alone: MSD splits z_m into
    shared and private parts, CCE rebuilds it from the others. Stage "balance" passes every modality through
    all stacks, fuses, equalises the energies E(m), and distils into the fused prediction what the best model
    of the first stage says of each modality, weighted by how sure it is. The rebuilt z~_m takes the place of
    an absent z_m.

        enhance   L = sum_m l(s_m, y)                 + zeta MSD + beta CCE
        balance   L = l(s, y) + 0.1 sum_m l(s_m, y)   + zeta MSD + beta CCE + gamma EMC + eta IMTD   (1.16)

    Losses: `task` (first term), `unimodal` (second, in "balance"), `msd`, `cce`, `emc`, `imtd`. The published
    outer weights are zeta = 0.5, beta = gamma = eta = 0.1.

    Deviations: what the paper leaves open is settled by METHODS 1.4 and 11. Beyond that,
    the router adds to a modality's own stack (in other words, its bias for it starts at 1), so that "balance"
    starts where "enhance" ended; in "enhance" the task term of CCE asks the modality's own predictor, because
    no fused one is trained yet; the log-variance is read from z_m alone, for the energy and for trust, and is
    trained on the error of the detached mean; `uncertainty: disagreement` measures u_m and the teacher's
    variance by the squared distance from the mean over modalities. Classification needs no second output:
    it takes entropy and class variance in either setting.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width D of everything inside.
        depth: Layers of an expert stack.
        heads: Attention heads of a layer.
        dropout: Share dropped in the perceptrons of stacks and fusion.
        cce: "paper": a generator for each modality, reading all shared and the others' private parts.
            "shared": one small generator for all, reading one lent shared and the own private part; this
            structure gives the published parameter counts.
        uncertainty: "probabilistic": regression predictors have a second output, the log-variance.
            "disagreement": they have none.
        cce_in_fusion: "fill" puts z~_m where m is absent; "off" leaves it to the token, or to zero.
        learned_scalars: Learn the temperature of the alignment and a gain of the fused logits.
        missing_tokens: An absent modality is a learned step and not an empty sequence.
        temperature: Of the alignment, where it starts (1.1).
        decorrelation: Factor lambda_1 of (1.4).
        private_task: Factor lambda_2 of (1.4).
        energy_norm: Factor alpha of the energy (1.7).
        energy_loss: Factor beta_e of the energy.
        energy_uncertainty: Factor gamma_e of the energy.
        energy_gradient: Factor delta of the energies' gradient norms (1.9).
        trust_floor: kappa of the trust weights (1.12).
        distillation_temperature: tau of the distillation of classes (1.14).

    Raises:
        ValueError: A switch has no such setting, or `heads` does not divide `hidden_size`.
    """

    stages = ("enhance", "balance")
    teachers = {"balance": "enhance"}
    loss_names = ("task", "unimodal", "msd", "cce", "emc", "imtd")

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
            raise ValueError(f"depth={depth}: at least 1")
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
            teacher: `(batch, modalities, outputs)` as `teach` gave it; without it nothing is distilled.
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
        with without_autocast(present.device):  # METHODS 1.5
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
        """T_m on the private part of each modality, `(batch, modalities, outputs)`.

        A probabilistic regression adds the log-variance that the predictor on z_m gives.
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
        """Projection, router and MSD of each modality; stacks and generators read the others as well."""
        of_each = [self.projections, self.routers, self.shared, self.private, self.norms]
        return {
            name: [parameter for modules in of_each for parameter in modules[name].parameters()]
            for name in MODALITIES
        }

    def _read(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, Tensor]:
        """Project, pass the expert stacks, average over time: z_m, `(batch, hidden)` each."""
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
        """Soft mixture of the stacks, `(stacks, batch, time, hidden)`; the weights are not normalised."""
        weights = self.routers[name](projected)  # (batch, time, stacks)
        own = torch.arange(len(MODALITIES), device=weights.device) == MODALITIES.index(name)
        return torch.einsum("sbth,bts->bth", passed, weights + own)

    def _disentangle(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """MSD: z_m^c and z_m^s, `(modalities, batch, hidden)` each, under one LayerNorm a modality."""
        shared, private = (_each(parts, states) for parts in (self.shared, self.private))
        return _each(self.norms, shared), _each(self.norms, private)

    def _rebuild(self, shared: Tensor, private: Tensor, present: Tensor) -> Tensor:
        """CCE, Eq. 1.5: z~_m from what is known of the modalities, `(modalities, batch, hidden)`."""
        if self.missing is None:  # nothing stands in for an absent modality
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
        """State of the fused prediction, `(modalities, ..., hidden)` to `(..., modalities * hidden)`."""
        joint = torch.cat(states.unbind(), dim=-1)
        return joint + self.fusion(joint)

    def _classify(self, fused: Tensor) -> Tensor:
        return self.gain() * self.classifier(fused)

    def _alone(self, predicted: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """sum_m l(s_m, y), and the Gaussian likelihood that trains the log-variance where there is one."""
        predicted = in_fp32(predicted)
        losses = sample_losses(predicted[..., : self.num_labels], labels)
        for log_variance in predicted[..., self.num_labels :].unbind(-1):
            bounded = log_variance.clamp(*LOG_VARIANCE)
            losses = losses + 0.5 * (torch.exp(-bounded) * losses.detach() + bounded)  # Eq. 1.13
        return mean_where(losses, present).sum()

    def _msd(self, shared: Tensor, private: Tensor, labels: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_MSD = L_inv + lambda_1 L_dis + lambda_2 L_uni (1.4)."""
        invariance = invariance_loss(in_fp32(shared), present, self.temperature())
        disentangled = disentanglement_loss(in_fp32(private), present)
        told = sample_losses(_each(self.private_predictors, in_fp32(private)), labels)
        private_task = mean_where(told, present).mean()  # Eq. 1.3
        total = invariance + self.decorrelation * disentangled + self.private_task * private_task
        return {"msd": total, "msd/inv": invariance, "msd/dis": disentangled, "msd/uni": private_task}

    def _cce(
        self, states: Tensor, rebuilt: Tensor, filled: Tensor, labels: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """L_CCE: each z~_m near z_m, and as good to predict from (1.6)."""
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
        """L_EMC = L_gap + delta sum_m G(m) (1.9), the predictors inside the energy held fixed."""
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
        """L_IMTD: the fused prediction drawn to each teacher as far as that is to be trusted (1.14, 1.15)."""
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
    """L_inv (1.1): the shared part of a sample's modality finds its other modalities among all samples.

    The anchor of a sample is the normalised mean over its *other* modalities: with its own among them the
    anchor is found without any alignment.

    Args:
        shared: z_m^c, `(modalities, batch, hidden)`.
        present: `(modalities, batch)` bool; a sample counts where it has m and another modality.
        temperature: tau.
    """
    directions = F.normalize(shared, dim=-1) * present.unsqueeze(-1)
    anchors = F.normalize(directions.sum(dim=0) - directions, dim=-1)
    anchored = (present.sum(dim=0) - present.long()) > 0  # (modalities, batch): has another modality
    similarity = directions @ anchors.mT / temperature  # (modalities, batch, anchors of the batch)
    similarity = similarity.masked_fill(~anchored.unsqueeze(1), torch.finfo(similarity.dtype).min)
    losses = -similarity.log_softmax(dim=-1).diagonal(dim1=1, dim2=2)
    return mean_where(losses.flatten(), (present & anchored).flatten())


def disentanglement_loss(private: Tensor, present: Tensor) -> Tensor:
    """L_dis (1.2): mean squared cosine between a sample's private parts, `(modalities, batch, hidden)`."""
    directions = F.normalize(private, dim=-1)
    losses = []
    for one, other in combinations(range(len(private)), 2):
        cosine = (directions[one] * directions[other]).sum(dim=-1)
        losses.append(mean_where(cosine.square(), present[one] & present[other]))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class EnergyFactors:
    """The energy of a modality on a sample, E_i(m) = alpha ||z||^2 / D + beta_e l + gamma_e u (1.7).

    Attributes:
        norm: alpha.
        loss: beta_e, of the supervised loss l of the modality's own prediction.
        uncertainty: gamma_e, of u: the entropy of a classification; the variance of a probabilistic
            regression; else the squared distance from the mean over modalities.
    """

    norm: float = 1.0
    loss: float = 1.0
    uncertainty: float = 1.0

    def __call__(
        self, states: Tensor, outputs: Tensor, weights: Tensor, labels: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energies and their gradients by z in closed form (1.11), so that nothing is differentiated twice.

        Args:
            states: z_m, `(modalities, batch, hidden)`.
            outputs: Linear predictions from it, `(modalities, batch, outputs)`; the second output of a
                regression is its log-variance.
            weights: Of that linear map, `(modalities, outputs, hidden)`.
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
            inside = bounded == log_variance[0]  # beyond the bounds it does not move
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
    """L_gap (1.8): squared differences of the energies `(modalities,)`, over pairs that are `available`."""
    differences = energy.unsqueeze(0) - energy.unsqueeze(1)
    pairs = available.unsqueeze(0) & available.unsqueeze(1)
    return (differences.square() * pairs).sum() / 2  # each pair stands there twice


def teacher_variance(means: Tensor, log_variance: Tensor, present: Tensor) -> Tensor:
    """Variance of what each teacher says, `(batch, modalities, classes or 1)` (1.13).

    Args:
        means: Logits, or the predicted score, `(batch, modalities, outputs)`.
        log_variance: `(batch, modalities, 1)`; `(batch, modalities, 0)` where a regression is judged by its
            squared distance from the mean over modalities.
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
    """alpha_m^i (1.12): how far each teacher is to be trusted with each sample, `(batch, modalities)`.

    In log space, because exp(-sigma) underflows; sums to 1 over the modalities present, absent ones get 0.

    Args:
        variance: `(batch, modalities, outputs)`, not negative.
        present: `(batch, modalities)` bool.
        floor: kappa, above 0: keeps the trust in a teacher without any variance finite.
    """
    deviation = variance.mean(dim=-1).sqrt()
    score = -deviation - torch.log(torch.log1p(variance.sum(dim=-1)) + floor)
    score = score.masked_fill(~present, torch.finfo(score.dtype).min)
    return score.softmax(dim=-1) * present


def distillation_distances(logits: Tensor, means: Tensor, temperature: float) -> Tensor:
    """How far the fused prediction is from each teacher's, `(batch, modalities)` (1.14, 1.15).

    KL(student || teacher) of classes under a temperature, the squared difference of scores.

    Args:
        logits: `(batch, outputs)`.
        means: `(batch, modalities, outputs)`.
        temperature: tau, of classes.
    """
    student = logits.unsqueeze(1)
    if means.shape[-1] == 1:
        return (student - means).square().squeeze(-1)
    student, taught = (values.div(temperature).log_softmax(dim=-1) for values in (student, means))
    return (student.exp() * (student - taught)).sum(dim=-1)


def _each(modules: nn.ModuleDict, values: Iterable[Tensor]) -> Tensor:
    """Each modality's own module on its own values, stacked: `(modalities, batch, width)`."""
    pairs = zip(MODALITIES, values, strict=True)
    return torch.stack([modules[name](no_wider(value, modules[name])) for name, value in pairs])
