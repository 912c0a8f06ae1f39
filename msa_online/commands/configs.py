# SPDX-License-Identifier: Apache-2.0
"""`msa-online configs`: list the shipped configurations, or print one."""

from argparse import Namespace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msa_online.evaluation.tables import show
from msa_online.shipped_configs import description, find_shipped, shipped

USAGE = "msa-online train NAME; msa-online study ablations/NAME; msa-online configs NAME prints one"


def run(options: Namespace, console: Console) -> None:
    """Print a table of the shipped configurations, or the content of one."""
    if options.name:
        console.out(find_shipped(options.name).read_text(encoding="utf-8"), end="", highlight=False)
        return
    table = Table(caption=USAGE)
    for column in ("name", "what it is"):
        table.add_column(column, overflow="fold")
    for name, path in shipped().items():
        table.add_row(Text(name), Text(description(path)))
    show(table, console)
