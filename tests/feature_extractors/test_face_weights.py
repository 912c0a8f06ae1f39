# SPDX-License-Identifier: Apache-2.0
"""dlib's face network, converted: every weight under its name, and one line if the files are bad."""

import json

import numpy as np
import pytest

from feature_extractors import AssetError
from feature_extractors.catalogue import asset_of_model
from feature_extractors.face_weights import FILES, convert_face_network, network_weights, read_weights


def entry(name: str, shape: list[int], steps: dict | None = None, dtype: str = "float32") -> dict:
    return {"name": name, "shape": shape, "dtype": dtype} | ({"quantization": steps} if steps else {})


MANIFEST = [
    {
        "weights": [
            entry("a", [2, 3]),
            entry("b", [4], {"dtype": "uint8", "scale": 0.5, "min": -3.0}),
            entry("c", [], {"dtype": "uint8", "scale": 2.0, "min": 1.0}),
        ]
    }
]
CONTENT = np.arange(6, dtype="<f4").tobytes() + bytes([0, 1, 100, 255]) + bytes([7])


def face_network() -> dict[str, np.ndarray]:
    """Random weights of face-api.js's network under its own names, as deep as dlib's."""
    random = np.random.default_rng(0)
    layers = {"conv32_down": (7, 3, 32)}
    before = 32
    for width, names in (
        (32, ("1", "2", "3")),
        (64, ("down", "1", "2", "3")),
        (128, ("down", "1", "2")),
        (256, ("down",)),
    ):
        for name in names:
            layers[f"conv{width}_{name}/conv1"] = (3, before, width)
            layers[f"conv{width}_{name}/conv2"] = (3, width, width)
            before = width
    weights = {}
    for layer, (edge, inputs, outputs) in layers.items():
        weights[f"{layer}/conv/filters"] = random.standard_normal((edge, edge, inputs, outputs))
        for name in ("conv/bias", "scale/weights", "scale/biases"):
            weights[f"{layer}/{name}"] = random.standard_normal(outputs)
    return weights


def test_values_of_8_bits_and_of_32_are_read_in_the_order_of_the_manifest():
    weights = read_weights(MANIFEST, CONTENT)
    np.testing.assert_array_equal(weights["a"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(weights["b"], [-3, -2.5, 47, 124.5])
    assert weights["c"] == 15 and weights["c"].shape == ()


@pytest.mark.parametrize(
    ("manifest", "content", "message"),
    [
        (MANIFEST, CONTENT[:-1], "cut: 28 bytes, at least 29 are expected"),
        (MANIFEST, CONTENT + b"x", "1 bytes after the last weight"),
        ([{"weights": [entry("a", [2], dtype="int32")]}], bytes(8), "a has the unknown type int32"),
    ],
    ids=["cut", "longer", "type"],
)
def test_content_that_does_not_fit_the_manifest_is_refused(manifest, content, message):
    with pytest.raises(AssetError, match=f"^{message}$"):
        read_weights(manifest, content)


def test_scale_and_offset_become_part_of_the_convolution_and_the_upper_part_is_left_out():
    """A convolution of one position, computed as face-api.js does: filters, bias, scale, offset."""
    stored = face_network()
    weights = network_weights(stored)
    assert len(weights) == 2 * 21 and all(values.dtype == np.float32 for values in weights.values())
    patch = np.random.default_rng(1).standard_normal((3, 3, 64))
    for target, layer in (("blocks.3.conv2", "conv64_down/conv2"), ("blocks.4.conv1", "conv64_1/conv1")):
        filtered = np.einsum("rci,rcio->o", patch, stored[f"{layer}/conv/filters"])
        filtered += stored[f"{layer}/conv/bias"]
        expected = filtered * stored[f"{layer}/scale/weights"] + stored[f"{layer}/scale/biases"]
        found = np.einsum("rci,oirc->o", patch, weights[f"{target}.weight"]) + weights[f"{target}.bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "conv128_2/conv2/scale/weights is missing"),
        (np.ones(3), r"conv128_2/conv2/scale/weights has shape \(3,\), not \(128,\)"),
    ],
)
def test_a_weight_that_is_missing_or_has_another_shape_is_named(change, message):
    weights = face_network()
    del weights["conv128_2/conv2/scale/weights"]
    if change is not None:
        weights["conv128_2/conv2/scale/weights"] = change
    with pytest.raises(AssetError, match=f"^{message}$"):
        network_weights(weights)


@pytest.mark.parametrize("manifest", ["not JSON", json.dumps(MANIFEST)])
def test_other_files_are_refused_with_their_name_and_nothing_is_written(manifest, tmp_path):
    (tmp_path / FILES[0]).write_bytes(CONTENT)
    (tmp_path / FILES[1]).write_text(manifest)
    (folder := tmp_path / "converted").mkdir()
    with pytest.raises(AssetError, match=r"face_recognition_model.bin: .*") as caught:
        convert_face_network(tmp_path, folder)
    assert "\n" not in str(caught.value) and not list(folder.iterdir())


def test_the_encoder_is_found_by_the_name_of_its_asset():
    assert asset_of_model("dlib-face-resnet") == "dlib-face-resnet"
    assert asset_of_model("face-api-recognition") is None
