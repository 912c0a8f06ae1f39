# SPDX-License-Identifier: Apache-2.0
"""The command line of `msa-online`; `train.py` is its command `train`.

It is outside the package, because importing `msa_online` imports torch and transformers (several seconds),
and `--help` should not. For the same reason the keys of a configuration are read from the source code of the
dataclasses that declare them.
"""

import argparse
import ast
import errno
import importlib
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).with_name("msa_online")
TRAINING_USAGE = """\
usage: msa-online train CONFIG [key=value ...]
       msa-online launch --num_processes N CONFIG [key=value ...]  (several processes)"""
STUDY_HELP = """\
A study is a YAML file:

    config: ebmc_offline                      what all variants start from: a file or a shipped configuration
    output_dir: runs/studies/ebmc             a folder for each run, table.md, results.json
    seeds: [1111, 1112, 1113]
    changes: {training.batch_size: 64}        to the configuration, in all variants
    variants:
      EBMC: {}                                changes of each variant; they override `changes`
      without EMC: {model.loss_weights.emc: 0}
    settings:                                 if there are any, every variant runs in each; curves.png
      rate 0.3: {data.missing.rates: 0.3}
    reference: EBMC                           the others are tested against it (default: the first)
    epochs: 150                               offer every variant the optimizer steps of so many epochs
    keep_checkpoints: false                   weights are deleted once a run is scored
    plugins: [my_package]                     your own modules, imported first

key=value changes all variants (data.path=features); without a dot it changes the study itself (seeds=[1111],
output_dir=runs/mine). A study that was stopped continues where it stopped."""
EXAMPLES = {  # printed at the end of each command's --help
    "import": ("import auto /data/CREMA-D data/crema-d",),
    "init-data": ("init-data my_clips",),
    "prepare": ("prepare my_clips", "prepare data/crema-d --label-column emotion --workers 4"),
    "evaluate": (
        "evaluate runs/mine my_clips --split test",
        "evaluate runs/mine my_clips --json -",
    ),
    "plot-states": ("plot-states runs/mine my_clips --out states.png",),
    "predict": (
        "predict clip.mp4 --text 'I loved it' --model runs/mine",
        "predict my_clips --model runs/mine --out results.csv",
    ),
    "describe": ("describe recommended", "describe runs/mine --json"),
    "publish": ("publish runs/mine ORG/NAME --private --license cc-by-nc-4.0 --language en",),
    "serve": ("serve runs/mine --examples --transcribe", "serve ORG/NAME --port 8000"),
    "get-models": ("get-models face_landmarker all-MiniLM-L6-v2",),
    "synthesize": ("synthesize data/synthetic --clips 48", "synthesize features/control --kind control"),
    "convert-features": ("convert-features unaligned_50.pkl features/mosi",),
    "extract-features": ("extract-features my_clips features/mine --text-encoder microsoft/deberta-v3-base",),
    "train": (
        "train recommended data.path=my_clips training.output_dir=runs/mine",
        "train recommended data.path=my_clips data.task=classification data.label_column=emotion",
    ),
    "launch": ("launch --num_processes 2 recommended data.path=my_clips training.output_dir=runs/mine",),
    "tune": ("tune late_fusion data.path=my_clips training.output_dir=runs/tuning --trials 10",),
    "study": ("study ablations/ebmc data.path=features/mosi 'seeds=[1111]'",),
    "configs": ("configs", "configs recommended"),
}
SHELLS = ("bash", "zsh", "fish", "tcsh")
CONFIGURATIONS = {"CONFIG", "CONFIG_OR_CHECKPOINT", "STUDY"}  # arguments that are completed by their names
PATHS = {  # arguments that are completed as files
    *("CLIP", "CLIPS", "CSV", "FILE", "FOLDER", "OUT", "PATH", "RUN", "TABLE"),
    *("data", "folder", "checkpoint", "model"),
}
NUM_FRAMES = "frames sampled from each clip (default 8)"
SKIP_BROKEN = "leave out rows that cannot be used"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `msa-online` and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="msa-online",
        description="Multimodal sentiment analysis from raw video.",
        epilog="msa-online COMMAND --help explains a command and shows examples.",
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=_Completion,
        help="print a script that completes commands, options and files in this shell, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands)
    init = commands.add_parser(
        "init-data",
        help="start a metadata.csv for a folder of clips",
        description="Write a metadata.csv with a row for every clip below FOLDER. Texts are taken from .txt "
        "files of the same name; labels and speakers are yours to fill in.",
    )
    init.add_argument("folder", metavar="FOLDER")
    _add_transcription(init)
    _add_prepare(commands)
    _add_evaluate(commands)
    _add_plot_states(commands)
    _add_predict(commands)
    _add_describe(commands)
    _add_publish(commands)
    _add_serve(commands)
    models = commands.add_parser("get-models", help="download or convert pretrained files")
    models.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    _add_synthesize(commands)
    _add_convert_features(commands)
    _add_extract_features(commands)
    _add_train(commands)
    _add_launch(commands)
    _add_study(commands)
    _add_tune(commands)
    configs = commands.add_parser("configs", help="list the shipped configurations, or print one")
    configs.add_argument("name", metavar="NAME", nargs="?", help="print this configuration")
    for name, command in commands.choices.items():
        command.formatter_class = _WithExamples
        command.epilog = examples_of(name)
    return parser


