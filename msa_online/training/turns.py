# SPDX-License-Identifier: Apache-2.0
"""Run slow work in one process, or shared by all, and wait beyond the time limit of collectives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed import ProcessGroup

from feature_extractors.worker import WorkerError

PATIENCE = timedelta(days=7)
"""Time limit for waiting. The process group of training gives up after 10 to 30 minutes."""
Result = TypeVar("Result")


def in_turn(work: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Call `work` in the main process first, then in one process of each other machine, then in the rest.

    Work that stores its results on the disk is thus done once per disk; later calls find the results.

    Args:
        work: The work, which may take hours.
        accelerator: The Accelerator of the run.

    Returns:
        What `work` returned in this process.

    Raises:
        SystemExit: `work` failed in another process, which raised the error.
        WorkerError: Another process was killed.
    """
    if accelerator.num_processes == 1:
        return work()
    mine = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    with _patient_group() as group:
        for turn in range(3):
            if turn == mine:
                result = _work_and_report(work, group)
            elif _any_failed(False, group):
                raise SystemExit(1)
    return result


def side_by_side(work: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Call `work` in all processes at once and wait for the slowest; errors as in `in_turn`."""
    if accelerator.num_processes == 1:
        return work()
    with _patient_group() as group:
        return _work_and_report(work, group)


@contextmanager
def _patient_group() -> Iterator[ProcessGroup]:
    """A second group of all processes with a long time limit; on the CPU, so that no GPU collective waits."""
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    yield group
    distributed.destroy_process_group(group)


def _work_and_report(work: Callable[[], Result], group: ProcessGroup) -> Result:
    done = False
    try:
        result = work()
        done = True
    finally:
        if not done:
            with suppress(WorkerError):  # the user has to see the error of `work`
                _any_failed(True, group)
    if _any_failed(False, group):
        raise SystemExit(1)
    return result


def _any_failed(failed: bool, group: ProcessGroup) -> bool:
    """Wait for all processes, and return whether any of them reports a failure."""
    count = torch.tensor(int(failed))
    try:
        distributed.all_reduce(count, group=group)
    except RuntimeError as error:
        raise WorkerError(
            "another process of this run was killed, perhaps because the memory was full; extracted features "
            "are in the cache: start again to continue"
        ) from error
    return count.item() > 0
