# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import AutoConfig

from msa_online import MSAConfig

WIDTHS = {"text": 4, "audio": 3, "vision": 2}


def reloaded(config: MSAConfig, folder) -> MSAConfig:
    config.save_pretrained(folder)
    again = AutoConfig.from_pretrained(folder)
    assert again.to_dict() == AutoConfig.from_pretrained(folder).to_dict()
    return again


def test_the_output_of_a_regression_is_a_score_and_no_class(tmp_path):
    config = MSAConfig(feature_widths=WIDTHS, label_range=[-3, 3])
    again = reloaded(config, tmp_path)
    assert "LABEL" not in (tmp_path / "config.json").read_text()
    for each in (config, again):
        assert each.is_regression and each.num_labels == 1
        assert each.id2label == {0: "score"} and each.label2id == {"score": 0}


def test_a_checkpoint_of_an_earlier_version_is_a_regression_still(tmp_path):
    MSAConfig(feature_widths=WIDTHS, label_range=[-3, 3]).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.is_regression and again.id2label == {0: "score"}


def test_the_output_of_a_regression_may_have_a_name_of_its_own(tmp_path):
    again = reloaded(MSAConfig(feature_widths=WIDTHS, id2label={0: "valence"}), tmp_path)
    assert again.is_regression and again.id2label == {0: "valence"}


@pytest.mark.parametrize(
    "outputs", [{"num_labels": 2}, {"num_labels": 3}, {"id2label": {0: "sad", 1: "happy"}}]
)
def test_classes_keep_their_number_and_names(outputs, tmp_path):
    config = MSAConfig(feature_widths=WIDTHS, **outputs)
    again = reloaded(config, tmp_path)
    assert not config.is_regression and not again.is_regression
    assert again.num_labels == config.num_labels == outputs.get("num_labels", 2)
    assert again.id2label == config.id2label == outputs.get("id2label", again.id2label)
