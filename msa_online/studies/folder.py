# SPDX-License-Identifier: Apache-2.0
"""The folder of a study or a search, which one process at a time may write."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msa_online.corpora.validation import why_not_writable
from msa_online.training.checkpoint import LOCK
from msa_online.training.yaml_reader import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows: folders are not held there
    fcntl = None


def require_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist.

    Raises:
        ConfigurationError: They cannot; names the reason.
    """
    if reason := why_not_writable(folder / LOCK):
        raise ConfigurationError(f"output_dir={folder} cannot be written: {reason}; name another")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create a folder and hold it: another process that wants to is refused.

    The system lets go when this process and those it forked have ended, however they end.

    Raises:
        ConfigurationError: Another process holds the folder, or it cannot be written.
    """
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except BlockingIOError as error:
            raise ConfigurationError(
                f"{folder}: another process is working there: wait for its end, or give another output_dir"
            ) from error
        yield


def _lock(file: int) -> None:
    """Lock an open file for this process; raises `BlockingIOError` if another one has."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network disks have no locks
            raise
