# SPDX-License-Identifier: Apache-2.0
"""Input masks of a run, by split."""

from collections.abc import Collection, Mapping

from msa_online.corpora.corpus import ReadyCorpus
from msa_online.missing.frames import VALIDATION_RATE, FrameDrop, FrameDropout, FramesAt, stand_ins_of
from msa_online.missing.modalities import InputMask, ModalityDropout, dropout_problem
from msa_online.missing.rates import SplitMask
from msa_online.modalities import COMPLETE, CONDITIONS, MODALITIES
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor
from msa_online.training.config import OVER_CONDITIONS, MissingArguments, TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError


def draw_split_masks(
    data: ReadyCorpus, missing: MissingArguments, condition: str | None = None
) -> dict[str, SplitMask]:
    """The mask of each split with samples; empty without missing rates.

    Args:
        data: The data of the run.
        missing: The rates.
        condition: The modalities of the run, a name in `CONDITIONS`; None for all.

    Raises:
        CorpusError: A split is too small for the rates.
    """
    if missing.rates is None:
        return {}
    return {
        name: SplitMask(
            [sample.id for sample in data.split(name)],
            data.present(name),
            missing.by_name,
            split=name,
            rounding=missing.rounding,
            seed=missing.seed,
            used=CONDITIONS[condition or COMPLETE],
        )
        for name in data.sizes
    }


def occurring_modalities(
    data: ReadyCorpus,
    training: TrainingArguments,
    masks: Mapping[str, SplitMask],
    stages: int,
) -> tuple[str, ...]:
    """Modalities that are visible in at least one training sample in at least one stage.

    Args:
        data: The data of the run.
        training: Training settings, for the condition of the last stage.
        masks: The mask of each split; empty without missing rates.
        stages: Number of training stages; in all but the last, everything is visible.
    """
    seen = masks["train"].seen if masks else data.present("train")
    visible = CONDITIONS[training.condition] if training.condition and stages == 1 else MODALITIES
    has = dict(zip(MODALITIES, seen.any(dim=0).tolist(), strict=True))
    return tuple(name for name in MODALITIES if has[name] and name in visible)


def selection_conditions(
    training: TrainingArguments, masks: Mapping[str, SplitMask], occurring: Collection[str]
) -> tuple[str, ...]:
    """The conditions whose mean validation score selects the best epoch of the last stage.

    Args:
        training: Training settings.
        masks: The mask of each split; empty without missing rates.
        occurring: Modalities of the training samples; conditions with another one are left out.
    """
    if training.selection == OVER_CONDITIONS:
        return tuple(name for name, visible in CONDITIONS.items() if set(visible) <= set(occurring))
    return (COMPLETE if masks else training.condition or COMPLETE,)


def make_input_masks(
    data: ReadyCorpus,
    training: TrainingArguments,
    masks: Mapping[str, SplitMask],
    model: MSAModel,
    processor: MSAProcessor | None,
) -> dict[str, InputMask]:
    """Input masks for training ("train"), validation ("valid") and the teacher's training split ("teacher").

    Args:
        data: The data of the run.
        training: Training settings; they apply if there are no masks.
        masks: The mask of each split of a run with missing rates; nothing else is hidden then.
        model: The model, with fitted encoders.
        processor: Its processor; None for a model of precomputed features.

    Raises:
        ConfigurationError: The rates of modality dropout cannot be realised on the training split.
        EncoderError: Words have to be dropped, and the tokenizer has no unknown token.
    """
    if masks:
        return {**masks, "teacher": masks["train"]}
    if training.frame_dropout:
        stand_ins = stand_ins_of(model, processor)
        ids = {split: [sample.id for sample in data.split(split)] for split in ("train", "valid")}
        drop = FrameDrop(ids["valid"], stand_ins, split="valid", seed=training.seed)
        return {
            "train": FrameDropout(ids["train"], stand_ins, training.seed),
            "valid": FramesAt(drop, VALIDATION_RATE),
            "teacher": InputMask(),
        }
    present = data.present("train")
    if problem := dropout_problem(training.modality_dropout, present):
        raise ConfigurationError(f"training.modality_dropout: {problem}")
    dropout = ModalityDropout(training.modality_dropout, present, training.seed)
    return {"train": dropout, "valid": InputMask(), "teacher": InputMask()}
