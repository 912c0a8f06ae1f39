# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from msa_online import MSAConfig
from msa_online.evaluation.conditions import decide_under
from msa_online.evaluation.states import draw_states, embed, fused_states


def test_fused_states_are_those_of_each_condition_in_the_order_of_the_data(model, make_batch, accelerator):
    batch = make_batch(6)
    shuffled = {name: value[[3, 1, 5, 0, 2, 4]] for name, value in batch.items()}
    states, labels = fused_states(model, [shuffled], accelerator, ["text", "text+audio+vision"])
    assert list(states) == ["text", "text+audio+vision"]
    assert labels == pytest.approx(batch["labels"].numpy())
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        alone = decide_under(model, model.encode(**inputs), ("text",)).fused
    assert states["text"] == pytest.approx(alone.numpy(), abs=1e-4)
    assert not np.allclose(states["text"], states["text+audio+vision"])


def test_groups_of_states_stay_apart_in_the_picture_and_the_seed_decides_it():
    random = np.random.default_rng(0)
    states = np.concatenate([random.normal(centre, 0.1, (15, 6)) for centre in (-3, 3)])
    points = embed(states, seed=1)
    within = max(points[:15].std(axis=0).max(), points[15:].std(axis=0).max())
    assert np.linalg.norm(points[:15].mean(axis=0) - points[15:].mean(axis=0)) > 2 * within
    assert np.array_equal(points, embed(states, seed=1))
    with pytest.raises(ValueError, match="4 samples are too few"):
        embed(states[:4], seed=1)


def test_scores_and_classes_are_drawn(model, tmp_path):
    points = {"text": np.random.default_rng(0).normal(size=(8, 2))}
    classes = MSAConfig(feature_widths={"text": 2, "audio": 2, "vision": 2}, id2label={0: "calm", 1: "sad"})
    draw_states(points, np.linspace(-3, 3, 8), model.config, "scores", tmp_path / "scores.png")
    draw_states(points, np.arange(8) % 2, classes, "classes", tmp_path / "new" / "classes.svg")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "classes.svg").read_text().count("<use") >= 8
