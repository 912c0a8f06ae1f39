# SPDX-License-Identifier: Apache-2.0
"""Runs with pretrained encoders: what is refused before data are read, training on two processes."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, WhisperFeatureExtractor

from msa_online import MSAConfig
from msa_online.encoders import encoder_class, load_encoder_config, load_preprocessors, make_encoders
from msa_online.encoders.pretrained import EncoderError
from msa_online.hub import load_checkpoint
from msa_online.training.config_reader import parse_arguments
from msa_online.training.model import build_model, require_encoders
from msa_online.training.yaml_reader import ConfigurationError

WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "max_source_positions": 100,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory) -> Path:
    """A folder with a small random Whisper and its feature extractor, as a pretrained one would be saved."""
    folder = tmp_path_factory.mktemp("tiny_whisper")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("whisper", **WHISPER)).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tiny_text_encoder, tiny_whisper):
    """A function that makes the arguments of a run with a tiny Whisper; its clips do not exist."""

    def make(training: dict | None = None, **model):
        model = {"text_encoder": str(tiny_text_encoder), "audio_encoder": str(tiny_whisper), **model}
        data = {"path": "/nowhere"}
        return parse_arguments({"model": model, "data": data, "training": training or {}})

    return make


def changed(folder: Path, source: Path, file: str, **changes) -> str:
    """A copy of an encoder's folder with changes in one of its files."""
    folder.mkdir()
    for each in source.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    document = json.loads((source / file).read_text())
    (folder / file).write_text(json.dumps(document | changes))
    return str(folder)


def test_encoders_that_fit_pass(arguments):
    require_encoders(arguments(audio_layer=3))


