# SPDX-License-Identifier: Apache-2.0
import json
import os
import pickle
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoProcessor

from msa_online import MSAModel
from msa_online.studies.folder import held
from msa_online.training.checkpoint import LOCK, RunFolder, require_space
from msa_online.training.config import RunArguments
from msa_online.training.config_reader import parse_arguments
from msa_online.training.loop import Progress
from msa_online.training.yaml_reader import ConfigurationError

DiskUsage = namedtuple("DiskUsage", "total used free")


def configured(path: Path, **training) -> RunArguments:
    """A run in `path`, with some keys of its `training:` section."""
    document = {
        "model": {"text_encoder": "bert-base-uncased"},
        "training": {"output_dir": str(path), **training},
    }
    return parse_arguments(document)


class Run:
    """A run reduced to what a state holds: a linear layer, its optimizer, and a registered count of steps."""

    def __init__(self, path: Path) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        layer = torch.nn.Linear(2, 1)
        self.layer, self.optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
        self.progress = Progress()
        self.folder = RunFolder(path, accelerator)

    def train(self) -> None:
        """One step on random data."""
        self.layer(torch.randn(8, 2)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1

    def save(self) -> None:
        self.folder.save_state(self.layer, self.parts)

    def load(self) -> None:
        self.folder.load_state(self.layer, self.parts)

    @property
    def parts(self) -> dict:
        return {"optimizer": self.optimizer, "progress": self.progress}

    @property
    def weights(self) -> list[float]:
        return self.layer.weight.flatten().tolist()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def begun(path) -> Run:
    """A run that has finished one epoch: its folder holds a state."""
    run = Run(path)
    run.folder.open(configured(path))
    run.train()
    run.save()
    return run


def test_a_run_records_how_it_was_configured(path):
    Run(path).folder.open(configured(path, epochs=3))
    text = (path / "run.yaml").read_text()
    assert "epochs: 3" in text and "text_encoder: bert-base-uncased" in text


def test_an_earlier_run_is_not_overwritten_by_accident(begun, path):
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(
        ConfigurationError, match="holds an earlier run.*training.resume=true.*training.overwrite=true"
    ):
        Run(path).folder.open(configured(path))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_overwrite_begins_with_an_empty_folder(begun, path):
    (path / "model.safetensors").write_text("of the earlier run")
    Run(path).folder.open(configured(path, overwrite=True, epochs=7))
    assert [file.name for file in path.iterdir()] == ["run.yaml"]
    assert "epochs: 7" in (path / "run.yaml").read_text()


def test_a_run_that_was_killed_while_its_folder_was_made_can_be_started_again(path):
    path.mkdir(parents=True)
    (path / "run.yaml.new").write_text("model:")
    with pytest.raises(TypeError):  # stops between the settings and the data
        Run(path).folder.open(configured(path), {"a clip": object()})
    assert not (path / "data.json").exists()
    Run(path).folder.open(configured(path, overwrite=True))
    assert [file.name for file in path.iterdir()] == ["run.yaml"]


def test_the_lock_of_a_study_that_was_refused_early_is_no_foreign_file(path):
    with pytest.raises(ConfigurationError, match="no such encoder"), held(path):
        raise ConfigurationError("no such encoder")
    assert [file.name for file in path.iterdir()] == [LOCK]
    Run(path).folder.open(configured(path))
    assert (path / "run.yaml").exists()


def test_overwrite_never_deletes_what_the_run_did_not_write(path):
    path.mkdir(parents=True)
    (path / "interview.mp4").write_text("the only copy")
    try:
        Run(path).folder.open(configured(path))
        Run(path).folder.open(configured(path, overwrite=True))
    except ConfigurationError as error:
        assert str(path) in str(error)
    assert (path / "interview.mp4").read_text() == "the only copy"


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_cannot_be_made_is_refused_before_the_clips_are_decoded(tmp_path, inside):
    (tmp_path / "notes").write_text("a file")
    path = tmp_path / "notes" / "run" if inside else tmp_path / "notes"
    with pytest.raises(
        ConfigurationError, match="training.output_dir=.*notes.* cannot be created: .* a file"
    ):
        Run(path).folder.check(configured(path))


def test_resuming_where_no_epoch_was_finished_is_refused(path):
    with pytest.raises(ConfigurationError, match=f"{path.name}: nothing to resume: no run was started"):
        Run(path).folder.open(configured(path, resume=True))
    Run(path).folder.open(configured(path))  # started, and stopped in its first epoch
    with pytest.raises(ConfigurationError, match="nothing to resume.*training.overwrite=true"):
        Run(path).folder.open(configured(path, resume=True))


def test_resuming_a_finished_run_says_that_it_has_finished(begun, path):
    (path / "model.safetensors").write_bytes(b"the best epoch")
    begun.folder.forget_state()
    with pytest.raises(ConfigurationError, match="nothing to resume: the run has finished"):
        Run(path).folder.open(configured(path, resume=True))


def test_a_finished_run_says_how_to_train_longer(begun, path):
    (path / "model.safetensors").write_bytes(b"the best epoch")
    begun.folder.forget_state()
    with pytest.raises(
        ConfigurationError, match=r"training\.init_from=\S+one training\.epochs=N training\.output_dir"
    ):
        Run(path).folder.open(configured(path, resume=True))


SAMPLES = {f"s{number}": ["train", f"{number}.0", "text", "file"] for number in range(4)}


def changed(name: str, place: int, value: str) -> dict:
    return {**SAMPLES, name: [value if at == place else each for at, each in enumerate(SAMPLES[name])]}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (changed("s2", 0, "test"), r"1 of 4 splits differ \(for example 's2': 'train', now 'test'\)"),
        (changed("s2", 1, "-2.0"), r"1 of 4 labels differ \(for example 's2': '2\.0', now '-2\.0'\)"),
        (changed("s0", 2, "other"), r"1 of 4 transcripts differ \(for example 's0'\)"),
        (changed("s3", 3, "other"), r"1 of 4 files differ \(for example 's3'\)"),
        ({name: SAMPLES[name] for name in ("s0", "s1")}, r"2 samples are gone \(for example 's2'\)"),
        ({**SAMPLES, "s9": SAMPLES["s0"]}, r"1 sample is new \(for example 's9'\)"),
        (dict(reversed(SAMPLES.items())), r"the samples are in another order \(number 1: 's0', now 's3'\)"),
    ],
)
def test_a_run_is_not_resumed_on_data_that_have_changed(path, now, message):
    run = Run(path)
    run.folder.open(configured(path), SAMPLES)
    run.save()
    Run(path).folder.open(configured(path, resume=True), dict(SAMPLES))
    with pytest.raises(
        ConfigurationError, match=f"{path.name}: the data have changed since .*{message}"
    ) as caught:
        Run(path).folder.open(configured(path, resume=True), now)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_of_the_data_goes_with_the_state(path):
    run = Run(path)
    run.folder.open(configured(path), SAMPLES)
    assert (path / "data.json").exists()
    run.folder.forget_state()
    assert [file.name for file in path.iterdir()] == ["run.yaml"]


