# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, imported."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("benchmark_batches")


def test_padding_and_the_slowest_process_are_counted_by_hand(script):
    lengths = np.array([2, 4, 3, 3, 6, 2])
    step = [np.array(batch) for batch in ([0, 1], [2, 3], [4], [5])]  # 8 and 6 tokens, then 6 and 2
    padding, slowest = script.work([[step]], lengths, processes=2)
    assert padding == pytest.approx(1 - 20 / 22)
    assert slowest == pytest.approx((8 / 7 + 6 / 4) / 2)


def test_the_orders_are_compared_for_the_texts_of_a_corpus(script, tiny_text_encoder, tmp_path, capsys):
    rows = ["file_name,text,label,split"]
    for number in range(40):
        (tmp_path / f"{number}.mp4").write_bytes(b"not read")
        rows.append(
            f"{number}.mp4,{'good film ' * (1 + number % 7)},0.5,{'valid' if number < 4 else 'train'}"
        )
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = ["--text-encoder", str(tiny_text_encoder), "--batch-size", "4", "--epochs", "2"]
    assert script.main([str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    assert "36 texts" in printed
    assert [printed.count(order) for order in ("as in training", "random", "sorted pools")] == [3, 3, 3]
