# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders import encoder_class, load_encoder_config
from msa_online.encoders.pretrained import EncoderError, find_encoder, load_tokenizer, read_encoder_config
from msa_online.encoders.text import TextEncoder

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
ARCHITECTURES = {
    "bert": {},
    "mpnet": {},
    "roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
}


@pytest.mark.parametrize(
    ("kind", "positions", "longest"),
    [
        ("bert", {"max_position_embeddings": 20}, 20),
        ("distilbert", {"max_position_embeddings": 20}, 20),
        ("roberta", {"max_position_embeddings": 20, "pad_token_id": 1}, 18),
        ("mpnet", {"max_position_embeddings": 20, "pad_token_id": 1}, 18),
        ("deberta-v2", {"max_position_embeddings": 20}, float("inf")),  # relative
    ],
)
def test_the_longest_text_is_the_longest_that_the_network_has_positions_for(kind, positions, longest):
    torch.manual_seed(0)
    encoder = TextEncoder(AutoConfig.for_model(kind, **{**SMALL, **ARCHITECTURES[kind], **positions}))
    assert encoder.longest == longest

    def run(tokens: int) -> torch.Size:
        ids = torch.full((1, tokens), 7)
        return encoder({"text_input_ids": ids, "text_mask": torch.ones_like(ids).bool()}).values.shape

    assert run(int(min(longest, 40)))[1] == min(longest, 40)
    if longest < 40:
        with pytest.raises((IndexError, RuntimeError)):
            run(longest + 1)


def text_inputs(generator_seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(generator_seed)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return {"text_input_ids": torch.randint(5, 50, (2, 7), generator=generator) * mask, "text_mask": mask}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_encodes_tokens_and_has_no_pooler(architecture):
    config = AutoConfig.for_model(architecture, **SMALL | ARCHITECTURES[architecture])
    encoder = TextEncoder(config).eval()
    sequence = encoder(text_inputs())
    assert sequence.values.shape == (2, 7, 32)
    assert torch.isfinite(sequence.values).all()
    assert (sequence.values[1, 4:] == 0).all()
    assert not any("pooler" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_change_a_token(architecture):
    encoder = TextEncoder(AutoConfig.for_model(architecture, **SMALL | ARCHITECTURES[architecture])).eval()
    inputs = text_inputs()
    alone = encoder({name: value[1:, :4] for name, value in inputs.items()}).values
    torch.testing.assert_close(encoder(inputs).values[1:, :4], alone, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "electra", "modernbert"])
def test_a_network_that_is_opened_and_left_as_it_is_encodes_the_same(architecture, layer):
    settings = {"electra": {"embedding_size": 32}, "modernbert": {"pad_token_id": 0}, **ARCHITECTURES}
    encoder = TextEncoder(AutoConfig.for_model(architecture, **SMALL | settings[architecture])).eval()
    expected = encoder(text_inputs())
    encoder.open_at(layer)
    seen = []
    found = encoder.finish(encoder(text_inputs()), lambda tokens: seen.append(tokens) or tokens.values)
    assert torch.equal(found.values, expected.values) and len(seen) == 1
    changed = encoder.finish(encoder(text_inputs()), lambda tokens: tokens.values + 1)
    assert not torch.allclose(changed.values[0], expected.values[0])


def test_a_network_whose_layers_share_weights_cannot_be_opened():
    encoder = TextEncoder(AutoConfig.for_model("albert", **SMALL, embedding_size=32))
    with pytest.raises(EncoderError, match="'albert', whose layers share weights"):
        encoder.open_at(0)


@pytest.mark.parametrize(
    ("modality", "name", "parameters"),
    [
        ("text", "bert-base-uncased", 108_891_648),
        ("text", "microsoft/deberta-v3-base", 183_831_552),
        ("text", "sentence-transformers/all-MiniLM-L6-v2", 22_565_376),
        ("text", "sentence-transformers/all-mpnet-base-v2", 108_895_872),
        ("audio", "openai/whisper-tiny.en", 8_208_384),
        ("audio", "openai/whisper-base.en", 20_590_592),
        ("audio", "facebook/wav2vec2-base", 94_371_712 - 768),  # without the state of masked steps
        ("audio", "facebook/hubert-base-ls960", 94_371_712 - 768),
        ("audio", "microsoft/wavlm-base-plus", 94_381_936 - 768),
        ("audio", "facebook/w2v-bert-2.0", 580_493_120 - 1024),
        ("vision", "google/vit-base-patch16-224", 85_798_656),  # without the pooler
        ("vision", "facebook/dinov2-small", 22_056_960 - 384),  # without the mask token
        ("vision", "openai/clip-vit-base-patch32", 87_456_000),
        ("vision", "google/siglip-base-patch16-224", 92_884_224),
    ],
)
def test_known_shapes_have_their_published_size(modality, name, parameters, monkeypatch):
    monkeypatch.setattr(
        "msa_online.encoders.pretrained.find_encoder", lambda name, download=False: name
    )  # as without a local copy
    sub_config = load_encoder_config(modality, name)
    config = MSAConfig(**{f"{modality}_config": sub_config})
    with torch.device("meta"):
        network = encoder_class(modality, sub_config).from_config(config).model
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_a_repository_of_another_owner_does_not_get_a_known_shape_or_our_weights():
    for name in ("someone/bert-base-uncased", "someone/all-MiniLM-L6-v2"):
        assert find_encoder(name) == name
        with pytest.raises(EncoderError, match=name):
            read_encoder_config(name)
    assert read_encoder_config("all-MiniLM-L6-v2").hidden_size == 384
    assert read_encoder_config("google-bert/bert-base-uncased").hidden_size == 768


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_of_an_encoder_in_place_of_its_folder_is_refused(tiny_text_encoder, file):
    with pytest.raises(EncoderError, match=f"{file}' is a file: give the folder"):
        read_encoder_config(str(tiny_text_encoder / file))


def test_the_shape_in_the_table_is_the_shape_of_the_local_copy():
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2"):
        if find_encoder(name) == name:
            continue  # not brought to this machine
        local = AutoConfig.from_pretrained(find_encoder(name))
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in TextEncoder(local).parameters())
        assert count == {384: 22_565_376, 768: 108_895_872}[local.hidden_size]


