# SPDX-License-Identifier: Apache-2.0
"""Read a corpus of clips: metadata.csv, MMSA's or MELD's layout, Arrow tables, or a Hub repository."""

import logging
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

from feature_extractors.clip import printable
from feature_extractors.sources import why_hub_is_silent
from msa_online.corpora.arrow_tables import is_arrow, read_arrow
from msa_online.corpora.corpus import TEXT_SUFFIXES, Corpus, CorpusError, Sample
from msa_online.corpora.downloads import LAYOUTS, recognise
from msa_online.corpora.layouts import (
    IMPORTED,
    MMSA_METADATA,
    RowTable,
    find_layout,
    read_metadata,
    read_mmsa,
)
from msa_online.corpora.splits import SPLITS, seeded_split
from msa_online.corpora.validation import check_label_column, check_rows

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FEATURE_SUFFIXES = (".npz", ".npy", ".pkl", ".pickle", ".safetensors")
FEATURES = "features.safetensors"
"""Names of precomputed features: `precomputed` reads them, `read_corpus` refuses them."""
SHOWN_NAMES = 8  # files listed in the message about a folder without metadata
logger = logging.getLogger(__name__)


def read_corpus(
    path: str | Path,
    *,
    label_column: str | None = "label",
    label_range: tuple[float, float] | None = None,
    skip_broken: bool = False,
    seed: int = 1111,
    audio_track: int | None = None,
    labels_optional: bool = False,
    texts_optional: bool = False,
) -> Corpus:
    """Read and check a corpus without decoding anything; reports all problems within a second.

    Supported are: a folder with metadata.csv (file_name, text, label; optional split, start, end, speaker,
    region, audio_track), or with one in each of train/, valid/ and test/; MMSA's label.csv with Raw/; MELD's
    csv files with their folders of clips; .parquet and .arrow files and `datasets.save_to_disk` folders;
    "owner/name" on the Hub. Splits given by the data are used. Otherwise clips are split 70/10/20 by speaker,
    or by file if there is no speaker.

    Args:
        path: The folder, the csv file or table in it, or the name of a data set on the Hub.
        label_column: Column of the label; None reads no labels.
        label_range: Smallest and largest legal label; labels become floats. None keeps them as class names.
        skip_broken: Leave out broken rows and log their number, instead of raising.
        seed: Seed of the split, if the data give none.
        audio_track: Audio track of rows that name none, counted from 1; None for `Clip`'s choice.
        labels_optional: Rows without a label are legal, and so are labels of any kind.
        texts_optional: The column of texts may be missing, because speech will be recognised.

    Raises:
        CorpusError: There is no metadata; a column is missing or its labels do not suit the task; or rows are
            broken, all of which are listed.
    """
    table = _read_rows(path, label_column, texts_optional)
    if label_column is not None and not labels_optional:
        check_label_column(table.rows, label_column, label_range, skip_broken)
    if audio_track is not None:
        rows = tuple(replace(row, audio_track=row.audio_track or str(audio_track)) for row in table.rows)
        table = replace(table, rows=rows)
    if labels_optional:
        rows = tuple(replace(row, label=(row.label or "").strip() or None) for row in table.rows)
        table = replace(table, rows=rows)
    samples, broken = check_rows(table, label_range)
    if broken and not skip_broken:
        raise CorpusError.of_rows(table.source, broken)
    if broken:
        total = len(broken) + len(samples)
        logger.warning("%s: left out %s broken rows of %s", printable(table.source), len(broken), total)
    if not samples:
        raise CorpusError(f"{table.source} has no usable row: write one row for every clip", broken)
    if not any(sample.split for sample in samples):
        samples = _with_seeded_split(samples, table.source, seed)
    return Corpus(tuple(samples), table.source, tuple(broken))


