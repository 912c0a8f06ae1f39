# SPDX-License-Identifier: Apache-2.0
"""Search settings of a configuration with optuna, by the validation score; the test split is never scored.

A search space is a YAML file with a line for each key of the configuration:

    training.learning_rate: {log: [1e-4, 3e-3]}
    model.head_kwargs.dropout: {uniform: [0, 0.6]}
    training.batch_size: {choice: [32, 64]}

Ranges of whole numbers give whole numbers. A search that was stopped continues: its finished trials are in
the journal of the output folder.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from msa_online.evaluation.conditions import UndefinedScoreError
from msa_online.evaluation.tables import format_metric, selection_metric, show
from msa_online.studies.folder import held
from msa_online.studies.runner import quietly
from msa_online.studies.study import SECTIONS, as_options
from msa_online.training.checkpoint import LOCK, draft_of, write_atomically
from msa_online.training.config import RunArguments, first_difference
from msa_online.training.config_reader import read_arguments
from msa_online.training.config_validation import SEEDS
from msa_online.training.divergence import DivergedError
from msa_online.training.model import require_encoders
from msa_online.training.run import best_validation_score
from msa_online.training.yaml_reader import ConfigurationError, read_document, read_yaml

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

KINDS = ("log", "uniform", "choice")
SET_BY_THE_SEARCH = ("training.output_dir", "training.resume", "training.overwrite", "training.push_to_hub")
RANDOM_TRIALS = 5  # before the sampler uses what it has seen
JOURNAL, TRIALS, BEST, RECORD = "journal.log", "trials", "best.yaml", "search.yaml"


@dataclass(frozen=True)
class Dimension:
    """Values of one key.

    Attributes:
        key: Key of the configuration, with its sections.
        kind: "log" or "uniform" between two ends, or "choice".
        values: The two ends, or the choices.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: "Trial") -> Any:
        """The value that optuna chooses for a trial."""
        if self.kind == "choice":
            return read_yaml(trial.suggest_categorical(self.key, [_text(value) for value in self.values]))
        whole = all(isinstance(value, int) for value in self.values)
        suggest = trial.suggest_int if whole else trial.suggest_float
        return suggest(self.key, *self.values, log=self.kind == "log")

    def contains(self, value: Any) -> bool:
        """Whether the search can choose `value`."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def to_optuna(self, value: Any) -> Any:
        """How optuna stores a value."""
        return _text(value) if self.kind == "choice" else value


@dataclass(frozen=True)
class Search:
    """A search over settings of a configuration.

    Attributes:
        config: The configuration file.
        changes: Changes to it, as items `key=value`.
        space: The searched keys.
        arguments: The configuration that results; its `training.output_dir` is the folder of the search.
    """

    config: Path
    changes: tuple[str, ...]
    space: tuple[Dimension, ...]
    arguments: RunArguments

    @property
    def folder(self) -> Path:
        """Folder of the journal, the trials and the best configuration."""
        return Path(self.arguments.training.output_dir)

    @property
    def metric(self) -> str:
        """The metric that is optimised."""
        return selection_metric(self.arguments.data.task == "regression")

    def with_values(self, values: Mapping[str, Any], output_dir: Path) -> RunArguments:
        """The configuration with values of the searched keys; raises `ConfigurationError`."""
        own = {**values, "training.output_dir": str(output_dir), "training.overwrite": True}
        return read_arguments(self.config, [*self.changes, *as_options(own)])


def read_search(config: Path, space: Path, changes: Sequence[str] = ()) -> Search:
    """Read and check a search: every end and every choice of every key must make a legal configuration.

    Args:
        config: A configuration file.
        space: A search space.
        changes: Changes to the configuration, as items `key=value`.

    Raises:
        ConfigurationError: A file cannot be read; a key is unknown or has values that the configuration
            refuses; or the key belongs to the search.
    """
    lines = read_document(space, "space")
    dimensions = tuple(_dimension(key, values, space) for key, values in lines.items())
    if not dimensions:
        raise ConfigurationError(f"{space}: no key to search; write key: {{log: [LOW, HIGH]}}")
    arguments = read_arguments(config, changes)
    if arguments.training.push_to_hub:
        raise ConfigurationError(
            "training.push_to_hub would publish every trial: leave it out, and publish the best run"
        )
    search = Search(config, tuple(changes), dimensions, arguments)
    for dimension in dimensions:
        for value in dimension.values:
            try:
                search.with_values({dimension.key: value}, search.folder)
            except ConfigurationError as error:
                raise ConfigurationError(f"{space}: {dimension.key}={value!r}: {error}") from error
    return search


def _dimension(key: str, content: Any, space: Path) -> Dimension:
    """A line of a search space; raises `ConfigurationError`."""
    if key in SET_BY_THE_SEARCH:
        raise ConfigurationError(f"{space}: {key} is set by the search: leave it out")
    if key in SECTIONS:
        raise ConfigurationError(f"{space}: {key} is a whole section: name its keys, like {key}.KEY")
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KINDS:
        raise ConfigurationError(
            f"{space}: {key} is {content!r}: write one of {{log: [LOW, HIGH]}}, {{uniform: [LOW, HIGH]}} and "
            "{choice: [ONE, OTHER]}"
        )
    ((kind, values),) = content.items()
    if not isinstance(values, list) or len(values) < 2:
        raise ConfigurationError(f"{space}: {key}: {kind} is {values!r}, but must be a list of two or more")
    if kind == "choice":
        numbers = (_number(value) if isinstance(value, str) else None for value in values)
        choices = zip(values, numbers, strict=True)
        return Dimension(key, kind, tuple(value if number is None else number for value, number in choices))
    ends = [_number(value) for value in values]
    if len(ends) != 2 or None in ends or ends[0] >= ends[1] or (kind == "log" and ends[0] <= 0):
        above = ", both above 0" if kind == "log" else ""
        raise ConfigurationError(
            f"{space}: {key}: {kind} is {values!r}, but must be a low and a high number{above}"
        )
    return Dimension(key, kind, tuple(ends))


def _number(value: Any) -> int | float | None:
    """A finite number, also one like 1e-4, which YAML reads as text; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def carry_out_search(search: Search, trials: int, console: Console) -> None:
    """Carry out trials until `trials` are finished; writes `best.yaml` after each.

    A trial that diverges counts, as the worst; so does one whose combination of values is refused. The first
    trial has the values of the configuration itself, if it names all of them.

    Raises:
        ConfigurationError: The folder contains another search or cannot be written, or another process works
            there; or an encoder is unavailable, or no trial has a score.
    """
    require_encoders(search.arguments)
    _check_folder(search)
    with held(search.folder):
        _carry_out(search, trials, console)


