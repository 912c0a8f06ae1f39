# SPDX-License-Identifier: Apache-2.0
"""The command line of `msa-online`, and what `train.py --help` prints.

It stands outside the package because importing `msa_online` imports torch and transformers (several seconds),
and asking for help should not. For the same reason the keys of a configuration are read from the source of
the dataclasses that declare them.
"""

import argparse
import ast
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).with_name("msa_online")
TRAINING_USAGE = (
    "usage: accelerate launch --quiet train.py CONFIG.yaml [key=value ...]",
    "       python train.py CONFIG.yaml [key=value ...]      the same in one process",
)
NUM_FRAMES = "frames sampled from each clip (default 8)"
SKIP_BROKEN = "go on without rows that cannot be used"


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
    prepare.add_argument("--num-frames", type=_at_least(1), default=8, help=NUM_FRAMES)
    prepare.add_argument(
        "--face-size", type=_at_least(16), default=96, help="pixels of a face crop's side (default 96)"
    )
    prepare.add_argument(
        "--max-text-tokens",
        type=_at_least(3),
        default=128,
        help="report texts that a model with this limit would cut (default 128, that of training)",
    )
    prepare.add_argument(
        "--max-audio-seconds",
        type=_positive,
        default=30.0,
        help="report sounds that a model with this limit would cut (default 30, that of training)",
    )
    prepare.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="count tokens as this encoder does (default: count words, which misses some cut texts)",
    )

    evaluate = commands.add_parser(
        "evaluate", help="score a checkpoint under the seven modality conditions, or with frames missing"
    )
    evaluate.add_argument("checkpoint", help="folder of a run, or Hub repository")
    evaluate.add_argument("data", help="as for prepare; for a model of features, a folder of them or an .npz")
    evaluate.add_argument("--split", default="test", choices=("train", "valid", "test"))
    evaluate.add_argument("--label-column", help="column of the labels (default: the one trained on)")
    evaluate.add_argument("--split-column", help="column of the splits, among features (default: as above)")
    evaluate.add_argument("--batch-size", type=_at_least(1), default=32)
    evaluate.add_argument(
        "--mixed-precision",
        default="auto",
        choices=("auto", "no", "fp16", "bf16"),
        help="default auto: what the device computes natively",
    )
    evaluate.add_argument(
        "--json", metavar="FILE", help="write all metrics to FILE; - prints them in place of the table"
    )
    evaluate.add_argument(
        "--frame-rates",
        choices=("input", "feature"),
        help="score with 0, 10, ... 90%% of words, sound steps and faces missing, before the encoders "
        "(input) or after them (feature), in place of the conditions",
    )
    evaluate.add_argument(
        "--frame-seed", type=int, default=1111, help="with --frame-rates: seed of the draw (default 1111)"
    )
    evaluate.add_argument(
        "--nested", action="store_true", help="with --frame-rates: a higher rate drops what a lower one does"
    )
    _add_extraction(evaluate)
    evaluate.set_defaults(refuse=evaluate.error)

    predict = commands.add_parser("predict", help="predict from raw clips, sound files, or text alone")
    predict.add_argument("clips", nargs="*", metavar="CLIP", help="media files")
    predict.add_argument("--model", required=True, help="folder of a run, or Hub repository")
    predict.add_argument("--text", action="append", help="transcript; once for each clip, in their order")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.add_argument(
        "--skip-broken",
        action="store_true",
        help="go on after a clip that cannot be used; the output holds its error, the exit status is 1",
    )
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

    _add_convert_features(commands)
    _add_extract_features(commands)
    return parser


def _add_convert_features(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert-features", help="convert precomputed features to a corpus to train on"
    )
    convert.add_argument("source", metavar="FILE", help=".pkl in MMSA's layout, or .npz")
    convert.add_argument("folder", metavar="FOLDER", help="a new folder")
    convert.add_argument("--metadata", metavar="CSV", help="labels, splits and text, found by the column id")
    convert.add_argument("--label-column", help="column of the labels (default: label or regression_labels)")
    convert.add_argument("--split-column", default="split", help="column of the splits (default split)")
    convert.add_argument(
        "--valid-share", type=_share, metavar="SHARE", help="take this share of training for validation"
    )
    _add_level(convert)
    convert.add_argument(
        "--non-finite",
        default="refuse",
        choices=("refuse", "zero"),
        help="what to do about NaN and infinities",
    )
    convert.add_argument("--skip-broken", action="store_true", help=SKIP_BROKEN)


def _add_extract_features(commands: argparse._SubParsersAction) -> None:
    extract = commands.add_parser("extract-features", help="make a corpus of features out of raw clips")
    extract.add_argument("data", metavar="CLIPS", help="as for prepare")
    extract.add_argument("folder", metavar="FOLDER", help="a new folder")
    extract.add_argument("--text-encoder", required=True, metavar="NAME", help="name or folder of an encoder")
    extract.add_argument("--label-column", default="label", help="column of the labels (default label)")
    extract.add_argument("--num-frames", type=_at_least(1), default=8, help=NUM_FRAMES)
    _add_level(extract)
    _add_extraction(extract)


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level", default="sequence", choices=("sequence", "utterance"), help="keep steps, or pool them"
    )


