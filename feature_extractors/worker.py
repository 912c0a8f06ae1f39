# SPDX-License-Identifier: Apache-2.0
"""Extraction in several processes; a clip that hangs or crashes a decoder ends its process, not the run.

Each process has a face model, works on one clip at a time, stores features in the cache and returns findings
and extent. This module is separate from `prepare`, so that a spawned process imports neither torch nor
transformers. The executors of the standard library do not suffice: they do not report which clip a dead
process had, cannot kill one that hangs, and fail all tasks when one process dies.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from feature_extractors import limits
from feature_extractors.cache import CacheError, FeatureCache
from feature_extractors.catalogue import AssetError
from feature_extractors.clip import Clip, ClipError, ClipExtent, ExtractionSettings
from feature_extractors.extraction import extract
from feature_extractors.face import FaceExtractor
from feature_extractors.limits import Deadline, too_slow

STARTING_SECONDS = 300.0
"""Time limit for a process to start and load the face model."""

GRACE_SECONDS = 30.0
"""Seconds after a clip's deadline at which its process is killed; decoding normally stops by itself."""

MAX_FAILED_STARTS = 3
"""Extraction gives up after this many consecutive processes were killed while they started."""

Extracted = tuple[tuple[str, ...], ClipExtent]
"""Findings and extent of a clip whose features are in the cache."""

_READY = "ready"
_context = multiprocessing.get_context("spawn")  # a fork would copy locks held by threads of MediaPipe


class WorkerError(RuntimeError):
    """Worker processes cannot be started; cached features are kept."""


