# SPDX-License-Identifier: Apache-2.0
"""The inputs of pretrained encoders are those that transformers makes, without padding."""

import json
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoProcessor,
    BitImageProcessorPil,
    ClapFeatureExtractor,
    CLIPImageProcessorPil,
    SeamlessM4TFeatureExtractor,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from feature_extractors import ClipFeatures
from msa_online import MSAProcessor
from msa_online.encoders.pretrained import EncoderError, load_feature_extractor, load_image_processor
from msa_online.encoders.spectrogram_transformer import SpectrogramTransformer
from msa_online.front_ends import _kaldi_filters, restore_extractor, sound_shape

EXTRACTORS = (
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    ASTFeatureExtractor,
)
TOLERANCE = {  # we compute in fp32, transformers partly in fp64; values reach 1.4 to 13
    Wav2Vec2FeatureExtractor: 0,
    WhisperFeatureExtractor: 5e-5,
    SeamlessM4TFeatureExtractor: 1e-3,
    ASTFeatureExtractor: 3e-4,
}
IMAGE_PROCESSORS = (
    ViTImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
    BitImageProcessorPil,  # of DINOv2
)


def features(*, samples: int = 8_000, faces: str = "yn", size: int = 96, findings=()) -> ClipFeatures:
    """Features of a clip with so many samples of sound and a face in the frames marked y."""
    random = np.random.default_rng(samples)
    return ClipFeatures(
        waveform=random.normal(0, 999, samples).astype(np.int16),
        face_crops=random.integers(1, 255, (len(faces), size, size, 3), np.uint8),
        blendshapes=random.random((len(faces), 52), np.float32),
        face_found=np.array([mark == "y" for mark in faces], bool),
        timestamps=np.arange(len(faces), dtype=np.float32),
        findings=findings,
        duration=samples / 16_000,
    )


def own_result(extractor, sound: np.ndarray) -> np.ndarray:
    """What transformers makes of a sound, (steps, width) or (samples,), padded as it likes."""
    values = next(iter(extractor(sound, sampling_rate=16_000, return_tensors="np").values()))[0]
    return values.T if isinstance(extractor, WhisperFeatureExtractor) else values


@pytest.fixture
def make_processor(tiny_tokenizer):
    def make(audio=None, image=None, **settings) -> MSAProcessor:
        return MSAProcessor(tiny_tokenizer, settings, audio_feature_extractor=audio, image_processor=image)

    return make


