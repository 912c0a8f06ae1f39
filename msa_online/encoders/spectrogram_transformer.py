# SPDX-License-Identifier: Apache-2.0
"""Audio encoder from the Audio Spectrogram Transformer, on as many patches as the batch has."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel
from transformers.masking_utils import create_bidirectional_mask

from msa_online.encoders.pretrained_audio import PretrainedAudioEncoder
from msa_online.front_ends import empty_bands_expected
from msa_online.layers.precision import no_wider


class SpectrogramTransformer(PretrainedAudioEncoder):
    """The Audio Spectrogram Transformer; a state is the mean of the patches of one time over frequency.

    transformers runs it on 10.24 s, padded with silence that its states attend to. Here a batch has as many
    patches as its longest sound needs, with the position embeddings of the first times, and no state attends
    to padding. A sound shorter than one patch (16 steps) is filled with zeros. The class and distillation
    tokens are attended to, but are no states.

    100 filter-bank steps a second become 10 states.
    """

    usual_stride = 1

    def build(self, config: ASTConfig) -> ASTModel:
        """The network; if cut, without its last norm, and without trained tokens that no layer reads."""
        network = ASTModel._from_config(config, dtype=torch.get_default_dtype())
        if self.is_cut:
            network.layernorm = nn.Identity()
        if config.num_hidden_layers == 0:
            network.embeddings.cls_token.requires_grad_(False)
            network.embeddings.distillation_token.requires_grad_(False)
        return network

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers, the lowest first."""
        return self.model.layers

    def hidden_states(self, values: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode filter banks `(batch, steps, bands)` with their mask `(batch, steps)` bool.

        Padding is at the end.

        Raises:
            ValueError: The sound is longer than the positions of the network.
        """
        network, config = self.model, self.model.config
        if (steps := mask.shape[1]) > config.max_length:
            raise ValueError(f"a sound of {steps} steps, and this network reads at most {config.max_length}")
        values = no_wider(values, network) * mask.unsqueeze(-1)
        values = F.pad(values, (0, 0, 0, max(0, config.patch_size - steps)))
        patches = network.embeddings.patch_embeddings(values)  # (batch, bands * times, width), by band
        bands, longest = network.embeddings.get_shape(config)
        times = patches.shape[1] // bands
        lengths = (mask.sum(dim=1).clamp(min=config.patch_size) - config.patch_size) // config.time_stride + 1
        valid = torch.arange(times, device=mask.device) < lengths.unsqueeze(1)
        states = self._embed(patches, bands, longest)
        seen = torch.cat([valid.new_ones(len(valid), 2), valid.repeat(1, bands)], dim=1)
        keys = create_bidirectional_mask(config, states, seen)
        hidden = [states]
        for layer in network.layers:
            hidden.append(layer(hidden[-1], keys))
        hidden[-1] = network.layernorm(hidden[-1])
        means = [states[:, 2:].unflatten(1, (bands, times)).mean(dim=1) for states in hidden]
        return means, valid & mask.any(dim=1, keepdim=True)

    def _embed(self, patches: Tensor, bands: int, longest: int) -> Tensor:
        """Add positions to patches `(batch, bands * times, width)`, and the two tokens before them."""
        embeddings = self.model.embeddings
        times = patches.shape[1] // bands
        positions = embeddings.position_embeddings
        tokens = torch.cat([embeddings.cls_token, embeddings.distillation_token], dim=1) + positions[:, :2]
        # positions are by band, then by time: the first times of each band
        positions = positions[:, 2:].unflatten(1, (bands, longest))[:, :, :times].flatten(1, 2)
        states = torch.cat([tokens.expand(len(patches), -1, -1), patches + positions], dim=1)
        return embeddings.dropout(states)

    @staticmethod
    @empty_bands_expected()
    def default_feature_extractor(config: ASTConfig) -> ASTFeatureExtractor:
        """Filter banks normalised as for AudioSet, with the configuration's bands and length."""
        return ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
