# SPDX-License-Identifier: Apache-2.0
"""The hint at an optional library that is absent names an extra that exists, and all that is imported is
declared.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from msa_online.extras import EXTRAS, why_not_installed

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]
LOCAL = {path.stem for folder in (".", "scripts") for path in (REPOSITORY / folder).glob("*.py")} | {
    *("feature_extractors", "msa_online", "tests"),
    "my_plugin",  # written by a test
}
APART = {"MMSA"}  # scripts/compare_with_mmsa.py runs in an environment of its own
BROUGHT = {"opencv-contrib-python"}  # by mediapipe, which pins it


@pytest.fixture(scope="module")
def installed() -> dict[str, list[str]]:
    """Distributions by the top-level modules that they install."""
    return packages_distributions()


def distribution(requirement: str) -> str:
    """Name of a distribution, as registries compare it, without versions and extras."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def imported_by(folder: str) -> Iterator[str]:
    """Top-level modules that the files of a folder import, at any depth of their code."""
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize("library", EXTRAS)
def test_an_absent_library_is_named_with_an_extra_that_the_package_has(library, monkeypatch):
    assert EXTRAS[library] in EXTRA
    monkeypatch.setitem(sys.modules, library, None)
    assert why_not_installed(library) == (
        f"{library} is not installed: pip install 'msa_online[{EXTRAS[library]}]'"
    )


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("feature_extractors", set()),
        ("msa_online", {*EXTRA} - {"test", "dev"}),
        ("tests", {*EXTRA}),
        ("scripts", {*EXTRA}),
    ],
    ids=["feature_extractors", "msa_online", "tests", "scripts"],
)
def test_what_is_imported_is_declared(folder, extras, installed):
    required = [*PROJECT["dependencies"], *(each for name in extras for each in EXTRA[name])]
    declared = {distribution(each) for each in required} | BROUGHT
    modules = {*imported_by(folder)} - sys.stdlib_module_names - LOCAL - APART
    missing = [
        module
        for module in sorted(modules)
        if not {distribution(each) for each in installed.get(module, [module])} & declared
    ]
    assert not missing
