# SPDX-License-Identifier: Apache-2.0
"""Converts dlib's face recognition network from face-api.js's files to a folder for transformers.

The network is a residual network of 29 convolutions, published by Davis King in the public domain
(`dlib_face_recognition_resnet_model_v1`). Each convolution is followed by a scale and an offset for each
channel. face-api.js has its weights in two files: a manifest in JSON (name, shape, and for weights of 8 bits
their scale and lowest value, in the order of storage) and the values, one weight after the other.

The upper part, which tells people apart, is left out: the encoder ends with the layers of 128 channels.
"""

import json
import math
from pathlib import Path

import numpy as np

from feature_extractors.catalogue import AssetError

MODEL_TYPE = "face_resnet"
"""`model_type` of the encoder's configuration; its class is in `msa_online/encoders/face_resnet.py`."""

WIDTHS, DEPTHS = (32, 64, 128), (3, 4, 3)
"""Channels of the three stages that are kept, and their numbers of blocks."""

SIZE = 150
"""Height and width of the network's pictures, in pixels."""

MEAN = (122.782, 117.001, 104.298)
"""Average red, green and blue of its pictures; values are divided by 255 after it is subtracted."""

FILES = ("face_recognition_model.bin", "face_recognition_model-weights_manifest.json")


def convert_face_network(source: Path, folder: Path) -> None:
    """Write the lower part of the face recognition network, for transformers.

    The folder gets `model.safetensors` (fp32), `config.json` and `preprocessor_config.json`.

    Args:
        source: Folder with the two files of face-api.js.
        folder: Where to write.

    Raises:
        AssetError: The files do not belong together, or a weight is missing; names the file.
        OSError: A file cannot be read, or the folder cannot be written.
    """
    from safetensors.numpy import save

    values, manifest = (source / name for name in FILES)
    try:
        weights = network_weights(read_weights(json.loads(manifest.read_bytes()), values.read_bytes()))
    except (AssetError, ValueError) as error:
        raise AssetError(f"{values}: {error}") from error
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    config = {"model_type": MODEL_TYPE, "dtype": "float32", "widths": WIDTHS, "depths": DEPTHS}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in MEAN],
        "image_std": [1.0, 1.0, 1.0],
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_weights(manifest: list[dict], content: bytes) -> dict[str, np.ndarray]:
    """All weights of a model of face-api.js, by name, in double precision.

    Args:
        manifest: The manifest: one group of weights, in the order of storage.
        content: The values: fp32, or 8-bit integers where the manifest has a scale and a lowest value.

    Raises:
        AssetError: The content is shorter or longer than the manifest says, or a type is unknown.
    """
    weights, position = {}, 0
    for entry in manifest[0]["weights"]:
        name, shape, steps = entry["name"], entry["shape"], entry.get("quantization")
        stored = entry["dtype"] if steps is None else steps["dtype"]
        if stored not in ("float32", "uint8"):
            raise AssetError(f"{name} has the unknown type {stored}")
        count, dtype = math.prod(shape), np.dtype(stored).newbyteorder("<")
        end = position + count * dtype.itemsize
        if end > len(content):
            raise AssetError(f"cut: {len(content)} bytes, at least {end} are expected")
        values = np.frombuffer(content, dtype, count, position).astype(np.float64).reshape(shape)
        weights[name] = values if steps is None else values * steps["scale"] + steps["min"]
        position = end
    if position < len(content):
        raise AssetError(f"{len(content) - position} bytes after the last weight")
    return weights


def network_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of the encoder in fp32, by their names in `FaceResNet`.

    The scale and the offset that follow a convolution become part of its filters and its bias.

    Raises:
        AssetError: A weight is missing or has an unexpected shape.
    """
    converted: dict[str, np.ndarray] = {}

    def read(name: str, *shape: int) -> np.ndarray:
        if name not in weights:
            raise AssetError(f"{name} is missing")
        if weights[name].shape != shape:
            raise AssetError(f"{name} has shape {weights[name].shape}, not {shape}")
        return weights[name]

    def convert(target: str, layer: str, edge: int, inputs: int, outputs: int) -> None:
        filters = read(f"{layer}/conv/filters", edge, edge, inputs, outputs)
        scale, bias = read(f"{layer}/scale/weights", outputs), read(f"{layer}/conv/bias", outputs)
        filters = (filters * scale).transpose(3, 2, 0, 1)  # (outputs, inputs, edge, edge)
        converted[f"{target}.weight"] = np.ascontiguousarray(filters, np.float32)
        offset = read(f"{layer}/scale/biases", outputs)
        converted[f"{target}.bias"] = (bias * scale + offset).astype(np.float32)

    convert("stem", "conv32_down", 7, 3, WIDTHS[0])
    number, inputs = 0, WIDTHS[0]
    for width, depth in zip(WIDTHS, DEPTHS, strict=True):
        names = [f"conv{width}_{block}" for block in range(1, depth + 1)]
        if width != inputs:
            names = [f"conv{width}_down", *names[:-1]]
        for name in names:
            convert(f"blocks.{number}.conv1", f"{name}/conv1", 3, inputs, width)
            convert(f"blocks.{number}.conv2", f"{name}/conv2", 3, width, width)
            number, inputs = number + 1, width
    return converted
