# SPDX-License-Identifier: Apache-2.0
"""Stages of training, and the search for the best epoch within each."""

import math
from collections.abc import Sequence
from typing import Any

from msa_online.training.config import StageArguments, TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError


class StageSchedule:
    """Runs through stages that end after a number of epochs, or earlier on a validation plateau.

    The search for the best epoch restarts with each stage, because stages are judged by different things. The
    whole state is plain data and goes into the checkpoint.

    Args:
        stages: The stages in order, at least one.
    """

    def __init__(self, stages: Sequence[StageArguments]) -> None:
        self.stages = tuple(stages)
        self.position = 0
        self.epoch = 0
        self.epoch_in_stage = 0
        self.best_score = -math.inf
        self.best_epoch: int | None = None

    @property
    def finished(self) -> bool:
        """No epoch is left to train."""
        return self.position >= len(self.stages)

    @property
    def stage(self) -> StageArguments:
        """The stage that is being trained."""
        return self.stages[self.position]

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the stages that are over."""
        return tuple(stage.name for stage in self.stages[: self.position])

    @property
    def is_last_stage(self) -> bool:
        """The checkpoint of this stage is the one that is published."""
        return self.position == len(self.stages) - 1

    @property
    def total_epochs(self) -> int:
        """Epochs of all stages when none ends early."""
        return sum(stage.epochs for stage in self.stages)

    def advance(self, score: float) -> bool:
        """Count a finished epoch with its validation `score`, higher is better; is it the stage's best?

        A score that is not a number never is.
        """
        self.epoch += 1
        self.epoch_in_stage += 1
        improved = score > self.best_score
        if improved:
            self.best_score, self.best_epoch = score, self.epoch
        if self._stage_is_over():
            self.position += 1
            self.epoch_in_stage = 0
            if not self.finished:
                self.best_score, self.best_epoch = -math.inf, None
        return improved

    def _stage_is_over(self) -> bool:
        if self.epoch_in_stage >= self.stage.epochs:
            return True
        without_gain = self.epoch - (self.best_epoch or self.epoch - self.epoch_in_stage)
        return self.stage.patience is not None and without_gain >= self.stage.patience

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return {name: value for name, value in vars(self).items() if name != "stages"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken."""
        vars(self).update(state)


def make_schedule(training: TrainingArguments, stages_of_head: Sequence[str]) -> StageSchedule:
    """The schedule a configuration asks for: all stages of the head, or some, or in another order.

    Raises:
        ConfigurationError: The head has no such stage, one is named twice, or the one that trains the
            prediction is left out.
    """
    if training.stages is None:
        if len(stages_of_head) > 1:
            raise ConfigurationError(
                f"the head trains in stages {', '.join(stages_of_head)}: give training.stages"
            )
        return StageSchedule([StageArguments(stages_of_head[0], training.epochs, training.patience)])
    names = [stage.name for stage in training.stages]
    known = set(names) <= set(stages_of_head) and len(names) == len(set(names))
    if not known or stages_of_head[-1] not in names:
        raise ConfigurationError(
            f"training.stages are {', '.join(names) or 'empty'}, but the head has "
            f"{', '.join(stages_of_head)}: name each at most once, in the order they are to run; "
            f"{stages_of_head[-1]}, which trains the prediction, must be among them"
        )
    return StageSchedule(training.stages)
