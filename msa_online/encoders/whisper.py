# SPDX-License-Identifier: Apache-2.0
"""Audio encoder from Whisper: its encoder on as many steps as the batch has."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder as WhisperNetwork

from feature_extractors.clip import SAMPLE_RATE
from msa_online.encoders.pretrained_audio import PretrainedAudioEncoder, attendable
from msa_online.front_ends import HOP
from msa_online.layers.precision import no_wider


class WhisperEncoder(PretrainedAudioEncoder):
    """The encoder of Whisper; its decoder is neither built nor loaded.

    transformers runs Whisper on 30 s, padded with silence that its states attend to. Here a batch has as many
    positions as its longest sound needs, padding is zero before each convolution, and no state attends to
    it. 100 log-mel steps a second become 50 states.
    """

    key_mapping = {r"^(model\.)?encoder\.": ""}

    def build(self, config: PretrainedConfig) -> WhisperNetwork:
        """The network; if cut, without its last norm."""
        network = WhisperNetwork._from_config(config, dtype=torch.get_default_dtype())
        if self.is_cut:
            network.layer_norm = nn.Identity()
        return network

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers, the lowest first."""
        return self.model.layers

    def hidden_states(self, values: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode a log-mel `(batch, steps, bands)` with its mask `(batch, steps)` bool.

        Raises:
            ValueError: The sound is longer than the positions of the network.
        """
        network = self.model
        if (steps := mask.shape[1]) > (longest := 2 * network.max_source_positions):
            raise ValueError(f"a sound of {steps} log-mel steps, and this Whisper reads at most {longest}")
        states = no_wider(values, network) * mask.unsqueeze(-1)
        states = F.gelu(network.conv1(states.mT)) * mask.unsqueeze(1)
        mask = mask[:, ::2]
        states = F.gelu(network.conv2(states)).mT  # (batch, steps / 2, width)
        states = states + network.embed_positions.weight[: mask.shape[1]]
        states = F.dropout(states, network.dropout, self.model.training)
        keys = create_bidirectional_mask(network.config, states, attendable(mask))
        hidden = [states]
        for layer in network.layers:
            hidden.append(layer(hidden[-1], keys))
        hidden[-1] = network.layer_norm(hidden[-1])
        return hidden, mask

    @staticmethod
    def default_feature_extractor(config: PretrainedConfig) -> WhisperFeatureExtractor:
        """Whisper's own, with the configuration's bands and length, in whole seconds."""
        seconds = 2 * config.max_source_positions * HOP // SAMPLE_RATE
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
