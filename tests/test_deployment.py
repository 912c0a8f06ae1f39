# SPDX-License-Identifier: Apache-2.0
"""The model in the hands of other libraries: `transformers.Trainer`, attention kernels, `torch.export`."""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import compute_module_sizes
from safetensors.torch import load_file, save_file
from torch.export import Dim
from transformers import (
    AutoModel,
    AutoProcessor,
    MPNetConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    WhisperConfig,
)

from feature_extractors import ClipFeatures
from msa_online import MSAConfig, MSADataCollator, MSAModel, MSAOutput
from msa_online.encoders.pretrained import EncoderError
from msa_online.methods import CALIBRATORS, HEADS
from msa_online.modalities import MODALITIES
from msa_online.training.callback import RunningStateCallback

SENTENCES = ["i loved the film", "a bad ending", "it was not really good but great", "", "awful", "the movie"]
SCORES = [2.5, -1.5, 1, 0, -3, 0.5]
WIDTHS = {"text": 6, "audio": 4, "vision": 5}
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture
def samples(tiny_processor) -> list[dict]:
    """Samples as a user makes them: of different lengths, one without a transcript, labels as numbers."""
    random = np.random.default_rng(0)
    made = []
    for number, (text, label) in enumerate(zip(SENTENCES, SCORES, strict=True)):
        frames = 2 + number % 3
        features = ClipFeatures(
            waveform=random.normal(0, 999, size=3200 + 1600 * number).astype(np.int16),
            face_crops=random.integers(0, 256, size=(frames, 32, 32, 3)).astype(np.uint8),
            blendshapes=random.random((frames, 52)).astype(np.float32),
            face_found=np.ones(frames, dtype=bool),
            timestamps=np.arange(frames, dtype=np.float32),
            findings=(),
            duration=float(frames),
        )
        made.append({**tiny_processor.encode(features, text), "labels": label})
    return made


@pytest.fixture
def make_model(tiny_config):
    def make(head: str, **settings) -> MSAModel:
        torch.manual_seed(0)
        return MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": head, **settings}))

    return make


@every_head
def test_a_trainer_with_its_defaults_trains_evaluates_predicts_and_saves(
    head, make_model, tiny_processor, samples, tmp_path
):
    model = make_model(head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), report_to="none", disable_tqdm=True, num_train_epochs=2),
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=MSADataCollator(tiny_processor),
        processing_class=tiny_processor,
        compute_metrics=lambda found: {"mae": abs(found.predictions[:, 0] - found.label_ids).mean()},
    )
    assert np.isfinite(trainer.train().training_loss)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("encoders.text", "encoders.audio", "encoders.vision", "head."):
        assert any(name.startswith(part) for name in moved), part
    found = trainer.predict(samples)
    assert found.predictions.shape == (6, 1)
    assert found.label_ids == pytest.approx(SCORES)
    scores = trainer.evaluate()
    assert scores["eval_mae"] == pytest.approx(found.metrics["test_mae"])
    assert scores["eval_mae"] == pytest.approx(abs(found.predictions[:, 0] - np.array(SCORES)).mean())
    trainer.save_model()
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = again(**MSADataCollator(processor)(samples)).logits
    np.testing.assert_allclose(logits.numpy(), found.predictions, atol=1e-5)


def test_a_trainer_trains_a_classifier(make_model, tiny_processor, samples, tmp_path):
    names = {"id2label": {0: "sad", 1: "happy"}, "label2id": {"sad": 0, "happy": 1}, "label_range": None}
    trainer = Trainer(
        make_model("late_fusion", **names),
        TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, num_train_epochs=1),
        train_dataset=[{**sample, "labels": int(sample["labels"] > 0)} for sample in samples],
        data_collator=MSADataCollator(tiny_processor),
    )
    assert np.isfinite(trainer.train().training_loss)
    assert trainer.predict(trainer.train_dataset).predictions.shape == (6, 2)


