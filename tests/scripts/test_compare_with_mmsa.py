# SPDX-License-Identifier: Apache-2.0
"""The corpus of the comparison with MMSA; the toolkit itself is not installed here."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.reading import read_features


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("compare_with_mmsa")


def test_features_and_tokens_of_the_corpus_say_the_same(script, tmp_path):
    script.write_corpus(tmp_path, 45)
    corpus = read_features(tmp_path / "features", label_range=(-3, 3))
    assert {name: steps.width for name, steps in corpus.steps.items()} == script.WIDTHS
    labels = json.loads((tmp_path / script.LABELS).read_text())
    assert {sample.id: sample.label for sample in corpus.split("test")} == pytest.approx(labels["test"])
    convert_features(tmp_path / "features.pkl", tmp_path / "again", text_encoder=str(tmp_path / "bert"))
    of_tokens = read_features(tmp_path / "again")
    torch.testing.assert_close(
        of_tokens.steps["text"].values, corpus.steps["text"].values, atol=1e-4, rtol=1e-4
    )
    for name in ("audio", "vision"):
        assert np.array_equal(corpus.steps[name].lengths, corpus.steps["text"].lengths)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    assert AutoModel.from_pretrained(tmp_path / "bert").config.vocab_size == len(tokenizer)
    assert tokenizer.unk_token_id not in tokenizer([sample.text for sample in corpus.samples])["input_ids"][0]


def test_cells_are_means_with_the_deviation_over_seeds(script):
    scored = [dict.fromkeys(script.SHOWN, value) for value in (0.25, 0.75)]
    assert script.cells_of(scored) == ["0.500 ± 0.354", "0.500 ± 0.354", "50.0 ± 35.4", "50.0 ± 35.4"]
    assert script.cells_of(scored[:1])[0] == "0.250"
