# SPDX-License-Identifier: Apache-2.0
"""The frozen teacher of a stage: answers of the best model of an earlier stage on each training sample."""

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, from_numpy
from torch.utils.data import DataLoader

from msa_online.evaluation.conditions import over_split
from msa_online.modeling_msa import MSAModel
from msa_online.training.checkpoint import RunFolder
from msa_online.training.stages import StageSchedule
from msa_online.training.state import REMEDY
from msa_online.training.yaml_reader import ConfigurationError


class Teacher:
    """Answers of a frozen model on the training split, looked up by sample.

    The model itself is gone by then: it is in no module tree, no optimizer and no published checkpoint, and
    nothing can switch its dropout on.

    Args:
        answers: `(samples, ...)` float32, in the order of `index`; None for a stage without a teacher.
    """

    def __init__(self, answers: Tensor | None = None) -> None:
        self.answers = answers

    def join(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `teacher` `(batch, ...)`, where there is one."""
        if self.answers is None:
            return dict(batch)
        self.answers = self.answers.to(batch["index"].device)
        return {**batch, "teacher": self.answers[batch["index"]]}


def appoint_teacher(
    model: MSAModel, schedule: StageSchedule, folder: RunFolder, loader: DataLoader, accelerator: Accelerator
) -> Teacher:
    """The teacher of the current stage; without answers if the head or the schedule has none.

    Args:
        model: The student, not wrapped.
        schedule: Knows the stage and those before it.
        folder: Holds the best weights of those, and keeps the answers for a resumed run.
        loader: Prepared loader of the whole training split.
        accelerator: Gives precision and gathers over ranks.

    Raises:
        ConfigurationError: The weights of the teacher are gone or damaged.
    """
    taught_by = model.head.teachers.get(schedule.stage.name)
    if taught_by not in schedule.passed:
        return Teacher()
    answers = folder.stage_file(f"{schedule.stage.name}_teacher")
    if not answers.exists():
        asked = _ask(model, taught_by, folder.stage_file(taught_by), loader, accelerator)
        if accelerator.is_main_process:
            draft = answers.with_suffix(".new")
            save_file({"answers": asked}, draft)
            os.replace(draft, answers)
        accelerator.wait_for_everyone()
    return Teacher(_reading(answers, load_file, answers)["answers"])


def _ask(
    model: MSAModel, taught_by: str, weights: Path, loader: DataLoader, accelerator: Accelerator
) -> Tensor:
    """Have the best model of stage `taught_by` answer on every training sample, `(samples, ...)`."""
    frozen = deepcopy(model)
    _reading(weights, load_model, frozen, weights)
    frozen.head.start_stage(taught_by)
    answers, _ = over_split(frozen, loader, accelerator, lambda batch: frozen.teach(**batch))
    return from_numpy(answers).float()


def _reading(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """`read(*arguments)`, with an error that names the file and the remedy."""
    try:
        return read(*arguments)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigurationError(
            f"{path}: the teacher of this stage cannot be read ({str(error).splitlines()[0]}); {REMEDY}"
        ) from error
