# SPDX-License-Identifier: Apache-2.0
"""Pretrained vision encoders: the states of transformers, one for each face crop and from it alone."""

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    ConvNextForImageClassification,
    Dinov2ForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
)

from msa_online import MSAConfig, MSAModel
from msa_online.encoders import encoder_class, load_encoder_config
from msa_online.encoders import image as image_encoders
from msa_online.encoders.image import FAMILIES, ImageEncoder
from msa_online.encoders.pretrained import EncoderError

WIDTH, SIZE, LAYERS = 16, 32, 2
OF_VIT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
}
OF_DINOV2 = {name: value for name, value in OF_VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
OF_CONVOLUTIONS = {"hidden_sizes": [8, 8, 8, WIDTH], "depths": [1, 1, 1, 1], "image_size": SIZE}
OF_BEIT = OF_VIT | {"layer_scale_init_value": 0.1}

TINY = {
    "vit": ("vit", OF_VIT),
    "deit": ("deit", OF_VIT),
    "beit": ("beit", OF_BEIT | {"use_mask_token": True, "use_relative_position_bias": True}),
    "beit, class token": (
        "beit",
        OF_BEIT | {"use_mean_pooling": False, "use_shared_relative_position_bias": True},
    ),
    "dinov2": ("dinov2", OF_DINOV2),
    "dinov2_with_registers": ("dinov2_with_registers", OF_DINOV2),
    "dinov3_vit": ("dinov3_vit", OF_VIT | {"num_register_tokens": 2}),
    "clip_vision_model": ("clip_vision_model", OF_VIT),
    "siglip_vision_model": ("siglip_vision_model", OF_VIT),
    "siglip, no head": ("siglip_vision_model", OF_VIT | {"vision_use_head": False}),
    "convnext": ("convnext", OF_CONVOLUTIONS),
    "convnextv2": ("convnextv2", OF_CONVOLUTIONS),
    "dinov3_convnext": ("dinov3_convnext", OF_CONVOLUTIONS),
    "face_resnet": ("face_resnet", {"widths": [6, 4], "depths": [1, 2]}),
}
"""Small configurations by name of the variant: the model type, and its fields."""


def tiny_config(variant: str):
    family, fields = TINY[variant]
    return AutoConfig.for_model(family, **fields)


def make_encoder(variant: str, blendshapes: bool = True) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(tiny_config(variant), blendshapes)
    with torch.no_grad():
        for parameter in encoder.parameters():  # tokens and positions start at zero in some families
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


def face_inputs(frames: int = 3, size: int = SIZE, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two samples; the second has no face in its last frame."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, frames, dtype=torch.bool)
    mask[1, -1] = False
    return {
        "vision_values": torch.randn(2, frames, 3, size, size, generator=generator),
        "vision_blendshapes": torch.rand(2, frames, 52, generator=generator),
        "vision_mask": mask,
    }


def test_every_family_of_the_table_is_tested():
    assert {family for family, _ in TINY.values()} == FAMILIES.keys()
    assert all(encoder_class("vision", tiny_config(variant)) is ImageEncoder for variant in TINY)


@pytest.mark.parametrize("variant", TINY)
def test_the_state_of_a_frame_is_that_of_transformers(variant):
    encoder = make_encoder(variant, blendshapes=False)
    reference = AutoModel.from_config(tiny_config(variant)).eval()
    reference.load_state_dict(encoder.model.state_dict(), strict=False)  # without a pooler that is not built
    inputs = face_inputs()
    states = encoder.states(inputs).values
    output = reference(inputs["vision_values"][0, :1])
    last = output.last_hidden_state
    if variant in ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit, class token"):
        expected = last[:, 0]
    elif variant == "clip_vision_model":
        expected = reference.post_layernorm(last[:, 0])
    elif variant == "siglip_vision_model":
        expected = reference.head(last)
    elif variant == "siglip, no head":
        expected = last.mean(1)
    elif variant == "beit":
        expected = reference.pooler.layernorm(last[:, 1:].mean(1))
    elif variant == "dinov3_convnext":
        expected = last[:, 0]
    elif variant == "face_resnet":
        cells = [last[:, :, row : row + 2, column : column + 2] for row in (0, 1) for column in (0, 1)]
        expected = torch.stack([cell.mean(dim=(2, 3)) for cell in cells], dim=2).flatten(1)
    else:
        expected = reference.layernorm(last.mean((2, 3)))
    assert states.shape == (2, 3, WIDTH) and (states[1, -1] == 0).all()
    torch.testing.assert_close(states[0, :1], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", TINY)
def test_a_frame_in_a_batch_has_the_state_it_has_alone(variant):
    """A scale of about one; convolutions and products of another batch size round differently."""
    encoder = make_encoder(variant)
    inputs = face_inputs()
    together = encoder(inputs).values
    alone = encoder({name: value[1:, 1:2] for name, value in inputs.items()}).values
    torch.testing.assert_close(together[1:, 1:2], alone, atol=1e-5, rtol=0)
    inputs["vision_values"][1, -1] = torch.nan
    assert torch.equal(encoder(inputs).values, together), "a frame without a face is not read"


@pytest.mark.parametrize("no_face", [False, True], ids=["faces", "no face in the batch"])
@pytest.mark.parametrize("variant", TINY)
def test_every_trained_parameter_gets_a_gradient(variant, no_face):
    """One without would stop distributed training at its second step."""
    encoder = make_encoder(variant).train()
    inputs = face_inputs(frames=2)
    if no_face:
        inputs["vision_mask"][:] = False
    values = encoder(inputs).values
    (values * torch.randn(values.shape)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    if no_face:
        assert (values == 0).all()
        assert all((p.grad == 0).all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", TINY)
def test_training_moves_no_picture(variant):
    """DINOv3 would draw new coordinates in each pass."""
    encoder = make_encoder(variant).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):  # stochastic depth, which is a kind of dropout
            module.drop_prob = 0.0
    inputs = face_inputs()
    torch.testing.assert_close(encoder(inputs).values, encoder.eval()(inputs).values)


@pytest.mark.parametrize("variant", TINY)
def test_a_checkpoint_is_rebuilt_bit_by_bit_from_its_folder(variant, tiny_text_config, tmp_path):
    config = MSAConfig(text_config=tiny_text_config, vision_config=tiny_config(variant), audio_width=16)
    model = MSAModel(config).eval()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert config.widths["vision"] == WIDTH
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # as a run reads its best epoch
        assert set(file.keys()) == model.state_dict().keys()
    again = MSAModel.from_pretrained(tmp_path).eval()
    assert fixed == {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    inputs = face_inputs()
    first, second = (it.encoders["vision"](inputs).values for it in (model, again))
    assert torch.equal(first, second)


def _full(config_class, model_class):
    of_text = {name: OF_VIT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    of_text |= {"intermediate_size": 32, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    return model_class(config_class(text_config=of_text, vision_config=OF_VIT))


PUBLISHED = {
    "CLIP": lambda: (model := _full(CLIPConfig, CLIPModel), model.vision_model),
    "SigLIP": lambda: (model := _full(SiglipConfig, SiglipModel), model.vision_model),
    "CLIP's vision tower": lambda: (model := AutoModel.from_config(tiny_config("clip_vision_model")), model),
    "CLIP's projected tower": lambda: (
        model := CLIPVisionModelWithProjection(tiny_config("clip_vision_model")),
        model.vision_model,
    ),
    "ViT": lambda: (model := AutoModel.from_config(tiny_config("vit")), model),
    "ViT's classifier": lambda: (model := ViTForImageClassification(tiny_config("vit")), model.vit),
    "DINOv2's classifier": lambda: (
        model := Dinov2ForImageClassification(tiny_config("dinov2")),
        model.dinov2,
    ),
    "DINOv3": lambda: (model := AutoModel.from_config(tiny_config("dinov3_vit")), model),
    "ConvNeXt's classifier": lambda: (
        model := ConvNextForImageClassification(tiny_config("convnext")),
        model.convnext,
    ),
}
"""What is saved, and the part of it that the encoder is."""


@pytest.mark.parametrize("published", PUBLISHED)
def test_weights_arrive_from_a_folder_that_holds_more(published, tmp_path):
    saved, tower = PUBLISHED[published]()
    saved.save_pretrained(tmp_path)
    config = load_encoder_config("vision", str(tmp_path))
    assert config.model_type in FAMILIES
    encoder = ImageEncoder(config, blendshapes=False)
    encoder.load_pretrained(tmp_path)
    weights = tower.state_dict()
    own = encoder.model.state_dict()
    assert own and all(torch.equal(value, weights[name]) for name, value in own.items())
    assert weights.keys() - own.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_network_for_pictures_of_any_shape_is_refused_with_what_there_is(tmp_path):
    AutoConfig.for_model("siglip2", vision_config={"hidden_size": 16}).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="siglip2_vision_model.*siglip_vision_model"):
        load_encoder_config("vision", str(tmp_path))


@pytest.mark.parametrize("variant", ["vit", "beit", "clip_vision_model", "dinov2", "convnext"])
def test_pictures_of_another_size_than_in_pretraining_are_read(variant):
    """Positions are interpolated; at the network's own size they are the learned ones (tested above)."""
    values = make_encoder(variant)(face_inputs(size=2 * SIZE)).values
    assert values.shape == (2, 3, WIDTH) and torch.isfinite(values).all()


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("variant", ["vit", "siglip_vision_model", "convnext", "face_resnet"])
def test_how_many_pictures_run_at_once_changes_nothing(variant, at_once, monkeypatch):
    encoder = make_encoder(variant).double()
    inputs = {name: it if it.dtype == torch.bool else it.double() for name, it in face_inputs().items()}
    whole = encoder(inputs).values
    monkeypatch.setattr(image_encoders, "PICTURES_AT_ONCE", at_once)
    torch.testing.assert_close(encoder(inputs).values, whole, atol=1e-13, rtol=0)


@pytest.mark.parametrize("variant", ["dinov2", "siglip_vision_model", "face_resnet"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    encoder = make_encoder(variant).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.zero_grad()
        encoder(face_inputs()).values.square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", TINY)
def test_a_half_precision_model_reads_fp32_pictures(variant, dtype, tiny_text_config):
    config = MSAConfig(text_config=tiny_text_config, vision_config=tiny_config(variant), audio_width=16)
    model = MSAModel(config).eval()
    exact = model.encoders["vision"](face_inputs()).values
    half = model.to(dtype).encoders["vision"](face_inputs()).values
    torch.testing.assert_close(half.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("variant", ["vit", "dinov3_vit", "clip_vision_model", "convnext"])
def test_layers_are_frozen_from_below(variant):
    encoder = make_encoder(variant)
    encoder.freeze_below(1)
    frozen = {name for name, p in encoder.model.named_parameters() if not p.requires_grad}
    below = {name for name, _ in encoder.model.named_parameters() if "embed" in name or "pre_" in name}
    layers = encoder.family.layers
    lowest = {name for name, _ in encoder.model.named_parameters() if name.startswith(f"{layers}.0.")}
    assert lowest and below and frozen == below | lowest


def test_a_frozen_network_makes_no_graph_and_what_is_on_top_still_trains():
    encoder = make_encoder("vit").train()
    encoder.freeze()
    assert not encoder.states(face_inputs()).values.requires_grad
    encoder(face_inputs()).values.square().sum().backward()
    trained = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {"norm", "blendshapes"}
    assert not encoder.model.training and encoder.norm.training


def test_blendshapes_are_read_only_when_switched_on():
    inputs = face_inputs()
    other = inputs | {"vision_blendshapes": 1 - inputs["vision_blendshapes"]}
    for switched_on in (True, False):
        encoder = make_encoder("vit", blendshapes=switched_on)
        assert torch.equal(encoder(inputs).values, encoder(other).values) != switched_on
        assert ("vision_blendshapes" in encoder.input_names) == switched_on
        assert encoder.states(inputs).values.shape[-1] == WIDTH + 52 * switched_on
