# SPDX-License-Identifier: Apache-2.0
"""What a user's input can raise: each of these carries one message that says it all, so no traceback is shown."""

from feature_extractors import ClipError
from feature_extractors.assets import AssetError
from msa_online.data.datasets import CorpusError
from msa_online.encoders.text import TextEncoderError
from msa_online.hub import CheckpointError
from msa_online.training.arguments import ConfigurationError

INPUT_ERRORS = (AssetError, CheckpointError, ClipError, ConfigurationError, CorpusError, TextEncoderError)