def examples_of(command: str) -> str:
    """Examples of a command as its --help prints them."""
    return "\n".join(("examples:", *(f"  msa-online {example}" for example in EXAMPLES[command])))


class _WithExamples(argparse.HelpFormatter):
    """Wraps descriptions, but neither examples nor descriptions that are laid out in lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Version(argparse.Action):
    """Print the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} {_Source('__init__.py').constant('__version__')}")
        parser.exit()


class _Completion(argparse.Action):
    """Print a completion script for a shell."""

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: str, *__: Any) -> None:
        import shtab  # needed here only

        names = " ".join(_shipped_names())
        configurations = shtab.FILE | {  # elsewhere than in bash, files only
            "bash": "_msa_online_configurations",
            "preamble": {
                "bash": "_msa_online_configurations() {\n"
                f'  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}\n'
            },
        }
        (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
        for command in commands.choices.values():
            for action in command._actions:
                if action.metavar in CONFIGURATIONS:
                    action.complete = configurations
                elif action.metavar in PATHS or action.dest in PATHS:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()


def _shipped_names() -> list[str]:
    """Names of the shipped configurations, of a wheel or a clone."""
    folder = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.with_name("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _add_import(commands: argparse._SubParsersAction) -> None:
    importing = commands.add_parser(
        "import",
        help="write the metadata.csv of a data set as it is downloaded",
        description="Write OUT/metadata.csv for an unpacked data set. Clips stay where they are. What cannot "
        "be used is reported with reasons. docs/datasets.md has a section on each data set.",
    )
    layouts = _Source("corpora/downloads/__init__.py").constant("LAYOUTS")
    importing.add_argument(
        "layout",
        metavar="LAYOUT",
        choices=("auto", *layouts),
        help=f"auto, or one of {', '.join(layouts)}",
    )
    importing.add_argument("path", metavar="PATH", help="the folder of the unpacked data set")
    importing.add_argument("out", metavar="OUT", help="the folder for metadata.csv; it may be PATH")
    importing.add_argument(
        "--protocol",
        metavar="NAME",
        help="how classes and splits are made; a wrong name lists all of the layout",
    )
    importing.add_argument(
        "--labels",
        metavar="FILE",
        help="labels of mosi and mosei, if they are not in PATH: .csd, or label.csv",
    )
    importing.add_argument(
        "--splits", metavar="FILE", help="folds of mosei, if they are not in PATH: cmu_mosei_std_folds.py"
    )


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="extract all clips of a corpus into the cache, show what was found in clips and splits",
    )
    prepare.add_argument("data", help="folder with metadata.csv or label.csv, table, or Hub repository")
    _add_extraction(prepare)
    prepare.add_argument(
        "--label-column", help="column of the labels, for the table of splits (default label)"
    )
    prepare.add_argument(
        "--task",
        choices=("regression", "classification"),
        help="what the labels are (default: scores if all are numbers, else classes)",
    )
    prepare.add_argument(
        "--strict",
        action="store_true",
        help="refuse data with warnings: a speaker or recording in two splits, odd labels, tiny splits",
    )
    prepare.add_argument("--num-frames", type=_at_least(1), default=8, help=NUM_FRAMES)
    prepare.add_argument(
        "--face-size",
        type=_at_least(16),
        metavar="N",
        help="pixels of a face crop's side (default: what the vision encoder reads; 96 without one)",
    )
    prepare.add_argument(
        "--vision-encoder",
        metavar="NAME",
        help="pretrained vision encoder that training will use; without it, training extracts clips again",
    )
    prepare.add_argument(
        "--face-choice",
        choices=("largest", "most_speaking"),
        default="largest",
        help="face to track if there are several (default largest)",
    )
    prepare.add_argument(
        "--max-text-tokens",
        type=_at_least(3),
        default=128,
        help="report texts that a model with this limit truncates (default 128, as in training)",
    )
    prepare.add_argument(
        "--max-audio-seconds",
        type=_positive,
        default=30.0,
        help="report sounds that a model with this limit truncates (default 30, as in training)",
    )
    prepare.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="count tokens with this encoder (default: count words, which misses some truncated texts)",
    )


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="score a checkpoint under the seven modality conditions, or with frames missing"
    )
    evaluate.add_argument("checkpoint", help="folder of a run, or Hub repository")
    evaluate.add_argument("data", help="as for prepare; for a model of features, a folder of them or an .npz")
    evaluate.add_argument("--split", default="test", choices=("train", "valid", "test"))
    evaluate.add_argument("--label-column", help="column of the labels (default: as in training)")
    evaluate.add_argument(
        "--split-column", help="column of the splits, for features (default: as in training)"
    )
    evaluate.add_argument("--batch-size", type=_at_least(1), default=32)
    evaluate.add_argument(
        "--mixed-precision",
        default="auto",
        choices=("auto", "no", "fp16", "bf16"),
        help="default auto: what the device computes natively",
    )
    evaluate.add_argument(
        "--json", metavar="FILE", help="write all metrics to FILE; - prints them instead of the table"
    )
    evaluate.add_argument(
        "--calibrate",
        action="store_true",
        help="with --split valid: fit intervals or temperatures on it and store them in the checkpoint",
    )
    evaluate.add_argument(
        "--scoring",
        default="standard",
        choices=("standard", "nonzero", "per_class"),
        help="nonzero leaves out samples with label 0, MAE and correlation included, as some papers do; "
        "per_class adds the F1 of each class, also against the rest as for the four emotions of IEMOCAP",
    )
    evaluate.add_argument(
        "--frame-rates",
        choices=("input", "feature"),
        help="score with 0, 10, ... 90%% of words, sound steps and faces missing, before the encoders "
        "(input) or after them (feature), instead of the conditions",
    )
    evaluate.add_argument(
        "--frame-seed", type=int, default=1111, help="with --frame-rates: random seed (default 1111)"
    )
    evaluate.add_argument(
        "--nested",
        action="store_true",
        help="with --frame-rates: higher rates also drop all that lower ones drop",
    )
    _add_extraction(evaluate)
    _add_plugin(evaluate)
    evaluate.set_defaults(refuse=evaluate.error)