def extract_in_processes(
    clips: Mapping[str, Clip], cache: FeatureCache, settings: ExtractionSettings, workers: int
) -> Iterator[tuple[str, Extracted | ClipError]]:
    """Extract clips into the cache.

    A clip whose process dies is tried once more at the end, alone: the system may have killed the process
    because other clips used too much memory. Close the iterator to stop early; clips in progress are
    finished.

    Args:
        clips: The clips by cache key.
        cache: Cache to fill.
        settings: What to extract.
        workers: Number of processes, at least one.

    Yields:
        The key of each clip with its findings and extent, or with the error if it cannot be used; in no
        fixed order.

    Raises:
        CacheError: The cache cannot be written.
        WorkerError: Processes cannot be started.
        ValueError: `workers` is below one.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    crashed: dict[str, Clip] = {}
    for key, result in _extract(clips, cache, settings, workers):
        if isinstance(result, ClipError) and result.problem == "crashed":
            crashed[key] = clips[key]
        else:
            yield key, result
    yield from _extract(crashed, cache, settings, workers=1)


def _extract(
    clips: Mapping[str, Clip], cache: FeatureCache, settings: ExtractionSettings, workers: int
) -> Iterator[tuple[str, Extracted | ClipError]]:
    """Try each clip once, started in order."""
    queue = deque(clips.items())
    pool: list[_Worker] = []
    failed_starts = 0
    try:
        while queue or any(worker.key for worker in pool):
            while len(pool) < workers and len(pool) < sum(bool(worker.key) for worker in pool) + len(queue):
                pool.append(_Worker(cache, settings))
            for worker in _await_any(pool):
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):  # the process has ended
                    pool.remove(worker)
                    if worker.key:
                        yield worker.key, worker.why_ended()
                    elif not worker.ready:
                        failed_starts += 1
                        worker.require_another_start(failed_starts)
                    continue
                if isinstance(message, float):
                    worker.allow(message)
                    continue
                if isinstance(message, CacheError | WorkerError):
                    raise message
                if message == _READY:
                    worker.ready, failed_starts = True, 0
                else:
                    yield worker.key, message
                worker.rest()
                if queue and not worker.killed:
                    worker.begin(*queue.popleft())
    finally:  # also on Ctrl-C: clips in progress are finished and stored, the others are not started
        for worker in pool:
            worker.dismiss()
        for worker in pool:
            worker.join()


def _await_any(pool: list["_Worker"]) -> list["_Worker"]:
    """Wait until workers send a message or end; kill those whose time is over."""
    remaining = min(worker.expires for worker in pool) - time.monotonic()
    timeout = None if math.isinf(remaining) else max(remaining, 0.0)
    eventful = wait([worker.connection for worker in pool], timeout)
    for worker in pool:
        if worker.connection not in eventful and time.monotonic() > worker.expires:
            worker.kill()
    return [worker for worker in pool if worker.connection in eventful]


class _Worker:
    """One process, as seen by the parent.

    Attributes:
        connection: Pipe to the process; reading fails once the process has ended.
        ready: Whether the face model is loaded.
        key: Cache key of the clip in progress, None between clips.
        expires: Time at which the process is killed, on the monotonic clock.
        killed: Whether it was killed.
    """

    def __init__(self, cache: FeatureCache, settings: ExtractionSettings):
        """Start the process."""
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, cache, settings))
        self._process.start()
        theirs.close()
        self.ready = self.killed = False
        self.key: str | None = None
        self._clip = Clip(Path())
        self._began = time.monotonic()
        self._seconds = STARTING_SECONDS
        self.expires = self._began + STARTING_SECONDS

    def begin(self, key: str, clip: Clip) -> None:
        """Send a clip to the process; if it has ended, the next read from the connection fails."""
        self.key, self._clip, self._began = key, clip, time.monotonic()
        self.allow(limits.OPENING_SECONDS)
        with suppress(OSError):
            self.connection.send((key, clip))

    def allow(self, seconds: float) -> None:
        """Set the time limit of the clip in progress, which the process computes from its length."""
        self._seconds, self.expires = seconds, self._began + seconds + GRACE_SECONDS

    def rest(self) -> None:
        """Mark the clip as done; a process without a clip has no time limit."""
        self.key, self.expires = None, math.inf

    def kill(self) -> None:
        """Kill the process; the clip in progress is lost."""
        self.killed, self.expires = True, math.inf
        self._process.kill()

    def why_ended(self) -> ClipError:
        """The error of the clip in progress, from the way the process ended."""
        if self.killed:
            return too_slow(self._clip.path, self._seconds)
        detail = f"the process that extracted it {self._ending()}"
        return ClipError(self._clip.path, "crashed", detail)

    def require_another_start(self, failed_starts: int) -> None:
        """Check that another process may be started in place of one that ended before it was ready.

        Raises:
            WorkerError: The process ended by itself, or too many were killed.
        """
        ending = self._ending()
        if self._process.exitcode >= 0:
            raise WorkerError(
                f"a process that extracts features {ending} while it started; its message is above. A"
                ' script that calls this needs `if __name__ == "__main__":`'
            )
        if failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(
                f"{failed_starts} processes that extract features were killed while they started, the last"
                f" one {ending}; run again with fewer workers. Cached features are kept"
            )

    def dismiss(self) -> None:
        """Tell the process to end after the clip in progress."""
        with suppress(OSError):
            self.connection.send(None)

    def join(self) -> None:
        """Wait for the end of the process, at most for the time limit of the clip in progress."""
        limit = STARTING_SECONDS if math.isinf(self.expires) else self.expires - time.monotonic()
        self._process.join(max(limit, 0.0))
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _ending(self) -> str:
        """Describe how the process ended."""
        self._process.join()
        status = self._process.exitcode
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        return f"was killed by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")


class _ReportedDeadline(Deadline):
    """A deadline that sends its time limit to the parent, which can then kill a process that hangs."""

    def __init__(self, path: Path, connection: Connection):
        super().__init__(path)
        self._connection = connection

    def allow(self, media_seconds: float) -> None:
        super().allow(media_seconds)
        self._connection.send(self.seconds)


def _serve(connection: Connection, cache: FeatureCache, settings: ExtractionSettings) -> None:
    """Main loop of a process. Ctrl-C is handled by the parent, which lets the clip in progress finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        face_extractor = FaceExtractor(settings)
    except (AssetError, ValueError, OSError) as error:
        connection.send(WorkerError(str(error)))
        return
    with face_extractor:
        connection.send(_READY)
        while (job := connection.recv()) is not None:
            key, clip = job
            limits.limit_memory(limits.MAX_MEMORY)
            try:
                features = extract(clip, settings, face_extractor, _ReportedDeadline(clip.path, connection))
                cache.store(key, features)
                connection.send((features.findings, ClipExtent.of(features)))
            except (ClipError, CacheError) as error:
                connection.send(error)
            except MemoryError:
                connection.send(limits.too_much_memory(clip.path))


def _end_with_parent() -> None:
    """End this process when the parent is killed; an idle process would not notice."""
    multiprocessing.parent_process().join()
    os._exit(1)