def _read_rows(path: str | Path, label_column: str | None, texts_optional: bool) -> RowTable:
    local = Path(path).expanduser()
    if not local.exists():
        if isinstance(path, str) and REPOSITORY.fullmatch(path):
            return _read_repository(path, label_column, texts_optional)
        raise CorpusError(f"{path} does not exist: give a folder with metadata.csv, or owner/name on the Hub")
    local = local.absolute()
    if local.is_file() and local.suffix.lower() in TEXT_SUFFIXES:
        read = read_mmsa if local.name in MMSA_METADATA else read_metadata
        return read(local, label_column, texts_optional)
    if local.suffix.lower() in FEATURE_SUFFIXES or (local / FEATURES).is_file():
        raise CorpusError(
            f"{path} holds precomputed features, not clips. They need no `prepare`: train on them with "
            "model.feature_widths in place of model.text_encoder; a pickle or an .npz file of another tool "
            f"is converted with: msa-online convert-features {shlex.quote(str(path))} FOLDER"
        )
    layout = find_layout(local) if local.is_dir() else None
    if layout is not None:
        return layout(local, label_column, texts_optional)
    if is_arrow(local):
        return read_arrow(local, label_column, texts_optional)
    raise CorpusError(_no_metadata(local))


def _read_repository(name: str, label_column: str | None, texts_optional: bool) -> RowTable:
    """Download a data set from the Hub, or take what its cache holds, and read it as a folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(name, repo_type="dataset", local_files_only=bool(why_hub_is_silent()))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(
            f"{name!r} is neither a local folder nor a data set that the Hub returned ({reason}). Check the "
            "name and the network, log in with `hf auth login` if it is private, or give a folder."
        ) from error
    if (snapshot / IMPORTED).is_file():
        raise CorpusError(
            f"{name!r} names clips on the machine where it was imported ({IMPORTED}): publish the clips "
            "beside their metadata.csv"
        )
    # a snapshot consists of links into blobs/, two folders up
    return replace(_read_rows(snapshot, label_column, texts_optional), links_into=snapshot.parents[1])


def _no_metadata(path: Path) -> str:
    looked_for = (
        "metadata.csv (also in train/, valid/, test/), label.csv with Raw/ (MMSA), train_sent_emo.csv "
        "(MELD), *.parquet, *.arrow"
    )
    if path.is_file():
        return f"{path} is not a .csv, .parquet or .arrow file: give the folder that contains metadata.csv"
    names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    if found := recognise(path):
        known = " and like ".join(LAYOUTS[name].title for name in found)
        commands = [f"msa-online import {name} {shlex.quote(str(path))} OUT" for name in found]
        remedy = f"It looks like {known}. Write a metadata.csv with: {' or: '.join(commands)}"
    else:
        remedy = (
            "Write a metadata.csv with the header file_name,text,label and a row for every clip: "
            f"`msa-online init-data {shlex.quote(str(path))}` starts one; `msa-online import auto PATH OUT` "
            "writes that of a public data set"
        )
    held = ", ".join(names[:SHOWN_NAMES])
    if len(names) > SHOWN_NAMES:
        held += f" and {len(names) - SHOWN_NAMES} more"
    return (
        f"{path} has no metadata.csv. Looked for: {looked_for}. The folder contains: {held or 'nothing'}. "
        f"{remedy}."
    )


def _with_seeded_split(samples: list[Sample], source: Path, seed: int) -> list[Sample]:
    files = [each.id.partition("@")[0] for each in samples]
    groups = [each.speaker or f"file {file}" for each, file in zip(samples, files, strict=True)]
    splits = seeded_split(groups, seed)
    sizes = Counter(splits)
    logger.warning(
        "%s gives no splits: %s clips of %s %s are split %s/%s/%s (train/valid/test, seed %s)",
        printable(source),
        len(samples),
        len(set(groups)),
        "speakers" if all(each.speaker for each in samples) else "speakers or files",
        *(sizes[name] for name in SPLITS),
        seed,
    )
    return [replace(sample, split=split) for sample, split in zip(samples, splits, strict=True)]
