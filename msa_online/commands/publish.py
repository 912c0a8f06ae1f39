# SPDX-License-Identifier: Apache-2.0
"""`msa-online publish`: upload the checkpoint of a run to the Hub."""

import sys
from argparse import Namespace
from pathlib import Path

from huggingface_hub.utils import enable_progress_bars
from rich.console import Console

from msa_online.publishing import check_space, publish, publish_space
from msa_online.training.config_reader import import_plugins


def run(options: Namespace, console: Console) -> None:
    """Publish a checkpoint and print its address."""
    import_plugins(options.plugin, "--plugin")
    if sys.stderr.isatty():
        enable_progress_bars()  # `run_command` has switched them off
    if options.space and options.plugin:
        options.refuse("--space with --plugin: a Space has no modules of yours; leave one of them out")
    if options.space:
        check_space(Path(options.run), options.repository, options.private)
    address = publish(
        Path(options.run),
        options.repository,
        private=options.private,
        license=options.license,
        languages=options.language,
        revision=options.revision,
    )
    console.print(f"published: {address}", soft_wrap=True)
    if options.space:
        page = publish_space(options.repository, private=options.private)
        console.print(f"published its page: {page}", soft_wrap=True)
    if options.license is None:
        console.print("the card names no licence unless it did before; --license adds one", soft_wrap=True)