def test_a_damaged_fingerprint_is_named_and_a_run_of_an_earlier_version_continues(begun, path):
    Run(path).folder.open(configured(path, resume=True), SAMPLES)
    for content in ("{", "[1]", '{"s0": 3}'):
        (path / "data.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"data\.json: cannot be read.*training\.overwrite=true"):
            Run(path).folder.open(configured(path, resume=True), SAMPLES)


def test_history_is_valid_json_whatever_the_metrics(begun, path):
    begun.folder.write_history([{"valid": {"acc2_non0": float("nan"), "mae": 0.5}}])
    (epoch,) = json.loads((path / "history.json").read_text(), parse_constant=pytest.fail)
    assert epoch["valid"] == {"acc2_non0": None, "mae": 0.5}


def test_a_damaged_best_epoch_is_named_when_the_run_is_resumed_and_not_after_the_last_epoch(begun, path):
    save_file({"weight": torch.zeros(64)}, path / "model.safetensors")
    Run(path).folder.open(configured(path, resume=True))
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(ConfigurationError, match="model.safetensors: cannot be read.*put the file back"):
        Run(path).folder.open(configured(path, resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 99}, "started with training.epochs=10, not 99"),
        ({"learning_rate": 0.5}, "started with training.learning_rate=0.001, not 0.5"),
        ({"modality_dropout": {"text": 0.5}}, r"training.modality_dropout=\{\}, not \{'text': 0.5\}"),
        ({"stages": [{"name": "a", "epochs": 1}]}, "training.stages=None, not"),
    ],
)
def test_resuming_under_another_configuration_names_what_changed(begun, path, change, message):
    with pytest.raises(ConfigurationError, match=message):
        Run(path).folder.open(configured(path, resume=True, **change))