def _carry_out(search: Search, trials: int, console: Console) -> None:
    from optuna.trial import TrialState

    study = _open(search)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    with bar:
        task = bar.add_task("trials", total=trials)
        while (done := len(study.get_trials(deepcopy=False, states=counted))) < trials:
            best = "" if (score := _best_score(study)) is None else f", best {_shown(search, score)}"
            bar.update(task, completed=done, description=f"trials{best}")
            _try(search, study)
    best = study.best_trial if _best_score(study) is not None else None
    if best is None:
        raise ConfigurationError(
            f"{search.folder}: no trial has a score; the last one: {study.trials[-1].user_attrs['message']}"
        )
    show(_table(search, study.get_trials(deepcopy=False, states=counted), best), console)
    console.print(
        f"best of {trials} trials: number {best.number}, validation {_shown(search, best.value)}; train it "
        f"with `msa-online train {search.folder / BEST}`",
        soft_wrap=True,
    )


def _check_folder(search: Search) -> None:
    """Check that the folder is new, or that of this search; does not change it.

    Raises:
        ConfigurationError: It contains another search, or something else.
    """
    path = search.folder / RECORD
    if path.exists():
        before = read_document(path, "record of the search")
        if changed := first_difference(before, _record(search), ("training.output_dir", "training.resume")):
            key, earlier, now = changed
            raise ConfigurationError(
                f"{search.folder} holds a search with {key}={earlier!r}, not {now!r}: give another "
                "training.output_dir, or restore the settings"
            )
    elif search.folder.is_dir() and any(
        entry.name not in (LOCK, draft_of(path).name) for entry in search.folder.iterdir()
    ):
        raise ConfigurationError(
            f"{search.folder} holds something else than a search: give another training.output_dir"
        )