@pytest.mark.parametrize("samples", [8_000, 8_079, 24_321])
@pytest.mark.parametrize("kind", EXTRACTORS)
def test_a_sound_becomes_what_transformers_makes_of_it_without_padding(kind, samples, make_processor):
    clip = features(samples=samples)
    ours = make_processor(kind()).encode(clip, "good")["audio_values"]
    whole = own_result(kind(), clip.sound())
    steps = {
        Wav2Vec2FeatureExtractor: samples,
        WhisperFeatureExtractor: -(-samples // 160),  # whose centre is in the sound
        SeamlessM4TFeatureExtractor: (1 + (samples - 400) // 160) // 2,
        ASTFeatureExtractor: 1 + (samples - 400) // 160,
    }[kind]
    assert ours.dtype == torch.float32 and ours.shape == (steps, *whole.shape[1:])
    np.testing.assert_allclose(ours, whole[:steps], atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_a_batch_of_any_lengths_is_padded_with_zeros_and_masked(kind, make_processor):
    processor = make_processor(kind())
    clips = [
        *(features(samples=samples) for samples in (4_000, 1, 8_000)),
        features(findings=("silent audio",)),
        ClipFeatures.absent(processor.settings),
    ]
    batch = processor(clips, ["good"] * 5)
    values, mask = batch["audio_values"], batch["audio_mask"]
    assert batch["modality_present"][:, 1].tolist() == [True, True, True, False, False]
    assert values.isfinite().all() and not values[~mask].any() and not values[3:].any()
    assert mask.shape == values.shape[:2] and mask[2].all() and mask[3:].sum(dim=1).tolist() == [1, 1]
    for row, clip in enumerate(clips[:3]):
        alone = processor([clip], ["good"])["audio_values"][0]
        assert int(mask[row].sum()) == len(alone) and torch.equal(values[row, : len(alone)], alone)


@pytest.mark.parametrize(
    ("kind", "seconds", "steps"), [(WhisperFeatureExtractor, 30, 3_000), (ASTFeatureExtractor, 10.24, 1_022)]
)
def test_a_sound_longer_than_its_encoder_takes_is_cut_and_reported(kind, seconds, steps, make_processor):
    processor = make_processor(kind())
    assert processor.max_audio_seconds == processor.limits.max_audio_seconds == seconds
    assert len(processor.encode(features(samples=31 * 16_000), "good")["audio_values"]) == steps


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_crops_with_a_face_become_what_the_image_processor_makes_and_others_zeros(kind, make_processor):
    clip = features(faces="yny")
    batch = make_processor(image=kind()).encode(clip, "good")
    expected = kind()(images=list(clip.face_crops), return_tensors="pt")["pixel_values"]
    assert batch["vision_values"].shape == (3, 3, 224, 224) and batch["vision_values"].dtype == torch.float32
    assert torch.equal(batch["vision_values"][[0, 2]], expected[[0, 2]])
    assert not batch["vision_values"][1].any() and batch["vision_mask"].tolist() == [True, False, True]


def test_a_clip_without_a_face_is_one_picture_of_zeros(make_processor):
    processor = make_processor(image=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    clips = [
        features(faces="nn", findings=("no face",)),
        features(size=32),
        ClipFeatures.absent(processor.settings),
    ]
    batch = processor(clips, ["good"] * 3)
    assert batch["vision_values"].shape == (3, 2, 3, 32, 32) and batch["vision_mask"].sum() == 1
    assert batch["vision_values"].any(dim=(1, 2, 3, 4)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("image", "given", "size"),
    [
        (None, {}, 96),
        (ViTImageProcessorPil(), {}, 224),
        (BitImageProcessorPil(size={"shortest_edge": 256}), {}, 256),  # of which 224 are kept
        (ViTImageProcessorPil(do_resize=False), {}, 96),
        (ViTImageProcessorPil(), {"face_size": 128}, 128),
    ],
)
def test_crops_have_the_size_that_the_image_processor_need_not_change(image, given, size, make_processor):
    assert make_processor(image=image, **given).settings.face_size == size


def test_the_bands_of_the_spectrogram_transformer_cause_no_warning():
    """Some are narrower than the FFT; a filter for the whole process would hide this elsewhere."""
    _kaldi_filters.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = SpectrogramTransformer.default_feature_extractor(ASTConfig())
        restore_extractor(extractor.to_dict())
        sound_shape(1.0, extractor)


@pytest.mark.parametrize(
    ("audio", "image"),
    [
        (WhisperFeatureExtractor(feature_size=40), None),
        (Wav2Vec2FeatureExtractor(do_normalize=False), BitImageProcessorPil(size={"shortest_edge": 256})),
        (None, {"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": 64, "width": 64}}),
        (None, CLIPImageProcessorPil(do_center_crop=False, size={"height": 64, "width": 64})),
        (SeamlessM4TFeatureExtractor(stride=4), ViTImageProcessorPil()),
        (ASTFeatureExtractor(mean=1.0), SiglipImageProcessorPil()),
    ],
)
def test_a_saved_processor_makes_the_same_inputs_without_other_files(audio, image, make_processor, tmp_path):
    processor, clip = make_processor(audio, image), features()
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MSAProcessor and again.to_dict() == processor.to_dict()
    ours, theirs = processor.encode(clip, "good"), again.encode(clip, "good")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"audio": Wav2Vec2FeatureExtractor(sampling_rate=8_000)}, "reads sound at 8,000 samples a second; "),
        ({"audio": ClapFeatureExtractor()}, "feature extractor is ClapFeatureExtractor: known are Wav2Vec2F"),
        ({"audio": {"feature_extractor_type": "Mine"}}, "feature extractor is Mine: known are"),
        ({"image": {"image_processor_type": "Mine"}}, "image processor is Mine, which transformers"),
        ({"image": Siglip2ImageProcessorPil()}, "makes inputs of shape .*, not pictures of one size"),
    ],
)
def test_a_front_end_that_cannot_be_used_is_refused(parts, message, make_processor):
    with pytest.raises(ValueError, match=message):
        make_processor(**parts)


def test_the_image_processor_of_dinov3_needs_no_torchvision(tmp_path):
    fields = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert isinstance(load_image_processor(str(tmp_path)), ViTImageProcessorPil)


@pytest.mark.parametrize(
    ("load", "fields", "message"),
    [
        (
            load_feature_extractor,
            ClapFeatureExtractor().to_dict(),
            "feature extractor is ClapFeatureExtractor",
        ),
        (load_image_processor, Siglip2ImageProcessorPil().to_dict(), "not pictures of one size"),
    ],
)
def test_a_published_front_end_that_cannot_be_used_is_refused_before_data_are_read(
    load, fields, message, tmp_path
):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields, default=list))
    with pytest.raises(EncoderError, match=message):
        load(str(tmp_path))


def test_arrays_are_read_by_the_front_ends_of_the_encoders(make_processor, face_image):
    image = ViTImageProcessorPil(size={"height": 64, "width": 64})
    processor = make_processor(WhisperFeatureExtractor(), image, num_frames=2)
    tone = np.sin(np.arange(4_000) / 10)
    batch = processor(text="good", audio=tone, sampling_rate=8_000, images=[face_image] * 2)
    assert batch["modality_present"].all() and batch["audio_values"].shape == (1, 50, 80)
    assert batch["vision_values"].shape == (1, 2, 3, 64, 64) and batch["vision_mask"].all()
