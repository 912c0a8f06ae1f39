# SPDX-License-Identifier: Apache-2.0
"""`msa-online synthesize`: make a corpus in which the contribution of each modality is known."""

from argparse import Namespace
from typing import Any

from rich.console import Console
from rich.table import Table

from msa_online.evaluation.tables import format_metric, format_share, show
from msa_online.modalities import CONDITIONS, MODALITIES, NOTHING
from msa_online.synthetic.control import FACTORS, TRUTH, ControlRecipe, write_control
from msa_online.synthetic.corpus import CorpusRecipe, render_corpus

ONLY_FOR = {"clips": ("clips", "workers"), "control": ("shared", "sizes", "difficulty", "noise")}


def run(options: Namespace, console: Console) -> None:
    """Make the corpus of the chosen kind."""
    for kind, names in ONLY_FOR.items():
        if kind != options.kind and (given := [name for name in names if getattr(options, name) is not None]):
            options.refuse(f"--{given[0]} is for --kind {kind}")
    {"clips": _render_clips, "control": _make_control}[options.kind](options, console)


def _render_clips(options: Namespace, console: Console) -> None:
    defaults = CorpusRecipe()
    strengths = {
        name: value if (value := getattr(options, name)) is not None else defaults.strengths[name]
        for name in MODALITIES
    }
    recipe = CorpusRecipe(clips=options.clips or defaults.clips, seed=options.seed, strengths=strengths)
    console.print(f"corpus: {render_corpus(options.folder, recipe, workers=options.workers)}", soft_wrap=True)


def _make_control(options: Namespace, console: Console) -> None:
    defaults = ControlRecipe()
    recipe = ControlRecipe(
        sizes=tuple(options.sizes or defaults.sizes),
        seed=options.seed,
        strengths={
            name: value if (value := getattr(options, name)) is not None else defaults.strengths[name]
            for name in FACTORS
        },
        difficulty={**defaults.difficulty, **dict(options.difficulty or ())},
        noise={**defaults.noise, **dict(options.noise or ())},
    )
    truth = write_control(options.folder, recipe)
    show(_error_table(truth), console)
    shares = ", ".join(f"{name} {format_share(share)}" for name, share in truth["shares"].items())
    console.print(f"true shares of the best predictions in percent: {shares}", highlight=False)
    console.print(f"corpus: {options.folder}, truth: {TRUTH}", soft_wrap=True)


def _error_table(truth: dict[str, Any]) -> Table:
    """The best possible errors, by condition."""
    table = Table(title="best possible MAE", title_justify="left")
    table.add_column("modalities")
    for name in ("expected", "standard error", "on the test split"):
        table.add_column(name, justify="right")
    for name in (NOTHING, *CONDITIONS):
        values = truth["bayes_mae"][name]
        row = [format_metric("mae", values["mean"]), f"{values['standard_error']:.4f}"]
        table.add_row(name, *row, format_metric("mae", values["test"]))
    incomplete = (format_metric("mae", truth["incomplete"][name]) for name in ("mean", "test"))
    table.add_row("mean of six incomplete", next(incomplete), "", next(incomplete))
    return table