def _add_plot_states(commands: argparse._SubParsersAction) -> None:
    plot = commands.add_parser(
        "plot-states",
        help="draw the fused states of a checkpoint on a split, by t-SNE",
        description="Draw the states that the last layer of the fused prediction reads, one point a sample, "
        "coloured by label, in a panel for each condition. Distances within a panel mean little beyond "
        "neighbourhood; panels are drawn one by one.",
    )
    plot.add_argument("checkpoint", help="folder of a run, or Hub repository")
    plot.add_argument("data", help="as for evaluate")
    plot.add_argument("--out", required=True, metavar="FILE", help="picture to write (.png, .svg, .pdf)")
    plot.add_argument("--split", default="test", choices=("train", "valid", "test"))
    plot.add_argument(
        "--conditions",
        nargs="+",
        default=["text+audio+vision"],
        metavar="CONDITION",
        help="visible modalities of each panel, like text audio+vision (default text+audio+vision)",
    )
    plot.add_argument("--label-column", help="column of the labels (default: as in training)")
    plot.add_argument("--split-column", help="column of the splits, for features (default: as in training)")
    plot.add_argument("--batch-size", type=_at_least(1), default=32)
    plot.add_argument("--seed", type=_seed, default=1111, help="of t-SNE (default 1111)")
    _add_extraction(plot)
    _add_plugin(plot)
    plot.set_defaults(refuse=plot.error)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser("predict", help="predict from raw clips, audio files, or text only")
    predict.add_argument(
        "clips", nargs="*", metavar="CLIP", help="media files, and folders with all media files in them"
    )
    predict.add_argument("--model", required=True, help="folder of a run, or Hub repository")
    predict.add_argument("--text", action="append", help="transcript; once for each clip, in their order")
    predict.add_argument(
        "--texts",
        metavar="TABLE",
        help="csv with the columns file_name and text (default: metadata.csv in a folder of clips, if any)",
    )
    predict.add_argument(
        "--out",
        metavar="FILE",
        help="write one row a clip to FILE (.csv, .jsonl or .parquet), broken clips with an error; the same "
        "command continues a run that was stopped",
    )
    predict.add_argument(
        "--workers", type=_at_least(1), help="with --out: processes that decode (default: all cores)"
    )
    predict.add_argument(
        "--window",
        type=_positive,
        metavar="SECONDS",
        help="predict for windows of clips without a transcript (default: 5, only for clips that are longer "
        "than the model reads)",
    )
    predict.add_argument(
        "--step", type=_positive, metavar="SECONDS", help="from window to window (default: half a window)"
    )
    predict.add_argument(
        "--timeline", metavar="FILE", help="write one row a window to FILE (.csv, .jsonl or .parquet)"
    )
    predict.add_argument(
        "--plot", metavar="FILE", help="draw score and contributions of one clip over time (.png, .svg, .pdf)"
    )
    predict.add_argument("--json", action="store_true", help="print JSON")
    _add_transcription(predict)
    _add_audio_track(predict, "of all clips")
    predict.add_argument(
        "--region",
        type=float,
        nargs=4,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="part of the frame with the face, in all clips: 0.5 0 0.5 1 is the right half",
    )
    predict.add_argument(
        "--skip-broken",
        action="store_true",
        help="continue after a clip that cannot be used; the output has its error, the exit status is 1",
    )
    _add_plugin(predict)
    predict.set_defaults(refuse=predict.error)


