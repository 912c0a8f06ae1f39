# SPDX-License-Identifier: Apache-2.0
"""The picture of the layers in ARCHITECTURE.md, read from the imports."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("feature_extractors", "msa_online")
LEVELS = {  # the longest prefix of a module's name decides
    "feature_extractors": 0.0,
    "msa_online.modalities": 0.5,
    "msa_online.confidence": 0.5,
    "msa_online.extras": 0.5,
    "msa_online.layers": 1.0,
    "msa_online.configuration_msa": 1.0,
    "msa_online.encoders": 1.0,
    "msa_online.front_ends": 1.0,
    "msa_online.methods": 1.5,
    "msa_online.context": 1.5,
    "msa_online.evaluation.tables": 1.5,  # tables of plain data
    "msa_online.model_card": 1.5,
    "msa_online.modeling_msa": 2.0,
    "msa_online.processing_msa": 2.0,
    "msa_online.transcription": 2.5,
    "msa_online.corpora": 3.0,
    "msa_online.precomputed": 3.0,
    "msa_online.synthetic": 3.0,
    "msa_online.missing": 3.2,
    "msa_online.batching": 3.5,
    "msa_online.evaluation": 3.5,
    "msa_online.lora": 3.5,
    "msa_online.hub": 4.0,
    "msa_online.training": 4.0,
    "msa_online.pipeline": 4.0,
    "msa_online.publishing": 4.0,
    "msa_online.pipeline_inputs": 4.0,
    "msa_online.pipeline_workers": 4.0,
    "msa_online.results_file": 4.0,
    "msa_online.timeline": 4.0,
    "msa_online.transformers_pipeline": 4.0,
    "msa_online.shipped_configs": 4.2,
    "msa_online.studies": 4.5,
    "msa_online.page": 4.5,
    "msa_online.describe": 4.5,  # joins what checkpoints and configurations say
    "msa_online.user_errors": 4.5,  # lists the errors of all others
    "msa_online": 4.5,  # the front door re-exports
    "msa_online.commands": 5.0,
    "msa_online_cli": 5.0,
    "train": 5.0,
}
SHARED = {"base", "gradients"}  # in `methods/`: the contract, and what modulators share
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "core", "misc", "tools"}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    paths = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    paths += [REPOSITORY / "msa_online_cli.py", REPOSITORY / "train.py"]
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


MODULES = modules()


def place(module: str) -> str:
    """The longest prefix of the module's name that has a level."""
    return max((prefix for prefix in LEVELS if f"{module}.".startswith(f"{prefix}.")), key=len)


def level(module: str) -> float:
    return LEVELS[place(module)]


def imported(path: Path) -> set[str]:
    """Dotted names a file imports anywhere in it; of ours, the module a name comes from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in (*PACKAGES, "msa_online_cli", "train")}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"msa_online"}))
def test_imports_point_down(module):
    above = {name for name in ours(imported(MODULES[module])) if level(name) > level(module)}
    assert not above, f"{module} stands below {', '.join(sorted(above))}"


def test_imports_have_no_circle():
    """Also those inside functions, which Python would allow."""
    graph = {name: ours(imported(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("feature_extractors")))
def test_extraction_knows_nothing_of_models(module):
    roots = {name.split(".")[0] for name in imported(MODULES[module])}
    assert not roots & {"msa_online", "msa_online_cli", "train", "torch", "transformers", "accelerate"}


def method_of(module: str) -> str | None:
    """The method a module belongs to: its file or folder in `methods/`; None for what methods share."""
    parts = module.split(".")
    is_method = parts[:2] == ["msa_online", "methods"] and len(parts) > 2 and parts[2] not in SHARED
    return parts[2] if is_method else None


@pytest.mark.parametrize("module", sorted(name for name in MODULES if method_of(name)))
def test_a_method_imports_no_other_method(module):
    names = imported(MODULES[module])
    assert {method_of(name) for name in names} <= {None, method_of(module)}
    assert "msa_online.methods" not in names  # the tables name the methods, not the reverse


def test_no_module_imports_scripts():
    importers = {
        name
        for name, path in MODULES.items()
        if {n.split(".")[0] for n in imported(path)} & {"scripts", "tests"}
    }
    assert not importers


def test_every_module_is_in_the_picture():
    assert not {name for name in MODULES if place(name) == "msa_online" != name}


def test_the_picture_in_architecture_has_these_levels():
    page = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = {}
    for level_of_line, names in re.findall(r"^(\d(?:\.\d)?)  +(\S.*)$", page, flags=re.MULTILINE):
        for name in re.sub(r"\(.*\)", "", names).split():
            path = REPOSITORY / name if (REPOSITORY / name).exists() else REPOSITORY / "msa_online" / name
            assert path.exists(), f"no {name}"
            module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            drawn[module.removesuffix(".__init__")] = float(level_of_line)
    assert drawn == LEVELS


def test_names_of_modules_say_what_is_inside():
    parts = {part for name in MODULES for part in name.split(".")}
    assert not parts & NAMES_THAT_SAY_NOTHING


def in_a_fresh_process(code: str) -> list[str]:
    """What `code` prints, word by word, in a process whose sockets refuse to connect."""
    guard = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('opened a socket')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard + code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_extraction_starts_without_torch_and_without_its_own_heavy_libraries():
    heavy = ("torch", "transformers", "av", "cv2", "mediapipe", "librosa", "scipy", "numba")
    assert (
        in_a_fresh_process(f"import feature_extractors\nprint(*[m for m in {heavy} if m in sys.modules])")
        == []
    )


@pytest.mark.slow
def test_the_package_starts_without_what_only_training_or_extraction_needs_and_without_network():
    heavy = (
        "av",
        "cv2",
        "mediapipe",
        "librosa",
        "numba",
        "sklearn",
        "matplotlib",
        "datasets",
        "pandas",
        "tensorboard",
    )
    assert in_a_fresh_process(f"import msa_online\nprint(*[m for m in {heavy} if m in sys.modules])") == []
