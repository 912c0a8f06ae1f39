# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it: `accelerate launch train.py`, killed, resumed, on one process and two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LIMIT = 240  # seconds a launch may take on a busy machine


class Launcher:
    """Launches train.py on the tiny corpus."""

    def __init__(self, repository: Path, corpus: Path, folder: Path) -> None:
        self.repository, self.corpus, self.folder = repository, corpus, folder

    def configure(self, text_encoder: Path, dropout: float) -> Path:
        settings = {
            "model": {
                "text_encoder": str(text_encoder),
                "audio_channels": [16, 16],
                "audio_width": 16,
                "face_channels": 8,
                "face_width": 16,
                "head_kwargs": {"hidden_size": 16, "dropout": dropout},
            },
            "data": {"path": str(self.corpus), "num_frames": 4, "face_size": 32},
            "training": {
                "epochs": 6,
                "batch_size": 4,
                "accumulation": 2,
                "learning_rates": {"text": 1e-3},
                "layer_decay": 0.8,
            },
        }
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def start(self, config: Path, run: str, *changes: str, processes: int = 1) -> subprocess.Popen:
        options = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1"]
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options, "train.py", str(config),
             f"training.output_dir={self.folder / run}", *changes],
            cwd=self.repository,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, config: Path, run: str, *changes: str, processes: int = 1) -> str:
        process = self.start(config, run, *changes, processes=processes)
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, output
        return output

    def kill_after_first_epoch(self, config: Path, run: str, *changes: str) -> None:
        process = self.start(config, run, *changes)
        deadline = time.monotonic() + LIMIT
        while not (self.folder / run / "history.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(json.loads((self.folder / run / "history.json").read_text())) < 6


@pytest.fixture(scope="module")
def launcher(repository, tiny_corpus, tmp_path_factory) -> Launcher:
    return Launcher(repository, tiny_corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole_run(launcher, tiny_text_encoder) -> tuple[Path, str]:
    """An uninterrupted run with every source of randomness switched on, and what it printed."""
    config = launcher.configure(tiny_text_encoder, dropout=0.2)
    output = launcher.run(config, "whole", "training.modality_dropout={text: 0.3, audio: 0.2}")
    return launcher.folder / "whole", output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def test_a_killed_run_resumes_onto_the_same_weights(launcher, whole_run, tiny_text_encoder):
    config = launcher.configure(tiny_text_encoder, dropout=0.2)
    dropout = "training.modality_dropout={text: 0.3, audio: 0.2}"
    launcher.kill_after_first_epoch(config, "killed", dropout)
    output = launcher.run(config, "killed", dropout, "training.resume=true")
    assert "resuming after epoch" in output
    whole, resumed = weights(whole_run[0]), weights(launcher.folder / "killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    histories = [
        json.loads((folder / "history.json").read_text())
        for folder in (whole_run[0], launcher.folder / "killed")
    ]
    assert histories[0] == histories[1]


def test_two_processes_and_one_land_on_the_same_weights(launcher, tiny_text_encoder, tmp_path):
    still = tmp_path / "still_bert"
    still.mkdir()
    for file in tiny_text_encoder.iterdir():
        (still / file.name).write_bytes(file.read_bytes())
    settings = json.loads((still / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(settings))
    config = launcher.configure(still, dropout=0.0)
    changes = ("model.loss_weights={unimodal: 0.0}", "training.epochs=2", "training.log_with=null")
    changes += ("training.mixed_precision=no", "training.freeze.text=1")
    one = launcher.run(config, "one", *changes, "training.accumulation=1", "training.batch_size=8")
    saving = ("training.accumulation=1", "training.gradient_checkpointing=[text]")
    two = launcher.run(config, "two", *changes, *saving, processes=2)
    assert "1 process on cpu" in one
    assert "2 processes on cpu" in two
    assert "reducer.cpp" not in two  # DDP's advice about a flag that stages need
    alone, together = weights(launcher.folder / "one"), weights(launcher.folder / "two")
    for name, value in alone.items():
        torch.testing.assert_close(
            value, together[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_run_is_a_checkpoint_with_a_model_card(whole_run, tiny_corpus):
    from msa_online import MSAPipeline

    run, output = whole_run
    card = (run / "README.md").read_text()
    for fact in (
        "regression",
        f"| data | {tiny_corpus.name} |",
        "| found in the clips | no audio stream: 1, empty text: 1",
        "train 16, valid 6, test 8",
        "1111",
        "MSAPipeline",
        "text+audio+vision",
        "(1 process)",
        "![MAE on test",
    ):
        assert fact in card
    assert (run / "robustness.png").stat().st_size > 5000
    effort = json.loads((run / "config.json").read_text())["trained_on"]["effort"]
    assert effort["hours"] > 0 and effort["steps"] > 0 and effort["device"]
    assert str(tiny_corpus.parent) not in card  # no path of the machine it was trained on
    prediction = MSAPipeline.from_pretrained(run)(tiny_corpus / "clip_00.mp4", text="a great movie")
    assert prediction.modalities == ("text", "audio", "vision")
    assert "loss" in output and "unimodal" in output and "no audio stream" in output
    assert (run / "logs").exists()
    assert not (run / "state").exists()


def test_a_second_run_into_the_same_folder_is_refused_and_nothing_is_lost(
    launcher, whole_run, tiny_text_encoder
):
    before = (whole_run[0] / "model.safetensors").read_bytes()
    process = launcher.start(launcher.configure(tiny_text_encoder, dropout=0.2), "whole")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "holds an earlier run" in output and "training.resume=true" in output
    assert (whole_run[0] / "model.safetensors").read_bytes() == before


def test_a_wrong_key_is_one_error_line(launcher, tiny_text_encoder):
    config = launcher.configure(tiny_text_encoder, dropout=0.2)
    process = launcher.start(config, "wrong", "data.pth=clips")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {config}: unknown key 'data.pth'; did you mean 'path'?"]


def test_fine_tuning_starts_from_a_checkpoint_with_other_labels(launcher, whole_run, tiny_corpus):
    rows = (tiny_corpus / "metadata.csv").read_text().splitlines()
    header = rows[0] + ",mood"
    moods = [row + "," + ("good", "bad", "neither")[number % 3] for number, row in enumerate(rows[1:])]
    (tiny_corpus / "metadata.csv").write_text("\n".join([header, *moods]) + "\n")
    config = launcher.folder / "moods.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "data": {
                    "path": str(tiny_corpus),
                    "task": "classification",
                    "label_column": "mood",
                    "num_frames": 4,
                    "face_size": 32,
                    "audio_track": 1,
                },
                "training": {"epochs": 1, "batch_size": 8, "init_from": str(whole_run[0])},
            }
        )
    )
    launcher.run(config, "moods")
    from msa_online import MSAPipeline

    prediction = MSAPipeline.from_pretrained(launcher.folder / "moods")(None, text="a bad film")
    assert set(prediction.probabilities) == {"good", "bad", "neither"}
    record = json.loads((launcher.folder / "moods" / "config.json").read_text())["trained_on"]
    assert record["audio_track"] == 1
    assert sum(prediction.probabilities.values()) == pytest.approx(1.0, abs=1e-5)
    assert prediction.label == max(prediction.probabilities, key=prediction.probabilities.get)


def test_an_error_on_two_processes_is_one_line_with_our_launcher(launcher, tiny_text_encoder):
    config = launcher.configure(tiny_text_encoder, dropout=0.0)
    options = ["launch", "--num_processes", "2", str(config), "training.epochs=many"]
    command = [sys.executable, "-m", "msa_online_cli", *options]
    done = subprocess.run(command, cwd=launcher.repository, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {config}: training.epochs is 'many', but must be int\n"
