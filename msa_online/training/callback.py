# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` needs to train heads that keep running state."""

from typing import Any

from transformers import TrainerCallback

from msa_online.modeling_msa import MSAModel


class RunningStateCallback(TrainerCallback):
    """Calls `head.end_step` after each optimizer step of a `transformers.Trainer`.

    Heads with running state need it: without it the prototypes of `pase` stay as they were loaded. `train.py`
    does it by itself.
    """

    def on_optimizer_step(self, *_: Any, model: MSAModel, **__: Any) -> None:
        """Have the head of `model` take in the samples of the step."""
        model.head.end_step(taken=True)
