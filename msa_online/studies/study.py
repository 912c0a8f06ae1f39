# SPDX-License-Identifier: Apache-2.0
"""Studies: variants of one configuration, each with several seeds, described by a YAML file."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from msa_online.methods import HEADS
from msa_online.shipped_configs import find_configuration
from msa_online.training.checkpoint import FREE_TO_CHANGE_ON_RESUME, SETTINGS, STATE
from msa_online.training.config import (
    FORMER_KEYS,
    RunArguments,
    TrainingArguments,
    first_difference,
    former_key,
)
from msa_online.training.config_reader import read_arguments
from msa_online.training.stages import make_schedule
from msa_online.training.yaml_reader import ConfigurationError, read_change, read_document, structure

SECTIONS = ("model", "data", "training")
SET_BY_THE_STUDY = ("training.seed", "training.output_dir", "training.resume", "training.overwrite")


@dataclass(frozen=True)
class Study:
    """Content of a study file.

    Attributes:
        config: Configuration that all variants start from: a path, or the name of a shipped one.
        output_dir: Folder of the runs and the tables.
        seeds: Seeds of every variant.
        variants: Changes by key, by the name of the variant; they override `changes`.
        changes: Changes to the configuration in all variants, by key.
        settings: Changes by key, by the name of a setting, like "rate 0.3". If there are any, every variant
            runs in each setting; its own changes override those of the setting.
        reference: Variant that the others are tested against; the first one by default.
        epochs: Budget that every variant is offered, in epochs at the batch size of the study's
            configuration. The stages of a variant keep their proportions; a variant with batches of another
            size gets as many epochs as make the same number of optimizer steps. None leaves each its own.
        keep_checkpoints: Keep the weights of finished runs.
        plugins: Your own modules to import before heads, calibrators and modulators are looked up.
    """

    config: str
    output_dir: str
    seeds: list[int]
    variants: dict[str, dict[str, Any]]
    changes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: str | None = None
    epochs: int | None = None
    keep_checkpoints: bool = False
    plugins: list[str] = field(default_factory=list)

    @property
    def references(self) -> dict[str, str]:
        """The reference of each of `combinations`, in the same setting."""
        reference = self.reference or next(iter(self.variants))
        if not self.settings:
            return dict.fromkeys(self.variants, reference)
        return {
            name_in(variant, setting): name_in(reference, setting)
            for setting in self.settings
            for variant in self.variants
        }

    @property
    def combinations(self) -> dict[str, dict[str, Any]]:
        """Changes of each variant in each setting, by a name with both."""
        if not self.settings:
            return self.variants
        return {
            name_in(variant, setting): {**of_setting, **own}
            for setting, of_setting in self.settings.items()
            for variant, own in self.variants.items()
        }

    def runs(self) -> list["StudyRun"]:
        """All runs, ordered by seed, so that all variants can be compared as early as possible.

        Raises:
            ConfigurationError: The configuration of a variant is invalid; the message names the variant.
        """
        return [self._run(variant, seed) for seed in self.seeds for variant in self.combinations]

    def require_variants(self, names: Iterable[str]) -> None:
        """Raise `ConfigurationError` for a name that is no variant, with those there are."""
        for name in names:
            if name not in self.combinations:
                known = ", ".join(map(repr, self.combinations))
                raise ConfigurationError(f"{name!r} is no variant of the study: one of {known}")

    def search_of(self, variant: str) -> tuple[Path, list[str]]:
        """Configuration and changes for a search over the settings of a variant, with the first seed.

        Raises:
            ConfigurationError: There is no such variant, or its configuration is invalid.
        """
        self.require_variants([variant])
        run = self._run(variant, self.seeds[0])
        folder = as_options({"training.output_dir": str(run.folder.with_name("search"))})
        return find_configuration(self.config), [*run.changes, *folder]

    def _run(self, variant: str, seed: int) -> "StudyRun":
        folder = Path(self.output_dir, folder_name(variant), str(seed))
        own = {"training.seed": seed, "training.output_dir": str(folder)}
        plugins = {"plugins": self.plugins} if self.plugins else {}
        changes = as_options({**plugins, **self.changes, **self.combinations[variant], **own})
        try:
            arguments = read_arguments(find_configuration(self.config), changes)
            if self.epochs is not None:
                changes = [*changes, *as_options(self._budget_of(arguments.training))]
                arguments = read_arguments(find_configuration(self.config), changes)
            if arguments.training.push_to_hub:
                raise ConfigurationError(
                    "training.push_to_hub would publish all runs of a study to one repository: leave it out, "
                    "and publish the best run with `msa-online publish`"
                )
            if head := arguments.model.get("head"):
                make_schedule(arguments.training, HEADS[head].stages)
        except ConfigurationError as error:
            raise ConfigurationError(f"variant {variant!r}: {error}") from error
        return StudyRun(variant, seed, folder, changes, arguments)

    def _budget_of(self, training: TrainingArguments) -> dict[str, Any]:
        """Changes that offer a variant the optimizer steps of `epochs` epochs."""
        of_study = read_arguments(find_configuration(self.config), as_options(self.changes)).training
        sizes = [each.batch_size * each.accumulation for each in (training, of_study)]
        epochs = max(1, round(self.epochs * sizes[0] / sizes[1]))
        if training.stages is None:
            return {"training.epochs": epochs}
        planned = [stage.epochs for stage in training.stages]
        ends = [round(epochs * sum(planned[: number + 1]) / sum(planned)) for number in range(len(planned))]
        stages = [
            {"name": stage.name, "epochs": max(1, end - start), "patience": stage.patience}
            for stage, start, end in zip(training.stages, [0, *ends], ends, strict=False)
        ]
        return {"training.stages": stages}


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        folder: Folder of the run.
        changes: Changes to the study's configuration, as items `key=value`.
        arguments: The resulting configuration.
    """

    variant: str
    seed: int
    folder: Path
    changes: list[str]
    arguments: RunArguments

    @property
    def record(self) -> dict[str, Any] | None:
        """Training record of the finished run, with its results; None before it is finished."""
        if self.is_interrupted:
            return None
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no JSON
            return None
        record = config.get("trained_on") if isinstance(config, dict) else None
        return record if isinstance(record, dict) and "results" in record else None

    @property
    def is_interrupted(self) -> bool:
        """Whether there is a state from which the run can continue."""
        return any((self.folder / name).is_dir() for name in (STATE, f"{STATE}.old"))

    @property
    def difference(self) -> str | None:
        """A setting in which the run in the folder differs from this one, with both values; None if equal."""
        try:
            before = read_document(self.folder / SETTINGS, "configuration of the run")
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error}; delete {self.folder}, and the study makes the run again"
            ) from error
        before.pop("launch", None)
        if former := former_key(before):
            return f"{former} of an earlier version, now {FORMER_KEYS[former]}"
        changed = first_difference(before, self.arguments.to_dict(), FREE_TO_CHANGE_ON_RESUME)
        return changed and f"{changed[0]}={changed[1]!r}, now {changed[2]!r}"

    def to_train(self) -> RunArguments:
        """The configuration of the run, to resume it if it was interrupted, or else to start it."""
        resume = self.is_interrupted and self.difference is None
        training = dataclasses.replace(self.arguments.training, resume=resume, overwrite=not resume)
        return dataclasses.replace(self.arguments, training=training)


