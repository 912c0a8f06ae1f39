# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: a loadable checkpoint of its best epoch, and the state to resume from."""

import json
import os
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.validation import why_not_writable
from msa_online.evaluation.conditions import ConditionPredictions
from msa_online.evaluation.json_text import json_text
from msa_online.lora import adapted_modalities, merged_weights, remove_lora, save_adapter
from msa_online.modeling_msa import PROBES, MSAModel
from msa_online.processing_msa import MSAProcessor
from msa_online.training.config import RunArguments, first_difference, refuse_former_keys
from msa_online.training.data import changed_data
from msa_online.training.state import REMEDY, SETTINGS, RunState, Stateful, require_settings, seal, verify
from msa_online.training.yaml_reader import ConfigurationError, read_document

STATE = "state"
STAGES = "stages"
PHASES = "phases"
DATA = "data.json"
PREDICTIONS = "predictions.npz"
ADAPTER = "adapter"
LOCK = ".lock"  # of a study or search; alone in its folder if that was refused before it began
FREE_TO_CHANGE_ON_RESUME = {
    "training.output_dir",  # the folder may have been moved
    *("training.resume", "training.overwrite", "training.log_with", "training.cache_states"),
    *("training.push_to_hub", "training.hub_private"),
    *("data.prepare_workers", "data.loader_workers", "data.strict"),
}


