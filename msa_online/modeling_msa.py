# SPDX-License-Identifier: Apache-2.0
"""MSAModel: encoders -> calibrator -> context -> balancing head."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, ModelOutput

from msa_online.configuration_msa import MSAConfig
from msa_online.context import CONTEXTS
from msa_online.encoders import make_encoders
from msa_online.encoders.pretrained import EncoderError
from msa_online.encoders.text import TextEncoder
from msa_online.layers.precision import no_wider
from msa_online.methods import CALIBRATORS, HEADS, HeadOutput
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.model_card import write_model_card

PROBES = "probes."
"""Prefix of modulator-only parameters; never published."""

INTERNALS = ("fused_valid", "probe_logits", "sequences", "of_head")
"""Fields of `MSAOutput` that only training loops read."""


@dataclass
class MSAOutput(ModelOutput):
    """Prediction of the model, losses and intermediate results.

    The fields are tensors or dicts of tensors. The last four are exceptions; `forward` returns them only with
    `output_internals`.

    Attributes:
        loss: Sum of the losses weighted by `config.loss_weights`, a scalar; None without labels.
        logits: Fused prediction, `(batch, outputs)`.
        modality_logits: Prediction of each modality alone, `(batch, outputs)` each.
        features: State of each modality that the fusion reads, `(batch, width)` each.
        fused: Input of the last layer of the fused prediction, `(batch, width)`.
        losses: Unweighted loss terms by name, scalars; empty without labels.
        diagnostics: Detached tensors for the log, by name.
        present: Which samples have each modality, `(batch,)` bool each.
        fused_valid: False in a stage that does not train the fused prediction.
        probe_logits: Predictions of a modulator's probes, `(batch, outputs)` each.
        sequences: Encoded batch before the calibrator, detached, by modality.
        of_head: Output of the head itself. Half precision and distributed training wrap the model and copy
            the tensors above; the losses were computed from the tensors in here.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    modality_logits: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    fused: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    diagnostics: dict[str, Tensor] | None = None
    present: dict[str, Tensor] | None = None
    fused_valid: bool | None = None
    probe_logits: dict[str, Tensor] | None = None
    sequences: dict[str, ModalitySequence] | None = None
    of_head: HeadOutput | None = None

    def without_internals(self) -> "MSAOutput":
        """The same output without the fields that only training loops read."""
        return MSAOutput(**{name: value for name, value in self.items() if name not in INTERNALS})