def read_study(path: str | Path, options: Sequence[str] = ()) -> Study:
    """Read a study file and apply options to it.

    Args:
        path: YAML file with the keys of `Study`.
        options: Items like `data.path=features`, a change in all variants; or, without a dot in the key,
            `seeds=[1111]`, a change to the study itself.

    Raises:
        ConfigurationError: The file cannot be read or is not YAML, a key is missing or unknown, or a value is
            invalid.
    """
    document = read_document(path, "study")
    of_runs = {}
    for option in options:
        key, value = read_change(option)
        (of_runs if "." in key else document)[key] = value
    for section in document.keys() & {"changes", "variants", "settings"}:
        values = document[section] = {} if document[section] is None else document[section]
        if section != "changes" and isinstance(values, dict):
            document[section] = {name: {} if own is None else own for name, own in values.items()}
    study = structure(Study, document, str(path))
    if problem := next(_problems(study), None):
        raise ConfigurationError(f"{path}: {problem}")
    study = dataclasses.replace(
        study, changes={**study.changes, **of_runs}, output_dir=os.path.expanduser(study.output_dir)
    )
    if problem := next(_problems(study), None):
        raise ConfigurationError(problem)
    return study


def _problems(study: Study) -> Iterator[str]:
    """Yield a message for each invalid value, with its key, the value and what is allowed."""
    seeds = study.seeds
    if not seeds or min(seeds) < 0:
        yield f"seeds is {seeds!r}: a list of whole numbers from 0 on, for example [1111, 1112, 1113]"
    elif len(set(seeds)) < len(seeds):
        yield f"seeds is {seeds!r}: give each seed once"
    if not study.variants:
        yield "variants is empty: a section with a name and changes for each variant"
    if study.reference is not None and study.reference not in study.variants:
        yield f"reference is {study.reference!r}: one of {', '.join(map(repr, study.variants))}"
    if study.epochs is not None and study.epochs < 1:
        yield f"epochs is {study.epochs}: at least 1, or null to leave each variant its own"
    folders: dict[str, str] = {}
    for name in study.variants | study.settings:
        if not folder_name(name):
            yield f"{name!r}: the name of a variant or setting needs a letter or a digit"
        elif (twin := folders.setdefault(folder_name(name), name)) != name:
            yield f"{twin!r} and {name!r} would share the folder {folder_name(name)!r}: rename one"
    combined: dict[str, str] = {}
    for setting in study.settings:
        for variant in study.variants:
            folder, here = folder_name(name_in(variant, setting)), f"{variant!r} in {setting!r}"
            if (twin := combined.setdefault(folder, here)) != here:
                yield f"{twin} and {here} would share the folder {folder!r}: rename one"
    for name, changes in (("changes", study.changes), *study.variants.items(), *study.settings.items()):
        if taken := [key for key in SET_BY_THE_STUDY if key in changes]:
            yield f"{name!r} sets {taken[0]}: the study sets that for every run itself"
        if whole := [key for key in SECTIONS if key in changes]:
            yield f"{name!r} sets the whole section {whole[0]}: name its keys, like {whole[0]}.KEY: VALUE"


def name_in(variant: str, setting: str) -> str:
    """Name of a variant in a setting."""
    return f"{variant}, {setting}"


def folder_name(variant: str) -> str:
    """Folder name of a variant: all but letters, digits, dots and signs is replaced by underscores."""
    return re.sub(r"[^\w.+-]+", "_", variant).strip("_.")


def as_options(changes: Mapping[str, Any]) -> list[str]:
    """Changes by key as items `key=value` for `msa-online train`."""
    return [f"{key}={_on_one_line(value)}" for key, value in changes.items()]


def _on_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()  # the dots end a document with a single value
