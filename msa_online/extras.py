# SPDX-License-Identifier: Apache-2.0
"""Optional libraries: which extra of the package brings them, and one wording for their absence."""

import importlib.util

EXTRAS = {
    "h5py": "csd",
    "espeakng_loader": "demo",
    "skimage": "demo",
    "gradio": "serve",
    "faster_whisper": "transcribe",
    "optuna": "tune",
}
"""Extra of the package that brings a library, by the name under which it is imported."""


def why_not_installed(library: str) -> str | None:
    """The reason why an optional library cannot be used, with the command that installs it; None if it can.

    Args:
        library: A name in `EXTRAS`.
    """
    if importlib.util.find_spec(library) is not None:
        return None
    return f"{library} is not installed: pip install 'msa_online[{EXTRAS[library]}]'"
