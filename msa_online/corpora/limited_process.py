# SPDX-License-Identifier: Apache-2.0
"""Run a reader of untrusted files in a process with limits on memory, time and output.

The process runs this file by its path. It imports nothing of the package, so that it starts quickly.
"""

import errno
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOO_MUCH_MEMORY, TOO_MUCH_OUTPUT = 101, 102  # exit statuses


class LimitExceededError(Exception):
    """A reader exceeded a limit; the message names it."""


def run_limited(
    reader: Path, arguments: Sequence[object], *, memory: int, seconds: int, output: int
) -> subprocess.CompletedProcess[str]:
    """Call `main` of a script in a separate process.

    Args:
        reader: The script. Its function `main` takes a list of strings and returns an exit status below 100.
        arguments: Arguments of `main`.
        memory: Bytes it may map in addition to its imports; Linux only, at most the memory of the machine.
        seconds: CPU time; not on Windows.
        output: Largest size of a file it writes, in bytes; not on Windows.

    Returns:
        The finished process with its output.

    Raises:
        LimitExceededError: The process exceeded a limit.
    """
    memory = min(memory, installed_memory())
    exceeded = {
        TOO_MUCH_MEMORY: f"{memory / 1e9:.1f} GB of memory",
        -signal.SIGABRT: f"{memory / 1e9:.1f} GB of memory",  # compiled libraries abort without memory
        TOO_MUCH_OUTPUT: f"{output / 1e9:.1f} GB on disk",
    }
    if hasattr(signal, "SIGXCPU"):
        exceeded[-signal.SIGXCPU] = f"{seconds} s of processor time"
    command = [sys.executable, "-P", __file__, reader, memory, seconds, output, *arguments]
    # threads and memory pools map memory in advance
    single = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | single,
    )
    if done.returncode in exceeded:
        raise LimitExceededError(exceeded[done.returncode])
    return done


def last_line(done: subprocess.CompletedProcess[str], most: int = 150) -> str:
    """Last line of a process's standard error, at most `most` characters; its exit status if it is empty."""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:most]


def installed_memory() -> int:
    """Memory of the machine in bytes; `sys.maxsize` if the platform does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_process(memory: int, seconds: int, output: int) -> None:
    """Limit the resources of this process from now on, as far as the platform supports it.

    Beyond the memory limit an allocation raises `MemoryError`, beyond the output limit a write raises
    `OSError` (EFBIG), and beyond the time limit SIGXCPU ends the process. Existing lower limits stay.

    Args:
        memory: Bytes in addition to those mapped already.
        seconds: CPU time.
        output: Largest size of a file, in bytes.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"RLIMIT_CORE": 0, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": output}
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        limits["RLIMIT_AS"] = int(mapped.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
    for name, limit in limits.items():
        kind = getattr(resource, name)
        before, most = resource.getrlimit(kind)
        allowed = [limit, *(other for other in (before, most) if other != resource.RLIM_INFINITY)]
        resource.setrlimit(kind, (min(allowed), most))


def main(argv: list[str]) -> int:
    """Run with the arguments SCRIPT MEMORY SECONDS OUTPUT ...; returns the script's exit status."""
    script = runpy.run_path(argv[0])  # before the limits, so that imports do not count
    limit_process(*map(int, argv[1:4]))
    try:
        return script["main"](argv[4:])
    except MemoryError:
        return TOO_MUCH_MEMORY
    except OSError as error:
        if error.errno == errno.EFBIG:
            return TOO_MUCH_OUTPUT
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
