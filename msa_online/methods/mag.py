# SPDX-License-Identifier: Apache-2.0
"""MAG: audio and vision shift the states of the words inside the text encoder (ACL 2020).

"Integrating Multimodal Information in Large Pretrained Transformers", arXiv 1908.05787. Equation numbers are
those of docs/methods/mag.md.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from msa_online.layers.alignment import resample, word_steps
from msa_online.layers.arguments import check_choice
from msa_online.layers.losses import REGRESSION_LOSSES, loss_alone, task_loss
from msa_online.layers.modules import Dropout, masked_mean
from msa_online.layers.precision import in_fp32
from msa_online.methods.base import BalancingHead, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence

SHIFTING = ("audio", "vision")
TINY = 1e-12


class MAGHead(BalancingHead):
    """Shifts token states by audio and vision of the same time, and predicts from the means over time.

        g_n = ReLU(G_n [Z; X_n])                        (11.1); gate of n = audio, vision at a token
        H   = sum_n g_n W_n X_n + b                     (11.2); displacement
        a   = min(beta |Z| / |H|, 1)                    (11.3)
        Z'  = dropout(LayerNorm(Z + a H))               (11.4); token states, where audio or vision is there
        h_m = tanh(V_m mean_t X_m)                      (11.5); state of m, of the text from Z'
        s   = U [h_text; h_audio; h_vision]             (11.6); fused prediction
        s_m = U_m tanh(V_m mean_t X_m)                  (11.7); prediction of m alone, of the text from Z

    With a `layer`, (11.1) to (11.4) act after that layer of the text encoder, whose other layers then read
    Z'. There is no text without Z' then, so s_m is left out and modulators that compare the modalities by
    it are refused. Without a `layer` they act on the encoded text, or on its precomputed features.

    Losses: `task` on s; `unimodal`, the sum over modalities of the task loss of s_m, without a `layer`.

    Deviations: h_audio and h_vision join the prediction, where the paper reads the text alone, because a
    text may be missing. The mean over tokens stands for BERT's pooled token. A token without audio and
    vision keeps Z exactly. (11.7) is ours.

    Args:
        widths: Width of each modality's states.
        num_labels: Outputs; 1 is regression.
        hidden_size: Width of h_m.
        layer: Layer of the text encoder after which the words are shifted, 0 for its embeddings; None shifts
            the encoded text.
        beta: Largest size of the displacement, relative to the token state.
        dropout: Share of Z' and of h_m dropped in training.
        regression_loss: "mse" or "l1".

    Raises:
        ValueError: `regression_loss` is neither, `layer` is negative, or `beta` is not above 0.
    """

    loss_names = ("task", "unimodal")
    paper = (
        "Rahman, Hasan, Lee, Bagher Zadeh, Mao, Morency, Hoque: Integrating Multimodal Information in Large "
        "Pretrained Transformers, ACL 2020, https://arxiv.org/abs/1908.05787"
    )

    def __init__(
        self,
        widths: Mapping[str, int],
        num_labels: int,
        *,
        hidden_size: int = 128,
        layer: int | None = None,
        beta: float = 1.0,
        dropout: float = 0.5,
        regression_loss: str = "mse",
    ) -> None:
        super().__init__()
        check_choice("regression_loss", regression_loss, REGRESSION_LOSSES)
        if layer is not None and layer < 0:
            raise ValueError(f"layer={layer} must be at least 0, or null")
        if beta <= 0:
            raise ValueError(f"beta={beta} must be above 0")
        self.text_layer = layer
        self.regression_loss = regression_loss
        self.gate = AdaptationGate(widths, beta, dropout)
        self.projections = nn.ModuleDict({name: nn.Linear(widths[name], hidden_size) for name in MODALITIES})
        alone = MODALITIES if layer is None else ()
        self.predictors = nn.ModuleDict({name: nn.Linear(hidden_size, num_labels) for name in alone})
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(len(MODALITIES) * hidden_size, num_labels)

    def shift_text(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Token states shifted by audio and vision, `(batch, tokens, width)`."""
        return self.gate(sequences)

    def forward(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> HeadOutput:
        """Fuse the sequences, states `(batch, time, width)` each; `labels` `(batch,)` or None."""
        present = {name: sequences[name].present for name in MODALITIES}
        alone = {name: self._state(name, sequences[name]) for name in self.predictors}
        text = sequences["text"]
        if self.text_layer is None:
            text = text.with_values(self.shift_text(sequences))
        features = {name: self._state(name, each) for name, each in {**sequences, "text": text}.items()}
        fused = self.dropout(torch.cat(list(features.values()), dim=-1))  # (batch, 3 * hidden)
        output = HeadOutput(
            logits=self.classifier(fused),
            modality_logits={name: self.predictors[name](state) for name, state in alone.items()},
            features=features,
            fused=fused,
        )
        if labels is not None:
            output.losses = {"task": task_loss(output.logits, labels, regression_loss=self.regression_loss)}
            if alone:
                output.losses["unimodal"] = loss_alone(
                    output.modality_logits, labels, present, self.regression_loss
                )
        return output

    def _state(self, name: str, sequence: ModalitySequence) -> Tensor:
        """h_m (11.5), `(batch, hidden)`; zero where m is absent."""
        state = torch.tanh(self.projections[name](masked_mean(sequence)))
        return state * sequence.present.unsqueeze(-1)

    def weights_problem(self, weights: Mapping[str, float]) -> str | None:
        """Refuses a weight of a loss that there is not."""
        if weights.get("unimodal") and self.text_layer is not None:
            return (
                "unimodal needs predictions of each modality alone, which need model.head_kwargs.layer=null"
            )
        return None

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Projection of each modality; the gate belongs to none."""
        return {name: list(self.projections[name].parameters()) for name in MODALITIES}


class AdaptationGate(nn.Module):
    """Shifts the state of each token by the audio and vision of its time, (11.1) to (11.4).

    Args:
        widths: Width of each modality's states.
        beta: Largest size of the displacement, relative to the token state.
        dropout: Share of the shifted states dropped in training.
    """

    def __init__(self, widths: Mapping[str, int], beta: float, dropout: float) -> None:
        super().__init__()
        width = widths["text"]
        self.beta = beta
        self.gates = nn.ModuleDict({name: nn.Linear(width + widths[name], width) for name in SHIFTING})
        self.values = nn.ModuleDict({name: nn.Linear(widths[name], width, bias=False) for name in SHIFTING})
        self.bias = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a constant displacement."""
        nn.init.zeros_(self.bias)

    def forward(self, sequences: Mapping[str, ModalitySequence]) -> Tensor:
        """Shift the states under "text", `(batch, tokens, width)`; tokens without the others keep theirs."""
        text = sequences["text"]
        states = text.values
        observed = torch.zeros_like(text.mask)
        displacement = self.bias
        for name in SHIFTING:
            aligned = resample(sequences[name], text.mask, word_steps(text, name, sequences[name]))
            gate = F.relu(self.gates[name](torch.cat([states, aligned.values], dim=-1)))
            displacement = displacement + gate * self.values[name](aligned.values)  # no bias: 0 if absent
            observed = observed | aligned.mask
        shifted = self.dropout(self.norm(states + self._scale(states, displacement) * displacement))
        return torch.where(observed.unsqueeze(-1), shifted, states)

    def _scale(self, states: Tensor, displacement: Tensor) -> Tensor:
        """Factor of the displacement (11.3), `(batch, tokens, 1)`."""
        own, other = (
            (in_fp32(each).square().sum(dim=-1, keepdim=True) + TINY).sqrt()
            for each in (states, displacement)
        )
        return (self.beta * own / other).clamp(max=1).to(states.dtype)
