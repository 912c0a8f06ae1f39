# SPDX-License-Identifier: Apache-2.0
"""Audio encoder from Wav2Vec2-BERT, which reads pairs of filter-bank steps."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

from msa_online.encoders.pretrained_audio import PretrainedAudioEncoder, attendable
from msa_online.layers.precision import no_wider


class Wav2Vec2BertEncoder(PretrainedAudioEncoder):
    """Wav2Vec2-BERT; 100 filter-bank steps a second, joined in pairs, become 50 states."""

    def build(self, config: PretrainedConfig) -> Wav2Vec2BertModel:
        """The network."""
        return Wav2Vec2BertModel._from_config(config, dtype=torch.get_default_dtype())

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers, the lowest first."""
        return self.model.encoder.layers

    def hidden_states(self, values: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode pairs of filter-bank steps `(batch, steps, features)`, mask `(batch, steps)` bool."""
        output = self.model(
            no_wider(values, self.model) * mask.unsqueeze(-1),
            attention_mask=attendable(mask).long(),
            output_hidden_states=self.is_weighted,
        )
        return list(output.hidden_states or [output.last_hidden_state]), mask

    @staticmethod
    def default_feature_extractor(config: PretrainedConfig) -> SeamlessM4TFeatureExtractor:
        """80 mel bands in pairs of steps, as Wav2Vec2-BERT was trained with."""
        bands = config.feature_projection_input_dim // 2
        return SeamlessM4TFeatureExtractor(feature_size=bands, num_mel_bins=bands, stride=2)
