# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Measure the effect of a constant coefficient on an encoder under AdamW (docs/methods/numerics.md).

    python scripts/measure_modulation.py FEATURES [key=value ...] [--modality text] [--coefficient 0.2]

FEATURES is a folder from `msa-online extract-features` or `convert-features`. For every seed, late fusion is
trained three times: without a coefficient, with it on the gradients of the modality's encoder, and with it on
their learning rate. The table shows the sum over the steps of the L2 norm of the encoder's updates, relative
to the run without a coefficient; the validation scores of the best epoch; and the share of the modality in
the predictions (exact Shapley values).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import fmean, stdev

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import Parameter

from msa_online.methods import MODULATORS, GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import apply_coefficients
from msa_online.modalities import COMPLETE, MODALITIES
from msa_online.studies.study import as_options
from msa_online.training.config_reader import read_arguments
from msa_online.training.run import train
from msa_online.user_errors import run_command

CONFIG = REPOSITORY / "configs" / "late_fusion.yaml"
WAYS = {"none": 1.0, "gradient": None, "lr": None}  # None: the coefficient of the command line


class ConstantCoefficient(GradientModulator):
    """One coefficient for one modality; also records how far each step moves its parameters.

    Args:
        modality: Whose parameters.
        coefficient: Factor on their gradients or on their learning rate.
        apply: "gradient" or "lr".
        epochs: First and last epoch in which it acts, from 0; None for all.
    """

    def __init__(
        self, *, modality: str, coefficient: float, apply: str, epochs: Sequence[int] | None = None
    ) -> None:
        self.modalities, self.epochs = (modality,), epochs and tuple(epochs)
        self.coefficient, self.apply = coefficient, apply
        self.place: torch.Tensor | None = None

    def modulate(self, context: ModulationContext) -> Modulation:
        """Scale, and log the effect of the previous step."""
        (modality,) = self.modalities
        acts = self.acts_in(context.epoch)
        coefficients = {modality: self.coefficient} if acts else {}
        rates = apply_coefficients(coefficients, context, apply=self.apply, noise=0.0)
        place = _flat(context.modality_parameters[modality])
        moved = (place - self.place).norm().item() if acts and self.place is not None else 0.0
        self.place = place
        return Modulation(rates, {f"moved/{modality}": moved})


def _flat(parameters: Sequence[Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def measure(options: argparse.Namespace, console: Console) -> None:
    """Train every seed in each of the three ways, and show the table."""
    MODULATORS["constant"] = ConstantCoefficient
    runs = [(seed, way) for seed in options.seeds for way in WAYS]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed, way in track(runs, "training", console=console, disable=not console.is_terminal):
        found[way].append(run(options, seed, way))
    table = Table("coefficient on", title=f"{options.coefficient:g} on the encoder of {options.modality}")
    for heading in found["none"][0]:
        table.add_column(heading, justify="right")
    for way, figures in found.items():
        cells = []
        for heading in figures[0]:
            values = [own[heading] for own in figures]
            if heading == "path":
                values = [value / plain["path"] for value, plain in zip(values, found["none"], strict=True)]
            cells.append(f"{fmean(values):.3f}" + (f" ±{stdev(values):.3f}" if len(values) > 1 else ""))
        table.add_row(way, *cells)
    console.print(table)


def run(options: argparse.Namespace, seed: int, way: str) -> dict[str, float]:
    """Train once in a new folder, and return the results."""
    window = None if options.from_epoch is None else [options.from_epoch, sys.maxsize]
    settings = {
        "modality": options.modality,
        "coefficient": options.coefficient if WAYS[way] is None else WAYS[way],
        "apply": "gradient" if way == "none" else way,
        "epochs": window,
    }
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "data.path": options.features,
            "model.text_encoder": None,
            "training.seed": seed,
            "training.patience": None,
            "training.output_dir": f"{folder}/run",
            "training.log_with": None,
            "training.modulator": "constant",
            "training.modulator_kwargs": settings,
        }
        arguments = read_arguments(CONFIG, [*options.changes, *as_options(fixed)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with (
            open(f"{folder}/log", "w", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            train(arguments, "measure_modulation.py")
        history = json.loads(Path(folder, "run", "history.json").read_text(encoding="utf-8"))
        record = json.loads(Path(folder, "run", "config.json").read_text(encoding="utf-8"))["trained_on"]
    return {
        "path": sum(epoch["losses"][f"moved/{options.modality}"] for epoch in history),
        "valid MAE": record["results"]["valid"][COMPLETE]["mae"],
        f"share of {options.modality}": record["shares"]["valid"][options.modality],
    }


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", metavar="FEATURES")
    parser.add_argument(
        "changes", metavar="key=value", nargs="*", help="to configs/late_fusion.yaml; model.feature_widths"
    )
    parser.add_argument("--modality", choices=MODALITIES, default="text")
    parser.add_argument("--coefficient", type=float, default=0.2)
    parser.add_argument("--from-epoch", type=int, help="it sets in with this epoch, from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1111, 1112, 1113])
    options = parser.parse_intermixed_args(argv)
    console = Console(file=sys.stdout, markup=False, highlight=False)
    return run_command(lambda: measure(options, console))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
