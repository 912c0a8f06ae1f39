# SPDX-License-Identifier: Apache-2.0
"""Read MMSA's pickled features in a separate process that builds plain data only."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import MOST_ROWS
from msa_online.corpora.limited_process import LimitExceededError, last_line, run_limited
from msa_online.corpora.splits import split_of
from msa_online.corpora.validation import number_in
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import FeatureTable, check_sizes, checked_lengths, table_of, unpadded
from msa_online.precomputed.mmsa_pickle import (
    COLUMNS,
    FOREIGN,
    TENSORS,
    TOKENS,
    TOO_MANY_ROWS,
    UNUSABLE,
)

READER = Path(__file__).with_name("mmsa_pickle.py")
SMALL, SECONDS = 1 << 28, 60  # bytes and CPU time that a pickle of any size may need
SEPARATOR = "$_$"  # between video and clip in MMSA's ids; one video shows one speaker


def read_mmsa_features(path: Path, *, tokens: bool = False) -> FeatureTable:
    """Read the rows and features of a pickle in MMSA's layout; no code of the pickle is executed.

    The layout: `train`, `valid` and `test`, each with `id`, `text`, `audio`, `vision`, columns of labels, and
    optionally `raw_text`, `audio_lengths`, `vision_lengths`. Without lengths, rows of zeros at the end are
    padding. Token ids in `text_bert` become `FeatureTable.tokens`.

    Args:
        path: The pickle.
        tokens: Read the token ids also where the file has features of the text.

    Raises:
        CorpusError: The file is missing or corrupt, contains anything but arrays and plain data, exceeds the
            limits for its size, or has another layout.
    """
    if not path.is_file():
        raise CorpusError(f"{path} does not exist: give the pickle itself")
    with tempfile.TemporaryDirectory(prefix="msa-features-") as folder:
        _read_in_a_process(path, folder)
        tensors = load_file(Path(folder, TENSORS))  # not memory-mapped: the folder is deleted
        columns = json.loads(Path(folder, COLUMNS).read_text(encoding="utf-8"))
    splits = {name: split_of(name) for name in columns}
    if not splits or None in splits.values() or not all("id" in of_split for of_split in columns.values()):
        held = [f"{name} ({', '.join(of_split) or 'no columns'})" for name, of_split in columns.items()]
        raise CorpusError(
            f"{path} does not have MMSA's layout: train, valid and test with a key 'id' in each are needed, "
            f"the file contains: {', '.join(held) or 'none of these'}"
        )
    columns = {
        split: of_split for split, of_split in columns.items() if not _is_empty(split, of_split, tensors)
    }
    if not columns:
        raise CorpusError(f"{path}: {', '.join(splits)} have no samples: copy or download it again")
    metadata = table_of(path, _joined_columns(path, columns, splits))
    held = [name for name in (*MODALITIES, TOKENS) if any(f"{split}/{name}" in tensors for split in columns)]
    if "text" in held and TOKENS in held and not tokens:
        held.remove(TOKENS)  # what is not used cannot make the file unusable
    steps = {name: _joined_steps(path, name, tensors, columns) for name in held}
    token_ids = steps.pop(TOKENS, None)
    return check_sizes(FeatureTable(metadata, tuple(range(len(metadata.rows))), steps, token_ids), path)


def _read_in_a_process(path: Path, folder: str) -> None:
    """Let the reader process write the content of a pickle to a folder, with limits that depend on its size.

    Arrays need three times the size of their pickle: for its bytes, the arrays, and the output.
    """
    size = path.stat().st_size
    try:
        done = run_limited(
            READER,
            (path, folder, MOST_ROWS),
            memory=SMALL + 8 * size,
            seconds=SECONDS + size // 1_000_000,
            output=SMALL + 4 * size,
        )
    except LimitExceededError as error:
        raise CorpusError(
            f"{path} ({size:,} bytes) needs more than {error} to be read, the limit for a pickle of its "
            "size: it is damaged or malicious. If you trust it, save its arrays as an .npz file."
        ) from error
    if done.returncode == TOO_MANY_ROWS:
        raise CorpusError(f"{path} has a split of more than {MOST_ROWS:,} samples: split it into parts")
    if done.returncode == FOREIGN:
        raise CorpusError(
            f"{path} contains {done.stdout.strip()}, which is neither an array nor plain data. Nothing of "
            "the file was executed. Save the features as numpy arrays, in a pickle or an .npz file."
        )
    if done.returncode == UNUSABLE:
        raise CorpusError(f"{path}: {done.stdout.strip()}")
    if done.returncode != 0:
        raise CorpusError(f"{path} cannot be read as a pickle ({last_line(done)}): copy or download it again")


def _joined_columns(
    path: Path, columns: Mapping[str, Mapping[str, list[str]]], splits: Mapping[str, str]
) -> dict[str, list[str]]:
    """All columns, concatenated over splits, and `split`; a cell is empty where a split lacks its column.

    Ids that join a video and a clip give `speaker`, `dialogue` and `turn` to the splits that lack them.
    """
    for split, of_split in columns.items():
        for key, cells in of_split.items():
            if len(cells) != len(of_split["id"]):
                raise CorpusError(
                    f"{path}: {split} has {len(cells):,} {key} for {len(of_split['id']):,} ids: one is "
                    "needed for each"
                )
    columns = _with_columns_of_ids(columns)
    joined: dict[str, list[str]] = {key: [] for of_split in columns.values() for key in of_split}
    for of_split in columns.values():
        for key, cells in joined.items():
            cells += of_split.get(key, [""] * len(of_split["id"]))
    joined["split"] = [splits[split] for split, of_split in columns.items() for _ in of_split["id"]]
    return joined


def _with_columns_of_ids(columns: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """The columns of each split, with those that follow from the ids if all ids join a video and a clip."""
    found = {}
    for split, of_split in columns.items():
        parts = [name.rpartition(SEPARATOR) for name in of_split["id"]]
        videos, clips = [video for video, _, _ in parts], [clip for _, _, clip in parts]
        if not all(videos):
            return {split: dict(of_split) for split, of_split in columns.items()}
        found[split] = {"speaker": videos, "dialogue": videos, "turn": clips, **of_split}
    return found


def _joined_steps(
    path: Path, name: str, tensors: Mapping[str, np.ndarray], columns: Mapping[str, Mapping[str, list[str]]]
) -> FeatureSteps:
    """Features of a modality, concatenated over splits."""
    parts = []
    for split, of_split in columns.items():
        key = f"{split}/{name}"
        if key not in tensors:
            raise CorpusError(
                f"{path}: {split} has no {name}, though other splits have it: add it, or delete it from all"
            )
        cells = of_split.get(f"{name}_lengths")
        lengths = None if cells is None else _lengths(path, f"{split} {name}_lengths", cells)
        own = tensors.get(f"{key}/lengths")
        if own is None:
            parts.append(unpadded(path, f"{split} {name}", tensors[key], lengths))
            continue
        if lengths is None or len(lengths) != len(own):  # another number of samples is refused later
            lengths = own
        kept = checked_lengths(path, f"{split} {name}", lengths, own)
        starts = np.cumsum([0, *own[:-1]])
        sequences = [tensors[key][at : at + steps] for at, steps in zip(starts, kept, strict=True)]
        parts.append(FeatureSteps.join(sequences, tensors[key].shape[-1]))
    widths = sorted({part.width for part in parts} - {0})  # 0: empty lists, which have no width
    if not widths:
        raise CorpusError(f"{path}: {name} is empty in every sample: add its features, or delete the key")
    if len(widths) > 1:
        raise CorpusError(f"{path}: {name} is {' and '.join(map(str, widths))} wide in different splits")
    lengths = np.concatenate([part.lengths for part in parts])
    values = torch.cat([part.values for part in parts if part.width])
    return FeatureSteps(values, np.cumsum([0, *lengths], dtype=np.int64))


def _is_empty(split: str, of_split: Mapping[str, list[str]], tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a split has the keys of one but no samples."""
    features = [array for key, array in tensors.items() if key.startswith(f"{split}/")]
    return not any(map(len, [*of_split.values(), *features]))


def _lengths(path: Path, key: str, cells: list[str]) -> np.ndarray:
    numbers = [number_in(cell) for cell in cells]
    if None in numbers:
        row = numbers.index(None)
        raise CorpusError(
            f"{path}: {key} is {cells[row]!r} in row {row + 1}: write whole numbers, or leave the key out"
        )
    return np.array(numbers, dtype=np.float64)