def _open(search: Search) -> "Study":
    """Open the journal; trials that were interrupted are marked and their values tried again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = search.folder / RECORD
    if not path.exists():
        write_atomically(path, yaml.safe_dump(_record(search), sort_keys=False))
    journal = search.folder / JOURNAL
    _drop_cut_record(journal)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name="search", direction="maximize", load_if_exists=True
        )
        begun = study.get_trials(deepcopy=False)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{journal} is damaged ({error}): restore it, or give another training.output_dir"
        ) from error
    for trial in begun:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    # a search that continues must not draw the values of its first trials again
    seed = (search.arguments.training.seed + len(begun)) % SEEDS
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    if not begun and (own := _own_values(search)):
        study.enqueue_trial(own)
    return study


def _drop_cut_record(journal: Path) -> None:
    """Remove the last record of a journal if it was cut off, by a full disk; its trial is tried again."""
    if journal.exists() and (content := journal.read_bytes()) and not content.endswith(b"\n"):
        with open(journal, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _record(search: Search) -> dict[str, Any]:
    """What must not change while a search continues, as plain data."""
    space = {each.key: {each.kind: list(each.values)} for each in search.space}
    return {**search.arguments.to_dict(), "space": space}


def _own_values(search: Search) -> dict[str, Any]:
    """The configuration's own values of all searched keys, for optuna; empty unless it has all of them."""
    values = {}
    for dimension in search.space:
        value: Any = search.arguments.to_dict()
        for name in dimension.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not dimension.contains(value):
            return {}
        values[dimension.key] = dimension.to_optuna(value)
    return values


def _try(search: Search, study: "Study") -> None:
    """Carry out one trial."""
    trial = study.ask()
    values = {dimension.key: dimension.suggest(trial) for dimension in search.space}
    folder = search.folder / TRIALS / f"{trial.number:03d}"
    started = time.monotonic()
    try:
        arguments = search.with_values(values, folder)
    except ConfigurationError as error:  # each value is legal, their combination is not
        _without_score(study, trial, "refused", error)
        return
    try:
        with quietly(folder):
            score, epochs = best_validation_score(arguments)
    except (DivergedError, UndefinedScoreError) as error:
        _without_score(study, trial, "diverged", error)
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the log beside it remains
    trial.set_user_attr("epochs", epochs)
    trial.set_user_attr("minutes", round((time.monotonic() - started) / 60, 2))
    study.tell(trial, score)
    if study.best_trial.number == trial.number:
        _write_best(search, values, trial.number, score)


def _without_score(study: "Study", trial: "Trial", reason: str, error: Exception) -> None:
    """End a trial as worse than all with a score."""
    from optuna.trial import TrialState

    trial.set_user_attr("reason", reason)
    trial.set_user_attr("message", str(error))
    study.tell(trial, state=TrialState.PRUNED)


def _write_best(search: Search, values: Mapping[str, Any], number: int, score: float) -> None:
    arguments = search.with_values(values, search.folder / "best")
    arguments = replace(arguments, training=replace(arguments.training, overwrite=False))
    best = search.folder / BEST
    chosen = ", ".join(as_options(values))
    comment = (
        f"# msa-online train {best}\n"
        f"# The best settings that `msa-online tune` has found: trial {number}, validation "
        f"{_shown(search, score)}.\n# Chosen: {chosen}\n"
    )
    write_atomically(best, comment + yaml.safe_dump(arguments.to_dict(), sort_keys=False))


def _best_score(study: "Study") -> float | None:
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max((trial.value for trial in complete), default=None)


def _shown(search: Search, score: float) -> str:
    """A score, which is higher for better runs, as its metric."""
    name = search.metric
    return f"MAE {format_metric(name, -score)}" if name == "mae" else f"F1 {format_metric(name, score)}"


def _table(search: Search, trials: Sequence["FrozenTrial"], best: "FrozenTrial") -> Table:
    """All trials, the best ones first."""
    title = f"{len(trials)} trials of {search.config.stem}, by validation score"
    table = Table(title=title, title_justify="left")
    for name in ("trial", "validation", "epochs", "minutes", *(each.key for each in search.space)):
        table.add_column(name, justify="right", overflow="fold")
    scored = sorted((each for each in trials if each.value is not None), key=lambda each: -each.value)
    for trial in [*scored, *(each for each in trials if each.value is None)]:
        score = trial.user_attrs["reason"] if trial.value is None else _shown(search, trial.value)
        figures = (str(trial.user_attrs.get(name, "-")) for name in ("epochs", "minutes"))
        values = (_brief(trial.params[each.key]) for each in search.space)
        style = "bold" if trial.number == best.number else None
        table.add_row(str(trial.number), score, *figures, *values, style=style)
    return table


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    """A choice as YAML, because optuna stores plain values only."""
    return as_options({"": value})[0].removeprefix("=")
