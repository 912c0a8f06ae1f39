# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: typed dataclasses read from YAML, with `key=value` changes to it."""

import collections.abc
import dataclasses
import difflib
import inspect
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from feature_extractors import ExtractionSettings
from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.audio import AudioEncoder
from msa_online.encoders.face import FaceEncoder
from msa_online.encoders.text import load_text_config
from msa_online.methods import CALIBRATORS, HEADS, MODULATORS
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import look_up
from msa_online.processing_msa import MAX_AUDIO_SECONDS, MAX_TEXT_TOKENS
from msa_online.training.validation import problems

TRUTHS = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
NOT_SET_IN_YAML = ("text_config", "label_range", "trained_on")


class ConfigurationError(ValueError):
    """A run is configured in a way that cannot work; the message names the key, the value and the fix."""


@dataclass(frozen=True)
class MissingArguments:
    """Modalities missing at given rates from all splits, for the whole run: the `data.missing:` section.

    Attributes:
        rates: Share of samples that lack each modality, by name, in [0, 1), or one rate for all three; None
            leaves the data as they are.
        rounding: Rounding of the counts: "largest_remainder", or "official" as in BALM's code (METHODS A15).
        seed: Seed of who lacks what; the same for all seeds of a study.
    """

    rates: dict[str, float] | float | None = None
    rounding: str = "largest_remainder"
    seed: int = 1111

    @property
    def by_name(self) -> dict[str, float]:
        """The rate of each modality that has one."""
        if isinstance(self.rates, float):
            return dict.fromkeys(MODALITIES, self.rates)
        return self.rates or {}


@dataclass(frozen=True)
class DataArguments:
    """What to train on: the `data:` section.

    Attributes:
        path: Folder, Hub repository or table (see the README on layouts); for a model of features, the folder
            that `msa-online convert-features` or `extract-features` made, or an .npz file.
        task: "regression" or "classification".
        label_column: Column that holds the label.
        split_column: Column that holds the split; another than "split" among features only.
        label_range: Lowest and highest legal label of a regression.
        skip_broken: Go on without rows that cannot be used, instead of stopping.
        split_seed: Seed of the speaker-grouped split made where the data brings none.
        standardize: Shift and scale features made elsewhere by what the training split shows.
        num_frames: Frames sampled from each clip.
        face_size: Height and width of a face crop in pixels.
        max_text_tokens: Longest token sequence.
        max_audio_seconds: Longest sound.
        prepare_workers: Processes that extract features; all cores by default.
        loader_workers: Processes that load batches; 0 loads them in the training process.
        missing: Modalities hidden on purpose from training, validation and test samples.
    """

    path: str = ""
    task: str = "regression"
    label_column: str = "label"
    split_column: str = "split"
    label_range: tuple[float, float] = (-3.0, 3.0)
    skip_broken: bool = False
    split_seed: int = 1111
    standardize: bool = True
    num_frames: int = 8
    face_size: int = 96
    max_text_tokens: int = MAX_TEXT_TOKENS
    max_audio_seconds: float = MAX_AUDIO_SECONDS
    prepare_workers: int | None = None
    loader_workers: int = 0
    missing: MissingArguments = field(default_factory=MissingArguments)

    @property
    def extraction(self) -> ExtractionSettings:
        """Settings of feature extraction."""
        return ExtractionSettings(num_frames=self.num_frames, face_size=self.face_size)

    @property
    def legal_range(self) -> tuple[float, float] | None:
        """Range labels have to lie in; None for classes."""
        return self.label_range if self.task == "regression" else None


@dataclass(frozen=True)
class StageArguments:
    """One stage of training.

    Attributes:
        name: One of the head's `stages`.
        epochs: Longest duration.
        patience: Epochs without a better validation score before the stage ends; None never ends it early.
    """

    name: str
    epochs: int
    patience: int | None = None


