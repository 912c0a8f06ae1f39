# SPDX-License-Identifier: Apache-2.0
"""`msa-online synthesize`: make a corpus in which the contribution of each modality is known."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from msa_online.evaluation.json_text import json_text
from msa_online.evaluation.tables import format_metric, format_share, show
from msa_online.modalities import CONDITIONS, NOTHING
from msa_online.synthetic.control import TRUTH, ControlRecipe, solve_clips, write_control
from msa_online.synthetic.corpus import CorpusRecipe, render_corpus
from msa_online.training.checkpoint import write_atomically

ONLY_FOR = {
    "clips": ("clips", "control-clips"),
    "workers": ("clips", "control-clips"),
    "text": ("clips", "control"),
    "audio": ("clips", "control"),
    "vision": ("clips", "control"),
    **dict.fromkeys(("shared", "sizes", "difficulty", "noise"), ("control",)),
}
"""Options that apply to some kinds only."""


def run(options: Namespace, console: Console) -> None:
    """Make the corpus of the chosen kind."""
    for name, kinds in ONLY_FOR.items():
        if getattr(options, name) is not None and options.kind not in kinds:
            options.refuse(f"--{name} is for --kind {' and '.join(kinds)}")
    if options.kind == "control":
        _make_control(options, console)
    else:
        _render_clips(options, console)


def _render_clips(options: Namespace, console: Console) -> None:
    defaults = CorpusRecipe()
    control = options.kind == "control-clips"
    recipe = CorpusRecipe(
        clips=options.clips or defaults.clips,
        seed=options.seed,
        strengths=_strengths(options, defaults.strengths),
        hidden_signs=control,
        **({"contradicting": 0.0, "missing": 0.0} if control else {}),
    )
    folder = render_corpus(options.folder, recipe, workers=options.workers)
    if control:
        truth = solve_clips(recipe.seed)
        write_atomically(folder / TRUTH, json_text(truth) + "\n")
        _show_truth(truth, console)
    console.print(f"corpus: {folder}", soft_wrap=True)


def _strengths(options: Namespace, defaults: Mapping[str, float]) -> dict[str, float]:
    given = {name: getattr(options, name) for name in defaults}
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def _make_control(options: Namespace, console: Console) -> None:
    defaults = ControlRecipe()
    recipe = ControlRecipe(
        sizes=tuple(options.sizes or defaults.sizes),
        seed=options.seed,
        strengths=_strengths(options, defaults.strengths),
        difficulty={**defaults.difficulty, **dict(options.difficulty or ())},
        noise={**defaults.noise, **dict(options.noise or ())},
    )
    truth = write_control(options.folder, recipe)
    _show_truth(truth, console)
    console.print(f"corpus: {options.folder}, truth: {TRUTH}", soft_wrap=True)


def _show_truth(truth: Mapping[str, Any], console: Console) -> None:
    """Print the best possible errors by condition, and the true shares."""
    table = Table(title="best possible MAE, and accuracy in percent", title_justify="left")
    with_test = "test" in truth["incomplete"]
    table.add_column("modalities")
    split = ["on the test split"] if with_test else []
    for name in ("expected", "standard error", *split, "accuracy of the sign"):
        table.add_column(name, justify="right")
    rows = {name: truth["bayes_mae"][name] for name in (NOTHING, *CONDITIONS)}
    for name, values in {**rows, "mean of six incomplete": truth["incomplete"]}.items():
        error = f"{values['standard_error']:.4f}" if "standard_error" in values else ""
        on_test = [format_metric("mae", values["test"])] if with_test else []
        accuracy = truth["bayes_accuracy"].get(name)
        right = format_metric("accuracy", accuracy["mean"]) if accuracy else ""
        table.add_row(name, format_metric("mae", values["mean"]), error, *on_test, right)
    show(table, console)
    shares = ", ".join(f"{name} {format_share(share)}" for name, share in truth["shares"].items())
    console.print(f"true shares of the best predictions in percent: {shares}", highlight=False)
