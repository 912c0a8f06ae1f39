# SPDX-License-Identifier: Apache-2.0
"""The part of `compare_with_mmsa.py` that runs in the environment of the MMSA toolkit, without ours.

    python mmsa_side.py train FOLDER MODEL SEED     train on FOLDER/features.pkl; writes predictions
    python mmsa_side.py score FOLDER                score FOLDER/cases.npz with the toolkit's metrics

MMSA 2.2.1 is called from outside and not changed on disk. `MMSA_run` sets a CUDA device even without one, so
`_run` is called in its place. `ReduceLROnPlateau` gets an argument that torch has removed: it is ignored.
Metrics are rounded to four decimals: `round` is replaced for the scores that are compared.
"""

import json
import sys
from pathlib import Path

import MMSA.run
import MMSA.utils.metricsTop
import numpy as np
import torch
from MMSA.config import get_config_regression
from MMSA.utils import MetricsTop, setup_seed

SIMS = "SIMS"


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Without the argument `verbose`."""

    def __init__(self, *args, verbose: bool = False, **settings) -> None:
        super().__init__(*args, **settings)


def train(folder: Path, model: str, seed: int) -> None:
    """Train one model of the toolkit with its own settings for CMU-MOSI, changed by FOLDER/settings.json."""
    torch.optim.lr_scheduler.ReduceLROnPlateau = Plateau
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("MMSA.") and hasattr(module, "ReduceLROnPlateau"):
            module.ReduceLROnPlateau = Plateau
    settings = get_config_regression(model, "mosi", "")
    settings.update(json.loads((folder / "settings.json").read_text())[model])
    settings.update(
        device=torch.device("cpu"),
        train_mode="regression",
        custom_feature=str(folder / "features.pkl"),
        feature_T=None,
        feature_A=None,
        feature_V=None,
        model_save_path=folder / f"{model}.pth",
        res_save_dir=folder,
        cur_seed=1,
    )
    setup_seed(seed)
    done = MMSA.run._run(settings, num_workers=0, from_sena=True)
    test = done["final_results"]["test"]
    written = {
        "ids": [str(name) for name in test["Ids"]],
        "predictions": [float(value) for value in test["SResults"]],
        "epochs": len(done["epoch_results"]["valid"]),
    }
    (folder / f"{model}_{seed}.json").write_text(json.dumps(written))


def score(folder: Path) -> None:
    """Score every case of FOLDER/cases.npz; a case is `(2, samples)`, predictions and labels."""
    MMSA.utils.metricsTop.round = lambda value, _: value
    metrics = MetricsTop("regression")
    scores = {}
    with np.load(folder / "cases.npz") as cases:
        for name in cases.files:
            corpus = SIMS if name.startswith("sims") else "MOSI"
            predictions, labels = torch.from_numpy(cases[name])
            found = metrics.getMetics(corpus)(predictions, labels)
            scores[name] = {key: float(value) for key, value in found.items()}
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        score(Path(sys.argv[2]))
