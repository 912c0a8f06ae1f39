# SPDX-License-Identifier: Apache-2.0
"""MSAConfig: the configuration of a model as plain data."""

import os
import re
import shlex
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from msa_online.confidence import Confidence
from msa_online.modalities import MODALITIES

LAYERS = ("last", "weighted")
"""Values of `audio_layer` that are not numbers."""

LOCAL_PATH = re.compile(r"~|\.{1,2}$|\.{0,2}[\\/]|[A-Za-z]:[\\/]|file:")
"""Start of a local path, which cannot be the name of a repository."""
INNER_PATH = re.compile(r"(?<![\w./:\\~-])(~|\.{1,2}|[A-Za-z]:)?[\\/][^\s,;'\"\])}]*")
"""A local path within a longer word, such as a list."""


@strict
class MSAConfig(PretrainedConfig):
    """Everything needed to build an `MSAModel`: encoders, calibrator, context, head, and the task.

    It contains the full configuration of each pretrained encoder (`text_config` and so on), so that a
    checkpoint can be rebuilt without the models that training started from.

    Attributes:
        text_config: Configuration of the text encoder, as a config object or its dict; None in a model of
            precomputed features.
        text_encoder: Name or folder of the text encoder that training starts from; a checkpoint keeps it as a
            record only. Of a folder, only the last name is saved.
        audio_config: Configuration of a pretrained audio encoder; None for convolutions that learn from
            scratch.
        audio_encoder: Name or folder of the pretrained audio encoder; a record, as `text_encoder`.
        audio_layer: Layer of a pretrained audio encoder that is read: "last"; N, the `hidden_states[N]` of
            transformers, 0 for the embeddings; or "weighted", a learned mean of all.
        audio_stride: How many consecutive states of a pretrained audio encoder are averaged; None averages so
            many that 10 to 12.5 states a second remain.
        vision_config: Configuration of a pretrained vision encoder; None for convolutions that learn from
            scratch.
        vision_encoder: Name or folder of the pretrained vision encoder; a record, as `text_encoder`.
        feature_widths: Width of each modality's features, for a model of precomputed features; None for raw
            clips.
        audio_channels: Widths A1 and A2 of the audio encoder's convolutions, where it is not pretrained
            (docs/methods/online_setting.md).
        audio_width: Width of the audio states.
        face_channels: Width F of the face encoder's first convolution (docs/methods/online_setting.md); a
            multiple of 8.
        face_width: Width of the face states.
        blendshapes: Add MediaPipe's 52 blendshape scores to the face states; they are the strongest visual
            input.
        calibrator: Name in `CALIBRATORS`.
        calibrator_kwargs: Keyword arguments of the calibrator.
        context: Name in `CONTEXTS`: what lets a clip see the other turns of its dialogue.
        context_kwargs: Keyword arguments of the context.
        context_turns: Most turns of a dialogue that are read together; longer dialogues are cut.
        head: Name in `HEADS`.
        head_kwargs: Keyword arguments of the head.
        loss_weights: Weight of each loss term of the head, by name; 1 where not named.
        label_range: Lowest and highest legal label of a regression; None for classification.
        plugins: Modules to import before the model is built, because they register its head or calibrator.
        confidence: Certainty of the predictions, fitted on validation, as plain data of `Confidence`; None if
            it was not fitted.
        trained_on: Record of data, training and scores of a checkpoint, for `describe` and the model card.
        id2label: Names of the classes by number; in a regression, of its one output, by default "score".
    """

    model_type = "msa_online"
    keys_to_ignore_at_inference = [  # for transformers.Trainer, so that predictions are the logits only
        *("modality_logits", "features", "fused", "losses", "diagnostics", "present"),
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2", optional=True),
    }

    text_config: dict | PretrainedConfig | None = None
    text_encoder: str | None = None
    audio_config: dict | PretrainedConfig | None = None
    audio_encoder: str | None = None
    audio_layer: str | int = "last"
    audio_stride: int | None = None
    vision_config: dict | PretrainedConfig | None = None
    vision_encoder: str | None = None
    feature_widths: dict[str, int] | None = None
    audio_channels: list[int] | tuple[int, ...] = (368, 192)
    audio_width: int = 160
    face_channels: int = 32
    face_width: int = 160
    blendshapes: bool = True
    calibrator: str = "identity"
    calibrator_kwargs: dict | None = None
    context: str = "none"
    context_kwargs: dict | None = None
    context_turns: int = 128
    head: str = "late_fusion"
    head_kwargs: dict | None = None
    loss_weights: dict | None = None
    label_range: list[float | int] | tuple[float | int, ...] | None = None
    plugins: list[str] | None = None
    confidence: dict | None = None
    trained_on: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set defaults; a model without `id2label` is a regression with one output.

        Raises:
            ValueError: `audio_layer`, `audio_stride`, `context_turns` or `confidence` has an impossible
                value.
        """
        if self.audio_layer not in LAYERS and (isinstance(self.audio_layer, str) or self.audio_layer < 0):
            raise ValueError(
                f"model.audio_layer is {self.audio_layer!r}: last, weighted, or the number of a layer from 0"
            )
        if self.audio_stride is not None and self.audio_stride < 1:
            raise ValueError(f"model.audio_stride is {self.audio_stride}: at least 1")
        if self.context_turns < 1:
            raise ValueError(f"model.context_turns is {self.context_turns}: at least 1")
        Confidence.of(self.confidence)
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if self.feature_widths is None and self.text_config is None:
            self.text_config = AutoConfig.for_model("bert")
        super().__post_init__(**kwargs)
        if self.id2label == {0: "LABEL_0"}:  # the default of transformers
            self.id2label, self.label2id = {0: "score"}, {"score": 0}
        self.calibrator_kwargs = self.calibrator_kwargs or {}
        self.context_kwargs = self.context_kwargs or {}
        self.head_kwargs = self.head_kwargs or {}
        self.loss_weights = self.loss_weights or {}

    @property
    def is_regression(self) -> bool:
        """Whether the model has one continuous output, in the units of the labels."""
        return self.num_labels == 1

    @property
    def dialogue_turns(self) -> int | None:
        """Most turns of a dialogue that the model reads together; None if it reads each clip alone."""
        return None if self.context == "none" else self.context_turns

    @property
    def widths(self) -> dict[str, int]:
        """Width of the states that each encoder returns, by modality."""
        if self.feature_widths is not None:
            # a saved config has sorted keys, but heads take the order of the modalities from here
            return {name: self.feature_widths[name] for name in MODALITIES}
        scratch = {"audio": self.audio_width, "vision": self.face_width}
        configs = {name: self.encoder_config(name) for name in MODALITIES}
        return {
            name: scratch[name] if config is None else width_of(config) for name, config in configs.items()
        }

    @property
    def encoder_names(self) -> dict[str, str]:
        """Name or folder of each pretrained encoder that training starts from, by modality."""
        names = {"text": self.text_encoder, "audio": self.audio_encoder, "vision": self.vision_encoder}
        return {modality: name for modality, name in names.items() if name is not None}

    def encoder_config(self, modality: str) -> PretrainedConfig | None:
        """Configuration of the pretrained encoder of a modality; None if it has none."""
        configs = {"text": self.text_config, "audio": self.audio_config, "vision": self.vision_config}
        return configs[modality]

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The text encoder's configuration; overridden because transformers would also try `text_encoder`.

        A model without a text encoder returns its own configuration, as transformers expects.
        """
        return self.text_config or self

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, as saved and published, without local paths."""
        output = super().to_dict()
        for name in MODALITIES:
            if output[f"{name}_config"] is not None:
                output[f"{name}_config"].pop("_name_or_path", None)
            output[f"{name}_encoder"] = without_path(output[f"{name}_encoder"])
        output["trained_on"] = without_path(output["trained_on"])
        for name in ("plugins", "confidence"):
            if not output[name]:
                del output[name]
        if self.dialogue_turns is None:
            for name in ("context", "context_kwargs", "context_turns"):
                del output[name]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved, always with class names: two classes with default names would reload as one."""
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}


