# SPDX-License-Identifier: Apache-2.0
"""Run a reader of foreign files in a process with limits on memory, time and output.

Run by its path, this file is that process: it imports nothing of the package, so that it starts at once.
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
    """A reader needed more than it was allowed; the message says of what."""


def run_limited(
    reader: Path, arguments: Sequence[object], *, memory: int, seconds: int, output: int
) -> subprocess.CompletedProcess[str]:
    """Call `main` of a script in a process of its own.

    Args:
        reader: The script; it has a function `main` that takes a list of strings and returns the exit status,
            below 100.
        arguments: What `main` gets.
        memory: Bytes it may map beside its imports; Linux only, and never more than the machine has.
        seconds: Processor time; not on Windows.
        output: Bytes of one file that it writes; not on Windows.

    Returns:
        The process that ended, what it printed included.

    Raises:
        LimitExceededError: A limit ended it.
    """
    memory = min(memory, installed_memory())
    exceeded = {
        TOO_MUCH_MEMORY: f"{memory / 1e9:.1f} GB of memory",
        -signal.SIGABRT: f"{memory / 1e9:.1f} GB of memory",  # compiled libraries end so
        TOO_MUCH_OUTPUT: f"{output / 1e9:.1f} GB on disk",
    }
    if hasattr(signal, "SIGXCPU"):
        exceeded[-signal.SIGXCPU] = f"{seconds} s of processor time"
    command = [sys.executable, "-P", __file__, reader, memory, seconds, output, *arguments]
    # each thread would map memory of its own, and so would a pool
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
    """The last line that a process wrote on standard error, at most so many characters; or its status."""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:most]


def installed_memory() -> int:
    """Bytes of memory in the machine; the largest number where the platform does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_process(memory: int, seconds: int, output: int) -> None:
    """Limit what this process may use from now on, as far as the platform can.

    Beyond the limit of memory an allocation raises `MemoryError`, beyond that of output a write raises
    `OSError` (EFBIG), and beyond that of time SIGXCPU ends the process. Limits that are lower already stay.

    Args:
        memory: Bytes beside those it has mapped already.
        seconds: Processor time.
        output: Bytes of one file.
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
    """Call `main` of the script in the first argument within the limits in the next three; exit status."""
    script = runpy.run_path(argv[0])  # its imports do not count
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
