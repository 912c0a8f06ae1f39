# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from msa_online import MSAConfig, MSAModel


@pytest.fixture
def make_model(tiny_config):
    """A function that builds the tiny model with a pretrained audio encoder."""

    def make(audio_config, layer="last", **settings) -> MSAModel:
        torch.manual_seed(0)
        audio = {"audio_config": audio_config, "audio_layer": layer}
        return MSAModel(MSAConfig(**{**tiny_config.to_dict(), **audio, **settings})).eval()

    return make