def test_a_run_continues_after_its_folder_was_moved(begun, path):
    moved = path.with_name("moved")
    path.rename(moved)
    Run(moved).folder.open(configured(moved, resume=True))


def test_a_key_given_up_since_the_start_counts_as_a_change(begun, path):
    started = path / "run.yaml"
    started.write_text(
        started.read_text().replace("bert-base-uncased", "bert-base-uncased\n  head: late_fusion")
    )
    with pytest.raises(ConfigurationError, match="started with model.head='late_fusion', not None"):
        Run(path).folder.open(configured(path, resume=True))


def test_a_run_of_an_earlier_version_is_refused_naming_its_key_and_what_replaces_it(begun, path):
    started = path / "run.yaml"
    started.write_text(started.read_text().replace("  learning_rates: {}", "  text_learning_rate: 2.0e-05"))
    with pytest.raises(
        ConfigurationError, match=r"run\.yaml: training\.text_learning_rate .* use .*overwrite"
    ):
        Run(path).folder.open(configured(path, resume=True))


def test_a_run_continues_in_the_precision_it_began_in(begun, path):
    """On a machine that would choose another one, the user names the precision of the start."""
    Run(path).folder.open(configured(path, resume=True, mixed_precision="no"))  # which `auto` came to
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = RunFolder(path, Accelerator(cpu=True, mixed_precision="bf16"))
    with pytest.raises(ConfigurationError, match="started with launch.mixed_precision='no', not 'bf16'"):
        folder.open(configured(path, resume=True))


@pytest.mark.parametrize("section", ["data", "training"])
def test_resuming_may_change_what_does_not_touch_the_result(begun, path, section):
    arguments = configured(path, resume=True, log_with=None)
    if section == "data":  # the number of processes that read: another machine has other cores
        document = arguments.to_dict()
        document["data"] |= {"prepare_workers": 3, "loader_workers": 2}
        arguments = parse_arguments(document)
    Run(path).folder.open(arguments)


def test_a_resumed_run_lands_where_an_uninterrupted_one_does(begun, path):
    begun.train()
    expected = begun.weights

    resumed = Run(path)
    resumed.folder.open(configured(path, resume=True))
    resumed.load()
    assert resumed.progress.step == 1
    resumed.train()  # draws the same data: the random numbers were resumed as well
    assert resumed.weights == expected


def test_saving_leaves_one_state_and_nothing_else(begun, path):
    begun.train()
    begun.save()
    assert sorted(file.name for file in path.iterdir()) == ["run.yaml", "state"]