def _add_describe(commands: argparse._SubParsersAction) -> None:
    describe = commands.add_parser("describe", help="show the parts of a model and their parameters")
    describe.add_argument(
        "source", metavar="CONFIG_OR_CHECKPOINT", help="file, shipped name, run or Hub repository"
    )
    describe.add_argument("--json", action="store_true", help="print JSON")
    _add_plugin(describe)


def _add_publish(commands: argparse._SubParsersAction) -> None:
    publish = commands.add_parser("publish", help="upload the checkpoint of a run to the Hugging Face Hub")
    publish.add_argument("run", metavar="RUN", help="folder of a finished run")
    publish.add_argument("repository", metavar="ORG/NAME", help="repository, created if it does not exist")
    publish.add_argument("--private", action="store_true", help="create a private repository")
    publish.add_argument(
        "--license", metavar="ID", help="licence of the weights as the Hub names it, like cc-by-nc-4.0"
    )
    publish.add_argument(
        "--language",
        metavar="CODE",
        action="append",
        default=[],
        help="language of the data for the card, like en; repeatable",
    )
    publish.add_argument(
        "--revision", metavar="BRANCH", help="publish to this branch, created if it does not exist"
    )
    publish.add_argument(
        "--space", action="store_true", help="also publish a Space of the same name: a page to try the model"
    )
    _add_plugin(publish)
    publish.set_defaults(refuse=publish.error)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="open a web page to try a checkpoint",
        description="Serve a web page: drop or record a clip, type what was said, switch modalities off. It "
        "needs no network, and deletes what visitors give. Needs the extra `serve`.",
    )
    serve.add_argument("model", metavar="RUN", help="folder of a run, or Hub repository")
    serving = _Source("page/serving.py")
    serve.add_argument(
        "--host",
        default=serving.constant("LOOPBACK"),
        help="address to listen on (default %(default)s: this computer only)",
    )
    serve.add_argument(
        "--port", type=_port, default=serving.constant("PORT"), help="port to listen on (default %(default)s)"
    )
    serve.add_argument("--examples", action="store_true", help="offer synthetic clips (needs the extra demo)")
    _add_transcription(serve)
    _add_plugin(serve)
    serve.set_defaults(refuse=serve.error)


