# SPDX-License-Identifier: Apache-2.0
"""MMIM: a fusion that keeps the information which the modalities share (EMNLP 2021).

"Improving Multimodal Fusion with Hierarchical Mutual Information Maximization for Multimodal Sentiment
Analysis", arXiv 2109.00412. Equation numbers are those of docs/methods/mmim.md.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, mean_where, task_loss
from msa_online.layers.modules import Dropout, Projection, masked_mean
from msa_online.layers.precision import in_fp32, without_autocast
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

SOURCE = "text"
TARGETS = tuple(name for name in MODALITIES if name != SOURCE)
RIDGE = 1e-3  # r of (8.5)
LOG_VARIANCE = 5.0  # bound of (8.3)
HIDDEN_SCORE = -1e4  # of a sample that (8.6) does not compare with; finite, so that 0 times it is 0


class MMIMHead(BalancingHead):
    """Concatenates the pooled modalities, and maximises bounds of the mutual information of its states.

        h_m = GELU(W_m LayerNorm(mean_t X_m))                      (8.1); zero where m is absent
        z   = GELU(W [h_text; h_audio; h_vision])                  (8.2); s = V z, s_m = U_m h_m
        I(text, n) >= E log q(h_n | h_text) + H(h_n)               (8.3) to (8.5), n of audio and vision
        CPC(z, m)  = contrast of F_m(z) with h_m within the batch  (8.6)

    Losses, unweighted (8.7): `task` on s; `unimodal`, the sum over modalities of the task loss of s_m;
    `information`, minus the sum of the two lower bounds, with the predictors q as constants; `likelihood`,
    the negative log likelihood by which the q are fitted, with the states as constants; `contrast`, the sum
    of CPC over modalities. The published weights of `information` and `contrast` are 0.1.

    Deviations: the q are fitted in the same step as the rest, by a loss of their own, where the paper
    alternates. The entropy is that of the batch, without a memory of earlier ones. Encoders' states are
    averaged over time. s_m and its loss are ours.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of h_m and z.
        dropout: Share of h_m and z dropped in training.
        regression_loss: "mse" or "l1".
        input_norm: Apply the LayerNorm of (8.1). False where the size of features carries the label.

    Raises:
        ValueError: `regression_loss` is neither.
    """

    loss_names = ("task", "unimodal", "information", "likelihood", "contrast")
    paper = (
        "Han, Chen, Poria: Improving Multimodal Fusion with Hierarchical Mutual Information Maximization for "
        "Multimodal Sentiment Analysis, EMNLP 2021, https://arxiv.org/abs/2109.00412"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 64,
        dropout: float = 0.2,
        regression_loss: str = "mse",
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        self.num_labels, self.regression_loss = num_labels, regression_loss
        self.projections = nn.ModuleDict(
            {
                name: Projection(widths[name], hidden_size, dropout, input_norm=input_norm)
                for name in MODALITIES
            }
        )
        self.fusion = nn.Sequential(
            nn.Linear(len(MODALITIES) * hidden_size, hidden_size), nn.GELU(), Dropout(dropout)
        )
        self.classifier = nn.Linear(hidden_size, num_labels)
        self.predictors = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in MODALITIES})
        self.likelihoods = nn.ModuleDict({name: GaussianPredictor(hidden_size) for name in TARGETS})  # q
        self.contrasts = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size)
                )
                for name in MODALITIES
            }
        )  # F_m

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        present = {name: sequences[name].present for name in MODALITIES}
        features = {
            name: self.projections[name](masked_mean(sequences[name])) * present[name].unsqueeze(-1)
            for name in MODALITIES
        }  # h_m, (batch, hidden)
        fused = self.fusion(torch.cat(list(features.values()), dim=-1))  # z, (batch, hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.predictors[name](state) for name, state in features.items()},
            features=features,
            fused=fused,
        )
        if labels is not None:
            output.losses = {
                "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
                "information": self._information(features, labels, present),
                "likelihood": self._likelihood(features, present),
                "contrast": self._contrast(output, present),
            }
        return output

    def weights_problem(self, weights: Mapping[str, float]) -> str | None:
        """Refuse bounds whose predictors are never fitted."""
        if weights.get("information", 1.0) and not weights.get("likelihood", 1.0):
            return (
                "loss_weights.likelihood=0 leaves the predictors untrained that the loss information reads: "
                "give it a weight, or set loss_weights.information to 0 too"
            )
        return None

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection of each modality."""
        return {name: list(self.projections[name].parameters()) for name in MODALITIES}

    def _information(
        self, features: Mapping[str, Tensor], labels: Tensor, present: Mapping[str, Tensor]
    ) -> Tensor:
        """Minus the lower bounds of I(text, audio) and I(text, vision), (8.3) to (8.5); q is a constant."""
        members = label_classes(labels, self.num_labels)  # (batch, classes)
        bounds = []
        for name in TARGETS:
            predictor = self.likelihoods[name]
            constants = {key: value.detach() for key, value in predictor.named_parameters()}
            likelihoods = functional_call(predictor, constants, (features[SOURCE], features[name]))
            with without_autocast(labels.device):
                both = present[SOURCE] & present[name]
                bounds.append(
                    mean_where(likelihoods, both)
                    + class_entropy(in_fp32(features[name]), members & both.unsqueeze(-1))
                )
        return -torch.stack(bounds).sum()

    def _likelihood(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Negative log likelihood of audio and vision given the text, (8.4); the states are constants."""
        terms = [
            mean_where(
                self.likelihoods[name](features[SOURCE].detach(), features[name].detach()),
                present[SOURCE] & present[name],
            )
            for name in TARGETS
        ]
        return -torch.stack(terms).sum()

    def _contrast(self, output: HeadOutput, present: Mapping[str, Tensor]) -> Tensor:
        """CPC of the fused state with each modality, (8.6), summed over modalities."""
        terms = []
        for name in MODALITIES:
            predicted = self.contrasts[name](output.fused)
            with without_autocast(predicted.device):
                terms.append(contrast(in_fp32(predicted), in_fp32(output.features[name]), present[name]))
        return torch.stack(terms).sum()


class GaussianPredictor(nn.Module):
    """q(y | x): a diagonal normal distribution whose mean and variance are MLPs of x, (8.3).

    Args:
        hidden_size: Width of x and y.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mean, self.log_variance = (
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size))
            for _ in range(2)
        )

    def forward(self, given: Tensor, target: Tensor) -> Tensor:
        """Log density of `target` `(batch, hidden)` without its constant, in fp32, `(batch,)`."""
        spread = LOG_VARIANCE * torch.tanh(in_fp32(self.log_variance(given)) / LOG_VARIANCE)
        error = in_fp32(target) - in_fp32(self.mean(given))
        return -0.5 * (error.square() * (-spread).exp() + spread).sum(dim=-1)


