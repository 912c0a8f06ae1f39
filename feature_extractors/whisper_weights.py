# SPDX-License-Identifier: Apache-2.0
"""Converts the encoder of a Whisper model from CTranslate2's file format to a folder for transformers.

A `model.bin` of CTranslate2 is little-endian and holds, in this order: the version of the format (u32), the
name of the architecture, its revision (u32), the number of variables (u32), the variables, the number of
aliases (u32), and for each alias two names. A variable is its name, its rank (u8), its dimensions (u32
each), its type (u8), its size in bytes (u32) and its values. A name is its length (u16) and that many bytes,
the last of which is zero.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

from feature_extractors.catalogue import AssetError
from feature_extractors.clip import SAMPLE_RATE

FORMAT_VERSION = 6
ARCHITECTURE = "WhisperSpec"
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""CTranslate2's numbers of types, as numpy's."""

HIGHEST_RANK = 3
"""Dimensions of the largest variable of a Whisper model: the filters of a convolution."""

HOP, WINDOW = 160, 400
"""Samples between two steps of Whisper's spectrogram, and samples per Fourier transform."""


def convert_encoder(source: Path, folder: Path) -> None:
    """Write the encoder of a Whisper model, for transformers.

    The folder gets `model.safetensors` (fp32, keys as in `WhisperModel`, without the decoder), `config.json`
    and `preprocessor_config.json`. The numbers of the architecture follow from the shapes of the weights.

    Args:
        source: Folder with a `model.bin` of CTranslate2.
        folder: Where to write.

    Raises:
        AssetError: The file is cut, malformed, or not a Whisper model; names the file and what is wrong.
        OSError: The file cannot be read, or the folder cannot be written.
    """
    from safetensors.numpy import save

    model = source / "model.bin"
    content = model.read_bytes()
    try:
        variables = read_variables(content)
        weights, config = encoder_weights(variables), model_config(variables)
    except AssetError as error:
        raise AssetError(f"{model}: {error}") from error
    named = {f"encoder.{name}": values for name, values in weights.items()}
    (folder / "model.safetensors").write_bytes(save(named, metadata={"format": "pt"}))
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(config))


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """All variables of a `model.bin`, by name; each is a view of `content` with the shape and type stored.

    Raises:
        AssetError: The content is not of this format, or a size in it does not agree with the rest.
    """
    reader = _Reader(content)
    version, architecture, _revision = reader.number("I"), reader.name(), reader.number("I")
    if (version, architecture) != (FORMAT_VERSION, ARCHITECTURE):
        raise AssetError(
            f"format {version} of {architecture!r}; only format {FORMAT_VERSION} of {ARCHITECTURE!r}"
            " can be read"
        )
    variables = {}
    for _ in range(reader.number("I")):
        if (name := reader.name()) in variables:
            raise AssetError(f"{name} occurs twice")
        if (rank := reader.number("B")) > HIGHEST_RANK:
            raise AssetError(f"{name} has {rank} dimensions; at most {HIGHEST_RANK} are expected")
        shape = tuple(reader.number("I") for _ in range(rank))
        type_number, size = reader.number("B"), reader.number("I")
        if type_number not in TYPES:
            raise AssetError(f"{name} has the unknown type {type_number}")
        dtype = np.dtype(TYPES[type_number])
        if size != math.prod(shape) * dtype.itemsize:
            raise AssetError(f"{name} has {size} bytes, which {_show(shape)} values of {dtype} do not have")
        variables[name] = np.frombuffer(reader.take(size), dtype).reshape(shape)
    for _ in range(2 * reader.number("I")):
        reader.name()  # an alias and its variable, which only the decoder has
    if rest := len(content) - reader.position:
        raise AssetError(f"{rest} bytes after the last variable")
    return variables


