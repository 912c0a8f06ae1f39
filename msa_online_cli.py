# SPDX-License-Identifier: Apache-2.0
"""The command line of `msa-online`.

It stands outside the package because importing `msa_online` imports torch and transformers (several seconds),
and asking for help should not.
"""

import argparse
import sys
from collections.abc import Callable


def build_parser() -> argparse.ArgumentParser:
    """The parser of `msa-online` and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="msa-online", description="Multimodal sentiment analysis from raw video."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare", help="extract all clips of a corpus into the cache, show what was found"
    )
    prepare.add_argument("data", help="folder with metadata.csv or label.csv, table, or Hub repository")
    _add_extraction(prepare)
    prepare.add_argument(
        "--num-frames", type=_at_least(1), default=8, help="frames sampled from each clip (default 8)"
    )
    prepare.add_argument(
        "--face-size", type=_at_least(16), default=96, help="pixels of a face crop's side (default 96)"
    )

    evaluate = commands.add_parser("evaluate", help="score a checkpoint under the seven modality conditions")
    evaluate.add_argument("checkpoint", help="folder of a run, or Hub repository")
    evaluate.add_argument("data", help="as for prepare")
    evaluate.add_argument("--split", default="test", choices=("train", "valid", "test"))
    evaluate.add_argument("--label-column", help="column of the labels (default: the one trained on)")
    evaluate.add_argument("--batch-size", type=_at_least(1), default=32)
    evaluate.add_argument("--mixed-precision", default="no", choices=("no", "fp16", "bf16"))
    evaluate.add_argument(
        "--json", metavar="FILE", help="write all metrics to FILE; - prints them in place of the table"
    )
    _add_extraction(evaluate)
    evaluate.set_defaults(refuse=evaluate.error)

    predict = commands.add_parser("predict", help="predict from raw clips, sound files, or text alone")
    predict.add_argument("clips", nargs="*", metavar="CLIP", help="media files")
    predict.add_argument("--model", required=True, help="folder of a run, or Hub repository")
    predict.add_argument("--text", action="append", help="what is said; once for each clip, in their order")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(refuse=predict.error)

    describe = commands.add_parser("describe", help="show the parts of a model and their parameters")
    describe.add_argument("source", metavar="CONFIG_OR_CHECKPOINT")
    describe.add_argument("--json", action="store_true", help="print JSON")

    models = commands.add_parser("get-models", help="bring pretrained files into the cache")
    models.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")

    synthesize = commands.add_parser("synthesize", help="render the synthetic corpus of talking clips")
    synthesize.add_argument("folder")
    synthesize.add_argument("--clips", type=_at_least(1), default=240)
    synthesize.add_argument("--seed", type=int, default=1111)
    for name, strength in (("text", 1.0), ("audio", 0.6), ("vision", 0.8)):
        synthesize.add_argument(f"--{name}", type=float, default=strength, help="strength of its cue, 0 to 1")
    synthesize.add_argument("--workers", type=_at_least(1), help="processes (default: all cores)")
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    """A type of options: whole numbers from `lowest` on."""

    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)

    return whole_number


def _add_extraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_at_least(1), help="processes that extract features (default: all cores)"
    )
    parser.add_argument("--skip-broken", action="store_true", help="go on without rows that cannot be used")


def main(argv: list[str] | None = None) -> int:
    """Read the command line and carry it out; returns the exit status."""
    options = build_parser().parse_args(argv)
    from msa_online.commands import run  # after parsing: the import takes seconds

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