def width_of(config: PretrainedConfig) -> int:
    """Width of the states of a pretrained encoder; networks of several widths end with the last."""
    return config.hidden_sizes[-1] if "hidden_sizes" in vars(config) else config.hidden_size


def without_path(value: Any) -> Any:
    """Replace each local path in `value` by its last name; names on the Hub are kept.

    Args:
        value: Plain data. In a dict, the string under "command" is a command line; its relative paths are
            kept.
    """
    if isinstance(value, dict):
        return {
            key: (_command_without_paths if key == "command" else without_path)(it)
            for key, it in value.items()
        }
    if isinstance(value, list):
        return [without_path(it) for it in value]
    if isinstance(value, str) and (LOCAL_PATH.match(value) or os.path.exists(value)):
        return _last_name(value)
    return value


def _command_without_paths(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # unbalanced quotes, written by hand
        words = command.split()
    published = [_word_without_path(word) for word in words]
    return command if published == words else shlex.join(published)


def _word_without_path(word: str) -> str:
    key, equals, value = word.rpartition("=") if "=" in word else ("", "", word)
    if LOCAL_PATH.match(value):
        return key + equals + _last_name(value)
    return INNER_PATH.sub(lambda found: _last_name(found.group()), word)


def _last_name(path: str) -> str:
    return re.split(r"[\\/]", os.path.abspath(path).rstrip("\\/"))[-1]
