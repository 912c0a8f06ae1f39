# SPDX-License-Identifier: Apache-2.0
"""Audio encoders that read the waveform: wav2vec 2.0 and networks of its structure."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.masking_utils import create_bidirectional_mask

from msa_online.encoders.pretrained_audio import PretrainedAudioEncoder
from msa_online.layers.precision import no_wider

WAVEFORM_TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat")
"""Model types of transformers that share the structure: convolutions, a positional convolution, layers."""


class WaveformEncoder(PretrainedAudioEncoder):
    """wav2vec 2.0, HuBERT, WavLM, data2vec, UniSpeech or UniSpeech-SAT: 50 states a second of 16 kHz sound.

    In transformers, padding changes the states of networks with a group norm (`feat_extract_norm: group`, the
    base sizes): the norm averages over padding, and their attention has no mask. Here the norm of a sample
    uses its own steps, padding is zero before each positional convolution, and no state attends to it. A
    sound shorter than one state (25 ms) is filled with silence.

    Attention is quadratic in the length of the sound: docs/training.md has the memory that this needs.

    The final norm of "stable layer norm" networks (the large sizes) belongs to the last state. Batch norm
    before the positional convolution (mHuBERT) always uses its stored statistics.
    """

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The network without the state that replaces masked ones; if cut, without its final norm."""
        network = AutoModel.from_config(config, dtype=torch.get_default_dtype())
        if hasattr(network, "masked_spec_embed"):
            del network.masked_spec_embed
        if _is_stable(config):
            norm = network.encoder.layer_norm
            del network.encoder.layer_norm  # it follows the layers, and is now registered after them
            network.encoder.layer_norm = nn.Identity() if self.is_cut else norm
        return network

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers, the lowest first."""
        return self.model.encoder.layers

    def train(self, mode: bool = True) -> "WaveformEncoder":
        """Set training mode; batch norm stays in evaluation mode, because its statistics include padding."""
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def hidden_states(self, values: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode waveforms `(batch, samples)` with their mask `(batch, samples)` bool, padding at the end."""
        config, encoder = self.model.config, self.model.encoder
        states, lengths = self._convolve(no_wider(values, self.model) * mask, mask.sum(dim=1))
        valid = torch.arange(states.shape[1], device=mask.device) < lengths.unsqueeze(1)
        projected = self.model.feature_projection(states)  # most families also return its input
        states = projected[0] if isinstance(projected, tuple) else projected
        states = states * valid.unsqueeze(-1)
        states = states + self._positions(states, valid)
        if not _is_stable(config):
            states = encoder.layer_norm(states)
        states = encoder.dropout(states)
        keys = valid
        if config.model_type != "wavlm":  # its attention reads the mask itself
            keys = create_bidirectional_mask(config, states, valid)
        hidden, shared = [states], []
        for layer in self.layers:
            with _mixed_masks_expected():
                output = layer(hidden[-1], keys, *shared)
            # the first layer of WavLM computes a bias of positions for all
            states, *shared = output if isinstance(output, tuple) else (output,)
            hidden.append(states)
        if _is_stable(config):
            hidden[-1] = encoder.layer_norm(hidden[-1])
        return hidden, valid & mask.any(dim=1, keepdim=True)

    def _convolve(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve waveforms `(batch, samples)` to `(batch, steps, channels)`, at least one step each."""
        config = self.model.config
        shortest = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            shortest = (shortest - 1) * stride + kernel
        states = F.pad(values, (0, max(0, shortest - values.shape[1]))).unsqueeze(1)
        lengths = lengths.clamp(min=shortest)
        layers = self.model.feature_extractor.conv_layers
        for layer, kernel, stride in zip(layers, config.conv_kernel, config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
            if not isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                states = layer(states)
            elif layer.training and layer.gradient_checkpointing:
                states = checkpoint(_normalized_convolution, layer, states, lengths, use_reentrant=False)
            else:
                states = _normalized_convolution(layer, states, lengths)
        return states.mT, lengths

    def _positions(self, states: Tensor, valid: Tensor) -> Tensor:
        """Positional convolution of states `(batch, steps, width)`; padding is zero before it."""
        positional = self.model.encoder.pos_conv_embed
        states, valid = states.mT, valid.unsqueeze(1)
        if isinstance(layers := getattr(positional, "layers", None), nn.ModuleList):  # data2vec has several
            for layer in layers:
                states = layer(states * valid)
            return states.mT
        if getattr(positional, "batch_norm", None) is not None:
            states = positional.batch_norm(states) * valid
        return positional.activation(positional.padding(positional.conv(states))).mT

    @staticmethod
    def default_feature_extractor(config: PretrainedConfig) -> Wav2Vec2FeatureExtractor:
        """Sound of zero mean and unit variance, as most of these networks were trained with."""
        return Wav2Vec2FeatureExtractor()


def group_norm(values: Tensor, valid: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise each channel of each sample over its valid steps, in fp32 or wider.

    Args:
        values: `(batch, channels, steps)`.
        valid: `(batch, 1, steps)` bool, at least one in each sample.
        norm: Weight, bias and epsilon, with one group for each channel.

    Returns:
        `(batch, channels, steps)` in the type of the norm's weights; steps that are not valid are finite.
    """
    exact = torch.promote_types(values.dtype, torch.float32)
    values = values.to(exact)
    count = valid.sum(dim=-1, keepdim=True)  # (batch, 1, 1)
    mean = torch.where(valid, values, 0.0).sum(dim=-1, keepdim=True) / count
    # filled with the mean, all steps have the variance of the valid ones but for a factor
    values = torch.where(valid, values, mean)
    variance = values.var(dim=-1, keepdim=True, correction=0) * (values.shape[-1] / count)
    scale = norm.weight.to(exact).unsqueeze(-1) * (variance + norm.eps).rsqrt()  # (batch, channels, 1)
    shift = norm.bias.to(exact).unsqueeze(-1) - mean * scale
    return torch.addcmul(shift, values, scale).to(norm.weight.dtype)


def _normalized_convolution(layer: nn.Module, values: Tensor, lengths: Tensor) -> Tensor:
    """A convolution with group norm, on `(batch, channels, steps)`, with `lengths` valid steps after it."""
    states = layer.conv(values)
    valid = torch.arange(states.shape[-1], device=states.device) < lengths.view(-1, 1, 1)
    return layer.activation(group_norm(states, valid, layer.layer_norm))


@contextmanager
def _mixed_masks_expected() -> Iterator[None]:
    """Without a warning of torch: WavLM gives it a bool mask of keys and a float bias of positions."""
    if torch.compiler.is_compiling():  # torch cannot trace a change of warning filters
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask", UserWarning)
        yield


def _is_stable(config: PretrainedConfig) -> bool:
    """Whether layers are normalised before attention, and the last state after them."""
    return getattr(config, "do_stable_layer_norm", False)  # data2vec has no such setting
