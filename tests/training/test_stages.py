# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import yaml

from msa_online.training.config import StageArguments, TrainingArguments
from msa_online.training.stages import StageSchedule, make_schedule
from msa_online.training.yaml_reader import ConfigurationError


def run(schedule: StageSchedule, scores: list[float]) -> list[bool]:
    """Advance by each score; whether each was the best of its stage."""
    return [schedule.advance(score) for score in scores]


def test_a_run_without_patience_trains_all_its_epochs():
    schedule = StageSchedule([StageArguments("train", 3)])
    assert run(schedule, [3.0, 2.0]) == [True, False]
    assert not schedule.finished
    assert run(schedule, [1.0]) == [False]
    assert schedule.finished and schedule.epoch == 3
    assert (schedule.best_epoch, schedule.best_score) == (1, 3.0)


def test_patience_ends_a_run_after_so_many_epochs_without_gain():
    schedule = StageSchedule([StageArguments("train", 100, patience=2)])
    assert run(schedule, [1.0, 2.0, 1.5, 2.5, 2.5]) == [True, True, False, True, False]
    assert not schedule.finished
    run(schedule, [2.4])  # the second in a row that is not better than 2.5
    assert schedule.finished and schedule.best_epoch == 4


def test_the_next_stage_has_its_own_best_epoch_and_its_own_patience():
    schedule = StageSchedule(
        [StageArguments("enhance", 10, patience=2), StageArguments("balance", 10, patience=2)]
    )
    assert run(schedule, [0.9, 0.5, 0.4]) == [True, False, False]
    assert schedule.stage.name == "balance" and schedule.is_last_stage
    assert (schedule.best_score, schedule.best_epoch) == (-math.inf, None)
    assert run(schedule, [0.1]) == [True]  # worse than the first stage, which was judged by something else
    run(schedule, [0.0])
    assert not schedule.finished  # one bad epoch: those of the first stage are forgotten
    run(schedule, [0.0])
    assert schedule.finished and schedule.best_epoch == 4
    assert schedule.total_epochs == 20


def test_a_phase_of_the_modulator_has_its_own_best_epoch_and_its_own_patience():
    schedule = StageSchedule([StageArguments("train", 20, patience=3)])
    run(schedule, [0.1, 0.9, 0.5])
    assert not schedule.advance(0.4, starts_phase=True)
    assert schedule.phase_starts and schedule.earlier_phases == [{"epoch": 2, "score": 0.9}]
    assert run(schedule, [0.2, 0.3, 0.1, 0.1]) == [True, True, False, False]
    assert not schedule.phase_starts and not schedule.finished
    run(schedule, [0.1])
    assert schedule.finished and (schedule.best_epoch, schedule.best_score) == (6, 0.3)


def test_a_phase_that_starts_when_patience_ends_keeps_the_stage_alive_but_adds_no_epochs():
    schedule = StageSchedule([StageArguments("train", 5, patience=2)])
    run(schedule, [0.9, 0.5])
    assert schedule.patience_ends_with(0.9) and not schedule.patience_ends_with(0.95)
    schedule.advance(0.5, starts_phase=True)
    assert not schedule.finished
    run(schedule, [0.4])
    schedule.advance(0.4, starts_phase=True)  # after the last epoch, so no phase follows
    assert schedule.finished and not schedule.phase_starts and schedule.best_epoch == 4


def test_the_next_stage_forgets_the_phases_of_the_one_before():
    schedule = StageSchedule([StageArguments("enhance", 2), StageArguments("balance", 2)])
    schedule.advance(0.9, starts_phase=True)
    schedule.advance(0.5)
    assert schedule.stage.name == "balance"
    assert schedule.earlier_phases == [] and not schedule.phase_starts


def test_only_the_last_of_several_stages_is_published():
    schedule = StageSchedule([StageArguments("enhance", 1), StageArguments("balance", 1)])
    assert not schedule.is_last_stage
    schedule.advance(0.0)
    assert schedule.is_last_stage


def test_a_score_that_is_no_number_is_never_the_best_and_uses_up_patience():
    schedule = StageSchedule([StageArguments("train", 10, patience=2)])
    assert run(schedule, [math.nan]) == [False]
    assert run(schedule, [0.5]) == [True]
    assert run(schedule, [math.nan, math.nan]) == [False, False]
    assert schedule.finished and schedule.best_epoch == 2

    hopeless = StageSchedule([StageArguments("train", 10, patience=2)])
    run(hopeless, [math.nan, math.nan])
    assert hopeless.finished and hopeless.best_epoch is None


def test_a_schedule_resumed_in_mid_stage_goes_on_as_if_it_had_not_stopped():
    stages = [StageArguments("enhance", 2), StageArguments("balance", 9, patience=3)]
    scores = [0.1, 0.2, 0.5, 0.4, 0.3, 0.2]
    whole = StageSchedule(stages)
    told = run(whole, scores)
    for stop in range(1, len(scores)):
        first, second = StageSchedule(stages), StageSchedule(stages)
        before = run(first, scores[:stop])
        second.load_state_dict(
            yaml.safe_load(yaml.safe_dump(first.state_dict()))
        )  # plain data survives any format
        assert before + run(second, scores[stop:]) == told
        assert second.state_dict() == whole.state_dict() and second.finished == whole.finished


def test_a_head_of_one_stage_takes_epochs_and_patience():
    schedule = make_schedule(TrainingArguments(epochs=4, patience=2), ("train",))
    assert schedule.stages == (StageArguments("train", 4, 2),)


def test_a_head_of_several_stages_takes_the_stages_given():
    stages = [StageArguments("enhance", 4), StageArguments("balance", 2)]
    assert make_schedule(TrainingArguments(stages=stages), ("enhance", "balance")).stages == tuple(stages)


def test_a_stage_may_be_left_out_and_the_order_changed():
    enhance, balance = StageArguments("enhance", 1), StageArguments("balance", 1)
    for stages in ([balance], [balance, enhance]):
        schedule = make_schedule(TrainingArguments(stages=stages), ("enhance", "balance"))
        assert schedule.stages == tuple(stages)


@pytest.mark.parametrize(
    ("stages", "of_head", "message"),
    [
        (None, ("enhance", "balance"), "enhance, balance: give training.stages"),
        ([], ("train",), "training.stages are empty, but the head has train"),
        (
            [StageArguments("enhance", 1)],
            ("enhance", "balance"),
            "are enhance, but the head has enhance, balance",
        ),
        (
            [StageArguments("balance", 1), StageArguments("balance", 1)],
            ("enhance", "balance"),
            "are balance, balance, but the head has enhance, balance",
        ),
        ([StageArguments("enhance", 1)], ("train",), "are enhance, but the head has train"),
    ],
)
def test_stages_that_cannot_train_the_head_are_refused(stages, of_head, message):
    with pytest.raises(ConfigurationError, match=message):
        make_schedule(TrainingArguments(stages=stages), of_head)
