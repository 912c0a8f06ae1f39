# SPDX-License-Identifier: Apache-2.0
"""Missing words, sounds and faces: what is dropped, what takes its place, and that nothing else decides."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from feature_extractors import Clip, ClipFeatures, decode
from feature_extractors.audio import as_int16
from msa_online import MSAConfig, MSAModel, MSAProcessor
from msa_online.encoders.pretrained import EncoderError
from msa_online.missing.frames import FrameDrop, FrameDropout, FramesAt, droppable, stand_ins_of
from msa_online.modalities import MODALITIES

IDS = [f"clip_{number}" for number in range(64)]
UNKNOWN, AVERAGE_SOUND = 1, -11.0
STAND_INS = {"text": torch.tensor(UNKNOWN), "audio": torch.tensor(AVERAGE_SOUND)}
WIDTHS = {"text": 3, "audio": 2, "vision": 4}


def drop_of(**settings) -> FrameDrop:
    return FrameDrop(IDS, STAND_INS, **{"split": "test", **settings})


def positions(drop: FrameDrop, batch: dict, rate: float) -> dict[str, torch.Tensor]:
    return {name: drop.dropped(batch["index"], name, droppable(batch, name), rate) for name in MODALITIES}


def rows(batch: dict, numbers: list[int]) -> dict:
    return {name: value[numbers] for name, value in batch.items()}


@pytest.fixture
def feature_model() -> MSAModel:
    """A model of features whose encoders have statistics to standardise by."""
    torch.manual_seed(0)
    model = MSAModel(MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 8}, label_range=[-3, 3]))
    for name, width in WIDTHS.items():
        model.encoders[name].standardize_by(torch.randn(width) * 5, torch.rand(width) + 0.5)
    return model.eval()


@pytest.fixture
def feature_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {"modality_present": torch.ones(8, 3, dtype=torch.bool), "index": torch.arange(8)}
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(8, 6, width, generator=generator)
        batch[f"{name}_mask"] = torch.arange(6) < torch.randint(1, 7, (8, 1), generator=generator)
    return batch


# --- which ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_positions_are_dropped_as_often_as_asked(rate, nested, make_batch):
    batch = make_batch(64)
    for name, dropped in positions(drop_of(nested=nested), batch, rate).items():
        among = droppable(batch, name)
        assert not (dropped & ~among).any()
        share = dropped[among].double().mean().item()
        assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / int(among.sum()))), name


def test_a_rate_of_zero_changes_nothing(make_batch, tiny_model):
    batch = make_batch(8)
    same = drop_of().from_inputs(batch, 0.0)
    assert all(torch.equal(same[name], value) for name, value in batch.items())
    sequences = tiny_model.encode(**batch)
    states = drop_of().from_states(sequences, batch["index"], 0.0)
    assert all(torch.equal(states[name].values, sequences[name].values) for name in MODALITIES)


def test_what_a_sample_loses_depends_on_nothing_but_itself(make_batch):
    batch = make_batch(32)
    whole = drop_of().from_inputs(batch, 0.5)
    for numbers in ([31, 4, 17], [4], list(range(31, -1, -1))):
        part = drop_of().from_inputs(rows(batch, numbers), 0.5)
        assert all(torch.equal(part[name], whole[name][numbers]) for name in whole)


def test_padding_does_not_change_a_draw(make_batch):
    batch = make_batch(8)
    short, long = batch["audio_mask"], torch.nn.functional.pad(batch["audio_mask"], (0, 40))
    one = drop_of().dropped(batch["index"], "audio", short, 0.5)
    other = drop_of().dropped(batch["index"], "audio", long, 0.5)
    assert torch.equal(other[:, :60], one) and not other[:, 60:].any()


def test_a_higher_rate_drops_more_of_the_same_when_nested_and_something_else_when_not(make_batch):
    batch = make_batch(32)
    for nested in (True, False):
        low, high = (positions(drop_of(nested=nested), batch, rate) for rate in (0.3, 0.6))
        kept_again = [bool((low[name] & ~high[name]).any()) for name in MODALITIES]
        assert kept_again == [not nested] * 3


def test_modalities_splits_and_seeds_lose_different_positions():
    index, among = torch.arange(32), torch.ones(32, 20, dtype=torch.bool)
    first = drop_of().dropped(index, "text", among, 0.5)
    for other in (
        drop_of().dropped(index, "audio", among, 0.5),
        drop_of(split="valid").dropped(index, "text", among, 0.5),
        drop_of(seed=2).dropped(index, "text", among, 0.5),
    ):
        assert (first == other).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(640))


# --- what takes its place ---


def test_words_become_unknown_and_the_ends_of_the_text_stay(make_batch):
    batch = make_batch(64)
    almost_all = drop_of().from_inputs(batch, 0.999)
    lengths = batch["text_mask"].sum(dim=1)
    for row, (before, after) in enumerate(
        zip(batch["text_input_ids"], almost_all["text_input_ids"], strict=True)
    ):
        last = lengths[row] - 1
        assert after[0] == before[0] and after[last] == before[last]
        assert (after[1:last] == UNKNOWN).double().mean() > 0.5 or last == 1
        assert torch.equal(after[last + 1 :], before[last + 1 :])
    assert torch.equal(almost_all["text_mask"], batch["text_mask"])


def test_sound_becomes_average_and_stays_attended(make_batch):
    batch = make_batch(8)
    after = drop_of().from_inputs(batch, 0.5)
    dropped = positions(drop_of(), batch, 0.5)["audio"]
    assert (after["audio_values"][dropped] == AVERAGE_SOUND).all()
    assert torch.equal(after["audio_values"][~dropped], batch["audio_values"][~dropped])
    assert torch.equal(after["audio_mask"], batch["audio_mask"])


def test_average_sound_is_what_the_audio_encoder_starts_out_to_take_for_nothing(tiny_model, tiny_processor):
    assert stand_ins_of(tiny_model, tiny_processor) == STAND_INS
    assert tiny_model.encoders["audio"].scale(torch.full((1, 1), AVERAGE_SOUND)).item() == pytest.approx(0.0)


def test_a_waveform_loses_ten_milliseconds_at_a_time(make_batch):
    batch = {**make_batch(8), "audio_values": torch.ones(8, 4_000), "audio_mask": torch.ones(8, 4_000) > 0}
    batch["audio_mask"][0, 3_000:] = False
    for after in (
        FrameDrop(IDS, {"audio": torch.tensor(0.0)}, split="test").from_inputs(batch, 0.5),
        FrameDropout(IDS, {"audio": torch.tensor(0.0)}, seed=1).apply(batch),
    ):
        pieces = after["audio_values"].reshape(8, 25, 160)[1:]
        assert (pieces == pieces[..., :1]).all() and 0.2 < pieces.mean() < 0.9
        assert after["audio_values"][0, 3_000:].all()  # padding is left as it is


@pytest.mark.parametrize(
    ("extractor", "average"),
    [
        (Wav2Vec2FeatureExtractor(), 0.0),
        (WhisperFeatureExtractor(), -0.194),
        (SeamlessM4TFeatureExtractor(), 0.0),
    ],
)
def test_the_average_sound_is_that_of_the_encoders_inputs(
    extractor, average, shared_data, tiny_model, tiny_tokenizer
):
    processor = MSAProcessor(tiny_tokenizer, {}, audio_feature_extractor=extractor)
    stand_in = stand_ins_of(tiny_model, processor)["audio"].item()
    speech = decode(Clip(shared_data / "crema_d" / "1001_DFA_HAP_XX.flv"), num_frames=1).waveform
    samples, full_scale = as_int16(speech)
    features = replace(ClipFeatures.absent(processor.settings), waveform=samples, full_scale=full_scale)
    inputs = processor.encode(features, "good")["audio_values"]
    assert stand_in == pytest.approx(average, abs=1e-3) and inputs.mean().item() == pytest.approx(
        stand_in, abs=0.25
    )


def test_a_dropped_face_is_not_found_and_cannot_be_seen(make_batch, tiny_model):
    batch, other = make_batch(8), make_batch(8, seed=1)
    after = drop_of().from_inputs(batch, 0.5)
    dropped = positions(drop_of(), batch, 0.5)["vision"]
    assert torch.equal(after["vision_mask"], batch["vision_mask"] & ~dropped)
    for key in ("vision_values", "vision_blendshapes"):
        where = dropped.reshape(8, 4, *[1] * (batch[key].ndim - 2))
        batch[key] = torch.where(where, other[key], batch[key])
    with torch.no_grad():
        seen = tiny_model(**drop_of().from_inputs(batch, 0.5)).logits
        assert torch.equal(seen, tiny_model(**after).logits)


def test_features_are_dropped_at_the_entrance_as_they_are_behind_the_encoders(feature_model, feature_batch):
    drop = FrameDrop(IDS, stand_ins_of(feature_model, None), split="test")
    with torch.no_grad():
        from_inputs = feature_model.encode(**drop.from_inputs(feature_batch, 0.5))
        from_states = drop.from_states(feature_model.encode(**feature_batch), feature_batch["index"], 0.5)
    for name in MODALITIES:
        assert torch.equal(from_inputs[name].values, from_states[name].values)
        assert torch.equal(from_inputs[name].mask, feature_batch[f"{name}_mask"])  # still attended
        dropped = drop.dropped(feature_batch["index"], name, feature_batch[f"{name}_mask"], 0.5)
        assert dropped.any() and not from_states[name].values[dropped].any()
        assert from_states[name].values[feature_batch[f"{name}_mask"] & ~dropped].all()


def test_states_are_zeroed_and_still_attended(make_batch, tiny_model):
    batch = make_batch(8)
    sequences = tiny_model.encode(**batch)
    states = drop_of().from_states(sequences, batch["index"], 0.5)
    for name, before in sequences.items():
        dropped = drop_of().dropped(batch["index"], name, before.mask, 0.5)
        assert dropped.any() and not states[name].values[dropped].any()
        assert torch.equal(states[name].values[~dropped], before.values[~dropped])
        assert torch.equal(states[name].mask, before.mask)
        assert torch.equal(states[name].present, before.present)


def test_a_tokenizer_without_an_unknown_token_is_refused(tiny_model, tiny_processor):
    tiny_processor.tokenizer = copy.deepcopy(tiny_processor.tokenizer)  # other tests share it
    tiny_processor.tokenizer.unk_token = None
    with pytest.raises(EncoderError, match="no unknown token.*--frame-rates feature"):
        stand_ins_of(tiny_model, tiny_processor)


# --- in training ---


def rates_in(dropout: FrameDropout, batch: dict) -> torch.Tensor:
    """Share of sound steps each sample loses."""
    lost = dropout.apply(batch)["audio_values"][..., 0] == AVERAGE_SOUND
    return (lost & batch["audio_mask"]).sum(dim=1) / batch["audio_mask"].sum(dim=1)


def test_in_training_half_of_the_samples_stay_whole_and_the_others_lose_any_share(make_batch):
    batch = make_batch(64)
    dropout = FrameDropout(IDS, STAND_INS, seed=1)
    rates = []
    for epoch in range(20):
        dropout.start_epoch(epoch)
        rates.append(rates_in(dropout, batch))
    rates = torch.stack(rates)
    assert (rates == 0).double().mean().item() == pytest.approx(0.5, abs=0.06)  # few steps may lose none
    lossy = rates[rates > 0]
    assert lossy.mean().item() == pytest.approx(0.5, abs=0.05) and lossy.min() < 0.1 and lossy.max() > 0.9
    assert (rates > 0).any(dim=0).all()  # nobody stays whole for ever


def test_training_drops_the_same_after_an_interruption_and_in_any_order(make_batch):
    batch = make_batch(32)
    dropout = FrameDropout(IDS, STAND_INS, seed=1)
    for epoch in range(3):
        dropout.start_epoch(epoch)
    resumed = FrameDropout(IDS, STAND_INS, seed=1)
    resumed.start_epoch(2)
    whole, order = dropout.apply(batch), [5, 31, 0, 9]
    part = resumed.apply(rows(batch, order))
    assert all(torch.equal(part[name], whole[name][order]) for name in whole)
    dropout.start_epoch(3)
    assert not torch.equal(dropout.apply(batch)["audio_values"], whole["audio_values"])


def test_validation_drops_the_same_every_time(make_batch):
    batches = [make_batch(8)]
    at_half = FramesAt(drop_of(split="valid"), 0.5).over(batches)
    first, second = ([batch["audio_values"] for batch in at_half] for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], batches[0]["audio_values"])
