# SPDX-License-Identifier: Apache-2.0
"""Compare what the code computes with an equation of docs/methods, by its number there."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PAGES = Path(__file__).parents[1] / "docs" / "methods"


@cache
def page_of(equation: str) -> str:
    """The page that has the equation; `equation` is a number like "1.6", or a heading of unnumbered ones."""
    titles = (f"**({equation})**", f"\n## {equation}\n")
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if any(title in text for title in titles):
            return f"docs/methods/{page.name}"
    raise LookupError(f"no page of docs/methods has an equation or a section {equation!r}")


def assert_equation(
    equation: str,
    quantity: str,
    found: Tensor | float | Sequence | Mapping,
    expected: Tensor | float | Sequence | Mapping,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-9,
) -> None:
    """Assert that values are those of an equation, within `atol` + `rtol` times the expected value.

    The message names the equation, its page, the quantity, the largest difference and where it is.

    Args:
        equation: Number of the equation, or the heading of its section.
        quantity: What is compared, in words.
        found: What the code computes; the keys of a mapping are those of `expected`.
        expected: What the equation gives.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    where = f"{page_of(equation)}, {f'({equation})' if equation[0].isdigit() else equation}: {quantity}"
    places = None
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), f"{where}: {sorted(found)} instead of {sorted(expected)}"
        places = list(expected)
        found, expected = [found[place] for place in places], list(expected.values())
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, f"{where}: {found.dtype} instead of {expected.dtype}"
    found, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (found, expected))
    assert found.shape == expected.shape, f"{where}: shape {found.shape} instead of {expected.shape}"
    difference = (found - expected).abs().nan_to_num(nan=torch.inf)
    if (difference <= atol + rtol * expected.abs()).all():
        return
    place = torch.unravel_index(difference.argmax(), difference.shape)
    at = tuple(number.item() for number in place)
    name = places[at[0]] if places else ", ".join(map(str, at))
    raise AssertionError(
        f"{where} is off by up to {difference[place].item():.3g}"
        + (f" at [{name}]" if at else "")
        + f": {found[place].item():.9g} instead of {expected[place].item():.9g}"
        + f" (allowed: {atol:g} + {rtol:g} x the expected value)"
    )
