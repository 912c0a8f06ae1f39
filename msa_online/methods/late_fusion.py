# SPDX-License-Identifier: Apache-2.0
"""Late fusion: pool each modality, concatenate, predict. The baseline, and a template for new heads.

Equation numbers are those of docs/methods/late_fusion.md.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, task_loss
from msa_online.layers.modules import MissingTokens, masked_deviation, masked_mean
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence


class LateFusionHead(BalancingHead):
    """Concatenates the pooled modalities and predicts with a two-layer MLP (the LF-DNN of the MMSA toolkit).

    It is the baseline: compare a balancing method with it at equal encoders, budget and tuning.

        h_m = GELU(W_m LayerNorm(p_m))               (5.1); a learned token where m is absent
        s_m = U_m h_m                                (5.2); prediction of m alone
        s   = V GELU(W [h_text; h_audio; h_vision])  (5.2); fused prediction

    p_m is mean_t X_m, for modalities in `deviation` followed by the standard deviation over t.

    Losses, unweighted (5.3): `task` on s; `unimodal`, the sum over modalities of the task loss of s_m on the
    samples that have m. `unimodal` keeps a weak modality learning once the strong one explains the label; a
    weight of 0 turns it off.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of h_m and of the predictor's hidden layer.
        depth: Layers of each modality's projection; (5.1) has one.
        dropout: Share of h_m and of the hidden layer dropped in training.
        regression_loss: "mse" or "l1".
        deviation: Modalities whose standard deviation over time is pooled beside the mean; it helps with
            the states of a pretrained audio encoder.
        input_norm: Apply the LayerNorm of (5.1). Without it p_m keeps its size, which precomputed features
            need: they are standardised already, and their size may carry the label.

    Raises:
        ValueError: `regression_loss` is neither, `depth` is below 1, or `deviation` names no modality.
    """

    loss_names = ("task", "unimodal")

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 128,
        depth: int = 1,
        dropout: float = 0.2,
        regression_loss: str = "mse",
        deviation: Sequence[str] = (),
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        for name in deviation:
            check_choice("deviation", name, MODALITIES)
        self.regression_loss = regression_loss
        self.deviation = tuple(deviation)
        pooled = {name: width * (1 + (name in deviation)) for name, width in widths.items()}

        def layers(width: int) -> list[nn.Module]:
            # not our Dropout: its random numbers would change all figures that were measured with this head
            return [nn.Linear(width, hidden_size), nn.GELU(), nn.Dropout(dropout)]

        self.projections = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width) if input_norm else nn.Identity(),
                    *layers(width),
                    *(layer for _ in range(depth - 1) for layer in layers(hidden_size)),
                )
                for name, width in pooled.items()
            }
        )
        self.missing = MissingTokens(hidden_size)
        # U_m; newer heads call it `predictors`, published checkpoints of this one contain `unimodal`
        self.unimodal = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in widths})
        self.fusion = nn.Sequential(
            nn.Linear(len(widths) * hidden_size, hidden_size), nn.GELU(), nn.Dropout(dropout)
        )
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        features = {
            name: self.missing(name, self.projections[name](self._pool(name, sequence)), sequence.present)
            for name, sequence in sequences.items()
        }  # (batch, hidden) each
        fused = self.fusion(torch.cat([features[name] for name in MODALITIES], dim=-1))  # (batch, hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.unimodal[name](state) for name, state in features.items()},
            features=features,
            fused=fused,
        )
        if labels is not None:
            present = {name: sequence.present for name, sequence in sequences.items()}
            output.losses = {
                "task": task_loss(output.logits, labels, regression_loss=self.regression_loss),
                "unimodal": loss_alone(output.modality_logits, labels, present, self.regression_loss),
            }
        return output

    def _pool(self, name: str, sequence: ModalitySequence) -> Tensor:
        """Moments over time that the projection of a modality reads, p_m of (5.1)."""
        mean = masked_mean(sequence)
        if name not in self.deviation:
            return mean
        return torch.cat([mean, masked_deviation(sequence).to(mean.dtype)], dim=-1)

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection of each modality."""
        return {name: list(self.projections[name].parameters()) for name in MODALITIES}
