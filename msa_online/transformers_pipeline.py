# SPDX-License-Identifier: Apache-2.0
"""The task "multimodal-sentiment" of `transformers.pipeline`."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from feature_extractors import ClipFeatures
from msa_online.modeling_msa import MSAModel
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.pipeline_inputs import KEYS, Sample, is_lazy, sample_of

TASK = "multimodal-sentiment"


class MultimodalSentimentPipeline(Pipeline):
    """`MSAPipeline` behind the interface of `transformers.pipeline`.

        classify = transformers.pipeline("multimodal-sentiment", model="runs/mine")
        classify("clip.mp4", text="I loved it")

    An input is what one clip of `MSAPipeline.__call__` is, or a list, generator or dataset of such inputs. A
    prediction is a dict with the fields of `Prediction`.
    """

    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_placed = getattr(self.model, "hf_device_map", None) is not None
        self._predictor = MSAPipeline(self.model, self.processor, None if is_placed else self.device)

    def __call__(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Predict for one clip, or for several at once.

        Args:
            inputs: As in `MSAPipeline.__call__`; for several clips with texts, dicts.
            kwargs: `text` and the other arguments of one clip; `attribute`, `batch_size` and `num_workers`.

        Raises:
            ClipError: As in `MSAPipeline.__call__`.
            ValueError: As in `MSAPipeline.__call__`.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if is_lazy(inputs):
            inputs = (each for each in inputs)  # transformers knows generators, but no other iterators
        several = isinstance(inputs, list | Dataset) or is_lazy(inputs)
        if several and (given := [name for name in KEYS if kwargs.get(name) is not None]):
            raise ValueError(f"{', '.join(given)} of several clips: give a dict for each clip")
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, attribute: bool | None = None, **parts: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := parts.keys() - set(KEYS[1:]):
            raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
        return parts, {} if attribute is None else {"attribute": attribute}, {}

    def preprocess(self, inputs: Any, **parts: Any) -> dict[str, tuple[Sample, ClipFeatures]]:
        """Check one input and extract its features."""
        sample = sample_of(self.processor.settings, inputs, **parts)
        return {"sample": (sample, self._predictor.extract(sample))}

    def _forward(self, inputs: dict[str, Any], attribute: bool = True) -> dict[str, Any]:
        """Predict for one sample, or for a list of samples."""
        samples = inputs["sample"]
        if isinstance(samples, list):
            return {"prediction": self._predictor.predict(samples, attribute)}
        return {"prediction": self._predictor.predict([samples], attribute)[0]}

    def postprocess(self, outputs: dict[str, Prediction]) -> dict[str, Any]:
        """The prediction as plain data."""
        return outputs["prediction"].to_dict()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the checkpoint; unlike in the base class, without a copy of this file for remote code."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MultimodalSentimentPipeline, pt_model=MSAModel, type="multimodal"
)
