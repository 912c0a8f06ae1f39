# SPDX-License-Identifier: Apache-2.0
"""Extraction in several processes; a clip that hangs or crashes a decoder costs its process, not the run.

Each process holds a face model, works on one clip at a time, stores features in the cache and returns
findings and extent. Here and not beside `prepare`, so that a spawned process imports neither torch nor
transformers. The executors of the standard library are not enough: they do not tell which clip a dead process
had, cannot end one that hangs, and give up all work when one dies.
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
"""Time allowed for a process to start and load the face model."""

GRACE_SECONDS = 30.0
"""Time beyond a clip's deadline after which its process is killed; decoding normally stops by itself."""

MAX_FAILED_STARTS = 3
"""Processes killed while they start, one after another, after which extraction gives up."""

Extracted = tuple[tuple[str, ...], ClipExtent]
"""Findings and extent of a clip whose features are in the cache."""

_READY = "ready"
_context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of MediaPipe hold


class WorkerError(RuntimeError):
    """A process ended that the work cannot go on without; what is cached stays cached."""


def extract_in_processes(
    clips: Mapping[str, Clip], cache: FeatureCache, settings: ExtractionSettings, workers: int
) -> Iterator[tuple[str, Extracted | ClipError]]:
    """Extract clips into the cache.

    A clip whose process dies is tried once more at the end, alone, because the system may have killed the
    process for memory that other clips took. Close the iterator to stop early: what is begun is finished.

    Args:
        clips: The clips by cache key.
        cache: Where features go.
        settings: What to extract.
        workers: Number of processes, at least one.

    Yields:
        The key of each clip with its findings and extent, or with the error if it cannot be used; in no
        fixed order.

    Raises:
        CacheError: The cache cannot be written.
        WorkerError: Processes cannot be started.
        ValueError: There are to be no workers.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one process is needed")
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
    """One attempt at each clip, begun in order."""
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
    finally:  # also on Ctrl-C: what is not begun stays undone, what is begun is stored
        for worker in pool:
            worker.dismiss()
        for worker in pool:
            worker.join()


def _await_any(pool: list["_Worker"]) -> list["_Worker"]:
    """Waits until workers have sent something or have ended; kills those whose time is over."""
    remaining = min(worker.expires for worker in pool) - time.monotonic()
    timeout = None if math.isinf(remaining) else max(remaining, 0.0)
    eventful = wait([worker.connection for worker in pool], timeout)
    for worker in pool:
        if worker.connection not in eventful and time.monotonic() > worker.expires:
            worker.kill()
    return [worker for worker in pool if worker.connection in eventful]


class _Worker:
    """The parent's view of one process.

    Attributes:
        connection: The pipe to the process; reading fails once it has ended.
        ready: Whether the face model is loaded.
        key: Cache key of the clip in work, None between clips.
        expires: When the process is killed, on the monotonic clock.
        killed: Whether this has happened.
    """

    def __init__(self, cache: FeatureCache, settings: ExtractionSettings):
        """Starts the process."""
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
        """Hands the process a clip; if it has ended meanwhile, reading from it shows this."""
        self.key, self._clip, self._began = key, clip, time.monotonic()
        self.allow(limits.OPENING_SECONDS)
        with suppress(OSError):
            self.connection.send((key, clip))

    def allow(self, seconds: float) -> None:
        """Sets the time for the clip in work, as the process found it from the clip's length."""
        self._seconds, self.expires = seconds, self._began + seconds + GRACE_SECONDS

    def rest(self) -> None:
        """The clip is done; without one a process may wait for ever."""
        self.key, self.expires = None, math.inf

    def kill(self) -> None:
        """Ends the process at once; what the clip in work has so far is lost."""
        self.killed, self.expires = True, math.inf
        self._process.kill()

    def why_ended(self) -> ClipError:
        """The error of the clip in work, from how the process ended."""
        if self.killed:
            return too_slow(self._clip.path, self._seconds)
        detail = f"the process that extracted it {self._ending()}"
        return ClipError(self._clip.path, "crashed", detail)

    def require_another_start(self, failed_starts: int) -> None:
        """Checks that it makes sense to start another process in place of one that ended before it was ready.

        Raises:
            WorkerError: It ended by itself, or too many were killed.
        """
        ending = self._ending()
        if self._process.exitcode >= 0:
            raise WorkerError(
                f"a process that extracts features {ending} while it started; its own message is above. A"
                ' script that calls this needs `if __name__ == "__main__":`'
            )
        if failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(
                f"{failed_starts} processes that extract features were killed while they started, the last"
                f" one {ending}; run again with fewer workers. What is cached stays cached"
            )

    def dismiss(self) -> None:
        """Asks the process to end after the clip in work."""
        with suppress(OSError):
            self.connection.send(None)

    def join(self) -> None:
        """Waits until the process has ended, at most as long as the clip in work may take."""
        limit = STARTING_SECONDS if math.isinf(self.expires) else self.expires - time.monotonic()
        self._process.join(max(limit, 0.0))
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _ending(self) -> str:
        """How the process ended, in words."""
        self._process.join()
        status = self._process.exitcode
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        return f"was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


class _ReportedDeadline(Deadline):
    """Tells the parent how much time the clip has, so that the parent can end a process that hangs."""

    def __init__(self, path: Path, connection: Connection):
        super().__init__(path)
        self._connection = connection

    def allow(self, media_seconds: float) -> None:
        super().allow(media_seconds)
        self._connection.send(self.seconds)


def _serve(connection: Connection, cache: FeatureCache, settings: ExtractionSettings) -> None:
    """The work of one process; Ctrl-C is left to the parent, which lets the clip in work finish."""
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
            try:
                features = extract(clip, settings, face_extractor, _ReportedDeadline(clip.path, connection))
                cache.store(key, features)
                connection.send((features.findings, ClipExtent.of(features, settings.hop_ms)))
            except (ClipError, CacheError) as error:
                connection.send(error)


def _end_with_parent() -> None:
    """End this process when the parent is killed, which an idle process would never notice."""
    multiprocessing.parent_process().join()
    os._exit(1)
