# SPDX-License-Identifier: Apache-2.0
"""The project's metrics for users of Hugging Face `evaluate`: the same functions, accumulated over batches.

    import evaluate
    from msa_online.evaluation.msa_metrics import METRICS_PATH

    metric = evaluate.load(str(METRICS_PATH))  # or "classification", "emotions" as second argument
    metric.add_batch(predictions=[0.3, -1.2], references=[1.0, -0.8])
    metric.compute()  # {"mae": ..., "corr": ..., "acc2_has0": ...}

`evaluate` copies this file and parses its imports line by line, so each import is on one line and names the
installed package absolutely. All features are float64, because float32 would round the values.
"""

import datasets
import evaluate

from msa_online.evaluation import metrics

_SCALAR = datasets.Value("float64")
_FEATURES = {
    "regression": {"predictions": _SCALAR, "references": _SCALAR},
    "classification": {"predictions": _SCALAR, "references": _SCALAR},
    "emotions": {
        "predictions": datasets.List(datasets.List(_SCALAR)),
        "references": datasets.List(_SCALAR),
    },
}
_INPUTS = """
Configuration "regression" (default): predictions and references are scores, `(samples,)`; `compute` takes
`style` and `label_range`. "classification": class indices, `(samples,)`; `compute` needs `num_classes`.
"emotions": predictions are logits `(samples, 4, 2)`, references 0 or 1 `(samples, 4)`.
"""


class MSAMetrics(evaluate.Metric):
    """Sentiment and emotion metrics; `msa_online.evaluation.metrics` defines them."""

    def _info(self) -> evaluate.MetricInfo:
        """Declare the inputs; raises `ValueError` for an unknown configuration name."""
        if self.config_name == "default":
            self.config_name = "regression"
        if self.config_name not in _FEATURES:
            raise ValueError(f"no configuration {self.config_name!r}: choose one of {', '.join(_FEATURES)}")
        return evaluate.MetricInfo(
            description=metrics.__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(_FEATURES[self.config_name]),
        )

    def _compute(self, predictions: list, references: list, **options: object) -> dict[str, float]:
        """Call the function of the configuration with the gathered values."""
        score = {
            "regression": metrics.regression_metrics,
            "classification": metrics.classification_metrics,
            "emotions": metrics.emotion_binary_metrics,
        }[self.config_name]
        return score(predictions, references, **options)