def _add_synthesize(commands: argparse._SubParsersAction) -> None:
    synthesize = commands.add_parser(
        "synthesize",
        help="make a corpus in which the contribution of each modality is known",
        description="Make a corpus with known truth. clips: talking clips with cues of given strengths. "
        "control: features on which balancing can matter; text is easy, audio and vision are hard, each "
        "carries a quarter of the label alone and a quarter is shared. The best possible error under every "
        "condition and the true shares are printed and written to truth.json. control-clips: the same as "
        "talking clips; the cues of voice and face have a random sign, which a low or high voice and dim or "
        "bright light show.",
    )
    synthesize.add_argument("folder")
    synthesize.add_argument(
        "--kind", choices=("clips", "control", "control-clips"), default="clips", help="default clips"
    )
    synthesize.add_argument("--seed", type=int, default=1111)
    for name in ("text", "audio", "vision"):
        synthesize.add_argument(
            f"--{name}",
            type=float,
            help="strength of the modality: of its cue from 0 to 1 (clips; default text 1, audio .6, vision "
            ".8), or of its own part of the label relative to the others (control; default 1)",
        )
    clips = synthesize.add_argument_group("clips and control-clips")
    clips.add_argument("--clips", type=_at_least(1), help="number of clips (default 240)")
    clips.add_argument("--workers", type=_at_least(1), help="processes (default: all cores)")
    control = synthesize.add_argument_group("control")
    control.add_argument("--shared", type=float, help="strength of the shared part (default 1)")
    control.add_argument(
        "--sizes",
        type=_at_least(2),
        nargs=3,
        metavar=("TRAIN", "VALID", "TEST"),
        help="samples in the splits (default 1284 229 686)",
    )
    control.add_argument(
        "--difficulty",
        type=_modality_value,
        nargs="+",
        metavar="MODALITY=D",
        help="0 is linear, 1 hidden, 2 learned late (default text=0 audio=1 vision=1)",
    )
    control.add_argument(
        "--noise",
        type=_modality_value,
        nargs="+",
        metavar="MODALITY=SD",
        help="standard deviation of the noise of each feature (default .5 for all)",
    )
    synthesize.set_defaults(refuse=synthesize.error)


