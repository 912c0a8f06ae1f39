# SPDX-License-Identifier: Apache-2.0
"""Whisper's encoder, converted: the same states as CTranslate2's own, and one line if the file is bad."""

import json
import re
import struct

import numpy as np
import pytest

from feature_extractors import AssetError, get_asset
from feature_extractors.assets import asset_path
from feature_extractors.catalogue import asset_of_model
from feature_extractors.whisper_weights import convert_encoder, encoder_weights, read_variables

WIDTH, BANDS, POSITIONS, HIDDEN = 8, 5, 100, 12
TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def tiny_variables() -> dict[str, np.ndarray]:
    """A Whisper of two layers in each half; of the decoder only what gives its sizes."""
    random = np.random.default_rng(0)
    variables = {
        "decoder/embeddings/weight": (30, WIDTH),
        "decoder/layer_0/ffn/linear_0/weight": (HIDDEN, WIDTH),
        "decoder/layer_1/ffn/linear_0/weight": (HIDDEN, WIDTH),
        "decoder/layer_norm/gamma": (WIDTH,),
        "decoder/position_encodings/encodings": (20, WIDTH),
        "encoder/conv1/bias": (WIDTH,),
        "encoder/conv1/weight": (WIDTH, BANDS, 3),
        "encoder/conv2/bias": (WIDTH,),
        "encoder/conv2/weight": (WIDTH, WIDTH, 3),
        "encoder/layer_norm/beta": (WIDTH,),
        "encoder/layer_norm/gamma": (WIDTH,),
        "encoder/position_encodings/encodings": (POSITIONS, WIDTH),
    }
    for number in range(2):
        layer = f"encoder/layer_{number}"
        for block, *sizes in (("self_attention", 3 * WIDTH, WIDTH, WIDTH), ("ffn", HIDDEN, WIDTH, HIDDEN)):
            first, second, between = sizes
            variables[f"{layer}/{block}/layer_norm/beta"] = (WIDTH,)
            variables[f"{layer}/{block}/layer_norm/gamma"] = (WIDTH,)
            variables[f"{layer}/{block}/linear_0/bias"] = (first,)
            variables[f"{layer}/{block}/linear_0/weight"] = (first, WIDTH)
            variables[f"{layer}/{block}/linear_1/bias"] = (second,)
            variables[f"{layer}/{block}/linear_1/weight"] = (second, between)
    arrays = {name: random.standard_normal(shape).astype(np.float16) for name, shape in variables.items()}
    for number in range(2):
        arrays[f"encoder/layer_{number}/self_attention/linear_0/bias"][WIDTH : 2 * WIDTH] = 0
    return arrays | {f"{part}/num_heads": np.array(2, np.int16) for part in ("encoder", "decoder")}