class MSAModel(PreTrainedModel):
    """Sentiment or emotion from text, audio and face, any of which may be missing.

        token ids ── text encoder ───┐
        sound ────── audio encoder ──┼── calibrator ── context ── head ── logits, named losses
        crops ────── vision encoder ─┘

    Args:
        config: Configuration of the model.

    Raises:
        EncoderError: An encoder is of a type that its modality does not have, or the head acts inside the
            text encoder and cannot.
        ValueError: Head, calibrator or context are in no table, or the audio encoder lacks `audio_layer`.
    """

    config_class = MSAConfig
    base_model_prefix = "msa"
    main_input_name = "text_input_ids"
    supports_gradient_checkpointing = True  # by the layers of pretrained encoders
    # the attention setting applies to pretrained encoders only, which refuse what they do not support
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        self.encoders = make_encoders(config)
        calibrator = look_up(CALIBRATORS, "calibrator", config.calibrator, config.plugins)
        head = look_up(HEADS, "head", config.head, config.plugins)
        context = look_up(CONTEXTS, "context", config.context, config.plugins)
        self.calibrator = calibrator(config.widths, **config.calibrator_kwargs)
        self.head = head(config.widths, config.num_labels, **config.head_kwargs)
        if self.head.text_layer is not None:
            open_text_encoder(self.encoders, config.head, self.head.text_layer)
        self.context = context(config.widths, **config.context_kwargs)
        self.probes = nn.ModuleDict()  # of a modulator, in training only
        parts = (*self.encoders.values(), self.calibrator, self.context, self.head)
        self._no_split_modules = sorted({type(part).__name__ for part in parts})  # for device_map
        self._fixed = [name for name, it in self.named_parameters() if not it.requires_grad]
        self.post_init()

    def encode(self, modality_present: Tensor, **inputs: Tensor) -> dict[str, ModalitySequence]:
        """Run the three encoders, the expensive half of `forward`; inputs as in `forward`.

        Evaluation under several modality conditions calls `encode` once and `decide` for each condition.

        Returns:
            States `(batch, time, width)` of each modality; absent modalities are masked.
        """
        return {
            name: self._sequence(name, inputs).to(modality_present.device).only(modality_present[:, column])
            for column, name in enumerate(self.encoders)
        }

    def _sequence(self, name: str, inputs: Mapping[str, Tensor]) -> ModalitySequence:
        """States of one modality, from its inputs or from what its frozen network returned for them."""
        encoder, states = self.encoders[name], inputs.get(f"{name}_states")
        if states is None:
            sequence = encoder(inputs)
        else:
            sequence = encoder.read(ModalitySequence.of(states, inputs[f"{name}_states_mask"]))
        places = {key: inputs.get(key) for key in ("dialogue", "turn", "speaker")}
        return replace(sequence, spans=inputs.get(f"{name}_spans"), **places)

    def decide(
        self,
        sequences: Mapping[str, ModalitySequence],
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
        index: Tensor | None = None,
    ) -> MSAOutput:
        """Calibrate encoded sequences, add their context and fuse; other arguments as in `forward`."""
        of_samples = {"index": index} if self.head.keeps_samples else {}
        output = self.head(self._head_inputs(sequences), labels, teacher, **of_samples)
        weights = self.config.loss_weights
        terms = [weights.get(name, 1.0) * loss for name, loss in output.losses.items()]
        present = {name: sequence.present for name, sequence in sequences.items()}
        probed = {name: probe(output.features[name].detach()) for name, probe in self.probes.items()}
        loss = torch.stack(terms).sum() if terms else None
        seen = {name: replace(seq, values=seq.values.detach()) for name, seq in sequences.items()}
        return MSAOutput(
            loss=loss,
            **vars(output),
            present=present,
            probe_logits=probed,
            sequences=seen,
            of_head=output,
        )

    def teach(self, **inputs: Tensor) -> Tensor:
        """Compute the targets for a later stage of training with this model frozen, `(batch, ...)`."""
        return self.head.teach(self._head_inputs(self.encode(**inputs)))

    def _head_inputs(self, sequences: Mapping[str, ModalitySequence]) -> dict[str, ModalitySequence]:
        """Input of the head; in a half-precision model, converted to the type of its weights.

        A head that acts inside the text encoder does so here, where it is known what is visible.
        """
        narrow = {
            name: replace(sequence, values=no_wider(sequence.values, self.head))
            for name, sequence in sequences.items()
        }
        if self.head.text_layer is not None:
            narrow["text"] = self.encoders["text"].finish(
                narrow["text"], lambda tokens: self.head.shift_text({**narrow, "text": tokens})
            )
        return self.context(self.calibrator(narrow))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MSAModel":
        """Convert or move the model; buffers stay in fp32 or wider, as they have the scale of the data."""
        buffers = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            after = self.get_buffer(name)
            if after.is_floating_point() and after.dtype.itemsize < 4 <= before.dtype.itemsize:
                owner, _, own_name = name.rpartition(".")
                setattr(self.get_submodule(owner), own_name, before.to(after.device, torch.float32))
        return self

    def forward(
        self,
        modality_present: Tensor,
        text_input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_spans: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_mask: Tensor | None = None,
        vision_values: Tensor | None = None,
        vision_blendshapes: Tensor | None = None,
        vision_mask: Tensor | None = None,
        text_values: Tensor | None = None,
        text_states: Tensor | None = None,
        text_states_mask: Tensor | None = None,
        audio_states: Tensor | None = None,
        audio_states_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        vision_states_mask: Tensor | None = None,
        dialogue: Tensor | None = None,
        turn: Tensor | None = None,
        speaker: Tensor | None = None,
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
        index: Tensor | None = None,
        output_internals: bool = False,
    ) -> MSAOutput:
        """Predict for a batch made by `MSAProcessor` or from precomputed features.

        A model of raw clips reads `text_input_ids`. A model of precomputed features reads `text_values`; its
        `audio_values` and `vision_values` are features too.

        A pretrained encoder can read its own states, computed earlier, in place of its inputs: what its
        method `states` returned, under `<modality>_states` and `<modality>_states_mask`.

        Args:
            modality_present: `(batch, 3)` bool in the order of `MODALITIES`; all False is allowed.
            text_input_ids: Token ids, `(batch, tokens)` int64.
            text_mask: Tokens that are not padding, `(batch, tokens)` bool.
            text_spans: When the word of each token is spoken, for heads that align by words,
                `(batch, tokens, 2, 2)`: start and end, first as shares of the sound that is read, then in
                frames. NaN where that is unknown; None if it is for all.
            audio_values: Natural-log mel spectrogram, `(batch, steps, 80)`; what the feature extractor of a
                pretrained encoder makes, `(batch, steps, bands)` or a waveform `(batch, steps)`; or features
                `(batch, time, width)`.
            audio_mask: Steps that are not padding, `(batch, steps)` bool.
            vision_values: Aligned face crops, `(batch, frames, height, width, 3)` uint8 RGB; what the image
                processor of a pretrained encoder makes, `(batch, frames, 3, height, width)`; or features
                `(batch, time, width)`.
            vision_blendshapes: Scores in [0, 1], `(batch, frames, 52)`.
            vision_mask: Frames with a face, `(batch, frames)` bool.
            text_values: Features `(batch, time, width)`.
            text_states: States of the pretrained text encoder, `(batch, tokens, ...)`.
            text_states_mask: Tokens that are not padding, `(batch, tokens)` bool.
            audio_states: States of the pretrained audio encoder, `(batch, time, ...)`.
            audio_states_mask: States that are not padding, `(batch, time)` bool.
            vision_states: States of the pretrained vision encoder, `(batch, frames, ...)`.
            vision_states_mask: Frames with a face, `(batch, frames)` bool.
            dialogue: Number of the dialogue that each sample is a turn of, `(batch,)` int64, for a model with
                context; None if each sample is alone.
            turn: Place of each sample in its dialogue, `(batch,)` int64, from 0; with `dialogue`.
            speaker: Number of the speaker of each sample within its dialogue, `(batch,)` int64, for a context
                that reads speakers; with `dialogue`.
            labels: `(batch,)`, numbers in regression and int64 in classification; None computes no losses.
            teacher: What `teach` of an earlier stage's best model returned for these samples, `(batch, ...)`,
                for heads with a teacher.
            index: Position of each sample in its dataset, `(batch,)`, for heads that keep a store of training
                samples; others ignore it.
            output_internals: Also return the fields that only training loops read.

        Raises:
            ValueError: An input that the model reads is missing.
        """
        inputs = {
            "text_input_ids": text_input_ids,
            "text_mask": text_mask,
            "text_spans": text_spans,
            "text_values": text_values,
            "audio_values": audio_values,
            "audio_mask": audio_mask,
            "vision_values": vision_values,
            "vision_blendshapes": vision_blendshapes,
            "vision_mask": vision_mask,
            "text_states": text_states,
            "text_states_mask": text_states_mask,
            "audio_states": audio_states,
            "audio_states_mask": audio_states_mask,
            "vision_states": vision_states,
            "vision_states_mask": vision_states_mask,
            "dialogue": dialogue,
            "turn": turn,
            "speaker": speaker,
        }
        self._require_inputs(inputs)
        sequences = self.encode(modality_present, **inputs)
        output = self.decide(sequences, self._typed_labels(labels), teacher, index)
        return output if output_internals else output.without_internals()

    @property
    def input_names(self) -> list[str]:
        """Inputs that `forward` needs in addition to `modality_present`."""
        return [name for encoder in self.encoders.values() for name in encoder.input_names]

    def _require_inputs(self, inputs: Mapping[str, Tensor | None]) -> None:
        """Raise `ValueError` if `inputs` lack one that the model reads."""
        needed = [
            key
            for name, encoder in self.encoders.items()
            for key in (encoder.input_names if inputs[f"{name}_states"] is None else (f"{name}_states_mask",))
        ]
        if missing := [key for key in needed if inputs[key] is None]:
            raise ValueError(
                f"the model needs {', '.join(missing)}: make batches with the checkpoint's processor, in "
                "transformers.Trainer with data_collator=MSADataCollator(processor)"
            )

    def _typed_labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels `(batch,)`, as floats in a regression: `Trainer` may pass integers."""
        as_integers = labels is not None and not labels.is_floating_point()
        return labels.float() if as_integers and self.config.is_regression else labels

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the text encoder.

        Raises:
            NotImplementedError: A model of precomputed features has none.
        """
        return self._text_model().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the text encoder; errors as in `get_input_embeddings`."""
        self._text_model().set_input_embeddings(value)

    def _text_model(self) -> PreTrainedModel:
        if self.config.feature_widths is not None:
            raise NotImplementedError("a model of precomputed features has no token embeddings")
        return self.encoders["text"].model

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload to the Hub for `push_to_hub`, with a model card that names the repository."""
        if self.config.trained_on:
            write_model_card(Path(working_dir), self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def modality_parameters(self) -> dict[str, list[Parameter]]:
        """Parameters of each modality: its encoder, and those that context and head declare."""
        of_context, of_head = self.context.modality_parameters(), self.head.modality_parameters()
        return {
            name: [*self.encoders[name].parameters(), *of_context[name], *of_head[name]]
            for name in MODALITIES
        }

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, but tensors keep the names of the model, and weights the mode of a new file.

        transformers would give the tensors of some encoders (ViT, DINOv2) the names of its earlier versions,
        and safetensors makes its files readable by their owner only.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        for file in Path(save_directory).glob("model*.safetensors"):
            shutil.copymode(Path(save_directory, CONFIG_NAME), file)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that do not match the configuration are an error.

        With `output_loading_info`, nothing is refused and the report is returned too.

        Raises:
            ValueError: The checkpoint lacks tensors of the model, or has others.
        """
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for name in model._fixed:  # positions that an encoder never trains; loading makes them trainable
            model.get_parameter(name).requires_grad_(False)
        if output_loading_info:
            return model, found
        if names := found["missing_keys"] | found["unexpected_keys"]:
            raise ValueError(
                f"{model.name_or_path}: the weights do not match config.json in {len(names)} tensors, for "
                f"example {min(names)}"
            )
        return model

    @classmethod
    def from_pretrained_encoders(cls, config: MSAConfig) -> "MSAModel":
        """Build a new model with the pretrained encoders that `config` names: `text_encoder` and so on.

        Raises:
            EncoderError: An encoder is unavailable.
        """
        model = cls(config)
        for modality, name in config.encoder_names.items():
            model.encoders[modality].load_pretrained(name)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained builds on the meta device: every parameter must be initialised here
        of_a_library = type(module).__module__.startswith(("torch.", "transformers."))
        of_ours = not of_a_library and hasattr(module, "reset_parameters")
        if of_ours or isinstance(module, nn.GRU):  # of which transformers initialises nothing
            module.reset_parameters()
        elif not isinstance(module, PreTrainedModel):
            super()._init_weights(module)


def open_text_encoder(encoders: Mapping[str, nn.Module], head: str, layer: int) -> None:
    """Prepare the text encoder for a head that acts inside it.

    Args:
        encoders: The encoders by modality.
        head: Name of the head, for messages.
        layer: Layer after which the head acts.

    Raises:
        EncoderError: The encoder cannot be opened there, or the model reads precomputed features.
    """
    if not isinstance(encoders["text"], TextEncoder):
        raise EncoderError(
            f"head {head!r} acts after layer {layer} of the text encoder, and precomputed features have "
            "none: train on clips, or set model.head_kwargs.layer=null, which acts on the features themselves"
        )
    encoders["text"].open_at(layer)


def look_up(table: Mapping[str, type], kind: str, name: str, plugins: Sequence[str] | None = None) -> type:
    """Class registered under `name`.

    Args:
        table: Classes by name.
        kind: What they are, for the message.
        name: Name of the class.
        plugins: Modules that register the classes of a checkpoint, from its configuration.

    Raises:
        ValueError: The name is unknown; the message names the plug-ins, or lists the known names.
    """
    if name in table:
        return table[name]
    if plugins:
        needed = f"this checkpoint needs the plug-in {' '.join(plugins)}: import it first, or give --plugin"
        raise ValueError(f"unknown {kind} {name!r}: {needed}")
    raise ValueError(
        f"unknown {kind} {name!r}; known are {', '.join(sorted(table))}, or import your own with plugins: "
        "[package]"
    )
