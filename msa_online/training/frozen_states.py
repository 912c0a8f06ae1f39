# SPDX-License-Identifier: Apache-2.0
"""States of a run's frozen encoders: computed once, by all processes together."""

import time
from collections.abc import Sequence

from accelerate import Accelerator
from rich.console import Console

from msa_online.corpora.corpus import ReadyCorpus
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.modeling_msa import MSAModel
from msa_online.precomputed.states import FrozenEncoder, SampleStates
from msa_online.processing_msa import MSAProcessor
from msa_online.training.config import TrainingArguments
from msa_online.training.turns import in_turn, side_by_side


def compute_frozen_states(
    model: MSAModel,
    processor: MSAProcessor | None,
    data: ReadyCorpus,
    training: TrainingArguments,
    accelerator: Accelerator,
    console: Console,
) -> dict[str, SampleStates]:
    """The states of each frozen encoder for all clips, by modality; batches then need no inputs for it.

    States that are not on disk are computed, and a line says which and how long it took. There are none with
    `cache_states` "off", with frame dropout, which changes the inputs, or for precomputed features. Encoders
    that train at least in part have none either, nor have those of modalities that no clip has.

    Raises:
        CacheError: The disk is too small for the states or not writable.
        SystemExit: The computation failed in another process, which reports the error.
    """
    if training.cache_states == "off" or training.frame_dropout or not isinstance(data, PreparedCorpus):
        return {}
    frozen = [
        FrozenEncoder(name, encoder, model.config, processor, data, str(accelerator.mixed_precision))
        for name, encoder in model.encoders.items()
        if isinstance(encoder, PretrainedEncoder) and encoder.stored_once
    ]
    frozen = [each for each in frozen if each.keys]
    if not frozen:
        return {}
    began = time.perf_counter()
    missing = any(each.missing for each in frozen)
    rank, processes = accelerator.process_index, accelerator.num_processes
    side_by_side(lambda: _compute(frozen, accelerator, rank, processes), accelerator)
    in_turn(lambda: _compute(frozen, accelerator), accelerator)  # what was computed on another machine's disk
    names, clips = ", ".join(each.name for each in frozen), f"{len(data.samples):,} clips"
    done = f"computed once ({clips}, {time.perf_counter() - began:.0f} s)" if missing else f"cached ({clips})"
    console.print(f"states of {names}: {done}", soft_wrap=True, highlight=False)
    return {each.name: each.states for each in frozen}


def _compute(
    frozen: Sequence[FrozenEncoder], accelerator: Accelerator, rank: int = 0, processes: int = 1
) -> None:
    """Compute one process' share of the states that are not on disk."""
    for each in frozen:
        each.store.refresh()
        mine = [key for key in each.missing if int(key[:8], 16) % processes == rank]
        each.compute(mine, accelerator.device, accelerator.autocast)
