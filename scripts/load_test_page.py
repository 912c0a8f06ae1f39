# SPDX-License-Identifier: Apache-2.0
"""Visit a page of `msa-online serve` with many clients at once, and report errors and waiting times.

    msa-online serve runs/mine &
    python scripts/load_test_page.py clip.mp4 --clients 50 --seconds 120

Each client uploads the clip under a name of its own and asks again as soon as it has an answer. The exit
status is 1 if any visit failed.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gradio_client import Client, handle_file
from gradio_client.utils import QueueError, TooManyRequestsError
from httpx import HTTPError

PATIENCE = 120  # seconds for one request, as long as a browser waits
POLL = 0.5  # seconds between two looks at the place in the queue
NO_ANSWER = (OSError, HTTPError, ValueError, QueueError, TooManyRequestsError, CancelledError)
"""Errors of a visit: the connection, HTTP, what the page or the client reports, a full queue."""


@dataclass
class Visits:
    """What one client experienced.

    Attributes:
        seconds: Time to each answer.
        errors: Messages of the visits without an answer.
        places: Places in the queue that the page reported.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    places: set[int] = field(default_factory=set)


def visit(address: str, clip: Path, until: float) -> Visits:
    """Ask the page again and again until a time on the monotonic clock; the last answer is awaited."""
    visits = Visits()
    try:
        client = Client(address, verbose=False, download_files=False, httpx_kwargs={"timeout": PATIENCE})
    except NO_ANSWER as error:
        visits.errors.append(f"{type(error).__name__}: {error}")
        return visits
    used = ["text", "audio", "vision"]
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            job = client.submit(handle_file(clip), None, "I loved it", used, api_name="/predict")
            while not job.done():
                if (place := job.status().rank) is not None:
                    visits.places.add(place)
                time.sleep(POLL)
            answer = job.result()
        except NO_ANSWER as error:
            visits.errors.append(f"{type(error).__name__}: {error}")
            continue
        if "Predicted score" in answer or "Most probable class" in answer:
            visits.seconds.append(time.monotonic() - began)
        else:
            visits.errors.append(answer)
    client.close()
    return visits


def report(visits: list[Visits]) -> list[str]:
    """Lines with the number of answers and errors, waiting times and places in the queue."""
    seconds = np.array([each for one in visits for each in one.seconds])
    errors = Counter(error.splitlines()[0] for one in visits for error in one.errors)
    lines = [f"{len(visits)} clients: {len(seconds)} answers, {errors.total()} errors"]
    if len(seconds):
        middle, late = np.percentile(seconds, [50, 95])
        lines.append(
            f"seconds to an answer: median {middle:.1f}, 95 % within {late:.1f}, longest {seconds.max():.1f}"
        )
    if places := {place for one in visits for place in one.places}:
        lines.append(f"places in the queue that clients saw: {min(places)} to {max(places)}")
    return lines + [f"{count} x {error[:200]}" for error, count in errors.most_common(5)]


def main(words: list[str] | None = None) -> int:
    """Run the test; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", type=Path, help="a short clip")
    parser.add_argument("--address", default="http://127.0.0.1:7860", help="address of the page")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120, help="length of the test")
    options = parser.parse_args(words)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(options.clients) as pool:
        copies = [Path(folder, f"client {number}{options.clip.suffix}") for number in range(options.clients)]
        for copy in copies:
            shutil.copy(options.clip, copy)
        until = time.monotonic() + options.seconds
        visits = list(pool.map(lambda copy: visit(options.address, copy, until), copies))
    print("\n".join(report(visits)))
    return int(any(one.errors for one in visits) or not any(one.seconds for one in visits))


if __name__ == "__main__":
    sys.exit(main())
