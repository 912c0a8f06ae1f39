# SPDX-License-Identifier: Apache-2.0
"""The hint at an optional library that is absent names an extra that exists."""

import sys
import tomllib
from pathlib import Path

import pytest

from msa_online.extras import EXTRAS, why_not_installed

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("library", EXTRAS)
def test_an_absent_library_is_named_with_an_extra_that_the_package_has(library, monkeypatch):
    assert EXTRAS[library] in PROJECT["optional-dependencies"]
    monkeypatch.setitem(sys.modules, library, None)
    assert why_not_installed(library) == (
        f"{library} is not installed: pip install 'msa_online[{EXTRAS[library]}]'"
    )
