# SPDX-License-Identifier: Apache-2.0
"""Citations in code and tests can be resolved: pages of docs/methods, equations and choices on them."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES, TESTS = REPOSITORY / "docs" / "methods", REPOSITORY / "tests"
SOURCES = sorted(
    path
    for folder in ("msa_online", "feature_extractors", "scripts", "tests")
    for path in (REPOSITORY / folder).rglob("*.py")
)
CONFIGURATIONS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
OF_METHODS = sorted((REPOSITORY / "msa_online" / "methods").rglob("*.py"))
PAGE = re.compile(r"docs/methods/(\w+\.md)")
EQUATION = re.compile(r"\(\d\.\d+\)")
CHOICE = re.compile(r"(?<![\w\"'])[EPBQ]\d{1,2}\b")
FORMER = re.compile(r"\bMETHODS [\dA-Z]\d*")  # numbers of a document outside the repository
QUAINT = re.compile(
    r"\b(not to be had|made elsewhere|is wrong with|nobody|whom|misfit|strange|mend|bricks)\b"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def citations(path: Path) -> set[str]:
    """Numbers of equations and choices that a module cites."""
    return {*EQUATION.findall(text_of(path)), *CHOICE.findall(text_of(path))}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_page_that_code_cites_exists(path):
    missing = {page for page in PAGE.findall(text_of(path)) if not (PAGES / page).is_file()}
    assert not missing, f"{name_of(path)} cites {missing}"


@pytest.mark.parametrize("path", [path for path in OF_METHODS if citations(path)], ids=name_of)
def test_equations_and_choices_that_a_method_cites_are_on_the_page_it_names(path):
    """Numbers like (1.7) and E7 are found on a page that the module's docstrings name."""
    cited = citations(path)
    pages = {page: text_of(PAGES / page) for page in PAGE.findall(text_of(path))}
    assert pages, f"{name_of(path)} cites {sorted(cited)} and names no page"
    for label in sorted(cited):
        defined = f"**{label}**" if label.startswith("(") else f"| {label} |"
        assert any(defined in page for page in pages.values()), f"{label} is on none of {sorted(pages)}"


@pytest.mark.parametrize("path", [*SOURCES, *CONFIGURATIONS], ids=name_of)
def test_no_document_outside_the_repository_is_cited(path):
    assert not FORMER.findall(text_of(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if TESTS not in path.parents], ids=name_of)
def test_words_of_code_are_plain(path):
    assert not QUAINT.findall(text_of(path))
