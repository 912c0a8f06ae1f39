# SPDX-License-Identifier: Apache-2.0
"""What each reader of the training and validation splits gets to see."""

import numpy as np
import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureCorpus
from msa_online.precomputed.reading import read_features
from msa_online.training.config import MissingArguments, TrainingArguments
from msa_online.training.masking import draw_split_masks, make_input_masks

SAMPLES = 40  # half for training, half for validation
WIDTHS = {"text": 3, "audio": 2, "vision": 4}


@pytest.fixture
def data(tmp_path) -> FeatureCorpus:
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(SAMPLES)]),
        label=random.uniform(-3, 3, SAMPLES),
        split=np.array(["train", "valid"] * (SAMPLES // 2)),
        **{name: random.normal(3, 1, size=(SAMPLES, 9, width)) for name, width in WIDTHS.items()},
    )
    return read_features(tmp_path / "features.npz")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """All samples of either split, with nothing missing."""
    half = SAMPLES // 2
    shown = {"index": torch.arange(half), "modality_present": torch.ones(half, 3, dtype=torch.bool)}
    for name, width in WIDTHS.items():
        shown[f"{name}_values"] = torch.full((half, 9, width), 3.0)
        shown[f"{name}_mask"] = torch.ones(half, 9, dtype=torch.bool)
    return shown


def input_masks(data: FeatureCorpus, missing: MissingArguments | None = None, **training):
    masks = draw_split_masks(data, missing or MissingArguments())
    model = MSAModel(MSAConfig(feature_widths=WIDTHS, label_range=[-3, 3]))
    return masks, make_input_masks(data, TrainingArguments(**training), masks, model, None)


def test_a_mask_is_all_that_training_validation_and_a_teacher_see(data, batch):
    masks, found = input_masks(data, MissingArguments(rates=0.5))
    for reader, split in (("train", "train"), ("teacher", "train"), ("valid", "valid")):
        assert torch.equal(found[reader].apply(batch)["modality_present"], masks[split].kept)
    assert not torch.equal(masks["train"].kept, masks["valid"].kept)


def test_dropout_of_modalities_is_for_training_alone(data, batch):
    masks, found = input_masks(data, modality_dropout={"text": 0.5})
    found["train"].start_epoch(0)
    assert not masks and not found["train"].apply(batch)["modality_present"].all()
    for reader in ("valid", "teacher"):
        assert found[reader].apply(batch)["modality_present"].all()


def test_frames_are_dropped_from_training_and_half_of_them_from_validation(data, batch):
    _, found = input_masks(data, frame_dropout=True)
    share = {}
    for reader, mask in found.items():
        mask.start_epoch(0)
        seen = mask.apply(batch)
        share[reader] = np.mean([(seen[f"{name}_values"] == 0).double().mean() for name in MODALITIES])
    assert share["teacher"] == 0.0
    assert share["train"] == pytest.approx(0.25, abs=0.12) and share["valid"] == pytest.approx(0.5, abs=0.1)
