# SPDX-License-Identifier: Apache-2.0
"""`msa-online synthesize`: render the synthetic corpus."""

from argparse import Namespace

from rich.console import Console


def run(options: Namespace, console: Console) -> None:
    """Render the synthetic corpus."""
    try:
        from msa_online.synthetic.corpus import CorpusRecipe, render_corpus
    except ModuleNotFoundError as error:
        options.refuse(f"{error.name} is not installed: pip install 'msa_online[demo]'")
    strengths = {name: getattr(options, name) for name in ("text", "audio", "vision")}
    recipe = CorpusRecipe(clips=options.clips, seed=options.seed, strengths=strengths)
    console.print(f"corpus: {render_corpus(options.folder, recipe, workers=options.workers)}", soft_wrap=True)
