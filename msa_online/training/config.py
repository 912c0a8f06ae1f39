# SPDX-License-Identifier: Apache-2.0
"""The keys of a run's configuration, as dataclasses; `config_reader` reads them from YAML."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders import load_encoder_config
from msa_online.lora import LoraSettings
from msa_online.modalities import MODALITIES
from msa_online.processing_msa import MAX_AUDIO_SECONDS, MAX_TEXT_TOKENS
from msa_online.training.yaml_reader import ConfigurationError

NOT_SET_IN_YAML = (
    "text_config",
    "audio_config",
    "vision_config",
    "label_range",
    "plugins",
    "confidence",
    "trained_on",
)
"""Fields of `MSAConfig` that data, encoders, training or the top level of a configuration decide."""


FORMER_KEYS = {
    "training.text_learning_rate": "training.learning_rates.text",
    "training.freeze_text_encoder": "training.freeze=[text]",
}
"""Keys of earlier versions, and what replaces them."""


ALL = "all"
"""In `training.freeze`: the whole encoder."""
OVER_CONDITIONS = "conditions"
"""In `training.selection`: by the mean score of the seven conditions."""


@dataclass(frozen=True)
class MissingArguments:
    """Modalities missing at given rates from all splits, fixed for the run: the `data.missing:` section.

    Attributes:
        rates: Share of samples that lack each modality, by name, in [0, 1), or one rate for all three; None
            hides nothing.
        rounding: Rounding of the counts: "largest_remainder", or "official" as in BALM's code
            (docs/methods/protocols.md).
        seed: Seed of the masks; the same for all seeds of a study.
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
        path: Folder, Hub repository or table (see docs/data.md); for a model of precomputed features, the
            folder that `msa-online convert-features` or `extract-features` wrote, or an .npz file.
        task: "regression" or "classification".
        label_column: Column of the label.
        split_column: Column of the split; other names than "split" are for precomputed features only.
        label_range: Lowest and highest legal label of a regression.
        skip_broken: Leave out rows that cannot be used, instead of stopping.
        strict: Refuse data with warnings: a speaker or recording in two splits, odd labels, tiny splits.
        split_seed: Seed of the speaker-grouped split that is made if the data have none.
        standardize: Standardise precomputed features with the statistics of the training split.
        num_frames: Frames sampled from each clip.
        face_size: Height and width of a face crop in pixels; null means 96, or the size that the image
            processor of the vision encoder makes.
        face_choice: Face to track if there are several: "largest" or "most_speaking".
        audio_track: Audio track of clips whose row names none, counted from 1; by default the default track,
            or the first audible one if that is silent.
        max_text_tokens: Longest token sequence.
        max_audio_seconds: Longest sound.
        transcribe: Speech recogniser that makes the texts of clips without one, such as whisper-tiny.en, a
            size of faster-whisper, or a folder or Hub repository (see docs/transcripts.md); null makes none.
        language: Code of the spoken language for it, like de; null lets a multilingual one detect it.
        prepare_workers: Processes that extract features; all cores by default.
        loader_workers: Processes that load batches; 0 loads them in the training process.
        missing: Modalities to hide from training, validation and test samples.
    """

    path: str = ""
    task: str = "regression"
    label_column: str = "label"
    split_column: str = "split"
    label_range: tuple[float, float] = (-3.0, 3.0)
    skip_broken: bool = False
    strict: bool = False
    split_seed: int = 1111
    standardize: bool = True
    num_frames: int = 8
    face_size: int | None = None
    face_choice: str = "largest"
    audio_track: int | None = None
    max_text_tokens: int = MAX_TEXT_TOKENS
    max_audio_seconds: float = MAX_AUDIO_SECONDS
    transcribe: str | None = None
    language: str | None = None
    prepare_workers: int | None = None
    loader_workers: int = 0
    missing: MissingArguments = field(default_factory=MissingArguments)

    @property
    def extraction(self) -> dict[str, Any]:
        """Fields of `ExtractionSettings`; `MSAProcessor` completes them."""
        size = {} if self.face_size is None else {"face_size": self.face_size}
        return {"num_frames": self.num_frames, "face_choice": self.face_choice, **size}

    @property
    def legal_range(self) -> tuple[float, float] | None:
        """Range of legal labels; None for classes."""
        return self.label_range if self.task == "regression" else None


@dataclass(frozen=True)
class StageArguments:
    """One stage of training.

    Attributes:
        name: One of the head's `stages`.
        epochs: Largest number of epochs.
        patience: Epochs without a better validation score after which the stage ends; None never ends it
            early.
    """

    name: str
    epochs: int
    patience: int | None = None


@dataclass(frozen=True)
class TrainingArguments:
    """How to train: the `training:` section.

    Attributes:
        output_dir: Folder of the run; it becomes a loadable checkpoint.
        seed: Seed of initialisation, sample order, dropout and modality dropout.
        epochs: Largest number of epochs of a run with one stage.
        patience: Epochs without a better validation score after which a run with one stage stops.
        stages: Stages of a head with several, instead of `epochs` and `patience`.
        batch_size: Largest number of samples, or with `model.context` of dialogues, per process in a forward
            pass.
        accumulation: Forward passes per process for each optimizer step.
        mixed_precision: "no" (fp32), "fp16", "bf16", or "auto": an explicit fp16 or bf16 of
            `accelerate launch`, else bf16 if the device computes it natively, else fp16 on a GPU and fp32 on
            a CPU.
        learning_rate: Peak learning rate of all parameters that `learning_rates` does not cover.
        learning_rates: Peak learning rate of an encoder, by modality: {text: 2e-5, audio: 1e-5}. By default
            2e-5 for pretrained encoders, and `learning_rate` for those that train from scratch.
        layer_decay: Learning rate of a layer of a pretrained encoder, relative to the layer above, in (0, 1].
            The top layer has the encoder's rate; the embeddings count as the lowest layer.
        weight_decay: AdamW's weight decay of matrices; vectors (biases, norms, scalings) have none.
        warmup: Share of all steps in which the learning rate rises.
        decay: Learning rate after the warm-up: "linear" falls to zero, "constant" stays.
        clip_norm: Largest gradient norm; larger gradients are scaled down to it.
        modality_dropout: Share of training samples from which each modality is hidden in an epoch, by name.
            Each sample keeps at least one modality, so three rates must sum to less than 2.
        frame_dropout: Drop words, sound steps and faces of training samples at random rates; validation then
            drops half of them.
        condition: Modalities, like "text+audio", that the last stage sees in training and evaluation
            (protocol per_condition); None trains one model for all seven conditions (single_model).
        selection: What selects the best epoch of the last stage and ends it by patience: the validation score
            with everything visible ("complete"), or its mean over the seven conditions ("conditions"), as far
            as the training samples have the modalities. The stage's validation metrics are of that kind.
        freeze: Pretrained encoders that are not trained: a list of modalities, like [vision]; or a number of
            layers for each, like {text: 6, vision: all}, counted from below and with the embeddings. What is
            frozen has no gradients and no dropout. Layers that the model adds to an encoder are trained.
        gradient_checkpointing: Modalities whose pretrained encoder recomputes the states inside its layers in
            the backward pass: less memory, more time, equal gradients.
        cache_states: "auto" computes the states of frozen encoders once and keeps them on disk; "off"
            computes them in every epoch.
        lora: Pretrained encoders to adapt with LoRA, by modality, with the keys of `LoraSettings`, like
            {text: {r: 8}}: their weights are frozen, and small matrices beside them are trained.
        modulator: Name in `MODULATORS`.
        modulator_kwargs: Keyword arguments of the modulator.
        init_from: Checkpoint to start from, for fine-tuning; the labels may differ.
        resume: Continue an interrupted run in `output_dir`.
        overwrite: Replace an earlier run in `output_dir`.
        log_with: A tracker that Accelerate supports: tensorboard, wandb, trackio, ...
        measure_gradients: Record the gradient norm of each loss in the first step of every epoch.
        diagnostics: What to measure after each epoch, any of shares, probes and gradients: the share of each
            modality in the validation predictions, a linear probe on its frozen states, and the gradient norm
            of its parameters (docs/training.md).
        push_to_hub: Repository on the Hub, like ORG/NAME, that the finished checkpoint is published to.
        hub_private: Create that repository as a private one.
    """

    output_dir: str = "runs/run"
    seed: int = 1111
    epochs: int = 10
    patience: int | None = None
    stages: list[StageArguments] | None = None
    batch_size: int = 32
    accumulation: int = 1
    mixed_precision: str = "auto"
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: str = "linear"
    clip_norm: float = 1.0
    modality_dropout: dict[str, float] = field(default_factory=dict)
    frame_dropout: bool = False
    condition: str | None = None
    selection: str = "complete"
    freeze: list[str] | dict[str, int | str] = field(default_factory=list)
    gradient_checkpointing: list[str] = field(default_factory=list)
    cache_states: str = "auto"
    lora: dict[str, LoraSettings] = field(default_factory=dict)
    modulator: str = "identity"
    modulator_kwargs: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    resume: bool = False
    overwrite: bool = False
    log_with: str | None = "tensorboard"
    measure_gradients: bool = False
    diagnostics: list[str] = field(default_factory=list)
    push_to_hub: str | None = None
    hub_private: bool = False

    @property
    def frozen_layers(self) -> dict[str, int | str]:
        """Number of frozen layers of each encoder, or `ALL`, by modality."""
        return self.freeze if isinstance(self.freeze, dict) else dict.fromkeys(self.freeze, ALL)


@dataclass(frozen=True)
class RunArguments:
    """Configuration of a run.

    Attributes:
        model: Keyword arguments of `MSAConfig`: the `model:` section.
        data: The `data:` section.
        training: The `training:` section.
        plugins: Your own modules to import before heads, calibrators and modulators are looked up.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)
    plugins: list[str] = field(default_factory=list)

    def model_config(self, classes: Sequence[str]) -> MSAConfig:
        """Configuration of the model to build; `classes` names the labels, empty for regression.

        Raises:
            EncoderError: The configuration of a pretrained encoder is unavailable, or the encoder is none for
                its modality.
        """
        names = {modality: self.model.get(f"{modality}_encoder") for modality in MODALITIES}
        configs = {
            f"{modality}_config": load_encoder_config(modality, name)
            for modality, name in names.items()
            if name
        }
        fields = {**self.model, "plugins": self.plugins, **self.output_fields(classes)}
        return MSAConfig(**configs, **fields)

    def output_fields(self, classes: Sequence[str]) -> dict[str, Any]:
        """The fields of a model's configuration that depend on the task: label range, or class names."""
        if self.data.task == "regression":
            return {"label_range": list(self.data.label_range)}
        return {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
        }

    def to_dict(self) -> dict[str, Any]:
        """The run as plain data, as in a YAML file; without `plugins` if there are none."""
        plain = dataclasses.asdict(self)
        plain["data"]["label_range"] = list(self.data.label_range)
        if not self.plugins:
            del plain["plugins"]
        return plain


