# SPDX-License-Identifier: Apache-2.0
"""What pretrained encoders of all modalities share: finding them by name, loading, freezing."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import PROCESSOR_NAME, cached_file, logging

from feature_extractors.assets import asset_path, get_asset
from feature_extractors.catalogue import ASSETS, asset_of_model
from feature_extractors.sources import why_hub_is_silent
from msa_online.front_ends import (
    empty_bands_expected,
    pillow_equivalent,
    restore_extractor,
    restore_image_processor,
)
from msa_online.modalities import ModalitySequence

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert"},
    "google-bert/bert-base-uncased": {"model_type": "bert"},  # the same repository
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2",
        "vocab_size": 128_100,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "max_relative_positions": -1,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "sentence-transformers/all-mpnet-base-v2": {
        "model_type": "mpnet",
        "vocab_size": 30_527,
        "max_position_embeddings": 514,
        "layer_norm_eps": 1e-5,
    },
    "openai/whisper-tiny.en": {"model_type": "whisper", "vocab_size": 51_864},
    "openai/whisper-base.en": {
        "model_type": "whisper",
        "vocab_size": 51_864,
        "d_model": 512,
        "encoder_layers": 6,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_layers": 6,
        "decoder_attention_heads": 8,
        "decoder_ffn_dim": 2048,
    },
    "facebook/wav2vec2-base": {"model_type": "wav2vec2"},
    "facebook/hubert-base-ls960": {"model_type": "hubert"},
    "microsoft/wavlm-base-plus": {"model_type": "wavlm"},
    "facebook/w2v-bert-2.0": {"model_type": "wav2vec2-bert"},
    "MIT/ast-finetuned-audioset-10-10-0.4593": {"model_type": "audio-spectrogram-transformer"},
    "google/vit-base-patch16-224": {"model_type": "vit"},
    "facebook/dinov2-small": {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "patch_size": 14,
        "image_size": 518,
    },
    "openai/clip-vit-base-patch32": {"model_type": "clip_vision_model"},
    "google/siglip-base-patch16-224": {"model_type": "siglip_vision_model"},
    "dlib-face-resnet": {"model_type": "face_resnet"},
}
"""Shapes of common encoders, so that models can be described and tested without the Hub.

The keys are whole names: a repository of another owner can have another shape under the same last part.
"""


READ_BY_ALL_LAYERS = re.compile(r"relative_attention_bias|rel_embeddings|encoder\.LayerNorm")
"""Embeddings of distances between tokens, and their norm, that MPNet and DeBERTa register after their layers.

