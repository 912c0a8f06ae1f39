# SPDX-License-Identifier: Apache-2.0
"""EBMC: first strengthen every modality, then keep any of them from dominating (CVPR 2026).

"Enhance-then-Balance Modality Collaboration for Robust Multimodal Sentiment Analysis", arXiv 2604.12518.
Numbers of equations like (1.7) and of choices like E7 are those of docs/methods/ebmc.md.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
LEAST_NORM = 1e-8  # keeps divisions finite where nothing varies
LENDERS = {"text": "audio", "audio": "text", "vision": "text"}
"""Modality whose shared part `cce: shared` reads to rebuild each modality."""

ENHANCED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fill": lambda states, rebuilt, there: torch.where(there, states, rebuilt),
    "replace": lambda states, rebuilt, there: rebuilt,
    "residual": lambda states, rebuilt, there: rebuilt + states * there,
    "off": lambda states, rebuilt, there: states,
}
"""What enters the fusion, by the setting `enhanced` (E7): of z_m, z~_m and, `(modalities, batch, 1)`, where m
is present."""

READINGS = {
    "private_independent": "L_dis is the dependence of private parts over the batch, not a cosine (1.17)",
    "msd_annealed": "the weight of MSD falls linearly to zero over stage balance",
    "energy_fixed_norm": "no gradient of EMC along z_m, so that it cannot act by the size of the states",
    "energy_constant_uncertainty": "no gradient of EMC through u_m",
    "gap_one_sided": "the gap pulls the higher energy of a pair down and leaves the lower one",
    "trust_against_fused": "the fused prediction competes for the trust with its own squared error (1.18)",
    "distil_where_better": "a teacher counts only on samples where its error is below the fused one",
}
"""Other readings of the paper than ours, by their name in the setting `readings`; any may be combined."""


class EBMCHead(BalancingHead):
    """Trains every modality alone in stage "enhance", then fuses and balances them in stage "balance".

                        ┌ shared z^c ┐                          task (fused)
        X_m ─ f_m ─ stacks ─ z_m ─ MSD        CCE ─ z~_m ─ fusion ─ s
                        │   └ private z^s ┘                  │
                        └ s_m, E(m): EMC           IMTD: frozen T_m(z^s), weighted by trust

    In "enhance" each modality passes its own expert stack. MSD splits z_m into a shared and a private part,
    CCE rebuilds z_m from the other modalities. In "balance" each modality passes all stacks and the states
    are fused. EMC equalises the energies E(m). IMTD distils the unimodal predictions of the best "enhance"
    model into the fused prediction, weighted by their certainty. How the rebuilt z~_m enters the fusion is
    the setting `enhanced`.

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
        enhanced: How z~_m enters the fusion (E7). "fill", the default: in place of an absent z_m. "replace":
            in place of every z_m. "residual": added to z_m. "off": not at all; an absent modality is its
            token, or zero.
        cce_in_fusion: Earlier name of `enhanced`, still read.
        teacher: "private": T_m predicts from the private part, as in the paper. "state": it is the predictor
            on z_m, as in the published code (E11).
        readings: Names in `READINGS`: other readings of the paper, each switched on by itself.
        learned_scalars: Learn the temperature of the alignment and a gain of the fused logits.
        missing_tokens: Represent an absent modality by one learned step, not by an empty sequence (E22).
        temperature: tau of (1.1), or its initial value.
        decorrelation: lambda_1 of (1.4).
        private_task: lambda_2 of (1.4).
        energy_norm: alpha of the energy (1.7).
        energy_loss: beta_e of the energy (1.7).
        energy_uncertainty: gamma_e of the energy (1.7).
        energy_gradient: delta, weight of the energies' gradient norms (1.9).
        energy_step: Size lambda of an explicit step of the states down their energies before the fusion
            (1.19); 0 is none.
        trust_floor: kappa of the trust weights (1.12).
        distillation_temperature: tau of the distillation in classification (1.14).

    Raises:
        ValueError: A setting is not among its choices or out of range, `enhanced` and `cce_in_fusion`
            contradict each other, or `heads` does not divide `hidden_size`.
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
        enhanced: str | None = None,
        cce_in_fusion: str | None = None,
        teacher: str = "private",
        readings: Sequence[str] = (),
        learned_scalars: bool = False,
        missing_tokens: bool = False,
        temperature: float = 0.05,
        decorrelation: float = 0.1,
        private_task: float = 0.1,
        energy_norm: float = 1.0,
        energy_loss: float = 1.0,
        energy_uncertainty: float = 1.0,
        energy_gradient: float = 0.01,
        energy_step: float = 0.0,
        trust_floor: float = 0.1,
        distillation_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("cce", cce, ("paper", "shared"))
        check_choice("uncertainty", uncertainty, ("probabilistic", "disagreement"))
        if enhanced is not None and cce_in_fusion not in (None, enhanced):
            raise ValueError(
                f"cce_in_fusion={cce_in_fusion} is an earlier name of enhanced={enhanced}: give one"
            )
        self.named_enhanced = enhanced or cce_in_fusion
        self.enhanced = self.named_enhanced or "fill"
        check_choice("enhanced", self.enhanced, tuple(ENHANCED))
        check_choice("teacher", teacher, ("private", "state"))
        for name in readings:
            check_choice("readings", name, tuple(READINGS))
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        if energy_step < 0:
            raise ValueError(f"energy_step={energy_step} must be at least 0")
        self.num_labels = num_labels
        self.cce, self.teacher, self.readings = cce, teacher, frozenset(readings)
        self.decorrelation, self.private_task = decorrelation, private_task
        self.energy = EnergyFactors(
            energy_norm, energy_loss, energy_uncertainty, "energy_constant_uncertainty" in readings
        )
        self.energy_gradient, self.energy_step = energy_gradient, energy_step
        self.trust_floor = trust_floor
        self.distillation_temperature = distillation_temperature
        self.balancing = True
        self.elapsed = 0.0  # share of the stage's epochs

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
        predicted = _each(self.predictors, states)  # (modalities, batch, outputs [+ 1])
        shared, private = self._disentangle(states)
        known = self._known(shared, present), self._known(private, present)
        rebuilt = self._rebuild(*known, *known)  # z~_m
        entering = ENHANCED[self.enhanced](self._descend(states, present), rebuilt, present.unsqueeze(-1))
        fused = self._fuse(entering)  # (batch, 3 * hidden)
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
        output.diagnostics = self._reconstruction(states, known, present)
        with without_autocast(present.device):  # all losses in fp32
            alone = self._alone(predicted, labels, present)
            msd = self._msd(shared, private, labels, present)
            cce = self._cce(states, rebuilt, entering, labels, present)
            if self.balancing:
                terms = {"task": task_loss(logits, labels), "unimodal": alone}
                terms |= {**msd, **cce, **self._emc(states, labels, present)}
                terms |= {} if teacher is None else self._imtd(logits, teacher, labels, present)
            else:
                terms = {"task": alone, **msd, **cce}
        output.losses = {name: term for name, term in terms.items() if name in self.loss_names}
        output.diagnostics |= {name: term.detach() for name, term in terms.items() if "/" in name}
        return output

    def teach(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Predict with the teacher of each modality, `(batch, modalities, outputs)`.

        A probabilistic regression appends the log-variance predicted from z_m.
        """
        states = torch.stack(list(self._read(sequences).values()))
        predicted = _each(self.predictors, states)
        if self.teacher == "private":
            _, private = self._disentangle(states)
            means = _each(self.private_predictors, private)  # T_m
            predicted = torch.cat([means, predicted[..., self.num_labels :]], dim=-1)
        return predicted.transpose(0, 1)

    def start_stage(self, name: str) -> None:
        """Enter "enhance" or "balance"."""
        self.balancing, self.elapsed = name == "balance", 0.0

    def start_epoch(self, elapsed: float) -> None:
        """Begin an epoch; the reading `msd_annealed` needs to know the share of the stage, in [0, 1)."""
        self.elapsed = elapsed

    def weights_problem(self, weights: Mapping[str, float]) -> str | None:
        """Refuse weights of 0 that would leave a part untrained, or trained by another loss, unnoticed."""
        if weights.get("cce") == 0 and self.named_enhanced is None:
            return (
                "cce: 0 leaves the generators to the task loss: set model.head_kwargs.enhanced to off, which "
                "takes them out of the fusion, or to fill, which keeps them"
            )
        if weights.get("msd") == 0 and weights.get("imtd") != 0 and self.teacher == "private":
            return (
                "msd: 0 leaves the private predictors untrained, from which imtd distils: set imtd: 0 too, "
                "or model.head_kwargs.teacher=state"
            )
        return None

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

    def _known(self, parts: Tensor, present: Tensor) -> Tensor:
        """Parts as generators read them: those of an absent modality come from its token, or are zero."""
        return parts * present.unsqueeze(-1) if self.missing is None else parts

    def _rebuild(self, shared: Tensor, private: Tensor, own_shared: Tensor, own_private: Tensor) -> Tensor:
        """CCE: z~_m from parts of the others and its own, all `(modalities, batch, hidden)` (1.5)."""
        if self.cce == "shared":
            lent = [MODALITIES.index(LENDERS[name]) for name in MODALITIES]
            return self.generators(torch.cat([shared[lent], own_private], dim=-1))
        inputs = []
        for own in range(len(MODALITIES)):
            others = [other for other in range(len(MODALITIES)) if other != own]
            lent = [part[other] for part in (shared, private) for other in others]
            inputs.append(torch.cat([own_shared[own], *lent], dim=-1))
        return _each(self.generators, inputs)

    def _descend(self, states: Tensor, present: Tensor) -> Tensor:
        """z_m after one step of `energy_step` down its energy, `(modalities, batch, hidden)` (1.19).

        The loss is left out of the energy: a prediction has no label.
        """
        if self.energy_step == 0:
            return states
        labels = torch.zeros(states.shape[1], device=states.device)
        labels = labels if self.num_labels == 1 else labels.long()
        with without_autocast(states.device):
            _, slopes = self._energies(
                states, labels, present, replace(self.energy, loss=0.0, constant_uncertainty=False)
            )
        return states - (self.energy_step * slopes * present.unsqueeze(-1)).to(states.dtype)

    def _energies(
        self, states: Tensor, labels: Tensor, present: Tensor, factors: "EnergyFactors"
    ) -> tuple[Tensor, Tensor]:
        """E_i(m) and its gradient by z_m; the predictors inside the energy are constants (E23)."""
        weights = in_fp32(torch.stack([self.predictors[name].weight.detach() for name in MODALITIES]))
        biases = in_fp32(torch.stack([self.predictors[name].bias.detach() for name in MODALITIES]))
        states = in_fp32(states)
        outputs = torch.baddbmm(biases.unsqueeze(1), states, weights.mT)
        return factors(states, outputs, weights, labels, present)

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
        apart = dependence_loss if "private_independent" in self.readings else disentanglement_loss
        disentangled = apart(in_fp32(private), present)
        losses = sample_losses(_each(self.private_predictors, in_fp32(private)), labels)
        private_task = mean_where(losses, present).mean()  # (1.3)
        total = invariance + self.decorrelation * disentangled + self.private_task * private_task
        if "msd_annealed" in self.readings and self.balancing:
            total = (1 - self.elapsed) * total
        return {"msd": total, "msd/inv": invariance, "msd/dis": disentangled, "msd/uni": private_task}

    def _cce(
        self, states: Tensor, rebuilt: Tensor, entering: Tensor, labels: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """L_CCE: distance of each z~_m from z_m, and task loss of predictions from z~_m (1.6)."""
        states, rebuilt, entering = in_fp32(states), in_fp32(rebuilt), in_fp32(entering)
        distance = (rebuilt - states.detach()).square().mean(dim=-1)
        reconstruction = mean_where(distance, present).mean()
        if self.balancing:
            swapped = entering.expand(len(MODALITIES), *entering.shape).clone()  # (swapped, modalities, ...)
            swapped.diagonal(dim1=0, dim2=1).copy_(rebuilt.movedim(0, -1))
            predicted = self._classify(self._fuse(no_wider(swapped.transpose(0, 1), self.classifier)))
        else:
            predicted = _each(self.predictors, rebuilt)[..., : self.num_labels]
        task = mean_where(sample_losses(predicted, labels), present).mean()
        return {"cce": reconstruction + task, "cce/rec": reconstruction, "cce/task": task}

    @torch.no_grad()
    def _reconstruction(
        self, states: Tensor, known: tuple[Tensor, Tensor], present: Tensor
    ) -> dict[str, Tensor]:
        """Share of the variance of z_m that z~_m explains if m is hidden, R2, for the log.

        Own parts of a hidden modality are those of the samples without it: zero, or what its token gives.
        """
        own = (_mean_over_samples(parts, ~present).expand_as(parts) for parts in known)
        explained = explained_variance(in_fp32(self._rebuild(*known, *own)), in_fp32(states), present)
        return {f"r2/{name}": value for name, value in zip(MODALITIES, explained, strict=True)}

    def _emc(self, states: Tensor, labels: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_EMC = L_gap + delta sum_m G(m) (1.9)."""
        states = in_fp32(states)
        if "energy_fixed_norm" in self.readings:
            size = states.norm(dim=-1, keepdim=True).clamp(min=LEAST_NORM)
            states = states * (size.detach() / size)
        energies, slopes = self._energies(states, labels, present, self.energy)
        energy = mean_where(energies, present)  # E(m), (modalities,)
        gap = energy_gap(energy, present.any(dim=1), one_sided="gap_one_sided" in self.readings)
        steepness = mean_where(slopes.square().sum(dim=-1), present).sum()
        return {
            "emc": gap + self.energy_gradient * steepness,
            "emc/gap": gap,
            "emc/gradient": steepness,
            **{f"energy/{name}": value for name, value in zip(MODALITIES, energy, strict=True)},
        }

    def _imtd(self, logits: Tensor, teacher: Tensor, labels: Tensor, present: Tensor) -> dict[str, Tensor]:
        """L_IMTD: distance of the fused prediction from each teacher's, weighted by trust (1.14), (1.15)."""
        logits, present = in_fp32(logits), present.T  # (batch, modalities)
        teacher = in_fp32(teacher)
        means, log_variance = teacher[..., : self.num_labels], teacher[..., self.num_labels :]
        variance = teacher_variance(means, log_variance, present)
        if "trust_against_fused" in self.readings:
            own = squared_errors(logits.detach(), labels).unsqueeze(1)
            rivals = torch.cat([variance, own], dim=1), F.pad(present, (0, 1), value=True)
            trust = trust_weights(*rivals, self.trust_floor)[:, :-1]
        else:
            trust = trust_weights(variance, present, self.trust_floor)
        if "distil_where_better" in self.readings:
            taught = sample_losses(means.transpose(0, 1), labels)  # (modalities, batch)
            trust = trust * (taught < sample_losses(logits.detach(), labels)).T
        distances = distillation_distances(logits, means, self.distillation_temperature)
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


def dependence_loss(private: Tensor, present: Tensor) -> Tensor:
    """L_dis in the reading `private_independent` (1.17): dependence of private parts over the batch.

    A cosine compares the coordinates of two parts, which have nothing in common, so that it is small from the
    start. This is the centred kernel alignment of linear kernels, from unbiased estimates: near 0 for
    independent parts, 1 for parts that say the same in any coordinates. Negative estimates count as 0.

    Args:
        private: z_m^s, `(modalities, batch, hidden)`.
        present: `(modalities, batch)` bool; a pair of modalities needs four samples that have both.
    """
    centred = (private - _mean_over_samples(private, present)) * present.unsqueeze(-1)
    size = mean_where(centred.square().sum(dim=-1), present).clamp(min=LEAST_NORM)
    similar = centred @ centred.mT / size[:, None, None]  # (modalities, batch, batch)
    losses = []
    for one, other in combinations(range(len(private)), 2):
        both = present[one] & present[other]
        count = both.sum().clamp(min=4)
        pairs = (both.unsqueeze(0) & both.unsqueeze(1)).fill_diagonal_(False)
        first, second = similar[one] * pairs, similar[other] * pairs
        sizes = _unbiased(first, first, count) * _unbiased(second, second, count)
        shared = _unbiased(first, second, count).clamp(min=0)
        losses.append((both.sum() >= 4) * shared / sizes.clamp(min=LEAST_NORM).sqrt())
    return torch.stack(losses).mean()


def _unbiased(first: Tensor, second: Tensor, count: Tensor) -> Tensor:
    """Unbiased Hilbert-Schmidt criterion of two kernels `(batch, batch)` with zero diagonals."""
    product = (first * second).sum()
    apart = first.sum() * second.sum() / ((count - 1) * (count - 2))
    crossed = 2 * (first.sum(dim=0) @ second.sum(dim=1)) / (count - 2)
    return (product + apart - crossed) / (count * (count - 3))


def explained_variance(rebuilt: Tensor, states: Tensor, present: Tensor) -> Tensor:
    """R2 of `rebuilt` as an estimate of `states`, both `(modalities, batch, hidden)`: `(modalities,)`.

    1 is exact, 0 is as good as the mean over the samples that have the modality; 0 where nothing varies.
    """
    missed, variance = (
        mean_where((states - estimate).square().sum(dim=-1), present)
        for estimate in (rebuilt, _mean_over_samples(states, present))
    )
    return torch.where(variance > LEAST_NORM, 1 - missed / variance.clamp(min=LEAST_NORM), 0.0)


def _mean_over_samples(states: Tensor, present: Tensor) -> Tensor:
    """Mean of `(modalities, batch, hidden)` over the samples that have each modality, with one sample."""
    return mean_where(states.movedim(-1, 1), present.unsqueeze(1)).unsqueeze(1)


@dataclass(frozen=True)
class EnergyFactors:
    """Energy of a modality on a sample, E_i(m) = alpha ||z||^2 / D + beta_e l + gamma_e u (1.7).

    Attributes:
        norm: alpha.
        loss: beta_e, weight of the supervised loss l of the modality's own prediction.
        uncertainty: gamma_e, weight of u: entropy in classification; variance in a probabilistic regression;
            else the squared distance from the mean over modalities.
        constant_uncertainty: No gradient goes through u.
    """

    norm: float = 1.0
    loss: float = 1.0
    uncertainty: float = 1.0
    constant_uncertainty: bool = False

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
        loss, uncertainty, by_loss, by_uncertainty = (
            self._regression(outputs, labels, present)
            if labels.is_floating_point()
            else self._classification(outputs, labels)
        )
        if self.constant_uncertainty:
            uncertainty, by_uncertainty = uncertainty.detach(), torch.zeros_like(by_uncertainty)
        norm = states.square().mean(dim=-1)
        energies = self.norm * norm + self.loss * loss + self.uncertainty * uncertainty
        slope = self.loss * by_loss + self.uncertainty * by_uncertainty
        gradients = 2 * self.norm / states.shape[-1] * states + slope @ weights
        return energies, gradients

    @staticmethod
    def _regression(outputs: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        """Loss, uncertainty, and the slope of each by the outputs."""
        mean, *log_variance = outputs.unbind(-1)
        error = mean - labels
        if log_variance:
            bounded = log_variance[0].clamp(*LOG_VARIANCE)
            uncertainty = bounded.exp()
            inside = bounded == log_variance[0]  # beyond the bounds the gradient is 0
            none = torch.zeros_like(mean)
            by_loss = torch.stack([2 * error, none], dim=-1)
            by_uncertainty = torch.stack([none, uncertainty * inside], dim=-1)
        else:
            distance = mean - mean_where(mean.detach().T, present.T)
            uncertainty = distance.square()
            by_loss, by_uncertainty = (2 * error).unsqueeze(-1), (2 * distance).unsqueeze(-1)
        return error.square(), uncertainty, by_loss, by_uncertainty

    @staticmethod
    def _classification(outputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Loss, uncertainty, and the slope of each by the outputs."""
        log_p = outputs.log_softmax(dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(dim=-1)
        by_loss = p - F.one_hot(labels, outputs.shape[-1])
        by_uncertainty = -p * (log_p + entropy.unsqueeze(-1))
        return sample_losses(outputs, labels), entropy, by_loss, by_uncertainty


def energy_gap(energy: Tensor, available: Tensor, one_sided: bool = False) -> Tensor:
    """L_gap (1.8): sum of the squared differences of the energies `(modalities,)` over `available` pairs.

    With `one_sided` the value is the same, but the lower energy of each pair is a constant.
    """
    others = energy.detach() if one_sided else energy
    differences = energy.unsqueeze(0) - others.unsqueeze(1)
    pairs = available.unsqueeze(0) & available.unsqueeze(1)
    if one_sided:
        return (differences.clamp(min=0).square() * pairs).sum()
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


def squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each output, `(batch, outputs)`: of the score, or of the probability of each class."""
    if logits.shape[-1] == 1:
        return (logits - labels.to(logits).unsqueeze(-1)).square()
    return (logits.softmax(dim=-1) - F.one_hot(labels, logits.shape[-1])).square()


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
