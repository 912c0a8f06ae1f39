# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor

import msa_online  # noqa: F401  registers the processor with AutoProcessor
from feature_extractors import (
    Clip,
    ClipExtent,
    ClipFeatures,
    ExtractionSettings,
    FaceExtractor,
    decode,
    extract,
    log_mel,
)
from msa_online import MSAProcessor
from msa_online.processing_msa import InputLimits, UnknownTokens, clean_text, token_ids

SETTINGS = ExtractionSettings(face_size=32, num_frames=4)


def features(*, steps: int = 50, faces: str = "yyny", findings: tuple[str, ...] = ()) -> ClipFeatures:
    """Features of a clip with so many spectrogram steps of sound and a face in the frames marked y."""
    random = np.random.default_rng(steps)
    return ClipFeatures(
        waveform=random.normal(0, 999, size=max(0, 160 * steps - 1)).astype(np.int16),
        face_crops=random.integers(1, 255, (len(faces), 32, 32, 3), np.uint8),
        blendshapes=random.random((len(faces), 52), np.float32),
        face_found=np.array([mark == "y" for mark in faces], bool),
        timestamps=np.arange(len(faces), dtype=np.float32),
        findings=findings,
        duration=steps / 100,
    )


def test_a_reloaded_processor_makes_the_same_inputs(tiny_tokenizer, tmp_path):
    processor = MSAProcessor(
        tiny_tokenizer, {"face_size": 32, "num_frames": 4}, max_text_tokens=6, max_audio_seconds=0.3
    )
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MSAProcessor
    assert again.settings == processor.settings == SETTINGS
    assert (again.max_text_tokens, again.max_audio_seconds) == (6, 0.3)
    expected = processor([features()], ["I loved it and the film was good"])
    batch = again([features()], ["I loved it and the film was good"])
    assert all(torch.equal(batch[name], value) for name, value in expected.items())


def test_settings_that_make_no_features_are_refused_when_the_processor_is_made(tiny_tokenizer):
    with pytest.raises(ValueError, match="face_size is 4"):
        MSAProcessor(tiny_tokenizer, {"face_size": 4})


def test_every_setting_of_extraction_travels_with_the_processor(tiny_tokenizer):
    assert MSAProcessor(tiny_tokenizer, {}).extraction == dataclasses.asdict(ExtractionSettings())


def test_a_batch_is_padded_and_masked(tiny_processor):
    batch = tiny_processor([features(steps=50), features(steps=30, faces="yn")], ["I loved it", "very bad"])
    assert set(batch) == set(tiny_processor.model_input_names)
    assert batch["text_input_ids"].shape == (2, 5) and batch["audio_values"].shape == (2, 50, 80)
    assert batch["vision_values"].shape == (2, 4, 32, 32, 3) and batch["vision_values"].dtype == torch.uint8
    assert batch["vision_blendshapes"].shape == (2, 4, 52)
    assert batch["text_mask"].tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch["audio_mask"].sum(dim=1).tolist() == [50, 30] and batch["audio_mask"][1, :30].all()
    assert batch["vision_mask"].tolist() == [[True, True, False, True], [True, False, False, False]]
    assert batch["modality_present"].all()
    assert not batch["audio_values"][1, 30:].any() and not batch["vision_values"][1, 2:].any()


def test_text_is_padded_with_the_tokenizers_own_padding(tiny_tokenizer, tiny_processor):
    batch = tiny_processor([features(), features()], ["the film", "the film was not really good"])
    assert batch["text_input_ids"][0].tolist() == [
        *tiny_tokenizer.convert_tokens_to_ids(["[CLS]", "the", "film", "[SEP]"]),
        *[tiny_tokenizer.pad_token_id] * 4,
    ]