class _TrainingHelp(argparse.Action):
    """Print the keys of a configuration; they are read on demand only."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(training_help())
        parser.exit()


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train a model from a configuration",
        usage=f"{TRAINING_USAGE.removeprefix('usage: ')}\n       msa-online train --help    lists the keys",
        add_help=False,
    )
    train.add_argument("-h", "--help", nargs=0, action=_TrainingHelp)
    train.add_argument("config", metavar="CONFIG")
    train.add_argument("changes", metavar="key=value", nargs="*", default=[])


def _add_launch(commands: argparse._SubParsersAction) -> None:
    launch = commands.add_parser(
        "launch",
        help="train on several processes or GPUs",
        usage="msa-online launch [OPTION ...] CONFIG [key=value ...]",
        description="Train as with `msa-online train`, in several processes. OPTIONs are those of "
        "`accelerate launch`, which lists them with --help, like --num_processes 2 or --config_file FILE.",
    )
    launch.set_defaults(words=[])


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study",
        help="run variants of a configuration with several seeds, and compare them in a table",
        description=STUDY_HELP,
    )
    study.add_argument("study", metavar="STUDY", help="a file, or a shipped study like ablations/ebmc")
    study.add_argument("changes", metavar="key=value", nargs="*", default=[])
    study.add_argument(
        "--only", metavar="VARIANT", action="append", default=[], help="run this variant; repeatable"
    )
    study.add_argument("--table", action="store_true", help="train nothing, only write the table again")


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="search settings of a configuration by the validation score",
        description="Carry out trials with optuna until N are finished, and write best.yaml, which `train` "
        "and `study` accept, to training.output_dir. The test split is not scored. A search that was stopped "
        "continues. The space is a YAML file with lines like `training.learning_rate: {log: [1e-4, 3e-3]}`, "
        "`model.head_kwargs.dropout: {uniform: [0, 0.6]}` or `training.batch_size: {choice: [32, 64]}`.",
    )
    tune.add_argument(
        "config", metavar="CONFIG", help="a file, or a shipped configuration; with --variant, a study"
    )
    tune.add_argument("changes", metavar="key=value", nargs="*", default=[])
    tune.add_argument("--trials", type=_at_least(1), required=True, metavar="N", help="trials in all")
    tune.add_argument(
        "--space",
        metavar="SPACE",
        help="a file, or a shipped space (default: spaces/NAME beside the configuration)",
    )
    tune.add_argument(
        "--variant", help="search settings of this variant of the study CONFIG, with its first seed"
    )
    tune.set_defaults(refuse=tune.error)


def _add_convert_features(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert-features", help="convert precomputed features to a corpus to train on"
    )
    convert.add_argument("source", metavar="FILE", help=".pkl in MMSA's layout, or .npz")
    convert.add_argument("folder", metavar="FOLDER", help="a new folder")
    convert.add_argument("--metadata", metavar="CSV", help="labels, splits and text, matched by column id")
    convert.add_argument("--label-column", help="column of the labels (default: label or regression_labels)")
    convert.add_argument("--split-column", default="split", help="column of the splits (default split)")
    convert.add_argument(
        "--valid-share", type=_share, metavar="SHARE", help="share of training to use for validation"
    )
    _add_level(convert)
    convert.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="make features of text from the tokens in text_bert: folder or name of the encoder they are for",
    )
    convert.add_argument(
        "--non-finite",
        default="refuse",
        choices=("refuse", "zero"),
        help="how to treat NaN and infinities",
    )
    convert.add_argument("--skip-broken", action="store_true", help=SKIP_BROKEN)


def _add_extract_features(commands: argparse._SubParsersAction) -> None:
    extract = commands.add_parser("extract-features", help="extract a corpus of features from raw clips")
    extract.add_argument("data", metavar="CLIPS", help="as for prepare")
    extract.add_argument("folder", metavar="FOLDER", help="a new folder")
    extract.add_argument("--text-encoder", required=True, metavar="NAME", help="name or folder of an encoder")
    extract.add_argument(
        "--audio-encoder", metavar="NAME", help="name or folder of an encoder (default: acoustic descriptors)"
    )
    extract.add_argument(
        "--audio-layer",
        type=_layer,
        metavar="LAYER",
        help="layer of the audio encoder: a number, 0 for the embeddings, or last (default last; one in "
        "the upper middle is often better)",
    )
    extract.add_argument(
        "--audio-stride",
        type=_at_least(1),
        metavar="N",
        help="average so many consecutive states of the audio encoder (default: 10 to 12.5 a second remain)",
    )
    extract.add_argument(
        "--vision-encoder",
        metavar="NAME",
        help="name or folder of an encoder of images, whose states precede the blendshapes",
    )
    extract.add_argument("--label-column", default="label", help="column of the labels (default label)")
    extract.add_argument("--num-frames", type=_at_least(1), default=8, help=NUM_FRAMES)
    _add_level(extract)
    _add_extraction(extract)
    extract.set_defaults(refuse=extract.error)


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level", default="sequence", choices=("sequence", "utterance"), help="keep steps, or pool them"
    )


def _add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this module first, if the checkpoint needs it; repeatable",
    )


def _number(text: str, kind: Callable[[str], float] = float) -> float:
    """A number, or an error in words; argparse itself would name the Python function that failed."""
    try:
        return kind(text)
    except ValueError as error:
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number") from error


def _share(text: str) -> float:
    """Option type: numbers between 0 and 1."""
    if not 0 < _number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number between 0 and 1")
    return float(text)


def _modality_value(text: str) -> tuple[str, float]:
    """Option type: a number for a modality, like audio=0.5."""
    name, _, value = text.partition("=")
    if name not in ("text", "audio", "vision") or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: give text=, audio= or vision= with a number")
    return name, _number(value)


def _layer(text: str) -> str | int:
    """Option type: "last" or the number of a layer."""
    if text == "weighted":
        raise argparse.ArgumentTypeError(
            "weighted is learned in training: give last or a number, or train on the clips with "
            "model.audio_layer=weighted and training.freeze=[audio]"
        )
    if text != "last" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no layer: give last, or a number from 0")
    return text if text == "last" else int(text)


def _positive(text: str) -> float:
    """Option type: finite numbers above 0."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return float(text)


def _port(text: str) -> int:
    """Option type: numbers of ports."""
    if not 0 < _number(text, int) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number from 1 to 65535")
    return int(text)


def _seed(text: str) -> int:
    """Option type: seeds."""
    from msa_online.training.config_validation import SEEDS

    if not 0 <= _number(text, int) < SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give a number from 0 to {SEEDS - 1}")
    return int(text)


def _at_least(lowest: int) -> Callable[[str], int]:
    """Option type: whole numbers from `lowest` on."""

    def whole_number(text: str) -> int:
        if _number(text, int) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)

    return whole_number


def _add_extraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_at_least(1), help="processes that extract features (default: all cores)"
    )
    parser.add_argument("--skip-broken", action="store_true", help=SKIP_BROKEN)
    _add_audio_track(parser, "of clips whose row names none")
    _add_transcription(parser)


