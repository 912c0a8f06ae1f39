# SPDX-License-Identifier: Apache-2.0
"""Validate the keyword arguments of methods."""

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Validate that a setting is one of `choices`.

    Raises:
        ValueError: It is not; names the setting, its value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")