def test_a_tokenizer_without_padding_pads_with_what_is_masked(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    processor = MSAProcessor(tokenizer, {"face_size": 32, "num_frames": 4})
    batch = processor.pad([processor.encode(None, text, ("text",)) for text in ("good", "good bad good")])
    assert batch["text_mask"].sum(dim=1).tolist() == [3, 5] and batch["text_input_ids"].shape == (2, 5)


def test_a_clip_is_not_changed_by_its_neighbours_in_a_batch(tiny_processor):
    alone = tiny_processor([features(steps=30)], ["very bad"])
    together = tiny_processor(
        [features(steps=30), features(steps=90)], ["very bad", "I loved it and the ending"]
    )
    assert torch.equal(together["audio_values"][0, :30], alone["audio_values"][0])
    assert torch.equal(together["text_input_ids"][0, :4], alone["text_input_ids"][0])
    assert torch.equal(together["vision_values"][0], alone["vision_values"][0])


@pytest.mark.parametrize(
    ("clip", "text", "present"),
    [
        (features(), "good", [True, True, True]),
        (features(), None, [False, True, True]),
        (features(), "", [False, True, True]),
        (features(), " \n\t", [False, True, True]),
        (features(), "\ufeff\u200b\u200f \ufe0f", [False, True, True]),
        (features(steps=0, findings=("no audio stream",)), "good", [True, False, True]),
        (features(findings=("silent audio",)), "good", [True, False, True]),
        (features(faces="nnnn", findings=("no face",)), "good", [True, True, False]),
        (features(faces="", findings=("no video stream",)), "good", [True, True, False]),
        (ClipFeatures.absent(SETTINGS), "good", [True, False, False]),
        (ClipFeatures.absent(SETTINGS), None, [False, False, False]),
    ],
)
def test_what_is_missing_is_marked_and_nothing_of_it_gets_through(
    clip, text, present, tiny_processor, tiny_model
):
    batch = tiny_processor([clip], [text])
    assert batch["modality_present"].tolist() == [present]
    assert batch["audio_values"].any().item() == present[1]
    assert batch["vision_values"].any().item() == present[2]
    assert batch["vision_blendshapes"].any().item() == present[2]
    with torch.no_grad():
        assert torch.isfinite(tiny_model(**batch).logits).all()  # a batch of one, whatever it lacks


def test_an_empty_transcript_becomes_the_special_tokens(tiny_tokenizer, tiny_processor):
    assert tiny_processor.tokenize("").tolist() == tiny_tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])


def test_without_special_tokens_an_empty_transcript_still_has_a_token(tiny_tokenizer):
    """Those of GPT-2 add none, and a batch of clips without words would have no step."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    processor = MSAProcessor(tokenizer, {"face_size": 32, "num_frames": 4})
    assert len(processor.tokenize("good bad")) == 2
    batch = processor([None], [""])
    assert batch["text_input_ids"].shape == (1, 1) and not batch["modality_present"].any()


@pytest.mark.parametrize(
    "invisible",
    [
        *("", " ", "\u00a0\u3000\u2003", "\0\x1b\x7f", "\u200b", "\u200c\u200d\u2060", "\ufeff", "\u00ad"),
        *("\u200e\u200f\u202a\u202c\u2066\u2069\u061c", "\ufe0e\ufe0f", "\U000e0100", "\u180b\u180e"),
        *("\u034f", "\u0301", "\u20e3", "\u3164\uffa0\u115f", "\u2800", "\ufffc", "\U000e0041", "\uffff"),
        *("\u2028\u2029", " \u200b \ufe0f\ufeff "),
    ],
)
def test_a_transcript_that_shows_nothing_is_no_text(invisible, tiny_processor):
    assert clean_text(invisible) == ""
    assert not tiny_processor.encode(features(), invisible)["modality_present"][0]


@pytest.mark.parametrize(
    "text",
    ["a", "?", "…", "好", "สวัสดี", "é", "e\u0301", "❤\ufe0f", "👩\u200d🚀", "\ufffd", "ـ", "نہ\u200cیں", "١"],
)
def test_whatever_shows_something_is_text_and_keeps_its_middle(text):
    assert clean_text(text).startswith(text[0]) and clean_text(f"\ufeff\u200b {text}\u200f\n") == clean_text(
        text
    )
    assert clean_text(f"{text}\u200b{text}").count("\u200b") == 1


def test_bytes_that_are_no_text_become_replacement_characters(tiny_processor):
    assert clean_text("so \udcff good") == "so \ufffd good"
    assert clean_text("\ud83d\ude00") == "😀"  # the halves of one character
    assert tiny_processor.encode(features(), "a \udcff film")["modality_present"][0]


def test_invisible_characters_around_a_transcript_change_nothing(tiny_processor):
    plain = tiny_processor.encode(features(), "a very good film")["text_input_ids"]
    marked = tiny_processor.encode(features(), "\ufeff\u200e a very good film\u200b\n")["text_input_ids"]
    assert torch.equal(plain, marked)


@pytest.mark.parametrize("name", ["[MASK]", "[SEP]", "[PAD]", "[CLS]", "[UNK]"])
def test_names_of_special_tokens_in_a_transcript_are_words(name, tiny_tokenizer, tiny_processor):
    ids = tiny_processor.tokenize(f"good {name} film {name}").tolist()
    special = set(tiny_tokenizer.all_special_ids) - {tiny_tokenizer.unk_token_id}
    assert special.isdisjoint(ids[1:-1]) and len(ids) > 6
    assert ids[:1] + ids[-1:] == [tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id]


def test_a_vocabulary_that_knows_a_special_token_as_a_word_does_not_give_it_away():
    """Split at white space alone, "[PAD]" is a whole word, which the vocabulary holds."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    assert token_ids(wrapped, "good [PAD] good") == [2, 1, 2]