def test_pretrained_weights_arrive(tiny_text_config, tiny_text_encoder):
    encoder = TextEncoder(tiny_text_config)
    encoder.load_pretrained(tiny_text_encoder)
    expected = AutoModel.from_pretrained(tiny_text_encoder, add_pooling_layer=False).state_dict()
    assert all(torch.equal(encoder.model.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(tiny_text_encoder, tmp_path, value):
    """Else a run learns at the end of its first epoch that it has diverged."""
    model = AutoModel.from_pretrained(tiny_text_encoder)
    model.embeddings.word_embeddings.weight.data[7, 3] = value
    model.save_pretrained(tmp_path)
    encoder = TextEncoder(load_encoder_config("text", str(tmp_path)))
    with pytest.raises(
        EncoderError, match="1 of .* not finite, for example embeddings.word_embeddings.weight"
    ):
        encoder.load_pretrained(tmp_path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_an_encoder_published_in_half_precision_is_trained_in_fp32(
    stored, key, tiny_text_encoder, tiny_tokenizer, tmp_path
):
    """In fp16 neither would its products with fp32 states be defined nor its gradients be unscaled."""
    AutoModel.from_pretrained(tiny_text_encoder, dtype=stored).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document[key] = document.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(document))
    encoder = TextEncoder(load_encoder_config("text", str(tmp_path)))
    encoder.load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    expected = AutoModel.from_pretrained(tiny_text_encoder, add_pooling_layer=False, dtype=stored)
    for name, value in expected.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], value.float()), name


def test_a_frozen_encoder_has_no_gradients_and_no_dropout_in_training(tiny_text_config):
    encoder = TextEncoder(tiny_text_config)
    encoder.freeze()
    encoder.train()
    inputs = {"text_input_ids": torch.randint(5, 20, (2, 7)), "text_mask": torch.ones(2, 7, dtype=torch.bool)}
    assert torch.equal(encoder(inputs).values, encoder(inputs).values)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("load", [read_encoder_config, load_tokenizer])
def test_an_encoder_that_cannot_be_had_is_one_clear_message(load):
    with pytest.raises(EncoderError, match=r"'nobody/no-such-encoder'.*get-models"):
        load("nobody/no-such-encoder")
