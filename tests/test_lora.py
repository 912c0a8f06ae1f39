# SPDX-License-Identifier: Apache-2.0
"""Adapters: what they train, what they merge to, and folders in peft's format, ours and a user's own."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from msa_online import MSAConfig, MSADataCollator, MSAModel, MSAPipeline
from msa_online.describe import describe
from msa_online.front_ends import sound_shape
from msa_online.hub import CheckpointError, load_checkpoint, load_config, load_for_fine_tuning
from msa_online.lora import (
    AdapterError,
    LoraSettings,
    adapted_modalities,
    add_lora,
    merged_weights,
    open_adapter,
    remove_lora,
    save_adapter,
)
from msa_online.methods import HEADS

TOLERANCE = {"atol": 1e-5, "rtol": 0}  # of scores in [-3, 3]; merging rounds each weight once


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def base(tiny_config, tiny_text_encoder) -> MSAModel:
    """A new model around a pretrained text encoder."""
    torch.manual_seed(0)
    tiny_config.text_encoder = str(tiny_text_encoder)
    return MSAModel.from_pretrained_encoders(tiny_config).eval()


def shift(model: torch.nn.Module) -> None:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def adapted(base) -> MSAModel:
    add_lora(base.encoders["text"], LoraSettings(r=4))
    shift(base)
    return base


def scores(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


@pytest.fixture
def folder(adapted, tiny_processor, tmp_path) -> Path:
    """What a run publishes in `adapter/`; tests damage it."""
    save_adapter(adapted, tmp_path)
    adapted.config.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    named(tmp_path, text_encoder=adapted.config.text_encoder)
    change(tmp_path, base_model_name_or_path=adapted.config.text_encoder)
    return tmp_path


def change(folder: Path, name: str = "adapter_config.json", **values) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def named(folder: Path, **values) -> None:
    change(folder, "config.json", **values)


# --- training ---


def test_the_adapters_and_all_other_parts_are_trained_but_no_weight_of_the_encoder(base, make_batch):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    layers = add_lora(base.encoders["text"], LoraSettings(r=4))
    assert len(layers) == 4 and {name.rpartition(".")[2] for name in layers} == {"query", "value"}
    trained = {name for name, value in base.named_parameters() if value.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 8
    assert trained - adapters == {name for name in before if not name.startswith("encoders.text.")}
    base.train()(**make_batch()).loss.backward()
    shift(base)
    base.train()(**make_batch()).loss.backward()  # a new lora_B is zero, and then lora_A has no gradient
    assert all(base.get_parameter(name).grad is not None for name in trained)
    assert all(base.get_parameter(name).grad.any() for name in adapters)
    remove_lora(base)
    after = base.state_dict()
    assert after.keys() == before.keys() and not adapted_modalities(base)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoders.text."))


def test_a_new_adapter_changes_no_prediction(base, make_batch):
    before = scores(base, make_batch())
    add_lora(base.encoders["text"], LoraSettings(r=4, dropout=0.5))
    assert torch.equal(scores(base, make_batch()), before)


def test_rank_scaling_dropout_and_layers_are_those_of_the_settings(base):
    pattern = r".*layer\.1\..*dense"
    settings = LoraSettings(r=2, alpha=6, dropout=0.25, target_modules=pattern)
    assert len(add_lora(base.encoders["text"], settings)) == 3
    layer = base.encoders["text"].model.encoder.layer[1].output.dense
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (2, 64)


@pytest.mark.parametrize("targets", [["nothing"], ["LayerNorm"]])
def test_layers_that_cannot_be_adapted_are_named_with_those_that_can(base, targets):
    with pytest.raises(AdapterError, match=r"target_modules: dense, key, query, value$") as caught:
        add_lora(base.encoders["text"], LoraSettings(target_modules=targets))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_train_under_autocast(base, make_batch, dtype):
    add_lora(base.encoders["text"], LoraSettings(r=4))
    with torch.autocast("cpu", dtype):
        base.train()(**make_batch()).loss.backward()
    gradients = [value.grad for name, value in base.named_parameters() if ".lora_B." in name]
    assert len(gradients) == 4
    assert all(it.dtype == torch.float32 and it.isfinite().all() and it.any() for it in gradients)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVEFORM = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (80, 4), "num_conv_pos_embeddings": 6}
WAVEFORM |= {"num_conv_pos_embedding_groups": 2}
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
IMAGES = SIZES | {"image_size": 32, "patch_size": 16}
ENCODERS = {  # settings, and the layers that are adapted by default
    "whisper": (WHISPER, "k_proj out_proj q_proj v_proj"),
    "wav2vec2": (SIZES | WAVEFORM, "k_proj out_proj q_proj v_proj"),
    "wavlm": (SIZES | WAVEFORM, "intermediate_dense output_dense"),
    "wav2vec2-bert": (SIZES, "linear_k linear_out linear_q linear_v"),
    "audio-spectrogram-transformer": (SIZES, "k_proj o_proj q_proj v_proj"),
    "vit": (IMAGES, "k_proj o_proj q_proj v_proj"),
    "dinov2": (IMAGES, "k_proj o_proj q_proj v_proj"),
    "beit": (IMAGES, "k_proj o_proj q_proj v_proj"),
    "clip_vision_model": (IMAGES, "k_proj out_proj q_proj v_proj"),
    "siglip_vision_model": (IMAGES, "k_proj out_proj q_proj v_proj"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_adapter_of_an_encoder_gets_a_gradient(kind, tiny_config, make_batch):
    """Networks that read the weights of a layer without calling it would leave its adapter without one."""
    sizes, layers = ENCODERS[kind]
    network = AutoConfig.for_model(kind, **sizes)
    modality = "vision" if "image_size" in sizes else "audio"
    model = MSAModel(MSAConfig(**tiny_config.to_dict() | {f"{modality}_config": network}))
    encoder = model.encoders[modality]
    if modality == "vision":
        inputs = {"vision_values": torch.randn(4, 4, 3, 32, 32)}
    else:
        values = torch.randn(4, *sound_shape(0.5, encoder.default_feature_extractor(network)))
        inputs = {"audio_values": values, "audio_mask": torch.ones(values.shape[:2], dtype=torch.bool)}
    adapted = add_lora(encoder, LoraSettings(r=2))
    assert sorted({name.rpartition(".")[2] for name in adapted}) == layers.split()
    shift(model)  # a new lora_B is zero, and then lora_A has no gradient
    model.train()(**make_batch() | inputs).loss.backward()
    adapters = [name for name, value in encoder.model.named_parameters() if value.requires_grad]
    assert len(adapters) == 2 * len(adapted) and all(".lora_" in name for name in adapters)
    assert [name for name in adapters if not encoder.model.get_parameter(name).grad.any()] == []


def test_encoders_with_adapters_of_their_own_kind_are_published_together(
    base, tiny_config, tiny_text_encoder, make_batch, tmp_path
):
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    audio = AutoConfig.for_model("whisper", **WHISPER, **decoder)
    AutoModel.from_config(audio).save_pretrained(tmp_path / "speech")
    settings = {"audio_config": audio, "audio_encoder": str(tmp_path / "speech"), "audio_layer": "weighted"}
    config = MSAConfig(**{**tiny_config.to_dict(), **settings})
    config.text_encoder = str(tiny_text_encoder)
    model = MSAModel.from_pretrained_encoders(config)
    add_lora(model.encoders["text"], LoraSettings(r=4))
    add_lora(model.encoders["audio"], LoraSettings(r=2, alpha=6))
    shift(model)
    batch = make_batch()
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["r"] == 4 and set(written["rank_pattern"].values()) == {2}
    assert written["modules_to_save"][:2] == ["encoders.audio.layer_weights", "encoders.audio.norm"]
    opened = open_adapter(MSAModel.from_pretrained_encoders(config), folder)
    torch.testing.assert_close(scores(opened, batch), scores(model, batch), **TOLERANCE)
    by_peft = PeftModel.from_pretrained(MSAModel.from_pretrained_encoders(config), str(folder))
    torch.testing.assert_close(scores(by_peft, batch), scores(model, batch), **TOLERANCE)


def test_adapters_that_would_have_no_effect_are_refused(tiny_config):
    config = AutoConfig.for_model("wavlm", **SIZES, **WAVEFORM)
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "audio_config": config}))
    with pytest.raises(
        AdapterError, match="WavLM's attention reads.*target_modules, like .'intermediate_dense"
    ):
        add_lora(model.encoders["audio"], LoraSettings(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "["}, "unterminated character set.*name linear layers"),
        ({"target_modules": []}, "name linear layers"),
        ({"r": 10**9}, "r is 1,000,000,000: at most the width of the encoder, 16"),
        ({"target_modules": ["conv"]}, "a convolution, whose adapter cannot always be merged"),
    ],
)
def test_settings_that_no_layer_fits_are_refused(settings, message, tiny_config):
    config = AutoConfig.for_model("hubert", **SIZES, **WAVEFORM)
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "audio_config": config}))
    with pytest.raises(AdapterError, match=message):
        add_lora(model.encoders["audio"], LoraSettings(**settings))


# --- merging and publishing ---


def test_merged_weights_predict_what_the_adapters_do(adapted, make_batch):
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    expected = scores(adapted, make_batch())
    plain = MSAModel(adapted.config)
    plain.load_state_dict(merged_weights(adapted))
    torch.testing.assert_close(scores(plain, make_batch()), expected, **TOLERANCE)
    after = adapted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    remove_lora(adapted)
    assert (scores(adapted, make_batch()) - expected).abs().max() > 1e-3  # the adapters matter


def test_an_adapter_opens_with_its_base_encoder(folder, adapted, make_batch):
    model, processor = load_checkpoint(folder)
    assert type(model) is MSAModel and processor.settings.num_frames == 4
    assert model.state_dict().keys() == merged_weights(adapted).keys()
    torch.testing.assert_close(scores(model, make_batch()), scores(adapted, make_batch()), **TOLERANCE)
    assert {value.dtype for value in load_checkpoint(folder, dtype="bfloat16")[0].parameters()} == {
        torch.bfloat16
    }
    assert MSAPipeline.from_pretrained(folder)(text="a movie").score is not None
    assert describe(folder).parameters["total"] == sum(it.numel() for it in model.parameters())


def test_fine_tuning_starts_from_an_adapter(folder, adapted):
    start = load_for_fine_tuning(folder, load_config(folder))
    assert "new" not in str(start)
    merged = merged_weights(adapted)
    torch.testing.assert_close(dict(start.model.state_dict()), merged, **TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
def test_peft_itself_opens_an_adapter(head, base, make_batch, tmp_path):
    config = MSAConfig(**{**base.config.to_dict(), "head": head, "head_kwargs": {"hidden_size": 8}})
    config.text_encoder = base.config.text_encoder
    model = MSAModel.from_pretrained_encoders(config)
    add_lora(model.encoders["text"], LoraSettings(r=4, target_modules=["dense"]))
    shift(model)
    save_adapter(model, tmp_path)
    other = MSAModel.from_pretrained_encoders(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing tensors
        opened = PeftModel.from_pretrained(other, str(tmp_path))
    torch.testing.assert_close(scores(opened, make_batch()), scores(model, make_batch()), **TOLERANCE)


def test_an_adapter_holds_little_and_no_local_path(folder, adapted, tmp_path):
    save_adapter(adapted, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == Path(adapted.config.text_encoder).name
    assert settings["modules_to_save"] == ["encoders.audio", "encoders.vision", "head"]
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in names if "encoders.text." in name and ".lora_" not in name]


# --- folders of a user's own peft code ---


@pytest.fixture
def run(base, tiny_processor, tmp_path) -> Path:
    """A published checkpoint."""
    base.save_pretrained(tmp_path / "run")
    tiny_processor.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_model_trained_by_a_users_own_peft_code_opens(run, make_batch, tiny_processor, tmp_path):
    lora = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["head"])
    model = get_peft_model(MSAModel.from_pretrained(run), lora)
    batch = make_batch(8)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=0.01, report_to="none", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    mine = tmp_path / "mine"
    model.save_pretrained(mine)
    opened, processor = load_checkpoint(mine)
    assert type(opened) is MSAModel and processor.settings.num_frames == 4  # from the base
    torch.testing.assert_close(scores(opened, batch), scores(model, batch), **TOLERANCE)
    assert (scores(opened, batch) - scores(MSAModel.from_pretrained(run), batch)).abs().max() > 1e-3
    assert MSAPipeline.from_pretrained(mine)(text="a movie").score is not None
    assert load_config(mine).head == "late_fusion"
    assert MSADataCollator(processor)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["classifier", "encoders.audio"]},
        {"bias": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": ["word_embeddings", "dense"], "rank_pattern": {"dense": 2}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_kinds_of_lora_open_as_peft_merges_them(settings, run, make_batch, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(**{"r": 4, "target_modules": ["query"], **settings})
    model = get_peft_model(MSAModel.from_pretrained(run), lora)
    shift(model)
    model.save_pretrained(tmp_path / "mine")
    opened, _ = load_checkpoint(tmp_path / "mine")
    torch.testing.assert_close(scores(opened, make_batch()), scores(model, make_batch()), **TOLERANCE)


def test_an_adapter_of_a_fine_tuned_checkpoint_needs_that_checkpoint(run, make_batch, tmp_path):
    """Its frozen weights are those of the checkpoint, not of the encoder that once was its start."""
    trained = MSAModel.from_pretrained(run)
    shift(trained)
    trained.save_pretrained(run)
    config = MSAConfig(**{**load_config(run).to_dict(), "head_kwargs": {"hidden_size": 24}})
    model = load_for_fine_tuning(run, config).model
    add_lora(model.encoders["text"], LoraSettings(r=4))
    shift(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder)
    model.config.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "run"
    change(folder, base_model_name_or_path=str(run))
    opened, _ = load_checkpoint(folder)
    assert opened.config.head_kwargs == {"hidden_size": 24}
    torch.testing.assert_close(scores(opened, make_batch()), scores(model, make_batch()), **TOLERANCE)


# --- folders that are refused ---


def refused(folder: Path, opener=load_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        opener(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    return message


def without(folder: Path, *parts: str) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if not all(part in name for part in parts)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "parts", [("layer.0", "query.lora_A"), ("head.classifier.bias",), ("encoders.audio",)]
)
def test_an_adapter_that_lacks_tensors_is_refused(folder, parts):
    without(folder, *parts)
    assert "does not match adapter_config.json" in refused(folder)


def test_an_adapter_with_tensors_of_another_model_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.head.more": torch.zeros(1)}, path)
    assert "in 1 tensors, for example head.more" in refused(folder)
    save_file({**load_file(path), "base_model.model.head.classifier.bias": torch.zeros(7)}, path)
    assert "cannot be read" in refused(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "only adapters of type LORA"),
        ({"megatron_config": {"a": 1}}, "only adapters of type LORA"),
        ({"r": 8}, "cannot be read"),
        ({"target_modules": ["nothing"]}, "cannot be read"),
    ],
)
def test_an_adapter_with_another_configuration_is_refused(folder, values, message):
    change(folder, **values)
    assert message in refused(folder)


def test_pickled_adapters_are_never_opened(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: cannot be read" in refused(folder)


def test_an_adapter_without_its_base_encoder_says_which_it_needs(folder):
    change(folder, base_model_name_or_path="gone")
    named(folder, text_encoder="gone")
    message = refused(folder)
    assert "'gone'" in message and "config.json" in message


def test_a_users_adapter_without_its_base_says_which_it_needs(run, tmp_path):
    mine = tmp_path / "mine"
    get_peft_model(MSAModel.from_pretrained(run), LoraConfig(target_modules=["query"])).save_pretrained(mine)
    for opener in (load_checkpoint, load_config, MSAPipeline.from_pretrained):
        opener(mine)
        change(mine, base_model_name_or_path=str(tmp_path / "gone"))
        message = refused(mine, opener)
        assert str(tmp_path / "gone") in message and "base_model_name_or_path" in message
        change(mine, base_model_name_or_path=str(run))
    change(mine, base_model_name_or_path=None)
    assert "names no base model" in refused(mine)
    change(mine, base_model_name_or_path=str(mine))
    assert "is an adapter too" in refused(mine)
