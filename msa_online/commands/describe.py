# SPDX-License-Identifier: Apache-2.0
"""`msa-online describe`: the parts of a model and the record of a checkpoint."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from feature_extractors.clip import printable
from msa_online.commands.json_output import write_json
from msa_online.describe import describe, description_tables, record_lines
from msa_online.evaluation.tables import conditions_table, confidence_table, shares_table, show
from msa_online.shipped_configs import shipped
from msa_online.training.config_reader import import_plugins


def run(options: Namespace, console: Console) -> None:
    """Show the parts of a model, their parameters, the shapes inside, and how a checkpoint scored."""
    import_plugins(options.plugin, "--plugin")
    source = options.source
    if source in shipped() and not Path(source).exists():
        source = shipped()[source]
    description = describe(source)
    if options.json:
        write_json(asdict(description), "-", console)
        return
    for table in description_tables(description, options.source):
        show(table, console)
    for line in record_lines(description):
        console.print(Text(printable(line)), soft_wrap=True)
    for split, results in description.trained_on.get("results", {}).items():
        show(conditions_table(results, f"scores on {split}"), console)
    for split, shares in description.trained_on.get("shares", {}).items():
        show(shares_table(shares, f"what predictions on {split} come from"), console)
    for split, measures in description.trained_on.get("confidence", {}).items():
        title = f"{split}: {description.confidence.kind}"
        show(confidence_table(description.confidence, measures, title), console)
    for line in description.trained_on.get("comparison", ()):
        console.print(Text(printable(line)), soft_wrap=True)
