# SPDX-License-Identifier: Apache-2.0
"""dlib's face network as a vision encoder: the values of face-api.js, from a name alone."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from feature_extractors import get_asset
from msa_online import MSAConfig, MSAModel
from msa_online.encoders import load_encoder_config, load_preprocessors
from msa_online.encoders.face_resnet import FaceResNet, FaceResNetConfig, ResidualBlock
from msa_online.encoders.image import ImageEncoder
from msa_online.front_ends import face_size, restore_image_processor

NAME = "dlib-face-resnet"

FACE_API = (1.0694033, 1.4410857, 1.0069783, 1.0435324, 0.9604003, 1.5578973, 1.3765325, 1.0726005)
"""Averages of the first channels of `conv128_2` over `pattern()`, computed by the JavaScript of
@vladmandic/face-api 1.7.15 on tfjs 4.22 in fp32. All parameters of its `conv256_*` layers were set to zero,
which leaves their shortcuts, and `fc` to the identity, so that its descriptor is these averages."""


def pattern() -> np.ndarray:
    """A picture (150, 150, 3) of stripes and hyperbolas."""
    y, x = np.mgrid[:150, :150]
    return np.stack([(3 * x + 2 * y + 40 * c + x * y // 50) % 256 for c in range(3)], axis=-1).astype("u1")


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    encoder = ImageEncoder(load_encoder_config("vision", NAME), blendshapes=True).eval()
    encoder.load_pretrained(NAME)
    return encoder


def face_inputs(pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """One sample with these pictures `(frames, height, width, 3)` as the encoder's processor makes them."""
    processor = load_preprocessors(MSAConfig(vision_encoder=NAME, vision_config=FaceResNetConfig()))
    processor = restore_image_processor(processor["image_processor"])
    values = processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
    return {
        "vision_values": values["pixel_values"][None],
        "vision_mask": torch.ones(1, len(pictures), dtype=torch.bool),
        "vision_blendshapes": torch.zeros(1, len(pictures), 52),
    }


def test_states_are_those_of_face_apis_own_code(encoder):
    states = encoder.states(face_inputs(pattern()[None])).values
    assert states.shape == (1, 1, 512 + 52)
    channels = states[0, 0, :512].view(128, 4).mean(dim=1)[: len(FACE_API)]
    torch.testing.assert_close(channels, torch.tensor(FACE_API), atol=1e-5, rtol=0)


def test_a_state_has_the_average_of_each_quarter_of_the_picture(encoder):
    inputs = face_inputs(pattern()[None])
    states = encoder.states(inputs).values[0, 0, :512].view(128, 2, 2)
    last = encoder.model(inputs["vision_values"][0]).last_hidden_state[0]
    assert last.shape == (128, 8, 8)
    torch.testing.assert_close(states[:, 1, 0], last[:, 4:, :4].mean(dim=(1, 2)))


def test_shapes_are_known_without_the_files_and_are_those_of_the_files():
    known, stored = FaceResNetConfig(), FaceResNetConfig.from_pretrained(get_asset(NAME))
    assert known.widths == tuple(stored.widths) and known.depths == tuple(stored.depths)
    assert known.hidden_size == stored.hidden_size == 512
    assert sum(parameter.numel() for parameter in FaceResNet(stored).parameters()) == 1_148_992
    config = MSAConfig(vision_encoder=NAME, vision_config=known)
    assert config.widths["vision"] == 512
    assert face_size(load_preprocessors(config)["image_processor"]) == 150


@pytest.mark.parametrize("size", [7, 8])
def test_a_block_that_halves_pads_what_its_shortcut_has_more(size):
    """Against a loop over positions, in double precision; dlib adds zeros at the lower right."""
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, halve=True).double()
    picture = torch.randn(1, 2, size, size, dtype=torch.double)
    rows = (size - 3) // 2 + 1
    first = torch.zeros(3, rows + 2, rows + 2, dtype=torch.double)  # with a border of zeros
    for row in range(rows):
        for column in range(rows):
            patch = picture[0, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            value = (block.conv1.weight * patch).sum(dim=(1, 2, 3)) + block.conv1.bias
            first[:, row + 1, column + 1] = value.relu()
    expected = torch.zeros(3, size // 2, size // 2, dtype=torch.double)
    for row in range(rows):
        for column in range(rows):
            patch = first[:, row : row + 3, column : column + 3]
            expected[:, row, column] = (block.conv2.weight * patch).sum(dim=(1, 2, 3)) + block.conv2.bias
    expected[:2] += F.avg_pool2d(picture[0], 2)
    torch.testing.assert_close(block(picture)[0], expected.relu())


def test_the_lowest_blocks_are_frozen_with_the_stem(encoder):
    encoder = ImageEncoder(encoder.model.config, blendshapes=False)
    encoder.freeze_below(3)
    frozen = {name for name, parameter in encoder.model.named_parameters() if not parameter.requires_grad}
    assert len(encoder.layers) == 10
    assert {name.split(".conv")[0].split(".weight")[0].split(".bias")[0] for name in frozen} == {
        *("stem", "blocks.0", "blocks.1", "blocks.2")
    }


def test_a_model_with_the_encoder_is_rebuilt_from_its_checkpoint_alone(
    encoder, tiny_text_config, tmp_path, monkeypatch
):
    config = MSAConfig(text_config=tiny_text_config, vision_config=encoder.model.config, vision_encoder=NAME)
    model = MSAModel(config).eval()
    model.encoders["vision"].load_pretrained(NAME)
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("MSA_CACHE", str(tmp_path / "empty"))
    again = MSAModel.from_pretrained(tmp_path).eval()
    assert again.config.vision_encoder == NAME
    inputs = face_inputs(pattern()[None])
    assert torch.equal(*(it.encoders["vision"](inputs).values for it in (model, again)))