def test_tokens_that_a_tokenizer_does_not_know_are_counted(tiny_tokenizer):
    limits = InputLimits(tokenizer=tiny_tokenizer)
    known, partly, wholly, empty, none = limits.unknown(
        ["good film", "good 映画 film", "😀 ดี", "\u200b", None]
    )
    assert (known, partly) == (UnknownTokens(0, 2), UnknownTokens(1, 3))
    assert wholly.all_unknown and wholly.unknown == wholly.tokens == 2
    assert not (partly.all_unknown or empty.all_unknown or none.all_unknown) and empty.tokens == 0
    assert partly.description == "1 of 3 tokens unknown"
    assert InputLimits().unknown(["😀"]) == [UnknownTokens(0, 0)]  # no tokenizer, no count


def test_a_long_transcript_is_cut_and_keeps_its_end_token(tiny_tokenizer):
    ids = MSAProcessor(tiny_tokenizer, {}, max_text_tokens=8).tokenize("very " * 500)
    assert len(ids) == 8 and ids[-1] == tiny_tokenizer.sep_token_id


def test_a_long_sound_is_cut_from_its_end(tiny_tokenizer):
    processor = MSAProcessor(tiny_tokenizer, {"face_size": 32}, max_audio_seconds=0.3)
    clip = features(steps=50)
    batch = processor([clip, features(steps=20)], ["good", "good"])
    assert batch["audio_values"].shape == (2, 30, 80)  # 0.3 s in steps of 10 ms
    assert torch.equal(batch["audio_values"][0], torch.from_numpy(log_mel(clip.sound())[:30]))
    assert batch["audio_mask"].sum(dim=1).tolist() == [30, 20]


def test_sound_that_starts_after_what_is_read_is_missing(tiny_tokenizer):
    processor = MSAProcessor(tiny_tokenizer, {"face_size": 32}, max_audio_seconds=0.3)
    late, early = (dataclasses.replace(features(), audible_from=start) for start in (0.31, 0.29))
    batch = processor([late, early], ["good", "good"])
    assert batch["modality_present"][:, 1].tolist() == [False, True]
    assert not batch["audio_values"][0].any() and batch["audio_mask"].sum(dim=1).tolist() == [1, 30]


def test_a_checkpoint_that_names_its_spectrogram_opens_if_it_is_ours(tiny_processor, tmp_path):
    """Earlier versions had the spectrogram among the settings of extraction."""
    tiny_processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    stored = json.loads(path.read_text())
    stored["extraction"] |= {"num_mels": 80, "window_ms": 25, "hop_ms": 10.0}
    path.write_text(json.dumps(stored))
    assert AutoProcessor.from_pretrained(tmp_path).settings == tiny_processor.settings
    stored["extraction"]["hop_ms"] = 20
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="extraction.hop_ms is 20: this version has 10 only"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "sound", "frames", "words", "cut"),
    [
        (4.2, 4.2, 8, 20, {}),
        (10.0, 10.0, 8, 30, {}),
        (32.0, 30.0, 8, 126, {}),  # 126 words and two special tokens
        (30.05, 30.05, 8, 0, {}),  # a codec's padding
        (182.4, 182.4, 8, 1310, {
            "text": "128 of 1,312 tokens",
            "audio": "first 30.0 of 182.4 s",
            "vision": "8 frames over 182.4 s",
        }),
        (182.4, 0.0, 0, 0, {}),  # neither sound nor a face
        (60.0, 0.0, 1, 127, {"text": "128 of 129 tokens", "vision": "1 frame over 60.0 s"}),
    ],
)  # fmt: skip
def test_what_a_model_does_not_read_is_named_with_figures(seconds, sound, frames, words, cut, tiny_processor):
    extent = ClipExtent(seconds, sound, frames)
    cuts = tiny_processor.limits.cut(extent, "very " * words)
    assert {name: one.description for name, one in cuts.items()} == cut


