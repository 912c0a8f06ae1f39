# SPDX-License-Identifier: Apache-2.0
"""`msa-online serve`: a web page to try a checkpoint."""

import signal
import time
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from msa_online.extras import why_not_installed
from msa_online.page.serving import require_free, running_page
from msa_online.pipeline import MSAPipeline
from msa_online.training.config_reader import import_plugins


def run(options: Namespace, console: Console) -> None:
    """Serve the page until Ctrl-C."""
    for library in ("gradio", *(("skimage", "espeakng_loader") if options.examples else ())):
        if missing := why_not_installed(library):
            options.refuse(missing)
    require_free(options.host, options.port)
    import_plugins(options.plugin, "--plugin")
    former = signal.signal(signal.SIGTERM, _interrupt)  # of service managers; ends like Ctrl-C
    try:
        with (
            MSAPipeline.from_pretrained(
                options.model, transcribe=options.transcribe, language=options.language
            ) as pipeline,
            running_page(
                pipeline,
                Path(options.model).name if Path(options.model).is_dir() else options.model,
                host=options.host,
                port=options.port,
                with_examples=options.examples,
            ) as address,
        ):
            console.print(f"serving {options.model} at {address} (Ctrl-C ends it)", soft_wrap=True)
            while True:  # a signal that another thread receives does not end a wait without a limit
                time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("stopped; all uploads are deleted")
    finally:
        signal.signal(signal.SIGTERM, former)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
