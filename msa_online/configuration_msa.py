# SPDX-License-Identifier: Apache-2.0
"""MSAConfig: the whole model as plain data."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from msa_online.modalities import MODALITIES


@strict
class MSAConfig(PretrainedConfig):
    """Everything needed to build an `MSAModel`: encoders x calibrator x head, and the task.

    The text encoder's own configuration is embedded whole (`text_config`), so that a checkpoint can be
    rebuilt without reaching for the model it was started from.

    Attributes:
        text_config: Configuration of the text encoder, as a config object or the dict it saves; None in a
            model of features.
        text_encoder: Name or folder the text encoder was taken from; for the record only.
        feature_widths: Width of each modality's features, for a model that takes features made elsewhere in
            place of raw clips; None for raw clips.
        audio_channels: Widths of the audio front-end's convolutions (METHODS 6.3, A1 and A2).
        audio_width: Width of the audio states.
        face_channels: Width F of the face front-end's first convolution (METHODS 6.3); a multiple of 8.
        face_width: Width of the face states.
        blendshapes: Join MediaPipe's 52 blendshape scores to the face states: the strongest visual stream.
        calibrator: Name in `CALIBRATORS`.
        calibrator_kwargs: Keyword arguments of the calibrator.
        head: Name in `HEADS`.
        head_kwargs: Keyword arguments of the head.
        loss_weights: Weight of each loss term the head returns by name; a term not named weighs 1.
        label_range: Lowest and highest legal label of a regression; None for classification.
        trained_on: What a checkpoint was trained on and how it scored, for `describe` and the model card.
    """

    model_type = "msa_online"
    keys_to_ignore_at_inference = [  # by transformers.Trainer, so that predictions are logits alone
        *("modality_logits", "features", "fused", "losses", "diagnostics", "present"),
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    text_config: dict | PretrainedConfig | None = None
    text_encoder: str | None = None
    feature_widths: dict[str, int] | None = None
    audio_channels: list[int] | tuple[int, ...] = (368, 192)
    audio_width: int = 160
    face_channels: int = 32
    face_width: int = 160
    blendshapes: bool = True
    calibrator: str = "identity"
    calibrator_kwargs: dict | None = None
    head: str = "late_fusion"
    head_kwargs: dict | None = None
    loss_weights: dict | None = None
    label_range: list[float | int] | tuple[float | int, ...] | None = None
    trained_on: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what was left out; a model without `id2label` is a regression with one output."""
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if self.feature_widths is None and self.text_config is None:
            self.text_config = AutoConfig.for_model("bert")
        super().__post_init__(**kwargs)
        self.calibrator_kwargs = self.calibrator_kwargs or {}
        self.head_kwargs = self.head_kwargs or {}
        self.loss_weights = self.loss_weights or {}

    @property
    def is_regression(self) -> bool:
        """One continuous output, in the units of the labels."""
        return self.num_labels == 1

    @property
    def widths(self) -> dict[str, int]:
        """Width of the states each encoder hands to the head, by modality."""
        if self.feature_widths is not None:
            # a saved config has its keys sorted, and heads take the order of the modalities from here
            return {name: self.feature_widths[name] for name in MODALITIES}
        return {"text": self.text_config.hidden_size, "audio": self.audio_width, "vision": self.face_width}

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The text encoder's configuration; by name, transformers would take `text_encoder` for one too.

        A model without a text encoder answers with its own, as transformers expects of one.
        """
        return self.text_config or self