class RunFolder:
    """The folder of one run; it is itself a checkpoint once an epoch has been validated.

        config.json, model.safetensors, tokenizer and processor files, README.md   the best epoch
        run.yaml, history.json                                                     configuration and epochs
        predictions.npz                                                            of validation and test
        adapter/                                                                   of LoRA, in peft's format
        data.json                                                                  fingerprint of the data
        stages/                                                                    teachers of later stages,
                                                                                   best of earlier phases
        state/                                                                     the last epoch
        logs/                                                                      files of the tracker

    Args:
        path: The folder.
        accelerator: Identifies the main process, the only one that writes.
    """

    def __init__(self, path: str | Path, accelerator: Accelerator) -> None:
        self.path = Path(path)
        self.accelerator = accelerator

    def check(self, arguments: RunArguments) -> None:
        """Check that the run may use the folder, without changing it.

        Raises:
            ConfigurationError: The folder contains an earlier run, and neither `resume` nor `overwrite` is
                set; it contains files that do not belong to a run; there is no state to resume, or it is
                damaged or has another configuration; or the folder cannot be created.
        """
        if arguments.training.resume:
            self._check_resumable(arguments)
        elif (self.path / SETTINGS).exists() and not arguments.training.overwrite:
            raise ConfigurationError(
                f"{self.path} holds an earlier run: set training.resume=true to continue it, "
                "training.overwrite=true to replace it, or give another training.output_dir"
            )
        elif foreign := self._foreign_file():
            raise ConfigurationError(
                f"{self.path} holds files that belong to no run (for example {foreign}): give another "
                "training.output_dir"
            )
        elif reason := "it is a file" if self.path.is_file() else why_not_writable(self.path):
            raise ConfigurationError(
                f"training.output_dir={self.path} cannot be created: {reason}; name another"
            )

    def _foreign_file(self) -> str | None:
        """Name of a file in a folder that is not that of a run; None if there is none."""
        if not self.path.is_dir() or (self.path / SETTINGS).exists():
            return None
        names = (entry.name for entry in self.path.iterdir())
        return next((name for name in names if name not in (LOCK, draft_of(self.path / SETTINGS).name)), None)

    def open(self, arguments: RunArguments, data: Mapping[str, list[str]] | None = None) -> None:
        """Prepare the folder for a new run; the folder of a run to resume is not changed.

        Args:
            arguments: The run.
            data: Fingerprint of its data; a resumed run must have the data it was started with.

        Raises:
            ConfigurationError: As in `check`; or the data of a run to resume have changed.
        """
        self.check(arguments)
        if arguments.training.resume and data is not None:
            self._require_same_data(data)
        self.accelerator.wait_for_everyone()  # all processes check before one writes
        if self.accelerator.is_main_process and not arguments.training.resume:
            self.path.mkdir(parents=True, exist_ok=True)
            # the folder of a run, as `check` has verified; its settings, which show that, are kept to the end
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != SETTINGS:
                    entry.unlink()
            write_atomically(self.path / SETTINGS, yaml.safe_dump(self._record(arguments), sort_keys=False))
            if data is not None:
                write_atomically(self.path / DATA, json.dumps(data, indent=0))
        self.accelerator.wait_for_everyone()

    def _require_same_data(self, data: Mapping[str, list[str]]) -> None:
        """Check that data are those of the start; runs of earlier versions have no fingerprint."""
        if not (self.path / DATA).exists():
            return
        try:
            difference = changed_data(json.loads((self.path / DATA).read_text(encoding="utf-8")), data)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise ConfigurationError(f"{self.path / DATA}: cannot be read ({error}); {REMEDY}") from error
        if difference:
            raise ConfigurationError(
                f"{self.path}: the data have changed since the run was started: {difference}. Restore them "
                "to resume it, or start another run"
            )

    def _record(self, arguments: RunArguments) -> dict[str, Any]:
        """The configuration as plain data, with the settings of `accelerate launch`."""
        launch = {
            "processes": self.accelerator.num_processes,
            "mixed_precision": str(self.accelerator.mixed_precision),
            "device": self.accelerator.device.type,
        }
        return {**arguments.to_dict(), "launch": launch}

    def _check_resumable(self, arguments: RunArguments) -> None:
        state = self._state
        if state is None:
            raise ConfigurationError(self._why_nothing_to_resume())
        manifest = verify(state)
        # `auto` and its outcome are the same run: `launch` records the precision in use
        free = FREE_TO_CHANGE_ON_RESUME | {"training.mixed_precision"}
        if changed := first_difference(self._read_settings(), self._record(arguments), free):
            key, before, now = changed
            raise ConfigurationError(
                f"{self.path}: the run was started with {key}={before!r}, not {now!r}; resume it unchanged, "
                "or start another"
            )
        require_settings(manifest, self.path / SETTINGS)
        published = self.path / SAFE_WEIGHTS_NAME
        if published.exists():  # check it now: it is read only after the last epoch
            with _published(published), safe_open(published, framework="pt"):
                pass

    def _why_nothing_to_resume(self) -> str:
        if not (self.path / SETTINGS).exists():
            return f"{self.path}: nothing to resume: no run was started there; leave out training.resume"
        if (self.path / SAFE_WEIGHTS_NAME).exists():
            return (
                f"{self.path}: nothing to resume: the run has finished, or its state was deleted. To train "
                f"longer, start another from it: training.init_from={shlex.quote(str(self.path))} "
                "training.epochs=N training.output_dir=ANOTHER"
            )
        return (
            f"{self.path}: nothing to resume: the run stopped before its first epoch ended; start it again "
            "with training.overwrite=true"
        )

    def _read_settings(self) -> dict[str, Any]:
        """The `_record` of the run when it started."""
        try:
            settings = read_document(self.path / SETTINGS, "configuration of the run")
            if not all(isinstance(part, dict | list) for part in settings.values()):
                raise ConfigurationError(f"{self.path / SETTINGS}: this is not the configuration of a run")
            refuse_former_keys(settings, str(self.path / SETTINGS))
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; {REMEDY}") from error
        return settings

    @property
    def _state(self) -> Path | None:
        """The newest complete state; between the two renames of `save_state` this is the older one."""
        return next((state for name in (STATE, f"{STATE}.old") if (state := self.path / name).is_dir()), None)

    def save_state(self, model: MSAModel, parts: Mapping[str, Stateful]) -> None:
        """Save the state to resume from, atomically.

        Args:
            model: The model, not wrapped.
            parts: The other objects with a state, by name: optimizer, schedules, modulator, progress.
        """
        new, current, old = (self.path / name for name in (f"{STATE}.new", STATE, f"{STATE}.old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        self.accelerator.wait_for_everyone()
        self._run_state(model, parts).write(new)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(new, self.accelerator.num_processes, self.path / SETTINGS)
            if current.exists():  # otherwise `old` is the only complete state
                shutil.rmtree(old, ignore_errors=True)
                os.rename(current, old)
            os.rename(new, current)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load_state(self, model: MSAModel, parts: Mapping[str, Stateful]) -> None:
        """Restore the state of `save_state`; takes the same arguments.

        Raises:
            ConfigurationError: The state is damaged or incomplete, or belongs to another run.
        """
        self._run_state(model, parts).read(self._state)

    def _run_state(self, model: MSAModel, parts: Mapping[str, Stateful]) -> RunState:
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            parts = {**parts, "scaler": accelerator.scaler}
        return RunState(
            model, parts, accelerator.device, accelerator.process_index, accelerator.num_processes
        )

    def forget_state(self) -> None:
        """Delete the state and the weights of stages, which a finished run does not need."""
        for name in (STATE, f"{STATE}.old", f"{STATE}.new", STAGES):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / DATA).unlink(missing_ok=True)

    def stage_file(self, name: str) -> Path:
        """File for weights or teacher targets of a stage."""
        return self.path / STAGES / f"{name}.safetensors"

    def keep_stage(self, name: str, model: MSAModel) -> None:
        """Save the weights of `model` as the best of stage `name`."""
        if self.accelerator.is_main_process:
            kept = self.stage_file(name)
            kept.parent.mkdir(exist_ok=True)
            draft = kept.with_suffix(".new")
            save_model(model, str(draft))
            os.replace(draft, kept)

    def keep_phase(self, number: int) -> None:
        """Keep the published weights as the best of phase `number`, which has ended, until the run has."""
        if self.accelerator.is_main_process:
            kept = self._phase_file(number)
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft = kept.with_suffix(".new")
            shutil.copyfile(self.path / SAFE_WEIGHTS_NAME, draft)
            os.replace(draft, kept)

    def _phase_file(self, number: int) -> Path:
        return self.path / STAGES / PHASES / f"{number}.safetensors"

    def publish(self, model: MSAModel, processor: MSAProcessor | None) -> None:
        """Save a checkpoint of `model` in the folder; each file is replaced atomically.

        A model of precomputed features has no processor. The weights of a model with adapters are merged;
        the adapters alone are in a folder beside them.
        """
        if not self.accelerator.is_main_process:
            return
        staging = self.path / "publish.new"
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        model.save_pretrained(staging, state_dict=merged_weights(model))
        if processor is not None:
            processor.save_pretrained(staging)
        self._move(staging, self.path)
        if adapted_modalities(model):
            staging.mkdir()
            save_adapter(model, staging)
            model.config.save_pretrained(staging)
            if processor is not None:
                processor.save_pretrained(staging)
            (self.path / ADAPTER).mkdir(exist_ok=True)
            self._move(staging, self.path / ADAPTER)

    @staticmethod
    def _move(staging: Path, folder: Path) -> None:
        """Replace each file of `folder` that `staging` has, atomically."""
        for file in staging.glob("*.safetensors"):  # safetensors makes them readable by their owner only
            shutil.copymode(staging / CONFIG_NAME, file)
        for file in staging.iterdir():
            os.replace(file, folder / file.name)
        staging.rmdir()

    def save_config(self, config: MSAConfig) -> None:
        """Replace the configuration of the published checkpoint, and of its adapter."""
        for folder in (self.path, self.path / ADAPTER):
            if folder.is_dir():
                config.save_pretrained(folder)

    def load_best(self, model: MSAModel) -> None:
        """Load the published weights into a model, without a second copy in memory; removes its adapters.

        Raises:
            ConfigurationError: Nothing was published, because no epoch of the last stage had a score; or the
                file is damaged, or contains the weights of another model.
        """
        published = self.path / SAFE_WEIGHTS_NAME
        if not published.exists():
            raise ConfigurationError(
                f"{self.path}: no epoch had a finite validation score; lower the learning rates"
            )
        self._load(published, model)

    def load_phase(self, number: int, model: MSAModel) -> None:
        """Load the weights that `keep_phase` kept, as `load_best` does."""
        self._load(self._phase_file(number), model)

    def _load(self, published: Path, model: MSAModel) -> None:
        remove_lora(model)  # they are merged into the published weights
        with _published(published):
            missing, unexpected = load_model(model, published, strict=False)
        if unexpected or not all(name.startswith(PROBES) for name in missing):
            raise ConfigurationError(f"{published}: these are the weights of another model; {REMEDY}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Convert errors in writing to the folder to a message with the remedy.

        What was complete before stays: each file, and the state as a whole, is replaced in one step.

        Raises:
            ConfigurationError: The disk is full, or the folder no longer writable.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).rpartition("error: ")[2]
            raise ConfigurationError(
                f"{self.path}: cannot be written ({reason}); what was saved before is complete. Free disk "
                "space, then training.resume=true continues after the last saved epoch"
            ) from error

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write the record of all epochs to history.json."""
        if self.accelerator.is_main_process:
            write_atomically(self.path / "history.json", json_text(history, indent=1))

    def write_predictions(self, predictions: Mapping[str, ConditionPredictions]) -> None:
        """Write the logits of each split and condition, and the labels, to predictions.npz.

        The keys are like "test/text+audio" and "test/labels"; samples are in the order of the data.
        """
        if self.accelerator.is_main_process:
            draft = self.path / f"{PREDICTIONS}.new"
            with open(draft, "wb") as file:
                arrays = {split: each.arrays() for split, each in predictions.items()}
                np.savez(
                    file,
                    **{
                        f"{split}/{name}": array for split, of in arrays.items() for name, array in of.items()
                    },
                )
            os.replace(draft, self.path / PREDICTIONS)


def read_predictions(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Logits of a finished run `(samples, outputs)` by condition, and its labels `(samples,)`.

    Raises:
        ConfigurationError: The file is damaged. An earlier version wrote none: the result is empty then.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {
                key.removeprefix(f"{split}/"): archive[key]
                for key in archive.files
                if key.startswith(f"{split}/")
            }
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}): delete {folder} and run it again"
        ) from error


def require_space(folder: Path, model: MSAModel) -> None:
    """Check that the checkpoints of a run fit on the disk.

    A run stores the best weights, those of a teacher, and a state of weights and two moments; of the state,
    two copies exist while one replaces the other.

    Raises:
        ConfigurationError: They do not fit; names the bytes needed and those free.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = size * 3 + 2 * 3 * size
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # will be replaced
    free = shutil.disk_usage(existing).free + written
    if free < needed:
        raise ConfigurationError(
            f"{folder}: checkpoints need about {needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free; "
            "give another training.output_dir or free disk space"
        )


@contextmanager
def _published(path: Path) -> Iterator[None]:
    """Convert errors in reading the published weights to a message with the file and the remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"{path}: cannot be read ({reason}); {REMEDY}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that it is never incomplete."""
    draft = draft_of(path)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def draft_of(path: Path) -> Path:
    """Where `write_atomically` writes a file before it replaces it."""
    return path.with_name(path.name + ".new")
