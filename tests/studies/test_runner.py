# SPDX-License-Identifier: Apache-2.0
"""Studies as a user runs them with `msa-online study`: killed, continued, with a faulty variant."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LIMIT = 240  # seconds a study may take on a busy machine


@pytest.fixture
def start(repository: Path, tiny_corpus: Path, tiny_text_encoder: Path, tmp_path: Path):
    """A function that starts a study of tiny models with the given variants in a process of its own."""
    base = {
        "model": {
            "text_encoder": str(tiny_text_encoder),
            "audio_channels": [16, 16],
            "audio_width": 16,
            "face_channels": 8,
            "face_width": 16,
            "head_kwargs": {"hidden_size": 16},
        },
        "data": {"path": str(tiny_corpus), "num_frames": 4, "face_size": 32},
        "training": {"epochs": 1, "batch_size": 4, "log_with": None},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def start(variants: dict, *options: str) -> subprocess.Popen:
        study = {
            "config": str(tmp_path / "base.yaml"),
            "output_dir": str(tmp_path / "study"),
            "seeds": [1],
            "variants": variants,
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return subprocess.Popen(
            [sys.executable, "-m", "msa_online_cli", "study", str(tmp_path / "tiny.yaml"), *options],
            cwd=repository,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def run(start):
    """A function that runs a study to its end; returns its exit status and what it printed."""

    def run(variants: dict, *options: str) -> tuple[int, str]:
        process = start(variants, *options)
        output, _ = process.communicate(timeout=LIMIT)
        return process.returncode, output

    return run


def test_a_study_leaves_a_table_of_runs_that_do_not_touch_each_other(run, tmp_path):
    variants = {"plain": {}, "the same": {}, "no unimodal": {"model.loss_weights": {"unimodal": 0}}}
    status, output = run(variants, "seeds=[1, 2]")
    assert status == 0, output
    lines = [line for line in output.splitlines() if line.startswith("[")]
    assert len(lines) == 6 and all("remaining" in line for line in lines), output
    assert lines[1].startswith("[2/6] the same, seed 1: finished after 0:00:")
    assert not list((tmp_path / "study").rglob("*.safetensors"))
    figures = json.loads((tmp_path / "study" / "results.json").read_text())
    assert figures["split"] == "test" and list(figures["variants"]) == list(variants)
    plain, same, other = figures["variants"].values()
    assert plain["seeds"] == [1, 2] and plain["all"]["mae"]["std"] > 0
    assert plain == same, "an earlier run in the same process changed a later one"
    assert other != plain
    page = (tmp_path / "study" / "table.md").read_text()
    assert f"{plain['all']['mae']['mean']:.3f} ±" in page and "online" in page
    assert len(figures["ends"]) == 6 and "| plain | 1 | 1 of 1 | 1 | limit, not converged |" in page
    assert "warning: plain (seed 1, 2) ended at its limit of 1 epochs" in output
    assert (tmp_path / "study" / "learning_curves.png").stat().st_size > 5000
    assert list(figures["differences"]) == ["the same", "no unimodal"]
    assert figures["differences"]["the same"]["all"]["mean"] == 0
    assert figures["differences"]["no unimodal"]["all"]["mean"] == pytest.approx(
        other["all"]["mae"]["mean"] - plain["all"]["mae"]["mean"], abs=1e-4
    )
    assert "## Difference to plain" in page and "Difference to plain" in output
    assert all(name in page and name in output for name in variants)

    status, output = run(variants, "seeds=[1, 2]", "training.epochs=2")
    assert status == 1 and "training.epochs=1, now 2" in output, output

    (tmp_path / "study" / "table.md").unlink()
    status, output = run(variants, "--table", "seeds=[2]")
    assert status == 0 and "| plain | 1 |" in (tmp_path / "study" / "table.md").read_text(), output


def test_variants_in_settings_are_drawn_over_them(run, tmp_path):
    settings = "settings={whole: {}, half: {data.missing.rates: 0.5}}"
    variants = {"plain": {}, "frozen": {"training.freeze": ["text"]}}
    status, output = run(variants, "seeds=[1]", settings)
    assert status == 0, output
    page = (tmp_path / "study" / "table.md").read_text()
    assert all(
        f"| {name} |" in page for name in ("plain, whole", "frozen, whole", "plain, half", "frozen, half")
    )
    figures = json.loads((tmp_path / "study" / "results.json").read_text())["variants"]
    assert figures["plain, half"]["imr"]["mae"]["mean"] != figures["plain, half"]["all"]["mae"]["mean"]
    assert (tmp_path / "study" / "curves.png").stat().st_size > 5000


def test_a_killed_study_continues_where_it_stopped(start, run, tmp_path):
    variants = {"one": {}, "two": {"training.epochs": 8}}
    process = start(variants)
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "study" / "two" / "1" / "state").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = tmp_path / "study" / "one" / "1" / "config.json"
    before = finished.stat().st_mtime_ns
    status, output = run(variants, "keep_checkpoints=true")
    assert status == 0 and "1 of 2 runs are finished already" in output, output
    assert finished.stat().st_mtime_ns == before, "a finished run was run again"
    assert "resuming after epoch" in (tmp_path / "study" / "two" / "1.log").read_text()
    assert list(json.loads((tmp_path / "study" / "results.json").read_text())["variants"]) == ["one", "two"]
    assert (tmp_path / "study" / "two" / "1" / "model.safetensors").is_file()


def test_a_faulty_variant_is_named_and_what_was_finished_before_is_kept(run, tmp_path):
    variants = {"good": {}, "astray": {"data.path": str(tmp_path / "nowhere")}, "later": {}}
    status, output = run(variants)
    assert status == 1 and "error: variant 'astray', seed 1:" in output, output
    assert "nowhere" in output and "Traceback" not in output
    status, output = run(variants, "--only", "good", "--only", "later")
    assert status == 0 and "1 of 2 runs are finished already" in output, output
    assert "2 of 3 runs are finished" in output
    status, output = run(variants, "--only", "bad")
    assert status == 1 and "'bad' is no variant of the study: one of 'good', 'astray', 'later'" in output


def test_an_encoder_that_is_unavailable_stops_a_study_before_its_first_run(run, tmp_path):
    variants = {"good": {}, "typo": {"model.text_encoder": str(tmp_path / "nowhere")}}
    status, output = run(variants)
    assert status == 1 and "error: variant 'typo', seed 1: encoder" in output, output
    assert "finished after" not in output and not (tmp_path / "study" / "good").exists()
