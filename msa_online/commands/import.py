# SPDX-License-Identifier: Apache-2.0
"""`msa-online import`: write the metadata.csv of a data set as it is downloaded."""

import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from msa_online.corpora.downloads import LAYOUTS
from msa_online.corpora.downloads.layout import Files
from msa_online.corpora.importing import Imported, import_dataset
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.split_checks import corpus_warnings
from msa_online.corpora.splits import SPLITS
from msa_online.corpora.validation import with_scores
from msa_online.evaluation.tables import show

LABEL_COLUMNS = ("label", "emotion", "sarcasm")  # in this order, the one to propose for training


def run(options: Namespace, console: Console) -> None:
    """Import a data set, and show what was recognised, what was left out, and the splits."""
    files = Files(*(Path(name).expanduser() if name else None for name in (options.labels, options.splits)))
    path, out = Path(options.path).expanduser(), Path(options.out).expanduser()
    imported = import_dataset(path, out, options.layout, options.protocol, files)
    layout = LAYOUTS[imported.layout]
    described = layout.protocols[imported.protocol]
    console.print(f"{imported.clips} was recognised as {layout.title} ({imported.layout})", soft_wrap=True)
    console.print(f"protocol {imported.protocol}: {described}", soft_wrap=True)
    if imported.left_out:
        show(_left_out(imported), console)
    column = next(
        (name for name in LABEL_COLUMNS if name in imported.label_columns), imported.label_columns[0]
    )
    corpus = read_corpus(imported.metadata, label_column=column, labels_optional=True)
    sizes = ", ".join(f"{corpus.sizes.get(name, 0):,} {name}" for name in SPLITS)
    speakers = len({sample.speaker for sample in corpus.samples if sample.speaker})
    of = f" of {speakers:,} speakers" if speakers else ""
    console.print(f"wrote {imported.metadata}: {imported.rows:,} clips{of} ({sizes})", soft_wrap=True)
    for note in imported.notes:
        console.print(f"note: {note}", soft_wrap=True)
    scored = replace(corpus, samples=tuple(with_scores(corpus.samples)))
    for warning in corpus_warnings(scored, None):
        console.print(f"warning: {warning}", soft_wrap=True)
    columns = ", ".join(imported.label_columns)
    console.print(f"columns of labels: {columns}", soft_wrap=True)
    folder = shlex.quote(str(out))
    console.print(f"next: msa-online prepare {folder} --label-column {column}", soft_wrap=True)


def _left_out(imported: Imported) -> Table:
    table = Table(title="left out")
    table.add_column("reason")
    table.add_column("rows", justify="right")
    table.add_column("for example")
    for reason, names in imported.left_out.items():
        table.add_row(reason, f"{len(names):,}", names[0])
    return table
