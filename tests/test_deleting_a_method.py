# SPDX-License-Identifier: Apache-2.0
"""Every method can be deleted: without its files, its lines in the tables and what is configured with it,
everything else is collected, and what depends on the tables passes.

Late fusion stays: it is the default of a configuration, the baseline, and the template of a new method.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations, count
from math import comb
from pathlib import Path

import pytest
import yaml

from msa_online.methods import CALIBRATORS, HEADS, MODULATORS

REPOSITORY = Path(__file__).parents[1]
TABLES = Path("msa_online/methods/__init__.py")
PARTS = {**HEADS, **MODULATORS, **CALIBRATORS}
FILES = {name: kind.__module__.split(".")[2] for name, kind in PARTS.items()}  # of msa_online.methods
METHODS = sorted({*FILES.values()} - {"base", "late_fusion"})


def methods_to_delete(methods: list[str]) -> list[list[str]]:
    """Methods to delete from each copy: for any two, some copy lacks the first and has the second.

    A copy costs the collection of all tests, so there are as few as possible. A method is deleted from half
    of n copies, and no two methods from the same ones; n is the least number with so many choices. Choices
    from both ends of their list leave each copy about half of the methods.
    """
    copies = next(n for n in count(2) if comb(n, n // 2) >= len(methods))
    choices = list(combinations(range(copies), copies // 2))
    ends = (choice for pair in zip(choices, reversed(choices), strict=True) for choice in pair)
    chosen = dict(zip(methods, ends, strict=False))
    return [[method for method in methods if copy in chosen[method]] for copy in range(copies)]


DELETED = methods_to_delete(METHODS)
PASSES = (
    "test_layers and import or test_a_configuration or configs_lists or help or keywords or in_the_order "
    "or classes_are_named"
)
"""Words of the tests that run in a copy. Pytest collects all tests to find them."""


def delete(method: str, copy: Path) -> None:
    """Delete all that a method consists of from a copy of the repository."""
    for pattern in (
        *(f"msa_online/methods/{name}" for name in (method, f"{method}.py")),
        *(f"tests/methods/{name}" for name in (method, f"test_{method}.py")),
        *(f"docs/{name}" for name in (f"methods/{method}.md", f"{method}.md", f"{method}_*.png")),
        f"scripts/*_{method}.py",
    ):
        for path in copy.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    delete_lines(method, copy / TABLES)
    delete_configurations({name for name, file in FILES.items() if file == method}, copy / "configs")


def delete_lines(method: str, tables: Path) -> None:
    """Delete the imports of a method, and the lines of the tables that name what was imported."""
    lines = tables.read_text().splitlines()
    names, gone = [], set()
    for node in ast.parse(tables.read_text()).body:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"msa_online.methods.{method}."):
            names += [alias.name for alias in node.names]
            gone.update(range(node.lineno - 1, node.end_lineno))
    word = re.compile(rf"\b({'|'.join(names)})\b")
    kept = [line for number, line in enumerate(lines) if number not in gone and not word.search(line)]
    tables.write_text("\n".join(kept) + "\n")


def delete_configurations(names: set[str], folder: Path) -> None:
    """Delete the configurations that name a part of the method, and the studies of deleted ones."""
    gone = set(names)
    while found := [
        path for path in folder.rglob("*.yaml") if words_of(yaml.safe_load(path.read_text())) & gone
    ]:
        for path in found:
            gone.add(f"configs/{path.relative_to(folder)}")
            path.unlink()


def words_of(content) -> set[str]:
    """All keys and values of a YAML document that are words."""
    if isinstance(content, dict):
        return set().union(*(words_of(key) | words_of(value) for key, value in content.items()))
    if isinstance(content, list):
        return set().union(*map(words_of, content))
    return {content} if isinstance(content, str) else set()


def test_for_any_two_methods_a_copy_lacks_the_first_and_has_the_second():
    for first in METHODS:
        for second in {*METHODS} - {first}:
            assert any(first in deleted and second not in deleted for deleted in DELETED)
    assert not [deleted for deleted in DELETED if len(deleted) in (0, len(METHODS))]


@pytest.mark.slow
@pytest.mark.parametrize("deleted", DELETED, ids=range(len(DELETED)))
def test_without_some_methods_everything_else_is_collected_and_passes(deleted, tmp_path):
    for name in ("msa_online", "feature_extractors", "tests", "configs", "scripts", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for file in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.md"), REPOSITORY / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    for method in deleted:
        delete(method, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", PASSES, "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"without {', '.join(deleted)}: {done.stdout[-6000:]}"