@dataclass(frozen=True)
class TrainingArguments:
    """How to train: the `training:` section.

    Attributes:
        output_dir: The run's folder; it becomes a loadable checkpoint.
        seed: Seed of initialisation, order, dropout and modality dropout.
        epochs: Epochs of a run in one stage.
        patience: Early stopping for a run in one stage.
        stages: Stages of a head that has several, in place of `epochs` and `patience`.
        batch_size: Most samples of one process in one forward pass.
        accumulation: Forward passes of one process for each optimizer step.
        mixed_precision: "no" (fp32), "fp16", "bf16", or "auto": an explicit fp16 or bf16 of
            `accelerate launch`, else bf16 where the device computes it natively, else fp16 on a GPU and fp32
            on a CPU.
        text_learning_rate: Peak learning rate of the text encoder.
        learning_rate: Peak learning rate of everything else.
        weight_decay: AdamW's decay of matrices; vectors (biases, norms, scalings) are not decayed.
        warmup: Share of all steps in which the learning rate rises.
        decay: "linear": the learning rate then falls to zero; "constant": it stays.
        clip_norm: Largest gradient norm; larger gradients are scaled down to it.
        modality_dropout: Share of training samples from which each modality is hidden, by name.
        frame_dropout: Drop words, sound steps and faces of training samples at random rates; epochs are then
            judged with half of them missing.
        condition: The modalities, like "text+audio", that the last stage may see in training and in
            evaluation (protocol per_condition); None trains one model for all seven (single_model).
        freeze_text_encoder: Leave the text encoder's weights as they are.
        modulator: Name in `MODULATORS`.
        modulator_kwargs: Keyword arguments of the modulator.
        init_from: Checkpoint to start from, for fine-tuning; the labels may differ.
        resume: Go on with an interrupted run in `output_dir`.
        overwrite: Replace an earlier run in `output_dir`.
        log_with: Trackers Accelerate knows: tensorboard, wandb, trackio, ...
        measure_gradients: Record the gradient norm of each loss in the first step of every epoch.
    """

    output_dir: str = "runs/run"
    seed: int = 1111
    epochs: int = 10
    patience: int | None = None
    stages: list[StageArguments] | None = None
    batch_size: int = 32
    accumulation: int = 1
    mixed_precision: str = "auto"
    text_learning_rate: float = 2e-5
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: str = "linear"
    clip_norm: float = 1.0
    modality_dropout: dict[str, float] = field(default_factory=dict)
    frame_dropout: bool = False
    condition: str | None = None
    freeze_text_encoder: bool = False
    modulator: str = "identity"
    modulator_kwargs: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    resume: bool = False
    overwrite: bool = False
    log_with: str | None = "tensorboard"
    measure_gradients: bool = False


@dataclass(frozen=True)
class RunArguments:
    """A whole run.

    Attributes:
        model: Keyword arguments of `MSAConfig`: the `model:` section.
        data: The `data:` section.
        training: The `training:` section.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)

    def model_config(self, classes: Sequence[str]) -> MSAConfig:
        """Configuration of the model to build; `classes` names the labels, empty for regression.

        Raises:
            TextEncoderError: The text encoder's configuration is not to be had.
        """
        text_encoder = self.model.get("text_encoder")
        text_config = load_text_config(text_encoder) if text_encoder else None
        return MSAConfig(text_config=text_config, **self.model, **self.output_fields(classes))

    def output_fields(self, classes: Sequence[str]) -> dict[str, Any]:
        """The part of a model's configuration that the task decides: label range, or names of the classes."""
        if self.data.task == "regression":
            return {"label_range": list(self.data.label_range)}
        return {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
        }

    def to_dict(self) -> dict[str, Any]:
        """The run as plain data, as a YAML file holds it."""
        plain = dataclasses.asdict(self)
        plain["data"]["label_range"] = list(self.data.label_range)
        return plain


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans: no, off, yes and on are words, as in YAML 1.2."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", TRUTHS, list("tTfF"))


def read_yaml(text: str) -> Any:
    """Plain data of a YAML document; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # noqa: S506  a safe loader


def read_arguments(path: str | Path, changes: Sequence[str] = ()) -> RunArguments:
    """Read a configuration file and apply changes to it.

    Args:
        path: YAML file with the sections `model`, `data` and `training`.
        changes: Items like `training.epochs=3`; the value is read as YAML.

    Raises:
        ConfigurationError: The file is not there or no YAML, a key is unknown (the nearest is named), or a
            value has the wrong type or lies out of range.
    """
    try:
        document = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    document = {} if document is None else document
    for change in changes if isinstance(document, dict) else ():
        _apply(document, change)
    return parse_arguments(document, origin=str(path))


def parse_arguments(document: Mapping[str, Any], origin: str = "configuration") -> RunArguments:
    """Typed arguments from plain data; raises `ConfigurationError` as `read_arguments` does."""
    arguments = _build(RunArguments, document, origin, "")
    _check(arguments, origin)
    return arguments


def _apply(document: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigurationError(f"{change!r} is no change: write key=value, for example training.epochs=3")
    *sections, name = key.split(".")
    for section in sections:
        if document.get(section) is None:
            document[section] = {}
        document = document[section]
        if not isinstance(document, dict):
            raise ConfigurationError(f"{change!r}: {section!r} holds a value, not a section")
    try:
        document[name] = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{change!r}: the value is not YAML") from error


def _build(kind: type, values: Any, origin: str, section: str) -> Any:
    """Make dataclass `kind` of plain data, section by section."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{origin}: {section or 'the file'} must be a section of keys, not {values!r}"
        )
    hints = get_type_hints(kind)
    _refuse_unknown(values, list(hints), origin, section)
    made = {}
    for name, value in values.items():
        key = f"{section}.{name}".lstrip(".")
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _build(hints[name], {} if value is None else value, origin, key)
        elif key == "training.stages" and isinstance(value, list):
            made[name] = [_build(StageArguments, stage, origin, key) for stage in value]
        else:
            made[name] = _typed(value, hints[name], origin, key)
    needed = [item.name for item in dataclasses.fields(kind) if _is_needed(item) and item.name not in made]
    if needed:
        raise ConfigurationError(f"{origin}: {section} lacks {', '.join(needed)} in {dict(values)}")
    return kind(**made)


