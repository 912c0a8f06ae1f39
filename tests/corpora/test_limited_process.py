# SPDX-License-Identifier: Apache-2.0
"""A reader of foreign files ends at its limits, and nothing else of it changes."""

import resource
from pathlib import Path

import pytest

from msa_online.corpora.limited_process import LimitExceededError, installed_memory, last_line, run_limited

MEGABYTE = 1_000_000
ENOUGH = {"memory": 50 * MEGABYTE, "seconds": 20, "output": MEGABYTE}


@pytest.fixture
def reader(tmp_path):
    """A function that writes a script whose `main` has this body."""

    def write(body: str) -> Path:
        path = tmp_path / "reader.py"
        path.write_text(f"import resource, sys\n\ndef main(argv):\n    {body}\n")
        return path

    return write


@pytest.mark.parametrize(
    ("body", "limits", "expected"),
    [
        ("return len(bytearray(200_000_000)) and 0", {}, "0.1 GB of memory"),
        ("return len([bytearray(1000) for _ in range(10**6)]) and 0", {}, "0.1 GB of memory"),
        ("sum(range(10**12))", {"seconds": 1}, "1 s of processor time"),
        ("open(argv[0], 'wb').write(bytes(3_000_000))", {}, "0.0 GB on disk"),
        ("import os; os.abort()", {}, "0.1 GB of memory"),  # how a compiled library ends without memory
    ],
)
def test_what_needs_more_than_a_limit_is_ended_and_the_limit_is_named(
    body, limits, expected, reader, tmp_path
):
    with pytest.raises(LimitExceededError, match=f"^{expected}$"):
        run_limited(reader(body), [tmp_path / "target"], **ENOUGH | limits)


def test_what_stays_within_its_limits_gives_its_status_and_what_it_printed(reader, tmp_path):
    body = "print(argv); open(argv[0], 'wb').write(bytes(900_000)); bytearray(40_000_000); return 7"
    done = run_limited(reader(body), [tmp_path / "target", 3], **ENOUGH)
    assert (done.returncode, done.stdout) == (7, f"{[str(tmp_path / 'target'), '3']}\n")
    assert (tmp_path / "target").stat().st_size == 900_000


def test_an_error_of_the_reader_is_its_last_line_cut_to_a_length(reader):
    done = run_limited(reader("raise ValueError('x' * 1000)"), [], **ENOUGH)
    assert done.returncode == 1 and last_line(done, 20) == "ValueError: xxxxxxxx"
    assert last_line(run_limited(reader("return 9"), [], **ENOUGH)) == "exit status 9"


def test_imports_of_the_reader_do_not_count(reader):
    path = reader("return 0")
    path.write_text("import numpy\nheld = bytearray(200_000_000)\n" + path.read_text())
    assert run_limited(path, [], **ENOUGH).returncode == 0


def test_no_limit_is_raised_and_none_is_above_the_memory_of_the_machine(reader):
    body = (
        "print(*resource.getrlimit(resource.RLIMIT_AS), *resource.getrlimit(resource.RLIMIT_FSIZE)); return 0"
    )
    generous = {"memory": 1 << 60, "seconds": 20, "output": 1 << 60}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MEGABYTE, before[1]))
    try:
        printed = run_limited(reader(body), [], **generous).stdout
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    memory, _, output, _ = map(int, printed.split())
    assert installed_memory() < memory < installed_memory() + (1 << 30)
    assert output == 5 * MEGABYTE
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before  # this process goes on without
