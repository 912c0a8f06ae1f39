# SPDX-License-Identifier: Apache-2.0
"""A small corpus of features, as arrays and as files."""

import csv
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def feature_arrays() -> dict[str, np.ndarray]:
    """Twelve samples as the keys of an .npz: text and audio in steps, vision one vector each."""
    random = np.random.default_rng(0)
    lengths = np.array([4, 3, 2, 1, 4, 4, 3, 3, 2, 4, 1, 2])
    arrays = {
        "id": np.array([f"s{number}" for number in range(12)]),
        "label": np.linspace(-3, 3, 12).astype(np.float32),
        "split": np.array(["train"] * 6 + ["valid"] * 3 + ["test"] * 3),
        "text": random.normal(size=(12, 4, 5)).astype(np.float32),
        "text_lengths": lengths,
        "audio": random.normal(2, 3, size=(12, 6, 3)),
        "vision": random.normal(size=(12, 2)).astype(np.float32),
    }
    arrays["text"][np.arange(4) >= lengths[:, None]] = 0
    arrays["audio"][3] = 0  # no sound
    arrays["audio"][4, 2:] = 0  # two steps, then padding
    return arrays


@pytest.fixture
def write_archive(tmp_path):
    """A function that writes arrays as an .npz file."""

    def write(arrays: dict[str, np.ndarray], name: str = "features.npz") -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


@pytest.fixture
def feature_folder(feature_arrays, write_archive, tmp_path) -> Path:
    """The same as a folder with metadata.csv and features.safetensors."""
    from msa_online.precomputed.conversion import convert_features

    convert_features(write_archive(feature_arrays), tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def rewrite_rows():
    """A function that changes the rows of a csv file: `change(rows)` gets and returns lists of dicts."""

    def rewrite(path: Path, change) -> None:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        rows = change(rows)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return rewrite
