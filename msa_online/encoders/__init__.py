# SPDX-License-Identifier: Apache-2.0
"""Learned encoders: one sequence of states for each modality."""

from torch import nn

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.audio import AudioEncoder
from msa_online.encoders.face import FaceEncoder
from msa_online.encoders.features import FeatureEncoder
from msa_online.encoders.text import TextEncoder
from msa_online.modalities import MODALITIES

__all__ = ["make_encoders"]


def make_encoders(config: MSAConfig) -> nn.ModuleDict:
    """The encoder of each modality, for raw clips or for precomputed features (`feature_widths`)."""
    if config.feature_widths is not None:
        return nn.ModuleDict({name: FeatureEncoder(name, config.feature_widths[name]) for name in MODALITIES})
    return nn.ModuleDict(
        {
            "text": TextEncoder(config.text_config),
            "audio": AudioEncoder(config.audio_channels, config.audio_width),
            "vision": FaceEncoder(config.face_channels, config.face_width, config.blendshapes),
        }
    )