def label_classes(labels: Tensor, num_labels: int) -> Tensor:
    """Class of each label, `(batch, classes)` bool: of a score, whether it is above 0."""
    if num_labels == 1:
        return torch.stack([labels <= 0, labels > 0], dim=-1)
    return F.one_hot(labels, num_labels).bool()


def class_entropy(states: Tensor, members: Tensor) -> Tensor:
    """Entropy of a mixture of one normal distribution per class, without its constant (8.5), a scalar.

    Args:
        states: `(batch, hidden)`.
        members: `(batch, classes)` bool. A class with fewer than two samples does not count; without any
            class the entropy is 0.
    """
    weight = members.mT.unsqueeze(-1).to(states.dtype)  # (classes, batch, 1)
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (states - (states * weight).sum(dim=1, keepdim=True) / count) * weight
    covariance = centred.mT @ centred / count  # (classes, hidden, hidden)
    ridge = RIDGE * torch.eye(states.shape[-1], dtype=states.dtype, device=states.device)
    roots = torch.linalg.cholesky(covariance + ridge).diagonal(dim1=-2, dim2=-1)
    return mean_where(roots.log().sum(dim=-1), members.sum(dim=0) > 1)  # half of log det


def contrast(predicted: Tensor, states: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of finding each sample's state among those of the batch (8.6), a scalar.

    Args:
        predicted: F_m(z) `(batch, hidden)`.
        states: h_m `(batch, hidden)`.
        counted: Samples that have m, `(batch,)` bool; only these are sought and compared with.
    """
    scores = F.normalize(predicted, dim=-1) @ F.normalize(states, dim=-1).mT  # (batch, batch)
    scores = scores.masked_fill(~counted, HIDDEN_SCORE)
    return -mean_where(scores.log_softmax(dim=-1).diagonal(), counted)
