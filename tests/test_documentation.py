# SPDX-License-Identifier: Apache-2.0
"""Pages of the repository: links lead somewhere, lines are short, words plain, the citation is complete."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from msa_online.encoders import CONVOLUTIONAL, ENCODERS
from tests.test_style import QUAINT

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("docs", "configs", "msa_online")
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(page for name in FOLDERS for page in (REPOSITORY / name).rglob("*.md"))]
)
SETTINGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
NEW_METHOD = REPOSITORY / "docs" / "adding_a_method.md"  # names files that its own test creates
LONGEST = 110  # characters of a line


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", without_code(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {
        anchor + (f"-{number}" if number else "")
        for anchor, last in found.items()
        for number in range(last + 1)
    }


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page that stay within the repository."""
    text = without_code(page)
    targets = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) + re.findall(
        r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE
    )
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(path):
    for target in links(path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)}: no file {target}"
        if anchor:
            found = anchors(linked.read_text(encoding="utf-8"))
            assert anchor in found, f"{name_of(path)}: no heading {target}; there are {sorted(found)}"


@pytest.mark.parametrize("path", [path for path in PAGES + SETTINGS if path != NEW_METHOD], ids=name_of)
def test_every_path_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    folders = "msa_online|feature_extractors|tests|scripts|configs|docs"
    for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./*-]*[\w*/]", text):
        found = list(REPOSITORY.glob(name.rstrip("/")))
        template = "<" in text[text.index(name) + len(name) :][:1]
        assert found or template, f"{name_of(path)}: no {name}"


def test_links_and_anchors_are_found():
    heading, code = "# One `two`: three\n", "```\n# no\n[no](code.md)\n```\n"
    page = f"{heading}[a](b.md#c) ![d](e.png)\n{code}[f](https://g.h)\n{heading}[i]: j.md\n"
    assert links(page) == ["b.md#c", "e.png", "j.md"]
    assert anchors(page) == {"one-two-three", "one-two-three-1"}


@pytest.mark.parametrize("path", PAGES + SETTINGS, ids=name_of)
def test_lines_are_short(path):
    """Rows of tables and lines that consist of one address are as long as they have to be."""
    lines = path.read_text(encoding="utf-8").splitlines()
    free = re.compile(r"\s*\||\s*(\[[^\]]+\]:\s*)?https?://\S+$")
    long = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST and not free.match(line)]
    assert not long, f"{name_of(path)}: lines {long} have more than {LONGEST} characters"


@pytest.mark.parametrize("path", PAGES + SETTINGS, ids=name_of)
def test_words_are_plain(path):
    text = path.read_text(encoding="utf-8")
    found = [*QUAINT.findall(text), *re.findall(r"\bMETHODS\b", text)]
    assert not found, f"{name_of(path)}: {found}"


def test_the_citation_names_the_software_and_every_paper_of_the_methods():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["title"].startswith(project["name"])
    methods = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs/methods").glob("*.md"))
    entries = re.findall(r"^```bibtex\n(.*?)^```", methods, flags=re.MULTILINE | re.DOTALL)
    papers = {re.search(r"\d{4}\.\d{5}", paper["url"])[0]: paper for paper in citation["references"]}
    assert len(papers) == len(entries)
    for number, paper in papers.items():
        assert f"https://arxiv.org/abs/{number}" in methods
        title = re.sub(r"\W+", " ", paper["title"])
        (entry,) = [
            entry
            for entry in entries
            if title in re.sub(r"\W+", " ", entry.replace("{", "").replace("}", ""))
        ]
        assert all(author["family-names"] in entry for author in paper["authors"])


@pytest.mark.parametrize("modality", ["audio", "vision"])
def test_the_page_of_encoders_lists_the_families_of_the_table(modality):
    page = (REPOSITORY / "docs" / "encoders.md").read_text(encoding="utf-8")
    table = page[page.index("| modality | model types") :].split("\n\n")[0]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith(f"| {modality} |")]
    assert set(re.findall("`(.+?)`", " ".join(rows))) == ENCODERS[modality].keys() - {CONVOLUTIONAL}
