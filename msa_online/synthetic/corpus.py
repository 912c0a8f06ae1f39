# SPDX-License-Identifier: Apache-2.0
"""Render a corpus of short talking clips in which the contribution of every modality is known.

    recipe = CorpusRecipe(clips=240, strengths={"text": 0.9, "audio": 0.6, "vision": 0.8})
    render_corpus("corpus", recipe)
    ideal_contributions(recipe)      # {"text": 0.53, "audio": 0.16, "vision": 0.32}: what a model should find

The clips are real media files: a photograph of a face, warped to an expression (`face`); synthesised speech
with neutral words and a cue in its tone (`voice`); and sentences of graded sentiment (`text`). `plan` draws
the content of all clips and computes the ideal contributions.
"""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.validation import why_not_writable
from msa_online.extras import why_not_installed
from msa_online.modalities import MODALITIES
from msa_online.synthetic.plan import (
    CorpusRecipe,
    PlannedClip,
    bayes_weights,
    ideal_contributions,
    plan_corpus,
)

__all__ = [
    "CorpusRecipe",
    "PlannedClip",
    "bayes_weights",
    "ideal_contributions",
    "plan_corpus",
    "render_corpus",
]

RENDERING = 1  # version; increase it when equal recipes give other clips
BYTES_PER_CLIP = 200_000  # upper bound; a clip takes 20 to 40 kB
COLUMNS = (
    *("file_name", "text", "label", "split", "speaker"),
    *(f"{name}_cue" for name in MODALITIES),
    *("contradicting", "missing"),
)


def render_corpus(folder: str | Path, recipe: CorpusRecipe, workers: int | None = None) -> Path:
    """Render a corpus to a folder, unless it exists there: `metadata.csv`, `recipe.json`, `clips/*.mp4`.

    An interrupted run continues where it stopped. `metadata.csv` is written last, so a folder with this file
    is complete. Equal recipes give equal tables, frames and waveforms, whatever the number of workers.

    Args:
        folder: Folder of the corpus; created if necessary.
        recipe: What to render.
        workers: Number of clips rendered in parallel, by default one per core. Workers are threads: drawing
            and encoding release Python's lock, and speech is synthesised in separate processes.

    Returns:
        The folder.

    Raises:
        CorpusError: The folder contains something else, the disk is too small, or the libraries of the extra
            `demo` are not installed.
    """
    folder = Path(folder)
    _require_libraries()
    _claim(folder, recipe)
    if (folder / "metadata.csv").exists():
        return folder
    plan = plan_corpus(recipe)
    todo = [index for index, planned in enumerate(plan) if not (folder / planned.file_name).exists()]
    _require_space(folder, len(todo))
    _render_clips(folder, recipe, plan, todo, workers or os.cpu_count() or 1)
    _write_table(folder / "metadata.csv", plan)
    return folder


def _require_libraries() -> None:
    for library in ("skimage", "espeakng_loader"):
        if reason := why_not_installed(library):
            raise CorpusError(f"clips cannot be rendered: {reason}")


def _claim(folder: Path, recipe: CorpusRecipe) -> None:
    """Create the folder and write the recipe to it; refuse a folder with other contents."""
    settings = {"rendering": RENDERING} | asdict(recipe)
    if not recipe.hidden_signs:  # recipes of earlier versions lack the key
        del settings["hidden_signs"]
    content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    note = folder / "recipe.json"
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder} is a file: name a folder to render into")
    if note.exists():
        if not _same_recipe(note, content):
            raise CorpusError(
                f"{folder} contains a corpus of another recipe (see {note}): "
                "name another folder, or delete this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise CorpusError(f"{folder} is not empty and has no recipe.json: name a new folder to render into")
    if reason := why_not_writable(folder):
        raise CorpusError(f"{folder} cannot be created: {reason}; name another folder")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    if not note.exists():
        note.write_text(content, encoding="utf-8")


def _same_recipe(note: Path, content: str) -> bool:
    try:
        return json.loads(note.read_text(encoding="utf-8")) == json.loads(content)
    except ValueError:  # damaged
        return False


def _require_space(folder: Path, clips: int) -> None:
    needed, free = clips * BYTES_PER_CLIP, shutil.disk_usage(folder).free
    if free < needed:
        raise CorpusError(
            f"{folder} has {free / 1e6:.0f} MB free and {clips} clips need up to {needed / 1e6:.0f} MB: "
            "free some space or name a folder on another disk"
        )


def _render_clips(
    folder: Path, recipe: CorpusRecipe, plan: Sequence[PlannedClip], todo: Sequence[int], workers: int
) -> None:
    from rich.progress import track

    from msa_online.synthetic.clip import write_clip
    from msa_online.synthetic.face import FaceRenderer

    renderer = FaceRenderer()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(write_clip, folder / plan[index].file_name, recipe, index, plan[index], renderer)
            for index in todo
        ]
        try:
            for job in track(as_completed(jobs), "rendering clips", total=len(jobs), transient=True):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, do not render the rest


def _write_table(path: Path, plan: Sequence[PlannedClip]) -> None:
    handle, draft = tempfile.mkstemp(suffix=".part", dir=path.parent)
    with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
        signs = list(plan[0].signs)
        writer = csv.DictWriter(file, (*COLUMNS, *(f"{name}_sign" for name in signs)))
        writer.writeheader()
        for planned in plan:
            row = {name: getattr(planned, name) for name in COLUMNS if not name.endswith("_cue")}
            row |= {f"{name}_cue": planned.cues[name] for name in MODALITIES}
            writer.writerow(row | {f"{name}_sign": planned.signs[name] for name in signs})
    os.chmod(draft, 0o644)
    os.replace(draft, path)
