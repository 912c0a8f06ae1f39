# SPDX-License-Identifier: Apache-2.0
"""Stages of training, and the search for the best epoch in each."""

import math
from collections.abc import Sequence
from typing import Any

from msa_online.training.config import StageArguments, TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError


class StageSchedule:
    """Sequence of stages that end after a number of epochs, or earlier at a validation plateau.

    The search for the best epoch restarts with each stage, because stages have different validation scores.
    The state is plain data and part of the checkpoint.

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
        """Whether all epochs are trained."""
        return self.position >= len(self.stages)

    @property
    def stage(self) -> StageArguments:
        """The current stage."""
        return self.stages[self.position]

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the finished stages."""
        return tuple(stage.name for stage in self.stages[: self.position])

    @property
    def elapsed(self) -> float:
        """Share of the current stage's epochs that are trained, in [0, 1)."""
        return self.epoch_in_stage / self.stage.epochs

    @property
    def is_last_stage(self) -> bool:
        """Whether this is the last stage, whose best epoch is published."""
        return self.position == len(self.stages) - 1

    @property
    def total_epochs(self) -> int:
        """Number of epochs of all stages if none ends early."""
        return sum(stage.epochs for stage in self.stages)

    def advance(self, score: float) -> bool:
        """Record the validation `score` of a finished epoch; returns whether it is the best of the stage.

        Higher is better; NaN is never the best.
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
        """The state of the schedule."""
        return {name: value for name, value in vars(self).items() if name != "stages"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the schedule."""
        vars(self).update(state)


def make_schedule(training: TrainingArguments, stages_of_head: Sequence[str]) -> StageSchedule:
    """The schedule of a configuration, which may leave out stages of the head or change their order.

    Raises:
        ConfigurationError: The head does not have a stage, a stage is named twice, or the one that trains the
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
