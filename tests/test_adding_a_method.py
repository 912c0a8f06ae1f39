# SPDX-License-Identifier: Apache-2.0
"""docs/adding_a_method.md works as it stands, and its contract catches what a new head gets wrong."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"^`([^`\n]+)`:\n\n```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
HEAD = "msa_online/methods/mean_fusion.py"
TABLES = "msa_online/methods/__init__.py"

MISTAKES = {
    "no hidden_size": ("hidden_size", "size", "has no keyword hidden_size"),
    "features copied": (
        "features=features,",
        "features={name: state.clone() for name, state in features.items()},",
        "report the tensor that the fusion reads",
    ),
    "alone from all": (
        "self.predictors[name](state)",
        "self.predictors[name](state + fused)",
        "modality_logits['text'] in stage 'train' is not from text alone",
    ),
    "predictor owned": (
        "list(self.projections[name].parameters())",
        "[*self.projections[name].parameters(), *self.predictors[name].parameters()]",
        "lists ['predictors.text.weight', 'predictors.text.bias'], which the fused prediction does not",
    ),
    "padding counted": (
        "masked_mean(sequences[name])",
        "sequences[name].values.mean(dim=1)",
        "three more padded steps change the prediction",
    ),
    "loss unlisted": (
        'loss_names = ("task", "unimodal")',
        'loss_names = ("task",)',
        "does not list ['unimodal']",
    ),
    "root of zero": (
        "logits=self.classifier(fused)",
        "logits=self.classifier(fused * fused.square().sum(dim=-1, keepdim=True).sqrt())",
        "are not finite when only [] are there",
    ),
    "label used": (
        "logits=self.classifier(fused)",
        "logits=self.classifier(fused) + (0 if labels is None else labels.unsqueeze(-1))",
        "logits differ with and without labels",
    ),
    "batch used": (
        "logits=self.classifier(fused)",
        "logits=self.classifier(fused - fused.mean(dim=0))",
        "the other samples of its batch change the prediction of a sample",
    ),
    "slope cut": (
        "self.classifier(fused)",
        "self.classifier(fused * fused.detach())",
        "are not those of finite differences",
    ),
    "never trained": (
        "self.classifier = ",
        "self.spare = nn.Linear(2, 2)\n        self.classifier = ",
        "no loss of any stage trains these parameters",
    ),
    "raw parameter": (
        "self.classifier(fused)",
        "self.classifier(fused * self.scale)",
        "has ['scale'] of its own and no reset_parameters",
    ),
}


def with_changes(text: str, changes: str) -> str:
    """A text with the lines that start with + put behind the line before them, which has to be there."""
    lines, place = text.splitlines(), 0
    for line in changes.splitlines():
        if line.startswith("+"):
            lines.insert(place, line[1:])
        else:
            assert line[1:] in lines[place:], f"docs/adding_a_method.md: no line {line[1:]!r}"
            place = lines.index(line[1:], place)
        place += 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the repository to which the page has been applied."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("msa_online", "feature_extractors", "tests", "configs", "scripts", "docs"):
        shutil.copytree(REPOSITORY / name, copy / name)
    for file in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.md"), REPOSITORY / "pyproject.toml"]:
        shutil.copy(file, copy)
    for name, language, content in CHANGES:
        path = copy / name
        assert path.exists() == (language == "diff"), (
            f"{name}: the page changes what is there and adds the rest"
        )
        path.write_text(with_changes(path.read_text(), content) if language == "diff" else content)
    return copy


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "1000"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_page_names_all_that_a_method_consists_of():
    names = [name for name, _, _ in CHANGES]
    test, config = "tests/methods/test_mean_fusion.py", "configs/mean_fusion.yaml"
    assert names == [HEAD, TABLES, config, test, "README.md"]


@pytest.mark.slow
def test_a_method_added_as_the_page_says_passes_its_tests_and_the_contract(followed):
    command = re.search(r"```bash\npython (-m pytest .*?)```", PAGE, flags=re.DOTALL)[1]
    finished = run([*shlex.split(command.replace("\\\n", " ")), "-p", "no:cacheprovider", "-rA"], followed)
    assert finished.returncode == 0, finished.stdout[-4000:]
    for file in ("test_mean_fusion", "test_contract", "test_modulation", "test_configs", "test_readme"):
        assert re.search(rf"^PASSED \S*{file}\.py", finished.stdout, flags=re.MULTILINE), file


def test_a_method_added_as_the_page_says_is_in_the_projects_style(followed):
    files = [name for name, language, _ in CHANGES if name.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        finished = run(["-m", "ruff", *command, *files], followed)
        assert finished.returncode == 0, finished.stdout


def test_a_plug_in_made_as_the_page_says_is_found_by_a_configuration(followed, tmp_path):
    shutil.copy(followed / HEAD, tmp_path / "mean_fusion.py")
    plugin = re.search(r"^### Or a plug-in.*?```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "my_package.py").write_text(plugin)
    config = tmp_path / "mine.yaml"
    config.write_text(
        "model: {feature_widths: {text: 4, audio: 4, vision: 4}, head: mean_fusion}\nplugins: [my_package]\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "msa_online_cli", "describe", str(config)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0 and "head.projections" in finished.stdout, finished.stderr


@pytest.fixture(scope="module")
def broken(followed) -> list[str]:
    """What the contract says of heads with one mistake each, a line for each failure."""
    right, tables = (followed / HEAD).read_text(), followed / TABLES
    for number, (old, new, _) in enumerate(MISTAKES.values()):
        assert old in right
        wrong = right.replace(old, new)
        if "self.scale" in wrong:
            wrong = wrong.replace(
                "self.classifier = ", "self.scale = Parameter(torch.ones(1))\n        self.classifier = "
            )
        (followed / HEAD).with_name(f"broken_{number}.py").write_text(wrong)
        joined = f"from msa_online.methods.broken_{number} import MeanFusionHead as Broken\n"
        tables.write_text(tables.read_text() + joined + f'HEADS["broken_{number}"] = Broken\n')
    words = ["-m", "pytest", "tests/methods/test_contract.py", "-k", "broken", "-p", "no:cacheprovider"]
    return run([*words, "--tb=no", "-q"], followed).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_new_head_is_found_and_named(mistake, broken):
    number = list(MISTAKES).index(mistake)
    said = [line for line in broken if line.startswith("FAILED") and re.search(rf"\bbroken_{number}\b", line)]
    assert any(MISTAKES[mistake][2] in line for line in said), "\n".join(said) or "\n".join(broken[-5:])