@pytest.mark.parametrize(
    "stopped", ["while the new state is written", "between the renames", "before tidying up"]
)
def test_a_stop_while_saving_costs_one_epoch_at_most(begun, path, stopped):
    first = begun.weights
    if stopped == "while the new state is written":
        (path / "state.new").mkdir()
        (path / "state.new" / "model.safetensors").write_text("half")
    elif stopped == "between the renames":
        shutil.copytree(path / "state", path / "state.new")
        (path / "state").rename(path / "state.old")
    else:
        (path / "state.old").mkdir()
        (path / "state.old" / "model.safetensors").write_text("older")
    resumed = Run(path)
    resumed.folder.open(configured(path, resume=True))
    resumed.load()
    assert resumed.weights == first
    resumed.train()
    resumed.save()
    assert sorted(file.name for file in path.iterdir()) == ["run.yaml", "state"]
    again = Run(path)
    again.load()
    assert again.weights == resumed.weights


def test_two_stops_in_a_row_while_saving_cost_no_more_than_one(begun, path, monkeypatch):
    (path / "state").rename(path / "state.old")  # the first stop came between the renames

    def stop(*_):
        raise KeyboardInterrupt

    begun.train()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", stop)
        begun.save()
    Run(path).folder.open(configured(path, resume=True))  # there still is a whole state
    Run(path).load()


def test_a_state_that_cannot_be_read_is_refused_before_anything_else_is_done(begun, path):
    (path / "state" / "rank_0.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"rank_0\.json.*1 bytes, not .*training\.overwrite=true"):
        Run(path).folder.check(configured(path, resume=True))


class Malicious:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_state_of_pickles_is_refused_unread(path, tmp_path):
    """As Accelerate writes it, which earlier versions used."""
    run = Run(path)
    run.folder.open(configured(path))
    run.folder.accelerator.register_for_checkpointing(run.progress)
    run.folder.accelerator.save_state(str(path / "state"))
    for file in (path / "state").glob("*.pkl"):
        file.write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(ConfigurationError, match=r"state: .*pickles.*training\.overwrite=true"):
        Run(path).folder.check(configured(path, resume=True))
    assert not (tmp_path / "executed").exists()


def test_a_state_moved_in_from_another_run_is_refused(begun, path, tmp_path):
    other = Run(tmp_path / "other")
    other.folder.open(configured(tmp_path / "other", seed=7))
    other.save()
    shutil.rmtree(path / "state")
    shutil.copytree(tmp_path / "other" / "state", path / "state")
    with pytest.raises(
        ConfigurationError, match=r"run\.yaml: .*not the configuration that .*state was written"
    ):
        Run(path).folder.check(configured(path, resume=True))


@pytest.mark.parametrize("content", [None, "training: [", "- 1", "training: 3", b"\xff\xfe"])
def test_a_damaged_record_of_the_configuration_is_named(content, begun, path):
    settings = path / "run.yaml"
    settings.unlink()
    if content is not None:
        settings.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=r"run\.yaml: .*training\.overwrite=true") as caught:
        Run(path).folder.check(configured(path, resume=True))
    assert "\n" not in str(caught.value)


def test_the_scale_of_half_precision_is_resumed(path):
    def scaled() -> Run:
        run = Run(path)
        run.folder.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return run

    run = scaled()
    run.folder.open(configured(path))
    scaler = run.folder.accelerator.scaler
    for _ in range(3):  # grows once, and one step counts towards the next growth
        scaler.scale(run.layer(torch.randn(8, 2)).sum()).backward()
        scaler.step(run.optimizer.optimizer)
        scaler.update()
    run.save()
    resumed = scaled()
    resumed.load()
    found = resumed.folder.accelerator.scaler.state_dict()
    assert found == scaler.state_dict() and found["scale"] == 128.0 and found["_growth_tracker"] == 1


def test_a_finished_run_keeps_no_state(begun, path):
    begun.folder.forget_state()
    assert [file.name for file in path.iterdir()] == ["run.yaml"]


