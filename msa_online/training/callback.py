# SPDX-License-Identifier: Apache-2.0
"""Callback for `transformers.Trainer`, for heads with running state."""

from typing import Any

from transformers import TrainerCallback

from msa_online.modeling_msa import MSAModel


class RunningStateCallback(TrainerCallback):
    """Calls `head.end_step` after each optimizer step of a `transformers.Trainer`.

    Heads with running state need it: without it, the prototypes of `pase` and the own labels of `self_mm`
    would never change. `msa-online train` does not need it.
    """

    def on_optimizer_step(self, *_: Any, model: MSAModel, **__: Any) -> None:
        """Update the running state of the head of `model`."""
        model.head.end_step(taken=True)