def name_field(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variable_field(name: str, values: np.ndarray) -> bytes:
    shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    kind = struct.pack("<BI", TYPES[str(values.dtype)], values.nbytes)
    return name_field(name) + shape + kind + values.tobytes()


def model_bin(variables: dict[str, np.ndarray], version: int = 6, architecture: str = "WhisperSpec") -> bytes:
    head = struct.pack("<I", version) + name_field(architecture) + struct.pack("<II", 3, len(variables))
    body = b"".join(variable_field(name, values) for name, values in variables.items())
    aliases = name_field("decoder/projection/weight") + name_field("decoder/embeddings/weight")
    return head + body + struct.pack("<I", 1) + aliases


@pytest.fixture
def convert(tmp_path):
    """Converts the content of a `model.bin` and returns the folder."""

    def run(content: bytes):
        (tmp_path / "model.bin").write_bytes(content)
        (tmp_path / "converted").mkdir()
        convert_encoder(tmp_path, tmp_path / "converted")
        return tmp_path / "converted"

    return run


def refusal(convert, content: bytes) -> str:
    """The only line of the error that the conversion of a file gives; nothing is written."""
    with pytest.raises(AssetError) as caught:
        convert(content)
    message = str(caught.value)
    assert "model.bin: " in message and "\n" not in message
    return message.partition("model.bin: ")[2]


# --- the weights of the pinned file ---


def test_the_states_equal_those_of_ctranslate2s_own_encoder():
    """Both in fp32, on 30 s of a voice-like sound and silence, by transformers' own feature extractor."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is in the extra `test`")
    import torch
    from transformers import AutoFeatureExtractor, AutoModel

    folder = get_asset("whisper-tiny.en-encoder")
    times = np.arange(12 * 16_000) / 16_000
    pitch = 2 * np.pi * 140 * times + 3 * np.sin(2 * np.pi * 4 * times)
    voice = sum(np.sin(harmonic * pitch) / harmonic for harmonic in range(1, 20)) * np.sin(9 * times) ** 2
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor(0.1 * voice, sampling_rate=16_000, return_tensors="np")["input_features"]
    assert features.shape == (1, 80, 3000)
    source = str(get_asset("whisper-tiny.en"))
    theirs = ctranslate2.models.Whisper(source, compute_type="float32", intra_threads=1)
    expected = np.array(theirs.encode(ctranslate2.StorageView.from_array(features)))
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder).eval().encoder(torch.tensor(features)).last_hidden_state
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(states.numpy(), expected, atol=1e-3, rtol=0)


def test_the_converted_folder_fits_transformers_encoder_exactly():
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = get_asset("whisper-tiny.en-encoder")
    encoder = WhisperEncoder(AutoConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name.removeprefix("encoder."): values for name, values in weights.items()})
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 8_208_384
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.float32 and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("decoder.") for name in report["missing_keys"])
    assert all(torch.equal(model.encoder.state_dict()[name], v) for name, v in encoder.state_dict().items())


def test_the_positions_are_the_sinusoids_of_the_paper():
    """Radford et al. (2022): sines, then cosines, with wavelengths from 2 pi to 10000 times as long."""
    from safetensors.numpy import load_file

    weights = load_file(get_asset("whisper-tiny.en-encoder") / "model.safetensors")
    angles = np.arange(1500)[:, None] * 10_000 ** -(np.arange(192) / 191)
    sinusoids = np.hstack([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(weights["encoder.embed_positions.weight"], sinusoids, atol=1e-3)


def test_an_encoder_is_found_by_its_whole_name_on_the_hub_or_by_that_of_the_asset():
    for name in ("openai/whisper-tiny.en", "whisper-tiny.en-encoder"):
        assert asset_of_model(name) == "whisper-tiny.en-encoder"
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"):
        assert asset_of_model(name) == "all-MiniLM-L6-v2"


@pytest.mark.parametrize(
    "name",
    [
        *("someone/whisper-tiny.en", "someone/all-MiniLM-L6-v2", "someone/dlib-face-resnet"),
        *("models/openai/whisper-tiny.en", "OpenAI/whisper-tiny.en", "openai/whisper-tiny.en/"),
        *("openai/whisper-large", "", "/"),
        *("whisper-tiny.en", "Systran/faster-whisper-tiny.en", "face_landmarker"),  # not for transformers
    ],
)
def test_a_model_of_another_owner_or_format_does_not_get_our_weights(name):
    assert asset_of_model(name) is None


# --- the format, with a small file ---


def test_every_weight_arrives_under_its_name(convert):
    from safetensors.numpy import load_file

    variables = tiny_variables()
    folder = convert(model_bin(variables))
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == 7 + 2 * 15 and all(values.dtype == np.float32 for values in weights.values())
    layer, ours = "encoder/layer_1", "encoder.layers.1"
    attention = variables[f"{layer}/self_attention/linear_0/weight"]
    for target, expected in {
        "encoder.conv2.weight": variables["encoder/conv2/weight"],
        "encoder.layer_norm.weight": variables["encoder/layer_norm/gamma"],
        f"{ours}.self_attn.q_proj.weight": attention[:WIDTH],
        f"{ours}.self_attn.k_proj.weight": attention[WIDTH : 2 * WIDTH],
        f"{ours}.self_attn.v_proj.weight": attention[2 * WIDTH :],
        f"{ours}.self_attn.out_proj.bias": variables[f"{layer}/self_attention/linear_1/bias"],
        f"{ours}.self_attn_layer_norm.bias": variables[f"{layer}/self_attention/layer_norm/beta"],
        f"{ours}.final_layer_norm.weight": variables[f"{layer}/ffn/layer_norm/gamma"],
        f"{ours}.fc1.weight": variables[f"{layer}/ffn/linear_0/weight"],
        f"{ours}.fc2.bias": variables[f"{layer}/ffn/linear_1/bias"],
    }.items():
        np.testing.assert_array_equal(weights[target], expected.astype(np.float32))


def test_the_numbers_of_the_architecture_follow_from_the_file(convert):
    from transformers import AutoConfig, AutoFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = convert(model_bin(tiny_variables()))
    config = AutoConfig.from_pretrained(folder)
    assert (config.d_model, config.num_mel_bins, config.max_source_positions) == (WIDTH, BANDS, POSITIONS)
    assert (config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim) == (2, 2, HIDDEN)
    assert (config.decoder_layers, config.max_target_positions, config.vocab_size) == (2, 20, 30)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert extractor.feature_size == BANDS and extractor.nb_max_frames == 2 * POSITIONS
    expected = {f"encoder.{name}" for name in WhisperEncoder(config).state_dict()}
    from safetensors.numpy import load_file

    assert load_file(folder / "model.safetensors").keys() == expected


def test_a_file_cut_anywhere_is_refused():
    content = model_bin(tiny_variables())
    for end in (*range(0, 300), *range(300, len(content), 97), len(content) - 1):
        with pytest.raises(AssetError, match=f"^cut: {end} bytes, at least \\d+ are expected$"):
            read_variables(content[:end])


def test_damage_to_any_byte_is_refused_in_one_line_or_changes_values_only():
    content = model_bin(tiny_variables())
    weights = encoder_weights(read_variables(content))
    random = np.random.default_rng(0)
    refused = 0
    for position in (*range(400), *random.integers(len(content), size=600)):
        damaged = content[:position] + random.bytes(1) + content[position + 1 :]
        try:
            found = encoder_weights(read_variables(damaged))
            assert {name: found[name].shape for name in found} == {
                name: weights[name].shape for name in weights
            }
        except AssetError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_a_cut_file_is_named(convert):
    assert re.fullmatch(r"cut: 5000 bytes, .*", refusal(convert, model_bin(tiny_variables())[:5000]))


HEAD = struct.pack("<I", 6) + name_field("WhisperSpec") + struct.pack("<I", 3)
ABSURD = {
    "version": (model_bin({}, version=7), "format 7 of 'WhisperSpec'; only format 6"),
    "architecture": (model_bin({}, architecture="TransformerSpec"), "format 6 of 'TransformerSpec'; only"),
    "not this format": (b"PK\x03\x04" + bytes(100), "malformed name before byte 6"),
    "many variables": (HEAD + struct.pack("<I", 2**32 - 1), "cut: 26 bytes, at least 28"),
    "long name": (HEAD + struct.pack("<IH", 1, 2**16 - 1), "cut: 28 bytes, at least 65563"),
    "lines in a name": (HEAD + struct.pack("<I", 1) + name_field("a\nb"), "malformed name before byte 32"),
    "high rank": (HEAD + struct.pack("<I", 1) + name_field("a") + b"\xff", "a has 255 dimensions; at most 3"),
    "wrong size": (
        HEAD + struct.pack("<I", 1) + name_field("a") + struct.pack("<B2IBI", 2, 2**32 - 1, 2**32 - 1, 4, 10),
        "a has 10 bytes, which 4294967295 x 4294967295 values of float16 do not have",
    ),
    "huge size": (
        HEAD + struct.pack("<I", 1) + name_field("a") + struct.pack("<BIBI", 1, 2**31 - 1, 4, 2**32 - 2),
        "cut: 40 bytes, at least 4294967334",
    ),
    "unknown type": (
        HEAD + struct.pack("<I", 1) + name_field("a") + struct.pack("<BIBI", 1, 1, 9, 2),
        "a has the unknown type 9",
    ),
    "twice": (
        HEAD + struct.pack("<I", 2) + 2 * variable_field("a", np.zeros(2, np.float16)),
        "a occurs twice",
    ),
    "more after the end": (model_bin(tiny_variables()) + b"x", "1 bytes after the last variable"),
}


@pytest.mark.parametrize(("content", "message"), ABSURD.values(), ids=ABSURD)
def test_absurd_sizes_are_refused(content, message, convert):
    assert refusal(convert, content).startswith(message)


def with_key_bias(values):
    values[WIDTH] = 1
    return values


NOT_WHISPER = {  # name of a variable, its change (None removes it), and how the message starts
    "missing": ("encoder/layer_1/ffn/linear_1/bias", None, "{} is missing"),
    "no encoder": ("encoder/conv1/weight", None, "{} is missing"),
    "rank": ("encoder/conv1/weight", lambda values: values[0], "{} has 2 dimensions, not 3"),
    "shape": ("encoder/conv2/weight", lambda values: values[:, :3], "{} has shape 8 x 3 x 3, not 8 x 8 x 3"),
    "heads": ("encoder/num_heads", lambda values: values + np.int16(1), "{} is 3, which does not divide"),
    "no heads": ("encoder/num_heads", lambda values: values * np.int16(0), "{} is 0, which does not divide"),
    "heads that are no number": ("encoder/num_heads", lambda values: np.float16("nan"), "{} is nan, which"),
    "quantised": ("encoder/conv1/bias", lambda values: values.astype(np.int8), "{} is quantised to int8; "),
    "infinite": ("encoder/layer_norm/beta", lambda values: values * np.float16(np.inf), "{} has values that"),
    "keys": ("encoder/layer_0/self_attention/linear_0/bias", with_key_bias, "encoder/layer_0 has a bias of"),
}


@pytest.mark.parametrize(("name", "change", "message"), NOT_WHISPER.values(), ids=NOT_WHISPER)
def test_variables_that_are_not_whispers_are_refused(name, change, message, convert):
    variables = tiny_variables()
    values = variables.pop(name)
    if change:
        variables[name] = np.asarray(change(values))
    assert refusal(convert, model_bin(variables)).startswith(message.format(name))


def test_a_variable_that_nothing_reads_is_refused():
    variables = tiny_variables() | {"encoder/layer_1/adapter": np.zeros(3, np.float16)}
    with pytest.raises(AssetError, match=r"^encoder/layer_1/adapter is unknown$"):
        encoder_weights(variables)


# --- the cache ---


def test_other_weights_than_the_pinned_ones_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MSA_MODEL_WHISPER_TINY_EN", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / "mine" / name).write_bytes(model_bin(tiny_variables()))
    with pytest.raises(AssetError) as caught:
        get_asset("whisper-tiny.en-encoder")
    message = str(caught.value)
    assert re.search(
        r"mine: model.bin has sha256 \w{64}, not \w{64}; set MSA_MODEL_WHISPER_TINY_EN_ENCODER", message
    )
    assert "\n" not in message and asset_path("whisper-tiny.en-encoder") is None
    assert not list((tmp_path / "cache").rglob(".fetching-*"))


def test_a_converted_file_that_was_damaged_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "whisper-tiny.en-encoder"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({}))
    monkeypatch.setenv("MSA_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"model.safetensors has sha256 .* remove this folder"):
        asset_path("whisper-tiny.en-encoder")
