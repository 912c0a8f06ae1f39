# SPDX-License-Identifier: Apache-2.0
"""Data sets as they are downloaded: one module reads one layout."""

import os
from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.downloads.cmu import MOSEI, MOSI
from msa_online.corpora.downloads.crema_d import CREMA_D
from msa_online.corpora.downloads.iemocap import IEMOCAP
from msa_online.corpora.downloads.layout import Layout
from msa_online.corpora.downloads.meld import MELD
from msa_online.corpora.downloads.mer2023 import MER2023
from msa_online.corpora.downloads.mmsa import CH_SIMS, CH_SIMS_V2, MMSA
from msa_online.corpora.downloads.mustard import MUSTARD
from msa_online.corpora.downloads.ravdess import RAVDESS

LAYOUTS: dict[str, Layout] = {
    "ch-sims": CH_SIMS,
    "ch-sims-v2": CH_SIMS_V2,
    "crema-d": CREMA_D,
    "iemocap": IEMOCAP,
    "meld": MELD,
    "mer2023": MER2023,
    "mmsa": MMSA,
    "mosei": MOSEI,
    "mosi": MOSI,
    "mustard": MUSTARD,
    "ravdess": RAVDESS,
}
SEARCHED_FOLDERS = 50


def recognise(path: Path) -> dict[str, Path]:
    """The layouts that a folder holds, and the folder of each: `path` itself, or one of its subfolders."""
    subfolders = sorted(
        child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")
    )
    for folders in ([path], subfolders[:SEARCHED_FOLDERS]):
        found = {
            name: folder for folder in folders for name, layout in LAYOUTS.items() if layout.is_here(folder)
        }
        if found:
            return found
    return {}


def find(path: Path, name: str) -> tuple[str, Path]:
    """The layout to read a folder in, by name or "auto", and the folder in which it begins.

    Raises:
        CorpusError: There is no such folder, or it does not hold the layout, or several with "auto".
    """
    if not path.is_dir():
        raise CorpusError(f"{path} is not a folder: give the folder of the unpacked data set")
    if not os.access(path, os.R_OK | os.X_OK):
        raise CorpusError(f"{path} is not readable for this user: change its permissions")
    found = recognise(path)
    if name != "auto" and name in found:
        return name, found[name]
    if name == "auto" and len(found) == 1:
        return next(iter(found.items()))
    if name == "auto" and found:
        raise CorpusError(f"{path} looks like {' and like '.join(found)}: name the layout in place of auto")
    if name == "auto":
        known = "; ".join(f"{name}: {layout.looks_like}" for name, layout in LAYOUTS.items())
        raise CorpusError(
            f"{path} holds none of the layouts that are recognised ({known}). Unpack all archives, or start "
            "a metadata.csv with: msa-online init-data FOLDER"
        )
    looks = f"; it looks like {' and like '.join(found)}" if found else ""
    raise CorpusError(
        f"{path} does not look like {LAYOUTS[name].title}{looks}. Expected in it or a subfolder: "
        f"{LAYOUTS[name].looks_like}"
    )
