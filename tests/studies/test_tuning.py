# SPDX-License-Identifier: Apache-2.0
"""Searches as a user runs them with `msa-online tune`: stopped, continued, with faulty spaces."""

from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import msa_online_cli
from msa_online.training.config_reader import read_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SPACE = {
    "training.learning_rate": {"log": ["1e-4", 1e-2]},
    "model.head_kwargs.hidden_size": {"choice": [4, 8]},
}


@pytest.fixture
def search(tmp_path: Path, capsys):
    """A function that runs a search on a few features; returns the exit status and what it printed."""
    random = np.random.default_rng(0)
    count = 30
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(count)]),
        label=np.linspace(-3, 3, count).astype(np.float32),
        split=np.array(["train", "valid", "test"] * (count // 3)),
        **{name: random.normal(size=(count, 3)).astype(np.float32) for name in ("text", "audio", "vision")},
    )
    config = {
        "model": {"feature_widths": dict.fromkeys(("text", "audio", "vision"), 3)},
        "data": {"path": str(tmp_path / "features.npz")},
        "training": {"epochs": 1, "log_with": None, "output_dir": str(tmp_path / "search")},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "spaces").mkdir()

    def search(trials: int, *options: str, space: dict | str = SPACE) -> tuple[int, str]:
        (tmp_path / "spaces" / "mine.yaml").write_text(
            space if isinstance(space, str) else yaml.safe_dump(space)
        )
        words = ["tune", str(tmp_path / "mine.yaml"), "--trials", str(trials), *options]
        status = msa_online_cli.main(words)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return search


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.load_study(study_name="search", storage=storage).trials


def test_a_search_continues_and_writes_settings_that_train_takes(search, tmp_path):
    status, output = search(2)
    assert status == 0 and "best of 2 trials" in output, output
    folder = tmp_path / "search"
    status, output = search(3)
    assert status == 0 and "3 trials of mine, by validation score" in output, output
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert len({trial.params["training.learning_rate"] for trial in trials}) == 3
    best = max(trials, key=lambda trial: trial.value)
    assert f"number {best.number}, validation MAE {-best.value:.3f}" in output
    chosen = read_arguments(folder / "best.yaml")
    assert chosen.training.learning_rate == pytest.approx(best.params["training.learning_rate"])
    assert chosen.model["head_kwargs"]["hidden_size"] == int(best.params["model.head_kwargs.hidden_size"])
    assert chosen.training.output_dir == str(folder / "best") and not chosen.training.overwrite
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["000.log", "001.log", "002.log"]
    logs = [path.read_text() for path in (folder / "trials").iterdir()]
    assert all("valid" in log and "test" not in log.partition("training ")[2] for log in logs), (
        "the test was seen"
    )
    status, output = search(3, "training.epochs=2")
    assert status == 1 and "search with training.epochs=1, not 2" in output


def test_the_values_of_an_interrupted_trial_are_tried_again_and_the_own_ones_first(search, tmp_path):
    own = ("training.learning_rate=0.002", "model.head_kwargs.hidden_size=8")
    assert search(1, *own)[0] == 0
    folder = tmp_path / "search"
    (first,) = trials_of(folder)
    assert first.params == {"training.learning_rate": 0.002, "model.head_kwargs.hidden_size": "8"}
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    killed = optuna.load_study(study_name="search", storage=storage).ask()
    killed.suggest_float("training.learning_rate", 1e-4, 1e-2, log=True)
    killed.suggest_categorical("model.head_kwargs.hidden_size", ["4", "8"])
    assert search(2, *own)[0] == 0
    _, stopped, again = trials_of(folder)
    assert stopped.state == optuna.trial.TrialState.FAIL and stopped.params == killed.params == again.params


def test_a_trial_that_diverges_counts_as_the_worst_and_the_search_goes_on(search, tmp_path):
    space = {"training.learning_rate": {"choice": ["1e30", 0.001, 0.01, 0.1]}}
    changes = ("training.learning_rate=1e30", "training.clip_norm=1e30", "training.epochs=3")
    status, output = search(2, *changes, space=space)
    assert status == 0 and "best of 2 trials: number 1" in output and "diverged" in output, output
    assert [trial.state.name for trial in trials_of(tmp_path / "search")] == ["PRUNED", "COMPLETE"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"training.learning_rat": {"log": [0.1, 0.2]}}, "did you mean 'learning_rate'"),
        ({"model.head_kwargs.hiden_size": {"choice": [4, 8]}}, "did you mean 'hidden_size'"),
        ({"model.head_kwargs.dropout": {"uniform": [0, 1.5]}}, "dropout=1.5"),
        ({"training.learning_rate": {"range": [0.1, 0.2]}}, "write one of {log: [LOW, HIGH]}"),
        ({"training.learning_rate": {"log": [0, 0.2]}}, "both above 0"),
        ({"training.learning_rate": {"uniform": [0.2, 0.1]}}, "a low and a high number"),
        ({"training.batch_size": {"choice": [4]}}, "a list of two or more"),
        ({"training.output_dir": {"choice": ["a", "b"]}}, "is set by the search"),
        ({"training": {"choice": [{"epochs": 1}, {"epochs": 2}]}}, "training is a whole section: name its"),
        ("{}", "no key to search"),
        ("[", "not YAML"),
    ],
)
def test_a_faulty_space_is_refused_in_one_line_before_anything_is_trained(search, tmp_path, space, message):
    status, output = search(1, space=space)
    assert status == 1 and message in output, output
    assert len(output.splitlines()) == 1 and not (tmp_path / "search").exists()


def test_a_record_that_a_full_disk_cut_off_loses_no_finished_trial(search, tmp_path):
    search(1)
    journal = tmp_path / "search" / "journal.log"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "')
    status, output = search(2)
    assert status == 0 and "best of 2 trials" in output, output
    assert len(trials_of(tmp_path / "search")) == 2
    journal.write_bytes(b"no journal\n")
    status, output = search(3)
    assert status == 1 and f"{journal} is damaged" in output and "Traceback" not in output


def test_a_missing_space_and_a_foreign_folder_are_refused(search, tmp_path):
    status, output = search(1, "--space", str(tmp_path / "none.yaml"))
    assert status == 1 and "none.yaml" in output
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "notes.txt").touch()
    status, output = search(1)
    assert status == 1 and "holds something else than a search" in output


def test_a_variant_of_a_study_is_searched_with_its_own_settings_and_first_seed(search, tmp_path):
    search(1)  # writes the space
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(
            {
                "config": str(tmp_path / "mine.yaml"),
                "output_dir": str(tmp_path / "study"),
                "seeds": [7, 8],
                "epochs": 2,
                "variants": {"plain": {}, "steep one": {"training.weight_decay": 0.5}},
            }
        )
    )
    space = str(tmp_path / "spaces" / "mine.yaml")
    options = ("tune", str(tmp_path / "study.yaml"), "--variant", "steep one", "--trials", "1")
    with pytest.raises(SystemExit):
        msa_online_cli.main([*options])
    assert msa_online_cli.main([*options, "--space", space, "training.clip_norm=2"]) == 0
    best = read_arguments(tmp_path / "study" / "steep_one" / "search" / "best.yaml").training
    assert (best.seed, best.weight_decay, best.clip_norm, best.epochs) == (7, 0.5, 2.0, 2)