def test_a_published_folder_is_a_checkpoint_as_it_is(begun, path, tiny_model, tiny_processor):
    begun.folder.publish(tiny_model, tiny_processor)
    with torch.no_grad():
        tiny_model.head.classifier.bias += 1.0
    begun.folder.publish(tiny_model, tiny_processor)  # a better epoch replaces it
    assert not (path / "publish.new").exists() and (path / "state").is_dir()
    weights = MSAModel.from_pretrained(path).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model.state_dict().items())
    assert AutoProcessor.from_pretrained(path).extraction == tiny_processor.extraction


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_published_files_have_the_permissions_of_the_umask(umask, path, tmp_path, tiny_model, tiny_processor):
    """Safetensors writes files for their owner alone."""
    before = os.umask(umask)
    try:
        run = Run(path)
        run.folder.open(configured(path))
        run.folder.publish(tiny_model, tiny_processor)
        run.folder.write_history([])
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert "model.safetensors" in modes


@pytest.mark.parametrize("harm", ["cut short", "of another model"])
def test_a_published_model_that_was_damaged_meanwhile_is_named(harm, begun, path, tiny_model, tiny_processor):
    begun.folder.publish(tiny_model, tiny_processor)
    published = path / "model.safetensors"
    if harm == "cut short":
        published.write_bytes(published.read_bytes()[:1000])
    else:
        save_file({"_orig_mod.bias": torch.zeros(1)}, published)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors: .*training\.overwrite=true"):
        begun.folder.load_best(tiny_model)


def test_a_stop_while_publishing_is_made_good_by_the_next(begun, path, tiny_model, tiny_processor):
    (path / "publish.new").mkdir()
    (path / "publish.new" / "model.safetensors").write_text("half")
    begun.folder.publish(tiny_model, tiny_processor)
    assert not (path / "publish.new").exists()
    MSAModel.from_pretrained(path)


def test_history_is_json_that_grows_with_the_run(begun, path):
    begun.folder.write_history([{"epoch": 1}])
    begun.folder.write_history([{"epoch": 1}, {"epoch": 2}])
    assert json.loads((path / "history.json").read_text()) == [{"epoch": 1}, {"epoch": 2}]
    assert not list(path.glob("*.new"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is part of Linux")
def test_a_disk_that_fills_up_is_one_line_and_the_earlier_file_stays(begun, path):
    begun.folder.write_history([{"epoch": 1}])
    (path / "history.json.new").symlink_to("/dev/full")
    with pytest.raises(ConfigurationError) as caught, begun.folder.writing():
        begun.folder.write_history([{"epoch": 1}, {"epoch": 2}])
    assert str(caught.value).startswith(f"{path}: cannot be written (No space left on device);")
    assert "training.resume=true continues" in str(caught.value)
    assert json.loads((path / "history.json").read_text()) == [{"epoch": 1}]


def test_weights_that_do_not_fit_on_the_disk_are_the_same_line(begun, path):
    with (
        pytest.raises(ConfigurationError, match="cannot be written .No space left on device"),
        begun.folder.writing(),
    ):  # as safetensors reports it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_too_little_disk_is_said_before_training(path, tiny_model, monkeypatch):
    size = sum(value.numel() for value in tiny_model.state_dict().values()) * 4
    # weights twice while one checkpoint replaces another, a teacher's once, a state of three times that twice
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(0, 0, free=9 * size))
    require_space(path, tiny_model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(0, 0, free=9 * size - 1))
    with pytest.raises(
        ConfigurationError, match=f"{path.name}: checkpoints need about .* MB.* free; give another"
    ):
        require_space(path, tiny_model)


def test_a_resumed_run_needs_no_room_for_what_it_has_written_already(begun, path, tiny_model, monkeypatch):
    size = sum(value.numel() for value in tiny_model.state_dict().values()) * 4
    with open(path / "state" / "optimizer.bin", "wb") as file:
        file.truncate(3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(0, 0, free=6 * size))
    require_space(path, tiny_model)