def _share(text: str) -> float:
    """A type of options: numbers between 0 and 1."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: a number between 0 and 1")
    return float(text)


def _positive(text: str) -> float:
    """A type of options: finite numbers above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return float(text)


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
    parser.add_argument("--skip-broken", action="store_true", help=SKIP_BROKEN)


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: With its sections: "data.missing.rates"; "[]" stands for each item of a list.
        kind: Its type, as annotated.
        default: Its default as YAML writes it; None if it has to be given.
        meaning: What it is for.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def answer_training_help(words: list[str]) -> int | None:
    """Answer a call of `train.py` that asks for help or names no configuration; returns its exit status.

    None for any other call, which is then to be carried out.
    """
    if {"-h", "--help"} & set(words):
        print(training_help())
        return 0
    if not words:
        print(*TRAINING_USAGE, "train.py --help lists the keys", sep="\n", file=sys.stderr)
        return 2
    return None


def training_help() -> str:
    """Every key of a configuration of `train.py`: type, default and meaning, by section."""
    lines = [
        *TRAINING_USAGE,
        "",
        "Train a model as CONFIG.yaml says; key=value changes or adds a key, and the value is read as YAML:",
        "training.epochs=3 'model.head_kwargs={hidden_size: 64}'. The keys, with types and defaults:",
    ]
    section = ""
    for key in training_keys():
        if (here := key.name.split(".")[0]) != section:
            section = here
            lines += ["", f"{section}:"]
        default = "(needed)" if key.default is None else f"= {key.default}"
        lines.append(f"  {key.name}  {key.kind} {default}")
        lines += textwrap.wrap(key.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def training_keys() -> list[Key]:
    """Keys of a configuration, in the order of the sections and of the fields in them."""
    arguments = _Source("training/config.py")
    hidden = arguments.constant("NOT_SET_IN_YAML")
    model = [
        key for key in _Source("configuration_msa.py").keys("MSAConfig", "model") if _last(key) not in hidden
    ]
    tables = _Source("methods/__init__.py")
    choices = {"head": "HEADS", "calibrator": "CALIBRATORS", "modulator": "MODULATORS"}
    return [
        replace(key, meaning=f"{key.meaning} One of {', '.join(tables.constant(choices[_last(key)]))}.")
        if _last(key) in choices
        else key
        for key in (*model, *(key for key in arguments.keys("RunArguments", "") if key.name != "model"))
    ]


def _last(key: Key) -> str:
    return key.name.rpartition(".")[2]


class _Source:
    """The source of a module of the package, read without importing it.

    Args:
        path: The file, relative to the package.
    """

    def __init__(self, path: str) -> None:
        self.body = ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body

    def constant(self, name: str) -> Any:
        """The value a name has at the top of the module, or of the module it is imported from.

        Of a dict the keys, because its values may be classes.
        """
        for node in self.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id == name:
                    is_table = isinstance(node.value, ast.Dict)
                    return (
                        [key.value for key in node.value.keys] if is_table else ast.literal_eval(node.value)
                    )
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return _Source("/".join(node.module.split(".")[1:]) + ".py").constant(name)
        raise LookupError(name)

    def keys(self, class_name: str, section: str) -> list[Key]:
        """Keys that a dataclass declares; those of the dataclasses in its fields stand in their place."""
        classes = {node.name: node for node in self.body if isinstance(node, ast.ClassDef)}
        meanings = _attributes(ast.get_docstring(classes[class_name]))
        found = []
        for field in classes[class_name].body:
            if not isinstance(field, ast.AnnAssign):
                continue
            name = f"{section}.{field.target.id}".lstrip(".")
            kind = ast.unparse(field.annotation)
            if kind in classes:
                found += self.keys(kind, name)
                continue
            found.append(Key(name, kind, self._default(field.value), meanings[field.target.id]))
            for item in classes.keys() & set(re.findall(r"\w+", kind)):
                found += self.keys(item, f"{name}[]")
        return found

    def _default(self, value: ast.expr | None) -> str | None:
        if value is None:
            return None
        if isinstance(value, ast.Call):  # field(default_factory=dict)
            return {"dict": "{}", "list": "[]"}[ast.unparse(value.keywords[0].value)]
        return json.dumps(self.constant(value.id) if isinstance(value, ast.Name) else ast.literal_eval(value))


def _attributes(docstring: str) -> dict[str, str]:
    """Meanings by name, from the section "Attributes" of a docstring."""
    entries = re.split(r"^    (?=\w+: )", docstring.partition("Attributes:\n")[2], flags=re.MULTILINE)
    pairs = (entry.partition(": ") for entry in entries)
    return {name: " ".join(meaning.split()) for name, colon, meaning in pairs if colon}


def main(argv: list[str] | None = None) -> int:
    """Read the command line and carry it out; returns the exit status."""
    options = build_parser().parse_args(argv)
    from msa_online.commands import run  # after parsing: the import takes seconds

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
