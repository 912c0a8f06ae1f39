# SPDX-License-Identifier: Apache-2.0
"""`msa-online plot-states`: draw the fused states of a checkpoint by t-SNE."""

from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from feature_extractors.clip import printable
from msa_online.batching import make_dataset, make_loader, make_sampler
from msa_online.commands.evaluate import read_split
from msa_online.commands.predict import PLOTS
from msa_online.corpora.validation import why_not_writable
from msa_online.evaluation.states import LEAST_SAMPLES, draw_states, embed, fused_states
from msa_online.hub import load_checkpoint
from msa_online.modalities import CONDITIONS
from msa_online.training.config_reader import import_plugins


def run(options: Namespace, console: Console) -> None:
    """Draw the states of a split."""
    target = Path(options.out)
    if target.suffix not in PLOTS:
        options.refuse(f"--out {target}: end its name with {', '.join(PLOTS)}")
    if reason := "it is a folder" if target.is_dir() else why_not_writable(target):
        options.refuse(f"--out {target} cannot be written: {reason}")
    if unknown := [name for name in options.conditions if name not in CONDITIONS]:
        options.refuse(f"--conditions {unknown[0]!r}: one of {', '.join(CONDITIONS)}")
    import_plugins(options.plugin, "--plugin")
    model, processor = load_checkpoint(options.checkpoint)
    dataset = make_dataset(
        read_split(options, model.config, processor), options.split, processor, model.config
    )
    if len(dataset) < LEAST_SAMPLES:
        options.refuse(f"{options.split} has {len(dataset)} samples: t-SNE needs {LEAST_SAMPLES} or more")
    accelerator = Accelerator()
    loader = accelerator.prepare(make_loader(dataset, make_sampler(dataset, options.batch_size)))
    model.to(accelerator.device)
    conditions = list(dict.fromkeys(options.conditions))
    states, labels = fused_states(model, loader, accelerator, conditions)
    coordinates = {name: embed(each, options.seed) for name, each in states.items()}
    title = f"{printable(options.checkpoint)}, {options.split}: fused states by t-SNE"
    draw_states(coordinates, labels, model.config, title, target)
    console.print(f"{len(labels):,} states in {target}", soft_wrap=True)