def _add_transcription(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transcribe",
        nargs="?",
        const=_Source("transcription.py").constant("DEFAULT_MODEL"),
        metavar="MODEL",
        help="recognise the speech of clips without a text: whisper-tiny.en (default, English), a size of "
        "faster-whisper, or a folder or Hub repository of a recogniser",
    )
    parser.add_argument(
        "--language", metavar="CODE", help="with --transcribe: the spoken language, like de (default: detect)"
    )


def _add_audio_track(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--audio-track",
        type=_at_least(1),
        metavar="N",
        help=f"audio track {which}, from 1 (default: the default track, or the first audible one)",
    )


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: Name with its sections: "data.missing.rates"; "[]" means each item of a list.
        kind: Annotated type.
        default: Default in YAML; None if the key is required.
        meaning: Description.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def training_help() -> str:
    """Every key of a configuration: type, default and meaning, by section."""
    lines = [
        TRAINING_USAGE,
        "",
        "Train a model. CONFIG is a YAML file or the name of a shipped configuration (`msa-online configs`).",
        "key=value changes or adds a key; the value is read as YAML: training.epochs=3",
        "'model.head_kwargs={hidden_size: 64}'. The keys, with types and defaults:",
    ]
    section = ""
    for key in training_keys():
        if (here := key.name.split(".")[0]) != section:
            section = here
            lines += ["", f"{section}:"]
        default = "(needed)" if key.default is None else f"= {key.default}"
        lines.append(f"  {key.name}  {key.kind} {default}")
        lines += textwrap.wrap(key.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", examples_of("train")]
    return "\n".join(lines)


def training_keys() -> list[Key]:
    """Keys of a configuration, in the order of the sections and of the fields in them."""
    arguments = _Source("training/config.py")
    hidden = arguments.constant("NOT_SET_IN_YAML")
    model = [
        key for key in _Source("configuration_msa.py").keys("MSAConfig", "model") if _last(key) not in hidden
    ]
    methods = _Source("methods/__init__.py")
    choices = {
        "head": methods.constant("HEADS"),
        "calibrator": methods.constant("CALIBRATORS"),
        "context": _Source("context.py").constant("CONTEXTS"),
        "modulator": methods.constant("MODULATORS"),
    }
    return [
        replace(key, meaning=f"{key.meaning} One of {', '.join(choices[_last(key)])}.")
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
        """Value of a name at module level, or of the module it is imported from.

        For a dict, its keys, because the values may be classes.
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
        """Keys of a dataclass; a field that is a dataclass is replaced by its keys."""
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
    """Descriptions by name, from the section "Attributes" of a docstring."""
    entries = re.split(r"^    (?=\w+: )", docstring.partition("Attributes:\n")[2], flags=re.MULTILINE)
    pairs = (entry.partition(": ") for entry in entries)
    return {name: " ".join(meaning.split()) for name, colon, meaning in pairs if colon}


def main(argv: list[str] | None = None, program: str | None = None) -> int:
    """Parse the command line and run the command; returns the exit status.

    Args:
        argv: Arguments; by default those of this process.
        program: Command line of a training run, for its record; by default `msa-online train`.
    """
    try:
        try:
            return _run(_parse(argv, program))
        finally:
            sys.stdout.flush()  # an error here is caught; an error at exit is not
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        if error.errno != errno.EPIPE:  # that one is no error: the reader, such as `head`, has ended
            file = error.filename or "the output"
            print(f"error: {file} cannot be written ({error.strerror}): free disk space", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str] | None, program: str | None) -> argparse.Namespace:
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if "changes" in options and not any(word.startswith("-") for word in rest):
        options.changes = [*options.changes, *rest]  # argparse accepts no key=value after an option
    elif "words" in options:
        options.words = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.program = program
    return options


def _run(options: argparse.Namespace) -> int:
    # before importing torch and tqdm: DDP warns of a flag that stages need; a study shows its own progress
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if options.command in ("study", "tune"):
        os.environ.setdefault("TQDM_DISABLE", "1")
    # after parsing: these imports take seconds
    command = importlib.import_module(f"msa_online.commands.{options.command.replace('-', '_')}")
    from msa_online.evaluation.tables import open_console
    from msa_online.user_errors import run_command

    return run_command(lambda: command.run(options, open_console()))


if __name__ == "__main__":
    sys.exit(main())
