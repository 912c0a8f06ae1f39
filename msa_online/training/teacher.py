# SPDX-License-Identifier: Apache-2.0
"""The teacher of a stage: targets from the best model of an earlier stage for each training sample."""

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

TARGETS = "answers"  # name of the tensor in the file of a teacher, as in earlier versions


class Teacher:
    """Targets of a frozen model for the training split, looked up by sample.

    The model itself is not kept: it is in no module tree, optimizer or published checkpoint, and its dropout
    cannot be switched on.

    Args:
        targets: Targets `(samples, ...)` float32, in the order of `index`; None without a teacher.
    """

    def __init__(self, targets: Tensor | None = None) -> None:
        self.targets = targets

    def join(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `teacher` `(batch, ...)`, if there is a teacher."""
        if self.targets is None:
            return dict(batch)
        self.targets = self.targets.to(batch["index"].device)
        return {**batch, "teacher": self.targets[batch["index"]]}


def appoint_teacher(
    model: MSAModel, schedule: StageSchedule, folder: RunFolder, loader: DataLoader, accelerator: Accelerator
) -> Teacher:
    """The teacher of the current stage; an empty `Teacher` if the head or the schedule has none.

    Args:
        model: The student, not wrapped.
        schedule: The schedule, with the current stage and those before it.
        folder: Folder of the run, with the best weights of earlier stages; the targets are saved there.
        loader: Prepared loader of the complete training split.
        accelerator: Provides autocast, and gathers over ranks.

    Raises:
        ConfigurationError: The weights of the teacher are missing or damaged.
    """
    taught_by = model.head.teachers.get(schedule.stage.name)
    if taught_by not in schedule.passed:
        return Teacher()
    file = folder.stage_file(f"{schedule.stage.name}_teacher")
    if not file.exists():
        targets = _targets(model, taught_by, folder.stage_file(taught_by), loader, accelerator)
        if accelerator.is_main_process:
            draft = file.with_suffix(".new")
            save_file({TARGETS: targets}, draft)
            os.replace(draft, file)
        accelerator.wait_for_everyone()
    return Teacher(_reading(file, load_file, file)[TARGETS])


def _targets(
    model: MSAModel, taught_by: str, weights: Path, loader: DataLoader, accelerator: Accelerator
) -> Tensor:
    """Targets of the best model of stage `taught_by` for all training samples, `(samples, ...)`."""
    frozen = deepcopy(model)
    _reading(weights, load_model, frozen, weights)
    frozen.head.start_stage(taught_by)
    targets, _ = over_split(frozen, loader, accelerator, lambda batch: frozen.teach(**batch))
    return from_numpy(targets).float()


def _reading(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Call `read(*arguments)`; errors are reported with the file and the remedy."""
    try:
        return read(*arguments)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigurationError(
            f"{path}: the teacher of this stage cannot be read ({str(error).splitlines()[0]}); {REMEDY}"
        ) from error
