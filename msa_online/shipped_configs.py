# SPDX-License-Identifier: Apache-2.0
"""The configurations and studies that come with the package, found by name."""

import difflib
import re
from itertools import takewhile
from pathlib import Path

from msa_online.training.yaml_reader import ConfigurationError

PACKAGED = Path(__file__).with_name("configs")  # in an installed wheel
FOLDER = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"  # in a clone


def shipped() -> dict[str, Path]:
    """All shipped files by name, the path under `configs/` without the suffix."""
    paths = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}


def find_configuration(name: str, folder: str = "") -> Path:
    """The file of this name, or else the shipped configuration of this name.

    Args:
        name: Path of a file, or name of a shipped configuration.
        folder: Folder of `configs/` that is searched first, like "ablations/".

    Raises:
        ConfigurationError: There is neither; the message names a similar shipped one.
    """
    return Path(name) if Path(name).is_file() else find_shipped(name, folder)


def find_shipped(name: str, folder: str = "") -> Path:
    """The shipped configuration of this name; arguments and errors as in `find_configuration`."""
    known = shipped()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    for candidate in (folder + short, short):
        if candidate in known:
            return known[candidate]
    near = [*difflib.get_close_matches(short, known), *difflib.get_close_matches(folder + short, known)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigurationError(
        f"{name}: neither a file nor a shipped configuration; {hint}`msa-online configs` lists them"
    )


def description(path: Path) -> str:
    """Description of a configuration: the first sentence of its comment, after the command in line 1."""
    command, *lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment)[0] or command.lstrip("# ")
