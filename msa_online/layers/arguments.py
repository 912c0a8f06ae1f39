# SPDX-License-Identifier: Apache-2.0
"""Check the keyword arguments of methods."""

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a setting that is none of `choices`.

    Raises:
        ValueError: Naming the setting, its value and what is allowed.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(str, choices))}")
