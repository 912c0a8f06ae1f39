# SPDX-License-Identifier: Apache-2.0
"""A teacher is a table of answers by sample: whose, in what order, and what asking leaves behind."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from msa_online import MSAConfig, MSAModel
from msa_online.batching import BucketBatchSampler
from msa_online.training.checkpoint import RunFolder
from msa_online.training.config import StageArguments
from msa_online.training.stages import StageSchedule
from msa_online.training.teacher import Teacher, appoint_teacher
from msa_online.training.yaml_reader import ConfigurationError

pytestmark = pytest.mark.needs("ebmc")  # the head that is taught

SAMPLES = 10


def make_model(tiny_config, head: str = "ebmc", seed: int = 0) -> MSAModel:
    torch.manual_seed(seed)
    settings = {"hidden_size": 8, "depth": 1} if head == "ebmc" else {"hidden_size": 8}
    return MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": head, "head_kwargs": settings}))


def standing_in(*stages: str) -> StageSchedule:
    """A schedule that stands in the last of `stages`, the others over."""
    schedule = StageSchedule([StageArguments(name, 1) for name in stages])
    for _ in stages[1:]:
        schedule.advance(0.0)
    return schedule


@pytest.fixture
def run(tiny_config, make_batch, tmp_path) -> SimpleNamespace:
    """A run at the start of its second stage: the best model of the first is kept, the student is another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    batch = make_batch(SAMPLES)
    batch["modality_present"][2, 0] = batch["modality_present"][5, 2] = False
    rows = [{name: value[row] for name, value in batch.items()} for row in range(SAMPLES)]
    lengths = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(rows, batch_sampler=BucketBatchSampler(lengths, 4), generator=torch.Generator())
    loader = accelerator.prepare(loader)
    folder = RunFolder(tmp_path, accelerator)
    best, student = make_model(tiny_config, seed=1), make_model(tiny_config, seed=2)
    best.head.start_stage("enhance")
    folder.keep_stage("enhance", best)
    student.train()
    schedule = standing_in("enhance", "balance")

    def appoint() -> Teacher:
        return appoint_teacher(student, schedule, folder, loader, accelerator)

    return SimpleNamespace(
        best=best.eval(), student=student, batch=batch, folder=folder, loader=loader, appoint=appoint
    )


def test_each_sample_is_told_what_the_teacher_said_of_it():
    answers = torch.arange(SAMPLES * 6, dtype=torch.float32).reshape(SAMPLES, 3, 2)
    index = torch.tensor([7, 0, 3])
    batch = Teacher(answers).join({"index": index, "labels": torch.zeros(3)})
    assert list(batch) == ["index", "labels", "teacher"]
    for place, sample in enumerate(index.tolist()):
        assert torch.equal(batch["teacher"][place], answers[sample])


def test_without_a_teacher_a_batch_stays_as_it_is():
    batch = {"index": torch.tensor([1])}
    assert Teacher().join(batch) == batch


@torch.no_grad()
def test_the_best_model_of_the_stage_before_teaches_whatever_the_student_has_become(run):
    answers = run.appoint().targets
    assert answers.shape == (SAMPLES, 3, 2)
    inputs = {name: value for name, value in run.batch.items() if name not in ("labels", "index")}
    torch.testing.assert_close(answers, run.best.teach(**inputs), rtol=1e-4, atol=1e-5)
    run.student.head.start_stage("enhance")
    assert not torch.allclose(answers, run.student.eval().teach(**inputs), atol=1e-2)


@torch.no_grad()
def test_what_is_said_of_a_modality_holds_whatever_else_is_hidden(run):
    answers = run.appoint().targets
    inputs = {name: value for name, value in run.batch.items() if name not in ("labels", "index")}
    for column in range(3):
        alone = torch.zeros_like(inputs["modality_present"])
        alone[:, column] = inputs["modality_present"][:, column]
        said = run.best.teach(**{**inputs, "modality_present": alone})
        torch.testing.assert_close(answers[:, column], said[:, column], rtol=1e-4, atol=1e-5)


def test_asking_twice_gives_the_same_answers_and_dropout_never_plays_a_part(run):
    first = run.appoint().targets
    run.folder.stage_file("balance_teacher").unlink()
    run.student.train()
    assert torch.equal(run.appoint().targets, first)


def test_asking_leaves_the_student_as_it_was(run):
    run.student.head.start_stage("balance")
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    teacher = run.appoint()
    after = run.student.state_dict()
    assert after.keys() == before.keys()  # the teacher is no part of it
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert run.student.training and run.student.head.balancing
    assert not teacher.targets.requires_grad
    assert all(parameter.grad is None for parameter in run.student.parameters())


def test_asking_draws_no_random_numbers(run):
    """A run resumed after the teacher has answered does not ask, and must draw on as if it had."""
    before = torch.get_rng_state()
    run.appoint()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_takes_the_answers_that_were_given(run):
    first = run.appoint().targets
    run.folder.stage_file("enhance").unlink()  # nobody is asked again
    assert torch.equal(run.appoint().targets, first)
    assert torch.equal(load_file(run.folder.stage_file("balance_teacher"))["answers"], first)


@pytest.mark.parametrize("stages", [("enhance",), ("balance",), ("balance", "enhance")])
def test_a_stage_whose_teacher_was_never_trained_has_none(stages, run, tiny_config):
    student = make_model(tiny_config)
    schedule = standing_in(*stages)
    teacher = appoint_teacher(student, schedule, run.folder, run.loader, run.folder.accelerator)
    assert teacher.targets is None
    assert not run.folder.stage_file("balance_teacher").exists()


def test_a_method_without_teachers_has_an_empty_teacher(run, tiny_config):
    student = make_model(tiny_config, "late_fusion")
    teacher = appoint_teacher(student, standing_in("train"), run.folder, run.loader, run.folder.accelerator)
    assert teacher.targets is None
    with pytest.raises(TypeError, match="LateFusionHead defines no teach"):
        student.head.teach({})


@pytest.mark.parametrize("harm", ["gone", "empty", "cut short", "of another model"])
def test_a_teacher_that_cannot_be_read_is_named_with_what_to_do(harm, run, tiny_config):
    weights = run.folder.stage_file("enhance")
    if harm == "gone":
        weights.unlink()
    elif harm == "empty":
        weights.write_bytes(b"")
    elif harm == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        run.folder.keep_stage("enhance", make_model(tiny_config, "late_fusion"))
    message = f"{re.escape(str(weights))}: the teacher.*put the file back.*training.overwrite=true"
    with pytest.raises(ConfigurationError, match=message):
        run.appoint()
    assert not run.folder.stage_file("balance_teacher").exists()


def test_answers_that_cannot_be_read_are_named_and_left_where_they_are(run):
    run.appoint()
    answers = run.folder.stage_file("balance_teacher")
    answers.write_bytes(answers.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match=f"{answers.name}: the teacher of this stage cannot be read"):
        run.appoint()
    assert answers.exists()
