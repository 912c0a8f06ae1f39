# SPDX-License-Identifier: Apache-2.0
import torch

from msa_online.encoders.face import FaceEncoder


def face_inputs(frames: int = 4, size: int = 32) -> dict[str, torch.Tensor]:
    return {
        "vision_values": torch.randint(0, 256, (2, frames, size, size, 3)).to(torch.uint8),
        "vision_blendshapes": torch.rand(2, frames, 52, dtype=torch.float64),
        "vision_mask": torch.ones(2, frames, dtype=torch.bool),
    }


def test_default_widths_have_the_published_number_of_parameters():
    encoder = FaceEncoder(32, 160, blendshapes=False)
    assert (
        sum(parameter.numel() for parameter in encoder.parameters()) == 507_296 + 6
    )  # layers + input scaling


def test_a_full_size_crop_shrinks_sixteen_times_before_pooling():
    encoder = FaceEncoder(8, 16, blendshapes=False)
    seen = []
    encoder.norms[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    encoder(face_inputs(size=96))
    assert seen == [(8, 64, 6, 6)]


def test_a_frame_without_a_face_reaches_no_other_frame():
    encoder = FaceEncoder(8, 16, blendshapes=True).double().eval()
    inputs = face_inputs()
    inputs["vision_mask"][:, 1] = False
    before = encoder(inputs)
    inputs["vision_values"][:, 1] = 255
    inputs["vision_blendshapes"][:, 1] = 1.0
    after = encoder(inputs)
    assert torch.equal(before.values, after.values)
    assert (after.values[:, 1] == 0).all()


def test_frames_of_padding_change_nothing():
    encoder = FaceEncoder(8, 16, blendshapes=True).double().eval()
    inputs = face_inputs(frames=6)
    inputs["vision_mask"][:, 4:] = False
    alone = encoder({name: value[:, :4] for name, value in inputs.items()}).values
    torch.testing.assert_close(encoder(inputs).values[:, :4], alone, atol=1e-12, rtol=0)


def test_blendshapes_are_read_only_when_switched_on():
    inputs = face_inputs()
    other = inputs | {"vision_blendshapes": 1 - inputs["vision_blendshapes"]}
    for switched_on in (True, False):
        encoder = FaceEncoder(8, 16, blendshapes=switched_on).double().eval()
        assert torch.equal(encoder(inputs).values, encoder(other).values) != switched_on