@pytest.mark.needs("pase")
def test_prototypes_move_in_a_trainer_that_is_told_of_them(make_model, tiny_processor, samples, tmp_path):
    model = make_model("pase")
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, num_train_epochs=1),
        train_dataset=samples,
        data_collator=MSADataCollator(tiny_processor),
        callbacks=[RunningStateCallback()],
    )
    trainer.train()
    assert model.head.prototypes.known.any()


def test_batches_of_the_collator_are_those_of_the_processor(tiny_processor, samples):
    as_lists = [
        {key: value.tolist() if key == "audio_values" else value for key, value in sample.items()}
        for sample in samples
    ]
    labels = torch.tensor(SCORES)
    expected = tiny_processor.pad(
        [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
    )
    for given in (samples, as_lists):
        batch = MSADataCollator(tiny_processor)(given)
        assert torch.equal(batch.pop("labels"), labels)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
    without = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
    assert "labels" not in MSADataCollator(tiny_processor)(without)


def test_an_input_that_is_missing_is_named_with_the_remedy(tiny_model, make_batch):
    batch = make_batch()
    del batch["text_mask"], batch["vision_blendshapes"]
    with pytest.raises(ValueError, match="needs text_mask, vision_blendshapes: .*MSADataCollator"):
        tiny_model(**batch)
    kinds = {value.kind for value in inspect.signature(MSAModel.forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds  # Trainer would hide typing errors, and rescale losses


def test_integers_are_legal_labels_of_a_regression(make_model, make_batch):
    batch = make_batch()
    whole = batch["labels"].round()
    for head in HEADS:
        model = make_model(head).eval()
        expected = model(**{**batch, "labels": whole}).loss
        assert torch.equal(model(**{**batch, "labels": whole.long()}).loss, expected)


@every_head
def test_the_public_output_holds_tensors_only(head, make_model, make_batch):
    """DataParallel, torch.export and Trainer take outputs apart and put them together again."""
    output = make_model(head)(**make_batch())
    assert isinstance(output, MSAOutput)
    for name, value in output.items():
        values = value.values() if isinstance(value, dict) else [value]
        assert all(isinstance(each, torch.Tensor) for each in values), name


# --- attention of the text encoder ---


@pytest.fixture
def saved(make_model, tmp_path):
    make_model("late_fusion").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "used"), [({}, "sdpa"), *(({"attn_implementation": it}, it) for it in ("sdpa", "eager"))]
)
def test_the_text_encoder_uses_the_requested_attention(asked, used, saved, make_batch):
    model = AutoModel.from_pretrained(saved, **asked)
    assert model.encoders["text"].model.config._attn_implementation == used
    batch = make_batch()
    expected = AutoModel.from_pretrained(saved, attn_implementation="eager")(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    model.set_attn_implementation("eager")
    assert model.encoders["text"].model.config._attn_implementation == "eager"


def test_attention_that_a_text_encoder_lacks_is_refused_in_words(make_model, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    make_model("late_fusion", text_config=MPNetConfig(vocab_size=50, **small)).save_pretrained(tmp_path)
    for asked in ({}, {"attn_implementation": "eager"}):
        model = AutoModel.from_pretrained(tmp_path, **asked)
        assert model.encoders["text"].model.config._attn_implementation == "eager"
    with pytest.raises(EncoderError, match="MPNetModel does not support.*eager"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")


# --- torch.export ---

SMALL_HEADS = {
    head: {"hidden_size": 8}
    | {name: 1 for name in ("depth", "memory_depth") if name in inspect.signature(HEADS[head]).parameters}
    for head in HEADS
}


def features_batch(size: int, steps: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    batch = {"modality_present": torch.rand(size, 3, generator=generator) > 0.2}
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(size, steps, width, generator=generator)
        batch[f"{name}_mask"] = torch.arange(steps) < torch.randint(1, steps, (size, 1), generator=generator)
    return batch


@every_head
def test_an_exported_model_predicts_the_same_for_batches_of_any_size(head, make_model, make_batch, tmp_path):
    model = make_model(head, calibrator=[*CALIBRATORS][-1], head_kwargs=SMALL_HEADS[head]).eval()

    def inputs(size: int) -> dict[str, torch.Tensor]:
        return {k: v for k, v in make_batch(size).items() if k not in ("labels", "index")}

    sizes = {name: {0: Dim.DYNAMIC} for name in inputs(4)}
    exported = torch.export.export(model, (), kwargs=inputs(4), dynamic_shapes=sizes)
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in (4, 7):
        expected = model(**inputs(size)).logits
        torch.testing.assert_close(program(**inputs(size)).logits, expected, atol=1e-6, rtol=0)


@every_head
def test_an_exported_model_of_features_takes_any_number_of_steps(head):
    torch.manual_seed(0)
    model = MSAModel(MSAConfig(feature_widths=WIDTHS, head=head, head_kwargs=SMALL_HEADS[head])).eval()
    batch = features_batch(4, 7)
    sizes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in batch} | {
        "modality_present": {0: Dim.DYNAMIC}
    }
    program = torch.export.export(model, (), kwargs=batch, dynamic_shapes=sizes).module()
    for size, steps in ((4, 7), (2, 11)):
        batch = features_batch(size, steps)
        torch.testing.assert_close(program(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


# --- what transformers and Accelerate ask of a model ---


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@every_head
def test_gradient_checkpointing_changes_no_gradient_and_recomputes_the_layers_of_text(
    head, make_model, make_batch
):
    def gradients(model: MSAModel) -> list[torch.Tensor | None]:
        torch.manual_seed(1)
        model.train()(**make_batch()).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.manual_seed(0)
    model = make_model(head)
    changed = copy.deepcopy(model)
    changed.gradient_checkpointing_enable()
    calls = []
    layer = changed.encoders["text"].model.encoder.layer[0].attention
    layer.register_forward_hook(lambda *_: calls.append(1))
    for expected, found in zip(gradients(model), gradients(changed), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_trainer_checkpoints_gradients(make_model, tiny_processor, samples, tmp_path):
    model = make_model("late_fusion")
    arguments = TrainingArguments(
        tmp_path, gradient_checkpointing=True, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    collator = MSADataCollator(tiny_processor)
    Trainer(model, arguments, train_dataset=samples, data_collator=collator).train()
    assert model.is_activation_checkpointing


def test_token_embeddings_are_those_of_the_text_encoder_and_grow(make_model, make_batch):
    model = make_model("late_fusion").eval()
    before = model(**make_batch()).logits
    assert model.get_input_embeddings() is model.encoders["text"].model.embeddings.word_embeddings
    vocabulary = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(vocabulary + 3)
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == vocabulary + 3
    torch.testing.assert_close(model(**make_batch()).logits, before)
    with pytest.raises(NotImplementedError, match="precomputed features has no token embeddings"):
        MSAModel(MSAConfig(feature_widths=WIDTHS)).get_input_embeddings()


@every_head
def test_a_device_map_keeps_each_part_on_one_device(head, make_model):
    model = make_model(head, calibrator=[*CALIBRATORS][-1])
    size = compute_module_sizes(model)[""]
    parts = {*(f"encoders.{name}" for name in MODALITIES), "calibrator", "context", "head", "probes"}
    for share in (0.5, 0.7, 0.9):  # "disk" stands for a second device
        room = {"cpu": int(share * size), "disk": size}
        devices = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
        assert devices.keys() <= parts | {"encoders", ""}, devices


@every_head
def test_what_a_part_reads_follows_it_to_its_device(head, make_model, make_batch):
    """The device "meta" stands for a second one: it needs no hardware, and computes shapes only."""
    model = make_model(head).eval()
    batch = {name: values for name, values in make_batch().items() if name != "labels"}
    add_hook_to_module(model.encoders["text"], AlignDevicesHook(execution_device="cpu"))
    expected = model(**batch).logits
    sequences = model.encode(**batch)
    hook = AlignDevicesHook(execution_device="meta")
    (moved,), _ = hook.pre_forward(model.head, sequences)
    assert all(each.values.device == each.mask.device == torch.device("meta") for each in moved.values())
    torch.testing.assert_close(model.decide(sequences).logits, expected)


def test_a_folder_opens_with_a_device_map(saved, make_batch):
    expected = AutoModel.from_pretrained(saved)(**make_batch()).logits
    for device_map in ("auto", {"": "cpu"}):
        model = AutoModel.from_pretrained(saved, device_map=device_map)
        torch.testing.assert_close(model(**make_batch()).logits, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_weights_that_do_not_fit_are_an_error_of_the_auto_class_too(prefix, saved):
    weights = {prefix + name: value for name, value in load_file(saved / "model.safetensors").items()}
    weights.popitem()
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights do not match config.json.*, for example "):
        AutoModel.from_pretrained(saved)


# --- pretrained encoders for all three modalities ---

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}


@pytest.fixture
def with_encoders(make_model, tmp_path) -> Path:
    """A checkpoint around BERT, Whisper's encoder and ViT."""
    encoders = {
        "audio_config": WhisperConfig(**SPEECH, num_mel_bins=80),
        "vision_config": ViTConfig(**SIZES, image_size=32, patch_size=16),
    }
    make_model("late_fusion", **encoders).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def inputs_of(make_batch):
    def make(size: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(size)
        batch = make_batch(size) | {"vision_values": torch.randn(size, 4, 3, 32, 32, generator=generator)}
        return {name: value for name, value in batch.items() if name not in ("labels", "index")}

    return make


def test_pretrained_encoders_take_the_attention_and_the_type_asked_for(with_encoders, inputs_of):
    plain = AutoModel.from_pretrained(with_encoders, attn_implementation="eager")
    assert {encoder.model.config._attn_implementation for encoder in plain.encoders.values()} == {"eager"}
    expected = plain(**inputs_of(2)).logits
    for asked in ({"attn_implementation": "sdpa"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        model = AutoModel.from_pretrained(with_encoders, **asked)
        used = {encoder.model.config._attn_implementation for encoder in model.encoders.values()}
        assert used == {"sdpa"}
        assert {value.dtype for value in model.parameters()} == {asked.get("dtype", torch.float32)}
        tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(asked.get("dtype"), 1e-5)
        logits = model(**inputs_of(2)).logits.float()
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_pretrained_encoders_are_exported_for_batches_of_any_size(with_encoders, inputs_of):
    model = AutoModel.from_pretrained(with_encoders).eval()
    sizes = {name: {0: Dim.DYNAMIC} for name in inputs_of(4)}
    program = torch.export.export(model, (), kwargs=inputs_of(4), dynamic_shapes=sizes).module()
    for size in (4, 7):
        expected = model(**inputs_of(size)).logits
        torch.testing.assert_close(program(**inputs_of(size)).logits, expected, atol=1e-6, rtol=0)


def test_a_trainer_trains_and_checkpoints_pretrained_encoders(with_encoders, inputs_of, tmp_path):
    batch = inputs_of(6) | {"labels": torch.tensor(SCORES)}
    rows = [{name: value[row] for name, value in batch.items()} for row in range(6)]
    trainer = Trainer(
        AutoModel.from_pretrained(with_encoders),
        TrainingArguments(
            str(tmp_path / "out"),
            report_to="none",
            disable_tqdm=True,
            num_train_epochs=1,
            gradient_checkpointing=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda found: {"mae": abs(found.predictions[:, 0] - found.label_ids).mean()},
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for encoder in trainer.model.encoders.values():
        assert all(layer.gradient_checkpointing for layer in encoder.layers)
    for part in trainer.model.encoders:
        names = [name for name in before if name.startswith(f"encoders.{part}.model.")]
        assert any(not torch.equal(trainer.model.state_dict()[name], before[name]) for name in names), part
    assert trainer.evaluate()["eval_mae"] > 0