def refuse_former_keys(document: Mapping[str, Any], origin: str) -> None:
    """Refuse keys of earlier versions.

    Args:
        document: A configuration as plain data.
        origin: Where it comes from, for the message.

    Raises:
        ConfigurationError: It has such a key; names what replaces it.
    """
    if key := former_key(document):
        raise ConfigurationError(f"{origin}: {key} is a key of an earlier version: use {FORMER_KEYS[key]}")


def former_key(document: Mapping[str, Any]) -> str | None:
    """A key of `FORMER_KEYS` that a configuration as plain data has; None if it has none."""
    given = _by_key(document)
    return next((key for key in FORMER_KEYS if key in given), None)


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str]
) -> tuple[str, Any, Any] | None:
    """The first setting in which two runs differ.

    Args:
        before: An earlier run as plain data. A key that it lacks has its default: an older version wrote it.
        now: A run as plain data.
        ignored: Keys of settings that may differ, with their sections.

    Returns:
        The key and both values, None for a missing value; None if the runs are equal.
    """
    before, now = _by_key(RunArguments().to_dict()) | _by_key(before), _by_key(now)
    for key in sorted((before.keys() | now.keys()) - set(ignored)):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _by_key(run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their full key: "training.epochs"."""
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in run.items()}
    return {
        f"{section}.{name}".rstrip("."): value
        for section, values in sections.items()
        for name, value in values.items()
    }
