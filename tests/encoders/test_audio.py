# SPDX-License-Identifier: Apache-2.0
import torch

from msa_online.encoders.audio import AudioEncoder


def test_default_widths_have_the_published_number_of_parameters():
    encoder = AudioEncoder((368, 192), 160)
    assert (
        sum(parameter.numel() for parameter in encoder.parameters()) == 502_896 + 2
    )  # layers + input scaling


def test_four_seconds_become_fifty_states_and_the_mask_follows():
    encoder = AudioEncoder((16, 16), 8).eval()
    mask = torch.arange(400) < torch.tensor([[400], [200], [201], [1]])
    sequence = encoder({"audio_values": torch.randn(4, 400, 80), "audio_mask": mask})
    assert sequence.values.shape == (4, 50, 8)
    assert sequence.mask.sum(dim=1).tolist() == [50, 25, 26, 1]  # ceil(steps / 8)
    assert (sequence.values[~sequence.mask] == 0).all()


def test_padding_and_what_it_holds_change_nothing():
    encoder = AudioEncoder((16, 16), 8).double().eval()
    values = torch.randn(1, 77, 80, dtype=torch.float64)
    alone = encoder({"audio_values": values, "audio_mask": torch.ones(1, 77, dtype=torch.bool)}).values
    padded = torch.cat([values, torch.full((1, 50, 80), 1e3, dtype=torch.float64)], dim=1)
    together = encoder({"audio_values": padded, "audio_mask": torch.arange(127)[None] < 77}).values
    torch.testing.assert_close(together[:, : alone.shape[1]], alone, atol=1e-12, rtol=0)
