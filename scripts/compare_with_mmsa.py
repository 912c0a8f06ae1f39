# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Train the same models on the same pickle with the MMSA toolkit and here, and compare metrics and quality.

    python -m venv mmsa && mmsa/bin/pip install MMSA==2.2.1
    python scripts/compare_with_mmsa.py FOLDER --mmsa-python mmsa/bin/python

A synthetic corpus is written to FOLDER as a pickle in MMSA's layout: 50 aligned steps, lengths, text as the
states of a small random BERT and as its tokens. `msa-online convert-features` reads the same file. Models of
the toolkit that read tokens get that BERT, frozen, so all models of both sides see the same.

First every metric is computed by both sides on equal predictions: those of the toolkit's models and random
ones, on the scales of CMU-MOSI and CH-SIMS. Then a table compares test results, mean over the seeds. Finished
runs in FOLDER are not repeated.
"""

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
import yaml
from rich.console import Console
from transformers import BertConfig, BertModel, BertTokenizer

from msa_online.evaluation.metrics import CH_SIMS, SEVEN_POINT, regression_metrics
from msa_online.evaluation.tables import as_markdown
from msa_online.modalities import COMPLETE
from msa_online.precomputed.conversion import convert_features
from msa_online.synthetic.plan import CorpusRecipe, PlannedClip, plan_corpus
from msa_online.user_errors import run_command

SIDE = REPOSITORY / "scripts" / "mmsa_side.py"
LABELS = "labels.json"  # by split and id
STEPS = 50
WIDTHS = {"text": 768, "audio": 5, "vision": 20}
STRENGTHS = {"text": 0.7, "audio": 0.6, "vision": 0.7}
NOISE = 1.5  # of a step of audio or vision; its cue has a deviation of about 1
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FROZEN = {"use_finetune": False}

MODELS = {  # name of the toolkit: settings there, head here, its settings
    "lf_dnn": ({}, "late_fusion", {"hidden_size": 128}),
    "mult": ({"nlevels": 2}, "mult", {"hidden_size": 50, "heads": 10, "depth": 2, "kernel_size": 5}),
    "misa": (FROZEN, "misa", {"hidden_size": 128}),
    "self_mm": (FROZEN, "self_mm", {"input_norm": False}),  # as there
}
LOSSES = {
    "misa": {"similarity": 0.3, "difference": 0.1, "reconstruction": 1.0, "unimodal": 0},
    "late_fusion": {"unimodal": 0},
    "mult": {"unimodal": 0},
    "self_mm": {"unimodal": 0},
}
THEIR_NAMES = {
    "MAE": "mae",
    "Corr": "corr",
    "Has0_acc_2": "acc2_has0",
    "Has0_F1_score": "f1_has0",
    "Non0_acc_2": "acc2_non0",
    "Non0_F1_score": "f1_non0",
    "Mult_acc_7": "acc7",
    "Mult_acc_5": "acc5",
}
THEIR_SIMS_NAMES = {
    "MAE": "mae",
    "Corr": "corr",
    "Mult_acc_2": "acc2_sims",
    "F1_score": "f1_sims",
    "Mult_acc_3": "acc3_sims",
    "Mult_acc_5": "acc5_sims",
}
SHOWN = ("mae", "corr", "acc2_non0", "acc7")
RANDOM_CASES = 50


def compare(options: argparse.Namespace, console: Console) -> None:
    """Write the corpus, run both sides, print the two tables in Markdown."""
    folder = Path(options.folder).absolute()
    if not (folder / "features").exists():
        write_corpus(folder, options.clips)
    labels = json.loads((folder / LABELS).read_text())
    shared = {
        "early_stop": options.patience,
        "pretrained": str(folder / "bert"),
        "train_samples": len(labels["train"]),
    }
    settings = {name: {**shared, **there} for name, (there, _, _) in MODELS.items()}
    (folder / "settings.json").write_text(json.dumps(settings))
    theirs = {
        name: [run_theirs(options.mmsa_python, folder, name, seed) for seed in options.seeds]
        for name in options.models
    }
    compare_metrics(options.mmsa_python, folder, theirs, labels["test"], console)
    ours = run_ours(folder, options)
    rows = []
    for name in options.models:
        _, head, _ = MODELS[name]
        scored = [scores_of(run, labels["test"]) for run in theirs[name]]
        rows.append([f"{name}, MMSA", *cells_of(scored)])
        rows.append([f"{head}, here", *cells_of(ours[head])])
    console.out(as_markdown(["model", "MAE", "Corr", "Acc-2 Non0", "Acc-7"], rows))


def write_corpus(folder: Path, clips: int) -> None:
    """Write `features.pkl`, the BERT of its tokens, and the corpus that `convert-features` makes of them."""
    plan = plan_corpus(CorpusRecipe(clips=clips, strengths=STRENGTHS, missing=0.0))
    tokenizer, bert = write_bert(folder / "bert", [clip.text for clip in plan])
    random = np.random.default_rng(0)
    directions = {name: random.standard_normal(WIDTHS[name]) for name in ("audio", "vision")}
    content = {}
    for split in ("train", "valid", "test"):
        of_split = [clip for clip in plan if clip.split == split]
        content[split] = part_of(of_split, tokenizer, bert, directions, random)
    (folder / "features.pkl").write_bytes(pickle.dumps(content))
    labels = {
        split: dict(zip(part["id"], part["regression_labels"].tolist(), strict=True))
        for split, part in content.items()
    }
    (folder / LABELS).write_text(json.dumps(labels))
    convert_features(folder / "features.pkl", folder / "features")


def write_bert(folder: Path, texts: Sequence[str]) -> tuple[BertTokenizer, BertModel]:
    """Write a BERT of one layer with random weights, and a tokenizer that knows the words of `texts`."""
    splitter = BertTokenizer()
    normalize = splitter.backend_tokenizer.normalizer.normalize_str
    split = splitter.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), num_hidden_layers=1, intermediate_size=768)
    bert = BertModel(config).eval()
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, bert


@torch.inference_mode()
def part_of(
    clips: Sequence[PlannedClip],
    tokenizer: BertTokenizer,
    bert: BertModel,
    directions: Mapping[str, np.ndarray],
    random: np.random.Generator,
) -> dict:
    """One split of the pickle: every step of audio and vision shows the cue of the clip, in noise."""
    tokens = tokenizer(
        [clip.text for clip in clips],
        padding="max_length",
        max_length=STEPS,
        truncation=True,
        return_tensors="pt",
    )
    mask = tokens["attention_mask"]
    states = bert(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state * mask[..., None]
    part = {
        "id": [clip.file_name.replace("/", "$_$") for clip in clips],
        "raw_text": [clip.text for clip in clips],
        "text": states.numpy(),
        "text_bert": torch.stack([tokens["input_ids"], mask, torch.zeros_like(mask)], dim=1).numpy(),
        "regression_labels": np.array([clip.label for clip in clips], np.float32),
        "annotations": [("Negative", "Neutral", "Positive")[int(np.sign(clip.label)) + 1] for clip in clips],
    }
    for name, direction in directions.items():
        cues = np.array([clip.cues[name] for clip in clips])
        noise = NOISE * random.standard_normal((len(clips), STEPS, len(direction)))
        values = (cues[:, None, None] * direction + noise) * mask[..., None].numpy()
        part[name] = values.astype(np.float32)
        part[f"{name}_lengths"] = mask.sum(dim=1).tolist()
    return part


def run_theirs(python: str, folder: Path, model: str, seed: int) -> dict:
    """Test predictions of a model of the toolkit."""
    written = folder / f"{model}_{seed}.json"
    if not written.exists():
        with open(folder / f"{model}_{seed}.log", "w") as log:
            command = [python, str(SIDE), "train", str(folder), model, str(seed)]
            subprocess.run(command, stdout=log, stderr=log, check=True)
    return json.loads(written.read_text())


def scores_of(run: Mapping, labels: Mapping[str, float]) -> dict[str, float]:
    """Our metrics of predictions of the toolkit."""
    return regression_metrics(run["predictions"], [labels[name] for name in run["ids"]])


def compare_metrics(
    python: str,
    folder: Path,
    theirs: Mapping[str, Sequence[Mapping]],
    labels: Mapping[str, float],
    console: Console,
) -> None:
    """Print the largest difference of each metric on equal predictions."""
    random = np.random.default_rng(0)
    cases = {
        f"mosi {name} {number}": np.array([run["predictions"], [labels[each] for each in run["ids"]]])
        for name, runs in theirs.items()
        for number, run in enumerate(runs)
    }
    for number in range(RANDOM_CASES):
        true = random.integers(-15, 16, 200) / 5
        cases[f"mosi random {number}"] = np.array([true + random.standard_normal(200), true])
        true = random.integers(-5, 6, 200) / 5
        predicted = np.round((true + 0.4 * random.standard_normal(200)).clip(-1, 1), 1)
        cases[f"sims random {number}"] = np.array([predicted, true])
    cases = {name: case.astype(np.float32) for name, case in cases.items()}
    np.savez(folder / "cases.npz", **cases)
    subprocess.run([python, str(SIDE), "score", str(folder)], check=True, capture_output=True)
    scores = json.loads((folder / "scores.json").read_text())
    largest: dict[str, float] = {}
    for name, (predicted, true) in cases.items():
        of_sims = name.startswith("sims")
        names = THEIR_SIMS_NAMES if of_sims else THEIR_NAMES
        mine = regression_metrics(predicted, true, label_range=CH_SIMS if of_sims else SEVEN_POINT)
        for their_name, our_name in names.items():
            key = f"{their_name}, {'SIMS' if of_sims else 'MOSI'}"
            largest[key] = max(largest.get(key, 0.0), abs(scores[name][their_name] - mine[our_name]))
    rows = [[key, f"{difference:.1e}"] for key, difference in largest.items()]
    console.out(as_markdown(["metric of MMSA", f"largest difference in {len(cases)} cases"], rows))
    console.out("")


def run_ours(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Test metrics of each head, one dict a seed, with everything visible."""
    variants = {}
    for name in options.models:
        _, head, kwargs = MODELS[name]
        loss = {"regression_loss": "mse" if name == "misa" else "l1"}
        variants[head] = {
            "model.head": head,
            "model.head_kwargs": {**kwargs, **loss},
            "model.loss_weights": LOSSES.get(head, {}),
        }
    study = {
        "config": str(REPOSITORY / "configs" / "late_fusion_plain_offline.yaml"),
        "output_dir": str(folder / "ours"),
        "seeds": options.seeds,
        "variants": variants,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    widths = ", ".join(f"{name}: {width}" for name, width in WIDTHS.items())
    command = [
        *(sys.executable, "-m", "msa_online_cli", "study", str(folder / "study.yaml")),
        *(f"data.path={folder / 'features'}", f"model.feature_widths={{{widths}}}"),
        *(f"training.epochs={options.epochs}", f"training.patience={options.patience}"),
        "training.learning_rate=1e-3",
    ]
    with open(folder / "ours.log", "w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, cwd=REPOSITORY)
    results = json.loads((folder / "ours" / "results.json").read_text())
    found: dict[str, list[dict[str, float]]] = {}
    for run in results["runs"]:
        found.setdefault(run["variant"], []).append(run["results"]["test"][COMPLETE])
    return found


def cells_of(scored: Sequence[Mapping[str, float]]) -> list[str]:
    """Mean and standard deviation of each shown metric over the seeds; accuracies in percent."""
    cells = []
    for name in SHOWN:
        values = np.array([scores[name] for scores in scored]) * (100 if name.startswith("acc") else 1)
        spread = f" ± {values.std(ddof=1):.{1 if name.startswith('acc') else 3}f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.{1 if name.startswith('acc') else 3}f}{spread}")
    return cells


def main(argv: list[str]) -> int:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="corpus, logs and results of all runs")
    parser.add_argument("--mmsa-python", required=True, help="Python of an environment with MMSA")
    parser.add_argument("--clips", type=int, default=900, help="samples of the corpus (default 900)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1111, 1112, 1113])
    parser.add_argument("--epochs", type=int, default=60, help="most epochs, of ours only (default 60)")
    parser.add_argument(
        "--patience", type=int, default=8, help="epochs without progress, of both (default 8)"
    )
    options = parser.parse_args(argv)
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
