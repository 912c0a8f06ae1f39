# SPDX-License-Identifier: Apache-2.0
"""Robust multimodal sentiment analysis from raw video.

Importing the package registers `MSAConfig`, `MSAModel` and `MSAProcessor` with the Auto classes of
transformers, so that `AutoModel.from_pretrained` loads a checkpoint without remote code, the vision encoder
`FaceResNet` likewise, and the task "multimodal-sentiment" with `transformers.pipeline`. The import loads no
model and uses no network.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.face_resnet import FaceResNet, FaceResNetConfig
from msa_online.modeling_msa import MSAModel, MSAOutput
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.processing_msa import MSADataCollator, MSAProcessor
from msa_online.transformers_pipeline import MultimodalSentimentPipeline

__version__ = "0.1.0"
__all__ = [
    "MSAConfig",
    "MSADataCollator",
    "MSAModel",
    "MSAOutput",
    "MSAPipeline",
    "MSAProcessor",
    "MultimodalSentimentPipeline",
    "Prediction",
]

AutoConfig.register(MSAConfig.model_type, MSAConfig)
AutoModel.register(MSAConfig, MSAModel)
AutoProcessor.register(MSAConfig, MSAProcessor)
AutoConfig.register(FaceResNetConfig.model_type, FaceResNetConfig)
AutoModel.register(FaceResNetConfig, FaceResNet)