def _is_needed(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], origin: str, section: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            key = f"{section}.{name}".lstrip(".")
            hint = f"did you mean {near[0]!r}?" if near else "nothing can be set here"
            raise ConfigurationError(f"{origin}: unknown key {key!r}; {hint}")


def _typed(value: Any, hint: Any, origin: str, key: str) -> Any:
    """`value` if it is what the annotation `hint` says; whole numbers pass for floats, lists for tuples."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        bare = getattr(option, "__origin__", option)
        if bare is float and _is_number(value):
            return float(value)
        if bare is dict and isinstance(value, dict) and get_args(option)[1] is not Any:
            return {
                name: _typed(item, get_args(option)[1], origin, f"{key}.{name}")
                for name, item in value.items()
            }
        if bare is collections.abc.Sequence and isinstance(value, list):
            return [_typed(item, get_args(option)[0], origin, key) for item in value]
        if bare is tuple and isinstance(value, list) and len(value) == len(get_args(option)):
            return tuple(
                _typed(item, kind, origin, key) for item, kind in zip(value, get_args(option), strict=True)
            )
        if (
            bare not in (float, collections.abc.Sequence)
            and isinstance(value, bare)
            and not (bare is int and isinstance(value, bool))
        ):
            return value
    names = " or ".join(_name_of(option) for option in options)
    raise ConfigurationError(f"{origin}: {key} is {value!r}, but must be {names}")


def _name_of(option: Any) -> str:
    if get_args(option) and option.__origin__ is tuple:
        return f"a list of {len(get_args(option))} numbers"
    if getattr(option, "__origin__", None) is collections.abc.Sequence:
        return f"a list of {get_args(option)[0].__name__}"
    return "null" if option is type(None) else option.__name__


def _is_number(value: Any) -> bool:
    """A finite number, or a string that is one: YAML 1.1 reads 1e-5 as a string."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check(arguments: RunArguments, origin: str) -> None:
    """Refuse what cannot work, before anything is loaded."""
    declared = [name for name in MSAConfig.__annotations__ if name not in NOT_SET_IN_YAML]
    _refuse_unknown(arguments.model, declared, origin, "model")
    problem = next(problems(arguments), None)
    if problem:
        raise ConfigurationError(f"{origin}: {problem}")
    try:
        arguments.data.extraction  # noqa: B018  validates itself
        config = MSAConfig(**arguments.model)
        head = look_up(HEADS, "head", config.head)
        calibrator = look_up(CALIBRATORS, "calibrator", config.calibrator)
        modulator = look_up(MODULATORS, "modulator", arguments.training.modulator)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{origin}: {' '.join(str(error).split())}") from error
    if config.feature_widths is None:
        channels, width = config.audio_channels, config.audio_width
        _build_once(AudioEncoder, (channels, width), {}, origin, "model.audio_channels and model.audio_width")
        channels, width = config.face_channels, config.face_width
        given = (channels, width, config.blendshapes)
        _build_once(FaceEncoder, given, {}, origin, "model.face_channels and model.face_width")
    _check_part(head, (config.widths, 1), config.head_kwargs, origin, "model.head_kwargs")
    _check_part(calibrator, (config.widths,), config.calibrator_kwargs, origin, "model.calibrator_kwargs")
    _check_part(modulator, (), arguments.training.modulator_kwargs, origin, "training.modulator_kwargs")
    _refuse_unknown(config.loss_weights, HEADS[config.head].loss_names, origin, "model.loss_weights")


def _check_part(
    part: type, given: tuple[Any, ...], keywords: dict[str, Any], origin: str, section: str
) -> None:
    """Build a part of the run once, without memory for its weights, so that it checks its own settings.

    Numbers that YAML takes for strings (1e-5) become numbers in `keywords`.
    """
    hints = get_type_hints(part.__init__)
    known = list(inspect.signature(part).parameters)[len(given) :]
    _refuse_unknown(keywords, known, origin, section)
    for name, value in keywords.items():
        if name in hints:
            keywords[name] = _typed(value, hints[name], origin, f"{section}.{name}")
    _build_once(part, given, keywords, origin, section)


def _build_once(
    part: type, given: tuple[Any, ...], keywords: Mapping[str, Any], origin: str, section: str
) -> None:
    """Build a part without memory for its weights; refuse one that fails or has empty weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of empty weights: refused below
            built = part(*given, **keywords)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{origin}: {section}: {error}") from error
    weights = built.named_parameters() if isinstance(built, torch.nn.Module) else ()
    if empty := next((name for name, weight in weights if not weight.numel()), None):
        raise ConfigurationError(f"{origin}: {section}: {empty} would be empty; sizes are at least 1")