def encoder_weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's weights in fp32, by their names in transformers' `WhisperEncoder`.

    CTranslate2 stores the projections to queries, keys and values as one matrix. The keys have no bias in
    Whisper, so theirs must be zero.

    Raises:
        AssetError: A variable is missing, unknown or quantised, or its shape or values are not as expected.
    """
    unread = {name for name in variables if name.startswith("encoder/")} - {"encoder/num_heads"}
    weights: dict[str, np.ndarray] = {}

    def read(name: str, *shape: int) -> np.ndarray:
        stored = _variable(variables, f"encoder/{name}")
        if stored.dtype.kind != "f":
            raise AssetError(f"encoder/{name} is quantised to {stored.dtype}; float16 or float32 is expected")
        values = stored.astype(np.float32)
        if values.shape != shape:
            raise AssetError(f"encoder/{name} has shape {_show(values.shape)}, not {_show(shape)}")
        if not np.isfinite(values).all():
            raise AssetError(f"encoder/{name} has values that are not finite")
        unread.discard(f"encoder/{name}")
        return values

    def copy(target: str, source: str, *shape: int) -> None:
        weights[f"{target}.weight"] = read(f"{source}/weight", *shape)
        weights[f"{target}.bias"] = read(f"{source}/bias", shape[0])

    def copy_norm(target: str, source: str) -> None:
        weights[f"{target}.weight"] = read(f"{source}/gamma", width)
        weights[f"{target}.bias"] = read(f"{source}/beta", width)

    config = model_config(variables)
    width, hidden = config["d_model"], config["encoder_ffn_dim"]
    copy("conv1", "conv1", width, config["num_mel_bins"], 3)
    copy("conv2", "conv2", width, width, 3)
    positions = read("position_encodings/encodings", config["max_source_positions"], width)
    weights["embed_positions.weight"] = positions
    for number in range(config["encoder_layers"]):
        target, source = f"layers.{number}", f"layer_{number}"
        copy_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        matrices = np.split(read(f"{source}/self_attention/linear_0/weight", 3 * width, width), 3)
        biases = np.split(read(f"{source}/self_attention/linear_0/bias", 3 * width), 3)
        for part, matrix, bias in zip(("q_proj", "k_proj", "v_proj"), matrices, biases, strict=True):
            weights[f"{target}.self_attn.{part}.weight"] = matrix
            if part != "k_proj":
                weights[f"{target}.self_attn.{part}.bias"] = bias
            elif bias.any():
                raise AssetError(f"encoder/{source} has a bias of the keys, which Whisper does not have")
        copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1", width, width)
        copy_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        copy(f"{target}.fc1", f"{source}/ffn/linear_0", hidden, width)
        copy(f"{target}.fc2", f"{source}/ffn/linear_1", width, hidden)
    copy_norm("layer_norm", "layer_norm")
    if unread:
        raise AssetError(f"{min(unread)} is unknown")
    return weights


def model_config(variables: dict[str, np.ndarray]) -> dict:
    """The numbers of transformers' `WhisperConfig`, for encoder and decoder, from the variables' shapes.

    Raises:
        AssetError: A variable is missing or has an unexpected rank, or the heads do not divide the width.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = _variable(variables, name).shape
        if len(found) != rank:
            raise AssetError(f"{name} has {len(found)} dimensions, not {rank}")
        return found

    width, bands, _ = shape("encoder/conv1/weight", 3)
    config = {
        "model_type": "whisper",
        "activation_function": "gelu",
        "dtype": "float32",
        "d_model": width,
        "num_mel_bins": bands,
        "max_source_positions": shape("encoder/position_encodings/encodings", 2)[0],
        "max_target_positions": shape("decoder/position_encodings/encodings", 2)[0],
        "vocab_size": shape("decoder/embeddings/weight", 2)[0],
    }
    for part in ("encoder", "decoder"):
        shape(f"{part}/num_heads", 0)
        heads = variables[f"{part}/num_heads"].item()
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise AssetError(f"{part}/num_heads is {heads}, which does not divide the width {width}")
        layers = {name.split("/")[1] for name in variables if name.startswith(f"{part}/layer_")}
        config[f"{part}_attention_heads"] = heads
        config[f"{part}_layers"] = len(layers - {"layer_norm"})
        config[f"{part}_ffn_dim"] = shape(f"{part}/layer_0/ffn/linear_0/weight", 2)[0]
    return config


def _preprocessor_config(config: dict) -> dict:
    """Settings of transformers' `WhisperFeatureExtractor`: the encoder halves the rate of the spectrogram."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": WINDOW,
        "chunk_length": 2 * config["max_source_positions"] * HOP // SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


class _Reader:
    """Reads fields one after the other, and never beyond the end."""

    def __init__(self, content: bytes) -> None:
        self.content = memoryview(content)
        self.position = 0

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.content):
            raise AssetError(f"cut: {len(self.content)} bytes, at least {end} are expected")
        self.position, start = end, self.position
        return self.content[start:end]

    def number(self, kind: str) -> int:
        """An unsigned number of the size that `struct` gives to `kind`: B 1, H 2, I 4 bytes."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def name(self) -> str:
        text = str(self.take(self.number("H")), "latin-1")
        if not text.endswith("\0") or not (text.isascii() and text[:-1].isprintable()):
            raise AssetError(f"malformed name before byte {self.position}")
        return text[:-1]


def _variable(variables: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in variables:
        raise AssetError(f"{name} is missing")
    return variables[name]


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
