# SPDX-License-Identifier: Apache-2.0
"""Heads that align by the times of words are refused where there are none."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from feature_extractors import FeatureCache
from feature_extractors.transcript import Transcript, Word
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.reading import read_corpus
from msa_online.methods import HEADS
from msa_online.training.data import check_word_times
from msa_online.training.yaml_reader import ConfigurationError

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
ALIGNING = [name for name, head in HEADS.items() if "alignment" in inspect.signature(head).parameters]


@pytest.mark.parametrize("head", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ALIGNING])
def test_features_have_no_times_of_words_which_is_said_before_training(head, train, tmp_path):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "features.npz",
        id=[f"s{row}" for row in range(20)],
        label=random.uniform(-3, 3, 20).round(3),
        split=(["train"] * 3 + ["valid"]) * 5,
        **{name: random.normal(size=(20, 4, width)) for name, width in WIDTHS.items()},
    )
    document = {
        "model": {
            "feature_widths": WIDTHS,
            "head": head,
            "head_kwargs": {"hidden_size": 8, "alignment": "words"},
        },
        "data": {"path": str(tmp_path / "features.npz")},
        "training": {"epochs": 1, "output_dir": str(tmp_path / "run"), "log_with": None},
    }
    with pytest.raises(ConfigurationError, match=r"none of the 15 training samples of .*features.npz has"):
        train(document)
    assert not (tmp_path / "run").exists()


def test_clips_without_times_of_words_are_counted(tiny_corpus, tiny_processor, cache_dir, capsys):
    corpus = read_corpus(tiny_corpus, label_range=(-3, 3))
    prepared = prepare(corpus, FeatureCache(), tiny_processor.settings, 1)
    with pytest.raises(ConfigurationError, match="alignment=words needs the times of words"):
        check_word_times(prepared, Console())
    ids = [sample.id for sample in prepared.split("train")]
    timed = Transcript("good", (Word("good", 0.1, 0.4),), "en", "a model")
    untimed = Transcript("good", (), "en", "a model")
    some = replace(prepared, transcripts={ids[0]: timed, ids[1]: untimed})
    check_word_times(some, Console())
    assert f"times of words: 1 of {len(ids)} training samples have them" in capsys.readouterr().out
    check_word_times(replace(prepared, transcripts=dict.fromkeys(ids, timed)), Console())
    assert capsys.readouterr().out == ""
