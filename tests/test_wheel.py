# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` brings works without the clone."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The files of the wheel, as setuptools puts them together."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["egg_info", "--egg-base", folder, "build", "--build-base", folder, "--build-lib", folder / "lib"]
    command = [sys.executable, "setup.py", "-q", *map(str, words)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    return folder / "lib"


def files(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def test_the_wheel_holds_every_configuration_module_and_template(built):
    assert files(built / "msa_online" / "configs", "*.yaml") == files(REPOSITORY / "configs", "*.yaml")
    for package in ("msa_online", "feature_extractors"):
        for pattern in ("*.py", "*.md", "py.typed"):
            assert files(built / package, pattern) == files(REPOSITORY / package, pattern)
    assert (built / "msa_online_cli.py").is_file()


def test_the_built_package_finds_its_own_configurations(built, tmp_path):
    code = "from msa_online.shipped_configs import shipped; print(*shipped().values(), sep='\\n')"
    environment = {"PYTHONPATH": str(built), "PATH": ""}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    found = done.stdout.splitlines()
    assert len(found) == len(files(REPOSITORY / "configs", "*.yaml")), done.stderr
    assert all(Path(path).is_relative_to(built) for path in found)


def test_a_source_distribution_holds_the_configurations():
    assert "graft configs" in (REPOSITORY / "MANIFEST.in").read_text()
