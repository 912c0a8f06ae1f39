# SPDX-License-Identifier: Apache-2.0
"""EBMC's published sizes, exact to the parameter (docs/methods/online_setting.md); nothing is allocated."""

from collections import Counter

import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.describe import count_parameters
from msa_online.encoders import load_encoder_config
from msa_online.methods import EBMCHead

PUBLISHED = {"cce": "shared", "uncertainty": "disagreement"}
ONLINE = {"hidden_size": 160, "learned_scalars": True, "missing_tokens": True}
ONLINE_WIDTHS = (160, 768, 160)


def parts_of(widths: tuple[int, int, int], outputs: int = 1, **settings) -> Counter:
    """Parameters of each part of a head for states of audio, text and vision of these widths."""
    names = ("audio", "text", "vision")
    with torch.device("meta"):
        head = EBMCHead(dict(zip(names, widths, strict=True)), outputs, **settings)
    counts = Counter()
    for name, parameter in head.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    return counts


@pytest.mark.parametrize(
    ("widths", "of_1_4_and_6_outputs"),
    [
        ((74, 768, 35), (5_953_552, 5_960_485, 5_965_107)),
        ((5, 768, 20), (5_932_048, 5_938_981, 5_943_603)),
        ((74, 768, 47), (5_956_624, 5_963_557, 5_968_179)),
        ((74, 1068, 35), (6_030_352, 6_037_285, 6_041_907)),
        ((512, 1024, 512), (6_253_328, 6_260_261, 6_264_883)),
        ((512, 1024, 1024), (6_384_400, 6_391_333, 6_395_955)),
        ((1582, 1024, 342), (6_483_728, 6_490_661, 6_495_283)),
    ],
)
def test_on_features_made_elsewhere_the_head_has_its_published_size(widths, of_1_4_and_6_outputs):
    found = tuple(parts_of(widths, outputs, **PUBLISHED).total() for outputs in (1, 4, 6))
    assert found == of_1_4_and_6_outputs


def test_the_offline_heads_parts_have_their_published_sizes():
    assert parts_of((512, 1024, 1024), **PUBLISHED) == {
        "projections": 656_128,
        "shared": 3 * (2 * 256**2 + 2 * 256),
        "private": 3 * (2 * 256**2 + 2 * 256),
        "norms": 3 * 2 * 256,
        "private_predictors": 3 * 257,  # with the three lines above, MSD's 791,811
        "generators": 197_120,
        "stacks": 3_947_520,
        "routers": 199_689,
        "fusion": 590_592,
        "classifier": 769,
        "predictors": 771,  # with the classifier, the heads' 1,540
    }
    assert 6 * (2 * 256**2 + 2 * 256) + 3 * 2 * 256 + 3 * 257 == 791_811


def test_the_reference_online_heads_parts_have_their_sizes():
    assert parts_of(ONLINE_WIDTHS, **PUBLISHED, **ONLINE) == {
        "projections": 174_560,
        "shared": 154_560,
        "private": 154_560,
        "norms": 960,  # with the two lines above, MSD's 310,080
        "private_predictors": 483,
        "generators": 77_120,
        "stacks": 1_545_600,
        "routers": 78_729,
        "fusion": 230_880,
        "predictors": 483,
        "classifier": 481,
        "missing": 480,
        "temperature": 1,
        "gain": 1,
    }


@pytest.mark.parametrize(("outputs", "expected"), [(1, 2_418_416), (4, 2_422_757), (6, 2_425_651)])
def test_without_tokens_and_scalars_the_online_head_has_the_size_of_the_published_structure(
    outputs, expected
):
    assert parts_of(ONLINE_WIDTHS, outputs, hidden_size=160, **PUBLISHED).total() == expected


def test_what_the_papers_own_structure_adds_is_its_generators_and_variances():
    ours, published = (parts_of(ONLINE_WIDTHS, **ONLINE, **settings) for settings in ({}, PUBLISHED))
    ours.subtract(published)
    added = {name: count for name, count in ours.items() if count}
    assert added == {"generators": 384_640, "predictors": 483}
    assert sum(added.values()) == 385_123


def test_attention_heads_add_no_parameters():
    one, four = (parts_of(ONLINE_WIDTHS, hidden_size=160, heads=heads) for heads in (1, 4))
    assert one == four


@pytest.mark.parametrize(
    ("text_encoder", "structure", "expected"),
    [
        ("bert-base-uncased", PUBLISHED, 112_320_746),
        ("bert-base-uncased", {}, 112_705_869),
        ("microsoft/deberta-v3-base", PUBLISHED, 187_260_650),
        ("sentence-transformers/all-MiniLM-L6-v2", PUBLISHED, 25_933_034),
    ],
)
def test_whole_models_have_the_documented_sizes(text_encoder, structure, expected):
    config = MSAConfig(
        text_config=load_encoder_config("text", text_encoder),
        blendshapes=False,
        head="ebmc",
        head_kwargs={**ONLINE, **structure},
    )
    with torch.device("meta"):
        counts = count_parameters(MSAModel(config))
    assert counts["total"] == expected
    assert counts["audio_encoder"] == 502_896 + 2 and counts["vision_encoder"] == 507_296 + 6
    scalars = counts["head.temperature"] + counts["head.gain"] + 2 + 6
    assert scalars == 10
