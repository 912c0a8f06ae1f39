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
    It also restarts with each phase of a modulator within a stage: the later phase trains differently, and
    its best epoch is published even if an earlier phase had a better one. So a comparison measures what the
    phase does. The state is plain data and part of the checkpoint.

    Args:
        stages: The stages in order, at least one.

    Attributes:
        earlier_phases: Best epoch and its score of each finished phase of the current stage.
    """

    def __init__(self, stages: Sequence[StageArguments]) -> None:
        self.stages = tuple(stages)
        self.position = 0
        self.epoch = 0
        self.epoch_in_stage = 0
        self.epoch_in_phase = 0
        self.best_score = -math.inf
        self.best_epoch: int | None = None
        self.earlier_phases: list[dict[str, Any]] = []

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
    def phase_starts(self) -> bool:
        """Whether a phase of the modulator, not the first of its stage, starts with the next epoch."""
        return bool(self.earlier_phases) and self.epoch_in_phase == 0 and not self.finished

    @property
    def total_epochs(self) -> int:
        """Number of epochs of all stages if none ends early."""
        return sum(stage.epochs for stage in self.stages)

    def patience_ends_with(self, score: float) -> bool:
        """Whether patience ends the stage after an epoch with this validation score."""
        if self.stage.patience is None or score > self.best_score:
            return False
        before = self.epoch - self.epoch_in_phase if self.best_epoch is None else self.best_epoch
        return self.epoch + 1 - before >= self.stage.patience

    def advance(self, score: float, starts_phase: bool = False) -> bool:
        """Record the validation `score` of a finished epoch; returns whether it is the best of its phase.

        Args:
            score: Higher is better; NaN is never the best.
            starts_phase: A phase of the modulator starts with the next epoch, if the stage has one.
        """
        out_of_patience = self.patience_ends_with(score)
        self.epoch += 1
        self.epoch_in_stage += 1
        self.epoch_in_phase += 1
        improved = score > self.best_score
        if improved:
            self.best_score, self.best_epoch = score, self.epoch
        if self.epoch_in_stage >= self.stage.epochs or (out_of_patience and not starts_phase):
            self.position += 1
            self.epoch_in_stage = self.epoch_in_phase = 0
            if not self.finished:
                self.best_score, self.best_epoch, self.earlier_phases = -math.inf, None, []
        elif starts_phase:
            self.earlier_phases.append({"epoch": self.best_epoch, "score": self.best_score})
            self.epoch_in_phase = 0
            self.best_score, self.best_epoch = -math.inf, None
        return improved

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