Every layer reads them, so they count as embeddings. Only their names distinguish them from what follows the
last layer, such as a final norm. All other parameters are placed by their order.
"""


NO_CODE = {"trust_remote_code": False}
"""Without this, transformers offers in a terminal to run the code that a configuration names."""

UNREADABLE = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, SafetensorError, StrictDataclassError),
)
"""Errors that transformers raises on files that are missing, damaged, or of other content."""


class EncoderError(OSError):
    """A pretrained encoder is unavailable or unsuitable; the message says what was tried, and the remedy."""


class PretrainedEncoder(nn.Module, ABC):
    """A network of transformers, and what is learned on top of it.

    A forward pass has two steps, so that the states of a frozen network can be computed once: `states` runs
    the network, and `read` is what trains on top of it. A subclass implements `states`, and `build` if
    `AutoModel` does not build its network.

    Parameters have torch's default type (fp32), whatever type the encoder was published in.

    Args:
        config: Configuration of the network.

    Attributes:
        model: The network.
        frozen: Whether the whole network is frozen.
        input_names: Entries of a batch that `states` reads.
        key_mapping: Patterns of the names of published weights that differ from the network's, and what
            replaces them.
    """

    input_names: tuple[str, ...]
    key_mapping: dict[str, str] | None = None

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.frozen = False
        self._frozen_modules: list[nn.Module] = []  # a plain list, so that nothing is registered twice
        self.model = self.build(config)

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The network with random weights, without the parts that no state depends on."""
        return AutoModel.from_config(config, dtype=torch.get_default_dtype())

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers of the network, the lowest first."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def stored_once(self) -> bool:
        """Whether `states` returns the same in every epoch and is worth storing."""
        return self.frozen

    @abstractmethod
    def states(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Run the network and parameter-free pooling; with a frozen network, nothing here is trained."""

    def read(self, sequence: ModalitySequence) -> ModalitySequence:
        """Apply what is learned on top of the network; by default nothing."""
        return sequence

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode the entries of a batch that `input_names` lists; states `(batch, time, width)`."""
        return self.read(self.states(inputs))

    def load_pretrained(self, source: str | Path) -> None:
        """Load the weights of a pretrained network of the same architecture, by folder or name.

        Parts of it that are not built here (other layers, a decoder, the head of a task) are left out.

        Raises:
            EncoderError: The weights are neither on disk nor available from the Hub, or some are missing or
                have another shape or are not finite.
        """
        with _quiet():  # of the parts that are left out, and of what is checked below
            pretrained, report = _load(
                type(self.model).from_pretrained,
                str(source),
                find_encoder(str(source), download=True),
                config=deepcopy(self.model.config),
                key_mapping=self.key_mapping,
                use_safetensors=True,  # never a pickle, which could execute code
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        own, stored = self.model.state_dict(), pretrained.state_dict()
        if others := sorted(it for it in report["mismatched_keys"] if it[0] in own):
            name, found, expected = others[0]
            raise EncoderError(
                f"encoder {str(source)!r}: {len(others)} of {len(own)} weights have another shape than "
                f"config.json says, for example {name}: {list(found)}, not {list(expected)}: give a folder "
                "whose files belong together"
            )
        if missing := own.keys() & set(report["missing_keys"]):
            raise EncoderError(
                f"encoder {str(source)!r}: {len(missing)} of {len(own)} weights are missing, for example "
                f"{min(missing)}: give a checkpoint of a {self.model.config.model_type!r} encoder"
            )
        if broken := [name for name, _ in self.model.named_parameters() if not stored[name].isfinite().all()]:
            raise EncoderError(
                f"encoder {str(source)!r}: {len(broken)} of {len(own)} weights are not finite, for example "
                f"{broken[0]}: give a checkpoint whose training did not diverge"
            )
        self.model.load_state_dict({name: stored[name] for name in own})

    def freeze(self) -> None:
        """Freeze the network: no gradients, and no dropout in training. What `read` applies still trains."""
        self.frozen = True
        self._freeze([self.model])
        self.model.requires_grad_(False)

    def freeze_below(self, layers: int) -> None:
        """Freeze the embeddings and the lowest layers of the network: no gradients, and no dropout.

        Args:
            layers: How many layers, from 0 (embeddings only) to all; layers above still train.

        Raises:
            ValueError: The network has fewer layers.
        """
        if not 0 <= layers <= len(self.layers):
            raise ValueError(f"{layers} layers to freeze, and the encoder has {len(self.layers)}")
        depths = self.depths()
        for name, parameter in self.model.named_parameters():
            if depths[name] <= layers:
                parameter.requires_grad_(False)
        lowest = list(self.layers[:layers])
        leaves = [module for module in self._modules_below_layers() if not any(module.children())]
        self._freeze([*leaves, *lowest])

    def depths(self) -> dict[str, int]:
        """Where each parameter of the network acts, by its name in `model`.

        Returns:
            0 for embeddings, N for layer N counted from 1, and one more for what follows the last layer.
        """
        of_layers = {
            id(parameter): number
            for number, layer in enumerate(self.layers, start=1)
            for parameter in layer.parameters()
        }
        outside = 0
        depths = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in of_layers:
                depths[name], outside = of_layers[id(parameter)], len(self.layers) + 1
            else:
                depths[name] = 0 if READ_BY_ALL_LAYERS.search(name) else outside
        return depths

    def _freeze(self, modules: list[nn.Module]) -> None:
        self._frozen_modules = modules
        self.train(self.training)

    def _modules_below_layers(self) -> list[nn.Module]:
        """Modules that are registered before the layers: the embeddings, and what contains them."""
        modules = list(self.model.modules())
        return modules[: next(place for place, module in enumerate(modules) if module is self.layers)]

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self


def find_encoder(name: str, download: bool = False) -> str:
    """Where to load an encoder from: a folder, our cache of models, or its name on the Hub.

    Args:
        name: A folder, or a name on the Hub.
        download: Download an encoder of `ASSETS` that is not in the cache.

    Raises:
        AssetError: `download` is set and no source has the encoder.
        EncoderError: The name is that of a file.
    """
    if Path(name).is_file():
        raise EncoderError(f"encoder {name!r} is a file: give the folder that it is in")
    if Path(name).is_dir() or not (asset := asset_of_model(name)):
        return name
    return str((get_asset if download else asset_path)(asset) or name)


def read_encoder_config(name: str) -> PretrainedConfig:
    """Configuration of an encoder by name, without its weights.

    Raises:
        EncoderError: The name is neither a folder nor a known encoder, and the Hub does not return it; or the
            installed transformers lacks its model.
    """
    source = find_encoder(name)
    published = ASSETS[asset].published_name if (asset := asset_of_model(name)) else name
    if not Path(source).is_dir() and (shape := KNOWN_CONFIGS.get(published)):
        return AutoConfig.for_model(**shape)
    kind = _load(_model_type, name, source)
    if kind is not None and kind not in CONFIG_MAPPING:
        raise EncoderError(
            f"encoder {name!r} is a model of type {kind!r}, which the installed transformers "
            f"{transformers.__version__} does not have: install a newer one, or choose another encoder"
        )
    with _quiet():  # of settings of a tower that is not used, such as the special tokens of SigLIP's text
        return _load(AutoConfig.from_pretrained, name, source, **NO_CODE)


def _model_type(source: str, **options: Any) -> str | None:
    fields, _ = PretrainedConfig.get_config_dict(source, **options)
    return fields.get("model_type")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a text encoder by name.

    Raises:
        EncoderError: The tokenizer is neither on disk nor available from the Hub, or has no vocabulary.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, name, find_encoder(name, download=True), **NO_CODE)
    try:
        require_vocabulary(tokenizer)
    except EncoderError as error:
        raise EncoderError(f"encoder {name!r}: {error}") from error
    return tokenizer


def require_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer knows a word or a letter.

    Without the files of a tokenizer, transformers makes one that knows special tokens only: all texts would
    be equal to the model.

    Raises:
        EncoderError: It knows special tokens only.
    """
    special = set(tokenizer.all_special_tokens)
    words = (token for token in tokenizer.get_vocab() if token not in special)
    if not any(character.isalpha() for token in words for character in token):
        raise EncoderError(
            "its tokenizer has no vocabulary: put the files of the tokenizer that it was published with "
            "(tokenizer.json, or vocab.txt) into its folder"
        )


@empty_bands_expected()
def load_feature_extractor(name: str) -> Any | None:
    """Feature extractor published with an audio encoder; None if there is none beside the weights.

    Raises:
        EncoderError: It cannot be read, is of an unknown class, or wants sound at another rate than 16 kHz.
    """
    source = find_encoder(name, download=True)
    if not _has_preprocessor(name, source):
        return None
    extractor = _load(AutoFeatureExtractor.from_pretrained, name, source, **NO_CODE)
    try:
        return restore_extractor(extractor)
    except ValueError as error:
        raise EncoderError(f"encoder {name!r}: {error}") from error


def load_image_processor(name: str) -> Any:
    """Image processor published with a vision encoder.

    Raises:
        EncoderError: It cannot be read or used; or there is none, and families differ too much to assume one.
    """
    source = find_encoder(name, download=True)
    if not _has_preprocessor(name, source):
        raise EncoderError(
            f"vision encoder {name!r} has no preprocessor_config.json, which says the size and the scale of "
            "its pictures: add the one that it was published with"
        )
    processor = _load(_saved_image_processor, name, source)
    if not pillow_equivalent(processor):  # else transformers refuses it without torchvision
        processor = _load(AutoImageProcessor.from_pretrained, name, source, **NO_CODE)
    try:
        return restore_image_processor(processor)
    except UNREADABLE as error:
        raise EncoderError(f"encoder {name!r}: {first_line_of(error)}") from error


def _saved_image_processor(source: str, **options: Any) -> dict[str, Any]:
    fields, _ = BaseImageProcessor.get_image_processor_dict(source, **options)
    return dict(fields)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of transformers."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _has_preprocessor(name: str, source: str) -> bool:
    files = ("preprocessor_config.json", PROCESSOR_NAME)
    absent = {"_raise_exceptions_for_missing_entries": False}  # then None, unless the Hub is silent
    return any(_load(cached_file, name, source, filename=file, **absent) is not None for file in files)


def _load(function: Callable, name: str, source: str, **kwargs: Any) -> Any:
    """Call a loading function of transformers; its errors become one line."""
    local = Path(source).is_dir() or bool(why_hub_is_silent())
    try:
        return function(source, local_files_only=local, **kwargs)
    except UNREADABLE as error:
        carried = {asset.published_name for asset in ASSETS.values()}
        first_line = first_line_of(error)
        if Path(source).is_dir():
            raise EncoderError(
                f"encoder {name!r}: the files in {source} cannot be read ({first_line})"
            ) from error
        raise EncoderError(
            f"encoder {name!r} is neither a folder nor in the cache of models, and the Hub did not "
            f"return it ({first_line}). Give a folder with the encoder, go online, or "
            f"download {', '.join(sorted(KNOWN_CONFIGS.keys() & carried))} with `msa-online get-models`."
        ) from error


def first_line_of(error: Exception) -> str:
    """The first line of a message; of one about the type of a field all, because the second says more."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    return next(iter(str(error).splitlines()), type(error).__name__)