def test_a_text_that_is_reported_as_cut_is_cut_and_no_other(tiny_processor):
    extent = ClipExtent(1.0, 1.0, 4)
    for words in (100, 126, 127, 300):
        whole = len(tiny_processor.tokenizer("very " * words)["input_ids"])
        is_cut = len(tiny_processor.tokenize("very " * words)) < whole
        assert bool(tiny_processor.limits.cut(extent, "very " * words)) == is_cut


def test_without_a_tokenizer_words_are_counted():
    cuts = InputLimits(max_text_tokens=100).cut(ClipExtent(1.0, 1.0, 4), "word " * 1200)
    assert cuts["text"].description == "100 tokens of 1,200 words"


def test_the_extent_of_a_clip_counts_only_what_a_model_can_use():
    assert ClipExtent.of(features(steps=50)) == ClipExtent(0.5, 7999 / 16_000, 4)
    assert ClipExtent.of(features(steps=50, findings=("silent audio",))).sound == 0
    assert ClipExtent.of(features(faces="nnnn", findings=("no face",))).frames == 0


def test_clips_and_transcripts_must_come_in_pairs(tiny_processor):
    with pytest.raises(ValueError):
        tiny_processor([features(), features()], ["good"])


# --- in the convention of multimodal processors ---


def test_text_alone_is_a_batch_of_one_or_of_several(tiny_processor):
    one = tiny_processor(text="a good movie", return_tensors="pt")
    assert one["modality_present"].tolist() == [[True, False, False]]
    several = tiny_processor(text=["a good movie", None, "bad"])
    assert several["modality_present"][:, 0].tolist() == [True, False, True]
    assert torch.equal(several["text_input_ids"][:1], one["text_input_ids"])


def test_arrays_make_the_inputs_that_their_file_makes(tiny_processor, make_clip, tmp_path):
    path = make_clip(tmp_path / "a.mkv", seconds=1.0)
    with FaceExtractor(tiny_processor.settings) as faces:
        expected = tiny_processor([extract(Clip(path), tiny_processor.settings, faces)], ["good"])
    raw = decode(Clip(path), num_frames=4)
    sound = {"audio": raw.waveform, "sampling_rate": 16_000}
    for pictures in ({"images": raw.frames}, {"frames": torch.from_numpy(raw.frames)}):
        batch = tiny_processor(text="good", **sound, **pictures, return_tensors="pt")
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    half = {
        "audio": [raw.waveform[:8_000], None],
        "images": [None, list(raw.frames)],
        "sampling_rate": 16_000,
    }
    batch = tiny_processor(text=[None, "good"], **half)
    assert batch["modality_present"].tolist() == [[False, True, False], [True, False, True]]
    assert tiny_processor(**half)["modality_present"][:, 0].tolist() == [False, False]
    with_list = tiny_processor(audio=raw.waveform.tolist(), sampling_rate=16_000)
    assert torch.equal(with_list["audio_values"], expected["audio_values"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ["a", "b"], "audio": [np.ones(99)], "sampling_rate": 16_000}, "lists of one length"),
        ({"text": ["a", "b"], "audio": np.ones(99), "sampling_rate": 16_000}, "lists of one length"),
        ({"audio": np.ones(99)}, "sampling_rate is None"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors is 'np': only \"pt\" exists"),
        ({"frames": np.ones((1, 9, 9, 3)), "images": np.ones((1, 9, 9, 3))}, "two names of one thing"),
        ({"features": [features()], "audio": np.ones(99)}, "features contain sound and pictures"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(given, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        tiny_processor(**given)


def test_a_processor_that_has_read_arrays_is_saved_as_before(tiny_processor, tmp_path):
    tiny_processor(frames=np.zeros((2, 64, 64, 3), np.uint8))
    tiny_processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.settings == tiny_processor.settings and "_faces" not in again.to_dict()


def test_inputs_of_one_modality_are_those_of_the_whole_sample(tiny_processor):
    """States of a frozen text encoder need no spectrogram, and a clip is not even read for them."""
    features = ClipFeatures.absent(tiny_processor.settings)
    whole = tiny_processor.encode(features, "a good film")
    text = tiny_processor.encode(None, "a good film", ("text",))
    assert set(text) == {"text_input_ids", "modality_present"}
    assert all(torch.equal(values, whole[key]) for key, values in text.items())
    batch, complete = tiny_processor.pad([text, text]), tiny_processor.pad([whole, whole])
    assert all(torch.equal(values, complete[key]) for key, values in batch.items())
    assert set(tiny_processor.encode(features, "", ("vision",))) == {
        *("vision_values", "vision_blendshapes", "vision_mask", "modality_present"),
    }
