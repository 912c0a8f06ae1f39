# SPDX-License-Identifier: Apache-2.0
"""Serve the page, with its uploads in a folder of its own that is deleted at the end."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

from msa_online.pipeline import MSAPipeline

LOOPBACK = "127.0.0.1"
PORT = 7860

SWEEPING = 30
"""Seconds between two looks for old uploads."""

MAX_WAITING = 200
"""Visitors who may wait for an answer; others are asked to come back."""


class PageError(RuntimeError):
    """The page cannot be served at an address."""


def require_free(host: str, port: int) -> None:
    """Check that an address can be served.

    Raises:
        PageError: It cannot; the message has the reason.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PageError(f"{host}:{port} cannot be served: {reason}; give another --port or --host") from error


def delete_older(folder: Path, seconds: float) -> None:
    """Delete the files below a folder that were written longer ago, those of broken uploads too."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another thread was faster
            if path.is_file() and time.time() - path.stat().st_ctime > seconds:
                path.unlink()


def _is_worth_reporting(record: logging.LogRecord) -> bool:
    """Whether a message of the server is not about a visitor who left during an upload."""
    error = record.exc_info and record.exc_info[1]
    return type(error).__name__ != "ClientDisconnect"


@contextmanager
def running_page(
    pipeline: MSAPipeline,
    source: str,
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    with_examples: bool = False,
) -> Iterator[str]:
    """Serve the page in a `with` block; yields its address.

    Args:
        pipeline: The model.
        source: Name of the checkpoint, which the page shows.
        host: Address to listen on; by default only this computer can open the page.
        port: Port to listen on.
        with_examples: Render examples first; needs the extra `demo`.

    Raises:
        ImportError: gradio is not installed, or for examples the extra `demo`.
        PageError: The address cannot be served.
    """
    with TemporaryDirectory(prefix="msa_online_page_") as folder:
        uploads, rendered = Path(folder, "uploads"), Path(folder, "examples")
        uploads.mkdir()
        rendered.mkdir()
        os.environ |= {  # gradio reads these when it is imported, and when components are made
            "GRADIO_TEMP_DIR": str(uploads),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        from msa_online.page.blocks import KEPT_SECONDS, MAX_BYTES, build_page
        from msa_online.page.examples import render_examples
        from msa_online.page.look import STYLE, make_theme

        examples = render_examples(rendered) if with_examples else []
        page = build_page(pipeline, source, examples).queue(max_size=MAX_WAITING, status_update_rate=1)
        require_free(host, port)
        logging.getLogger("uvicorn.error").addFilter(_is_worth_reporting)
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            allowed_paths=[str(rendered)],
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=make_theme(),
            css=STYLE,
        )
        stopped = Event()

        def sweep() -> None:
            while not stopped.wait(SWEEPING):
                delete_older(uploads, KEPT_SECONDS)

        Thread(target=sweep, daemon=True).start()
        try:
            yield f"http://{host}:{port}"
        finally:
            stopped.set()
            page.close(verbose=False)