@pytest.mark.parametrize("lost", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_text_encoder_without_the_files_of_its_tokenizer_is_refused(
    arguments, tiny_text_encoder, tmp_path, lost
):
    """transformers would make a tokenizer that knows no word."""
    folder = changed(
        tmp_path / "bare", tiny_text_encoder, "tokenizer_config.json", tokenizer_class="BertTokenizer"
    )
    for name in lost:
        Path(folder, name).unlink()
    with pytest.raises(EncoderError, match=f"'{folder}': its tokenizer has no vocabulary: put the files"):
        require_encoders(arguments(text_encoder=folder))


def test_a_tokenizer_of_a_larger_encoder_is_refused(arguments, tiny_text_encoder, tmp_path):
    folder = changed(tmp_path / "small", tiny_text_encoder, "config.json", vocab_size=10)
    with pytest.raises(EncoderError, match=r"has 10 tokens, and its tokenizer makes numbers up to \d\d: put"):
        require_encoders(arguments(text_encoder=folder))


def test_texts_longer_than_the_encoder_has_positions_for_are_refused(tiny_text_encoder, tmp_path):
    folder = changed(tmp_path / "short", tiny_text_encoder, "config.json", max_position_embeddings=20)
    document = {"model": {"text_encoder": folder}, "data": {"path": "/nowhere", "max_text_tokens": 20}}
    require_encoders(parse_arguments(document))
    document["data"]["max_text_tokens"] = 21
    with pytest.raises(
        ConfigurationError, match="tokens is 21, .* reads at most 20: set data.max_text_tokens=20"
    ):
        require_encoders(parse_arguments(document))


def test_an_encoder_of_another_modality_is_refused_with_the_right_key(
    arguments, tiny_text_encoder, tiny_whisper
):
    whisper, bert = str(tiny_whisper), str(tiny_text_encoder)
    for key, name, expected in (
        ("vision_encoder", whisper, "a 'whisper' model is no vision encoder: give it as model.audio_encoder"),
        ("text_encoder", whisper, "a 'whisper' model is no text encoder: give it as model.audio_encoder"),
        ("audio_encoder", bert, "a 'bert' model is no audio encoder: types for audio are "),
    ):
        with pytest.raises(EncoderError) as caught:
            require_encoders(arguments(**{key: name}))
        assert str(caught.value).startswith(f"model.{key} is {name!r}: {expected}")
        assert "\n" not in str(caught.value)


def test_a_layer_that_the_encoder_lacks_is_refused_before_data_are_read(arguments):
    with pytest.raises(EncoderError, match="audio_layer is 4, and the 'whisper' encoder has 3 layers"):
        require_encoders(arguments(audio_layer=4))


def test_an_encoder_for_another_sampling_rate_is_refused(arguments, tiny_whisper, tmp_path):
    name = "preprocessor_config.json"
    folder = changed(tmp_path / "slow", tiny_whisper, name, sampling_rate=8000)
    with pytest.raises(EncoderError, match=r"slow': .* reads sound at 8,000 samples a second.*16,000.*rate"):
        require_encoders(arguments(audio_encoder=folder))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"num_mel_bins": 128},
            r"\(100, 128\), and its feature extractor makes \(100, 80\)",
        ),
        ("preprocessor_config.json", {"chunk_length": 3}, "reads at most 2 s .* makes 3 s"),
        ("preprocessor_config.json", {"hop_length": 0}, "odd cannot be read .*division"),
        ("preprocessor_config.json", {"sampling_rate": "16k"}, "odd cannot be read .*'str' and 'int'"),
        ("config.json", {"d_model": "big"}, "'d_model' expected int, got str"),
        ("config.json", {"encoder_attention_heads": 5}, "makes no 'whisper' network .*as it was published"),
    ],
)
def test_files_of_an_encoder_that_do_not_fit_together_are_one_line(
    file, changes, message, arguments, tiny_whisper, tmp_path
):
    folder = changed(tmp_path / "odd", tiny_whisper, file, **changes)
    with pytest.raises(EncoderError, match=message) as caught:
        require_encoders(arguments(audio_encoder=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_list_in_place_of_an_encoders_settings_is_one_line(file, arguments, tiny_whisper, tmp_path):
    folder = changed(tmp_path / "list", tiny_whisper, file)
    (tmp_path / "list" / file).write_text("[1]")
    with pytest.raises(EncoderError, match="list cannot be read"):
        require_encoders(arguments(audio_encoder=folder))


@pytest.mark.parametrize(
    ("file", "key", "kind"),
    [
        ("config.json", "model_type", "AutoConfig"),
        ("preprocessor_config.json", "feature_extractor_type", "AutoFeatureExtractor"),
    ],
)
def test_code_that_an_encoders_files_name_is_neither_run_nor_offered(
    file, key, kind, arguments, tiny_whisper, tmp_path, capsys, monkeypatch
):
    folder = changed(tmp_path / "evil", tiny_whisper, file, **{key: "Evil", "auto_map": {kind: "evil.Evil"}})
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a hurried user answers
    with pytest.raises(EncoderError):
        require_encoders(arguments(audio_encoder=folder))
    assert not (tmp_path / "ran").exists() and "[y/N]" not in capsys.readouterr().out


def test_weights_that_are_a_pickle_are_not_opened(tiny_whisper, tmp_path):
    folder = changed(tmp_path / "pickled", tiny_whisper, "config.json")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    config = MSAConfig(audio_encoder=folder, audio_config=load_encoder_config("audio", folder))
    with pytest.raises(EncoderError, match="model.safetensors"):
        make_encoders(config)["audio"].load_pretrained(folder)


@pytest.mark.parametrize("kind", ["clip", "t5", "whisper", "swin"])
def test_a_model_that_reads_more_than_text_is_no_text_encoder(kind):
    with pytest.raises(EncoderError, match=f"a '{kind}' model is no text encoder"):
        encoder_class("text", AutoConfig.for_model(kind))


def test_a_model_type_that_transformers_lacks_is_one_line(arguments, tiny_whisper, tmp_path):
    folder = changed(tmp_path / "new", tiny_whisper, "config.json", model_type="whisper-9")
    with pytest.raises(EncoderError, match=r"type 'whisper-9', which the installed transformers [\d.]+"):
        require_encoders(arguments(audio_encoder=folder))


def test_an_encoder_that_is_nowhere_is_one_line(arguments):
    with pytest.raises(EncoderError, match=r"'nobody/nothing' is neither a folder nor in the cache"):
        require_encoders(arguments(audio_encoder="nobody/nothing"))


def test_without_a_saved_feature_extractor_the_one_of_the_family_is_used(tiny_whisper, tmp_path):
    folder = changed(tmp_path / "bare", tiny_whisper, "config.json")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    config = MSAConfig(audio_encoder=folder, audio_config=load_encoder_config("audio", folder))
    found = load_preprocessors(config)
    assert type(found["audio_feature_extractor"]) is WhisperFeatureExtractor
    assert found["audio_feature_extractor"].chunk_length == 2 and found["image_processor"] is None


def test_a_vision_encoder_without_its_image_processor_is_refused(tmp_path):
    config = AutoConfig.for_model("vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="no preprocessor_config.json"):
        load_preprocessors(MSAConfig(vision_encoder=str(tmp_path), vision_config=config))


def test_a_run_is_fine_tuned_with_the_audio_encoder_of_its_checkpoint(arguments, tiny_whisper, tmp_path):
    first, processor = build_model(arguments(audio_layer=2), (), Console(quiet=True))
    stored = AutoModel.from_pretrained(tiny_whisper).encoder.state_dict()
    own = first.encoders["audio"].model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in own.items())
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_checkpoint(tmp_path)
    assert reader.audio_feature_extractor.to_dict() == processor.audio_feature_extractor.to_dict()
    start = {"init_from": str(tmp_path)}
    require_encoders(arguments(start, audio_layer=2))
    second, _ = build_model(arguments(start, audio_layer=2), (), Console(quiet=True))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    for model, key in (({}, "audio_layer"), ({"audio_layer": 2, "audio_encoder": None}, "audio_encoder")):
        model = {"audio_layer": "last", **model}
        with pytest.raises(ConfigurationError, match=f"has {key} .* set model.{key}=.*, or train without"):
            require_encoders(arguments(start, **model))


# --- on two processes ---

RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig
from msa_online.encoders import encoder_class
from tests.encoders.test_pretrained_audio import TINY, inputs_of

dist.init_process_group("gloo")
rank = dist.get_rank()
for family, settings in TINY.items():
    for layer in ("last", 0, 1, "weighted"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **settings)
        encoder = DistributedDataParallel(encoder_class("audio", config)(config, layer, 2)).train()
        for step in range(3):  # a parameter without a gradient is an error in the second
            values = encoder(inputs_of([24, 5 + rank])).values
            (values * torch.randn(values.shape)).sum().backward()
        norms = torch.stack([p.grad.norm() for p in encoder.parameters() if p.requires_grad])
        other = norms.clone()
        dist.broadcast(other, 0)
        torch.testing.assert_close(norms, other)
print("done")
"""


@pytest.mark.slow
def test_every_audio_encoder_trains_on_two_processes(on_two_processes, tmp_path):
    codes, printed = on_two_processes(RANK, tmp_path)
    assert codes == [0, 0] and all("done" in text for text in printed), "".join(printed)
