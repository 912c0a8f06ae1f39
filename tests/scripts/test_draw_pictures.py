# SPDX-License-Identifier: Apache-2.0
"""The drawn pictures of the README are those that their scripts write."""

import importlib
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from msa_online.methods import CALIBRATORS, HEADS, MODULATORS

TABLES = {"head": HEADS, "calibrator": CALIBRATORS, "modulator": MODULATORS}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def architecture(repository):
    """The module of scripts/draw_architecture.py."""
    path = repository / "scripts/draw_architecture.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location(path.stem, path))
    spec.loader.exec_module(module)
    return module


def names_in(picture: str, kind: str) -> list[str]:
    return re.findall(rf'class="name {kind}">([^<]+)<', picture)


@pytest.mark.parametrize("name", ["architecture", "results"])
def test_the_committed_picture_is_what_the_script_writes(name, repository, tmp_path):
    script = f"scripts/draw_{name}.py"
    subprocess.run([sys.executable, repository / script, tmp_path / "picture.svg"], check=True)
    drawn, committed = (tmp_path / "picture.svg").read_text(), (repository / f"docs/{name}.svg").read_text()
    assert drawn == committed, f"docs/{name}.svg is out of date: run python {script}"
    ElementTree.fromstring(committed)


@pytest.mark.parametrize("kind", TABLES)
def test_the_architecture_names_every_method_of_the_tables(kind, architecture):
    assert names_in(architecture.draw(), kind) == list(TABLES[kind])


def test_more_methods_still_fit_into_the_picture(architecture, monkeypatch):
    many = {f"method_{number}": None for number in range(20)}
    for table in ("HEADS", "MODULATORS", "CALIBRATORS"):
        monkeypatch.setattr(architecture, table, many)
    root = ElementTree.fromstring(architecture.draw())
    _, _, width, height = map(float, root.get("viewBox").split())
    for frame in root.iter(f"{SVG}rect"):
        assert float(frame.get("x")) >= 0 and float(frame.get("x")) + float(frame.get("width")) <= width
        assert float(frame.get("y")) >= 0 and float(frame.get("y")) + float(frame.get("height")) <= height


def test_the_result_has_a_row_and_two_dots_for_each_row_of_the_table(repository):
    page = (repository / "docs/ebmc.md").read_text(encoding="utf-8")
    picture = (repository / "docs/results.svg").read_text(encoding="utf-8")
    table = page.split("### all-MiniLM-L6-v2, three seeds, test")[1].split("###")[0]
    rows = re.findall(r"^\| ([a-z+ ]+) \| \d", table, re.MULTILINE)
    assert len(rows) == 8 and all(f">{row.replace('+', ' + ')}<" in picture for row in rows)
    assert picture.count("<circle") == 2 * len(rows) + 2  # two of them in the legend


def test_the_picture_of_the_evidence_has_the_rows_of_its_table(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    script = importlib.import_module("draw_evidence")
    page = (repository / "docs/evidence.md").read_text(encoding="utf-8").split(script.TABLE)[1]
    rows = re.findall(r"^\| ([^|]+) \| \d \| .*? \| ([\d.]+) ±", page.split("![")[0], re.MULTILINE)
    errors, *_ = script.draw().axes
    assert [label.get_text() for label in errors.get_yticklabels()] == [name for name, _ in rows]
    assert len(rows) > 10 and (repository / "docs/evidence.png").stat().st_size > 10_000


def test_the_readme_has_the_table_of_the_evidence(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    table = importlib.import_module("draw_evidence").short_table()
    assert len(table.splitlines()) > 10
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{table}\n\n" in readme, "the table is out of date: run python scripts/draw_evidence.py"


def test_a_readme_without_the_table_is_said_before_anything_is_written(
    repository, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    script = importlib.import_module("draw_evidence")
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    (tmp_path / "README.md").write_text("# No table\n", encoding="utf-8")
    before = (repository / "docs/evidence.png").stat().st_mtime_ns
    assert script.main() == 1
    assert "README.md has no table whose first column is 'method, stored states'" in capsys.readouterr().err
    assert (repository / "docs/evidence.png").stat().st_mtime_ns == before
