# SPDX-License-Identifier: Apache-2.0
"""Self-MM: each modality learns from labels of its own, which the model generates (AAAI 2021).

"Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning for Multimodal Sentiment
Analysis", arXiv 2102.04830. Equation numbers are those of docs/methods/self_mm.md.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, sample_losses, task_loss
from msa_online.layers.modules import Dropout, Projection, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.layers.ranks import across_ranks_rows
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

TINY = 1e-6  # e of (9.5), and the least |a| of (9.6)


class SelfMMHead(BalancingHead):
    """Late fusion whose modalities learn from labels of their own, generated from distances between states.

        h_m = GELU(W_m LayerNorm(mean_t X_m))            (9.1); zero where m is absent
        z   = ReLU(W [h_text; h_audio; h_vision])        (9.2); s = V z, fused prediction
        z_m = ReLU(A_m h_m), s_m = U_m z_m               (9.3); prediction of m alone
        y_m = running mean of the labels generated for m (9.4) to (9.7)

    Losses, unweighted (9.8): `task` on s; `pseudo`, the sum over modalities of the loss of s_m against y_m,
    weighted by tanh |y_m - y|; `unimodal`, the sum over modalities of the task loss of s_m against the label
    y itself. The paper has no `unimodal`: give it the weight 0.

    Labels are generated for scores alone. With classes there is no `pseudo`, and a run has to set its weight
    to 0; the predictors then learn from `unimodal`. Outside a run, where `start_training` was not called,
    y_m is y and `pseudo` is 0.

    Deviations: the encoders' states are averaged over time, where the paper reads audio and vision with
    LSTMs, and pass a projection. A modality of a sample is counted and gets labels in the epochs that show
    it. Generated labels stay within the range of the training labels.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of h_m, z and z_m.
        dropout: Share of h_m and z dropped in training.
        regression_loss: "l1" or "mse".
        input_norm: Apply the LayerNorm of (9.1). False where the size of features carries the label.

    Raises:
        ValueError: `regression_loss` is neither.
    """

    loss_names = ("task", "unimodal", "pseudo")
    keeps_samples = True
    paper = (
        "Yu, Xu, Yuan, Wu: Learning Modality-Specific Representations with Self-Supervised Multi-Task "
        "Learning for Multimodal Sentiment Analysis, AAAI 2021, https://arxiv.org/abs/2102.04830"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 128,
        dropout: float = 0.2,
        regression_loss: str = "l1",
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        self.num_labels, self.hidden_size, self.regression_loss = num_labels, hidden_size, regression_loss
        self.projections = nn.ModuleDict(
            {
                name: Projection(widths[name], hidden_size, dropout, input_norm=input_norm)
                for name in MODALITIES
            }
        )
        self.fusion = nn.Sequential(nn.Linear(len(MODALITIES) * hidden_size, hidden_size), nn.ReLU())
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)
        self.specific = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU()) for name in MODALITIES}
        )  # A_m
        self.predictors = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in MODALITIES})

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
        index: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` and `index` `(batch,)` or None."""
        present = {name: sequences[name].present for name in MODALITIES}
        features = {
            name: self.projections[name](masked_mean(sequences[name])) * present[name].unsqueeze(-1)
            for name in MODALITIES
        }  # h_m, (batch, hidden)
        joint = self.fusion(torch.cat(list(features.values()), dim=-1))  # z, (batch, hidden)
        alone = {name: self.specific[name](state) for name, state in features.items()}  # z_m
        fused = self.dropout(joint)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.predictors[name](state) for name, state in alone.items()},
            features=features,
            fused=fused,
        )
        store = self.samples if self.training and index is not None else None
        if labels is not None:
            output.losses = {
                "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
            }
            if self.num_labels == 1:
                own = store.of(index) if store else labels.expand(len(MODALITIES), -1)
                with without_autocast(labels.device):
                    output.losses["pseudo"] = pseudo_loss(
                        output.modality_logits, own, labels, present, self.regression_loss
                    )
                shifts = mean_where((own - labels).abs(), torch.stack(list(present.values())))
                output.diagnostics = {
                    f"label_shift/{name}": shift for name, shift in zip(MODALITIES, shifts, strict=True)
                }
        if store:
            there = torch.stack(list(present.values()))
            seen = torch.cat([there, there.any(dim=0, keepdim=True)])
            store.collect(index, torch.stack([*alone.values(), joint]).detach(), seen)
        return output

    def weights_problem(self, weights: Mapping[str, float]) -> str | None:
        """Refuse to generate labels where they are classes."""
        if self.num_labels > 1 and weights.get("pseudo", 1.0):
            return (
                "self_mm generates labels for scores, but those of the data are classes: set "
                "model.loss_weights.pseudo=0 to train it on the classes alone, or choose another head"
            )
        return None

    def start_training(self, labels: Tensor) -> None:
        """Start from the labels `(samples,)` as those of each modality, if they are scores."""
        if self.num_labels == 1:
            self.samples = OwnLabels(labels, self.hidden_size)

    def end_step(self, taken: bool) -> None:
        """Generate labels for the samples of the step, and store their states."""
        if self.samples is not None:
            self.samples.end_step(taken)

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection of each modality."""
        return {name: list(self.projections[name].parameters()) for name in MODALITIES}


def pseudo_loss(
    logits: Mapping[str, Tensor],
    own: Tensor,
    labels: Tensor,
    present: Mapping[str, Tensor],
    regression_loss: str = "l1",
) -> Tensor:
    """Sum over modalities of the loss against their own labels, weighted by tanh |y_m - y| (9.8), a scalar.

    Args:
        logits: s_m `(batch, 1)` each.
        own: y_m `(modalities, batch)`.
        labels: y `(batch,)`.
        present: `(batch,)` bool each. A modality counts the samples that have it.
        regression_loss: "l1" or "mse".
    """
    terms = []
    for name, own_labels in zip(MODALITIES, own, strict=True):
        weights = torch.tanh((own_labels - labels).abs())
        losses = sample_losses(logits[name], own_labels, regression_loss)
        terms.append(mean_where(weights * losses, present[name]))
    return torch.stack(terms).sum()


class OwnLabels:
    """Labels of each modality and latest states of all training samples, in fp32 and equal on all ranks.

    The states are z_text, z_audio, z_vision and z. They are stored, and labels are generated, once per
    optimizer step, from all its micro-batches on all processes, so nothing depends on how a batch is cut.

    Args:
        labels: y `(samples,)`, in the order of `index`; the store is on the same device.
        width: Width of the states.

    Attributes:
        generated: y_m, `(modalities, samples)`.
        states: `(modalities + 1, samples, width)`; zero until they are first seen.
        visits: Steps in which each state was seen, `(modalities + 1, samples)` int64.
    """

    def __init__(self, labels: Tensor, width: int) -> None:
        self.labels = in_fp32(labels)
        self.generated = self.labels.repeat(len(MODALITIES), 1)
        self.states = self.labels.new_zeros(len(MODALITIES) + 1, len(labels), width)
        self.visits = torch.zeros(self.states.shape[:2], dtype=torch.int64, device=labels.device)
        self._step: list[tuple[Tensor, Tensor]] = []

    def of(self, index: Tensor) -> Tensor:
        """y_m of the samples `index` `(batch,)`, `(modalities, batch)`."""
        return self.generated[:, index]

    def collect(self, index: Tensor, states: Tensor, seen: Tensor) -> None:
        """Add a micro-batch to the step in progress.

        Args:
            index: Its samples, `(batch,)`.
            states: `(modalities + 1, batch, width)`, detached.
            seen: Which of them are of what the sample has, `(modalities + 1, batch)` bool.
        """
        rows = torch.cat([states.to(self.states), seen.to(self.states).unsqueeze(-1)], dim=-1)
        self._step.append((index, rows.transpose(0, 1)))

    @torch.no_grad()
    def end_step(self, taken: bool) -> None:
        """Use what was collected since the last step, or discard it if `taken` is False."""
        step, self._step = self._step, []
        if not taken or not step:
            return
        index, rows = (across_ranks_rows(torch.cat(parts)) for parts in zip(*step, strict=True))
        shown = rows[..., -1].any(dim=1)  # others are placeholders of empty micro-batches, or show nothing
        index, rows = index[shown], rows[shown].transpose(0, 1)
        states, seen = rows[..., :-1], rows[..., -1].bool()
        own, known = self._generate(states, self.labels[index])
        visits = self.visits[: len(MODALITIES), index]
        visit = visits + 1  # n of (9.7)
        before = self.generated[:, index]
        mean = ((visit - 1) * before + 2 * own) / (visit + 1)
        changed = seen[: len(MODALITIES)] & (visits > 0) & known
        self.generated[:, index] = torch.where(changed, mean, before)
        self.states[:, index] = torch.where(seen.unsqueeze(-1), states, self.states[:, index])
        self.visits[:, index] += seen

    def _generate(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Generated labels (9.6) `(modalities, batch)`, and of which modalities they are, `(modalities, 1)`.

        Args:
            states: `(modalities + 1, batch, width)`.
            labels: y `(batch,)`.
        """
        centres, exist = self._centres()
        distances = (states - centres.unsqueeze(2)).square().sum(dim=-1) / math.sqrt(states.shape[-1])
        positive, negative = distances  # (modalities + 1, batch)
        *alone, fused = (negative - positive) / (positive + TINY)  # (9.5)
        alone = torch.stack(alone)
        divisor = torch.where(fused.abs() < TINY, TINY, fused)
        own = labels + (alone - fused) / 2 * (labels + fused) / divisor
        known = exist.all(dim=0)
        return own.clamp(self.labels.min(), self.labels.max()), (known[:-1] & known[-1]).unsqueeze(-1)

    def _centres(self) -> tuple[Tensor, Tensor]:
        """Mean states of samples whose own label is above, and below, 0 (9.4).

        Returns:
            Centres `(2, modalities + 1, width)`, and which exist, `(2, modalities + 1)` bool.
        """
        own = torch.cat([self.generated, self.labels.unsqueeze(0)])
        members = torch.stack([own > 0, own < 0]) & (self.visits > 0)  # (2, modalities + 1, samples)
        count = members.sum(dim=-1)
        sums = torch.einsum("smn,mnw->smw", members.to(self.states), self.states)
        return sums / count.clamp(min=1).unsqueeze(-1), count > 0

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to continue exactly."""
        return {"generated": self.generated, "states": self.states, "visits": self.visits}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])
