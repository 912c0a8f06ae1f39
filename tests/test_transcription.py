# SPDX-License-Identifier: Apache-2.0
"""Clips without a text get one from a real recogniser; silence and noise get none."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_extractors import Clip, ClipFeatures, ExtractionSettings, FeatureCache, get_asset
from feature_extractors.decoding import decode_sound
from feature_extractors.transcript import Transcript, Word
from msa_online import MSAPipeline
from msa_online.batching import make_dataset
from msa_online.commands.predict import prediction_lines
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.reading import read_corpus
from msa_online.synthetic.voice import VOICE_RATE, Speech, speak
from msa_online.timeline import predict_timeline
from msa_online.training.config import DataArguments
from msa_online.training.data import read_data
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.transcription import (
    Transcriber,
    TranscriptionError,
    is_repetitive,
    pieces_with_speech,
)
from msa_online_cli import main

SENTENCE = "the road goes along the river and turns left at the bridge"
SETTINGS = ExtractionSettings()


def spoken(words: str, rate: int) -> np.ndarray:
    """Synthetic speech (samples,) at a rate, between half seconds of silence."""
    sound = speak(words, Speech("en-us+m1", 48, 50, 150))
    times = np.arange(round(len(sound) / VOICE_RATE * rate)) / rate
    voice = np.interp(times, np.arange(len(sound)) / VOICE_RATE, sound)
    return np.pad(voice, round(rate / 2)).astype(np.float32)


def features_of(sound: np.ndarray) -> ClipFeatures:
    return replace(
        ClipFeatures.absent(SETTINGS),
        waveform=np.round(sound * 32767).astype(np.int16),
        duration=len(sound) / 16_000,
    )


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    return spoken(SENTENCE, 16_000)


@pytest.fixture(scope="module")
def clip(make_clip, tmp_path_factory) -> Path:
    """A face that says the sentence."""
    sound = spoken(SENTENCE, 48_000)
    path = tmp_path_factory.mktemp("spoken") / "a.mp4"
    return make_clip(path, seconds=len(sound) / 48_000, fps=5, audio=sound)


@pytest.fixture(scope="module")
def recogniser() -> Transcriber:
    return Transcriber()


def test_speech_becomes_words_in_order_inside_the_clip(recogniser, voice):
    heard = recogniser(features_of(voice))
    said = heard.text.lower().strip(".").split()
    assert len(set(said) & set(SENTENCE.split())) >= 7, heard.text
    assert heard.language == "en" and heard.model == "whisper-tiny.en"
    times = [time for word in heard.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] > 0.3 and times[-1] < len(voice) / 16_000 - 0.3
    assert [heard.text[begin:end] for begin, end in heard.places()] == [word.text for word in heard.words]


@pytest.mark.parametrize("kind", ["silence", "noise", "tone", "no sound"])
def test_without_speech_no_word_is_invented(recogniser, kind):
    random = np.random.default_rng(0)
    times = np.arange(32_000) / 16_000
    sound = {
        "silence": np.zeros(32_000),
        "noise": 0.1 * random.normal(size=32_000),
        "tone": 0.3 * np.sin(2 * np.pi * 220 * times),
        "no sound": np.zeros(0),
    }[kind]
    assert recogniser(features_of(sound)).text == ""


def test_a_sound_is_recognised_once_and_a_damaged_entry_is_made_anew(voice, tmp_path):
    first = Transcriber(cache=FeatureCache(tmp_path))
    heard = first(features_of(voice))
    assert first.made == 1 and first(features_of(voice)) == heard and first.made == 1
    again = Transcriber(cache=FeatureCache(tmp_path))
    assert again(features_of(voice)) == heard and again.made == 0
    (entry,) = (tmp_path / "transcripts").rglob("*.json")
    entry.write_text(entry.read_text().replace(heard.words[0].text, "Toads"))
    assert again(features_of(voice)) == heard and again.made == 1
    assert Transcriber(language="en").identity != again.identity


def test_words_of_a_window_have_its_times():
    words = (Word("one,", 1.0, 1.4), Word("two", 1.5, 2.1), Word("three", 2.2, 3.0))
    whole = Transcript("one, two three", words, "en", "m")
    part = whole.between(1.2, 2.4)
    assert part.text == "one, two" and part.words[0] == Word("one,", 0.0, pytest.approx(0.2))
    assert part.words[1].start == pytest.approx(0.3) and whole.between(5, 6).text == ""


def test_speech_in_a_language_that_the_recogniser_does_not_know_is_doubtful(recogniser, voice):
    german = speak("die besprechung wurde in den zweiten stock verlegt", Speech("de", 48, 50, 150))
    times = np.arange(round(len(german) / VOICE_RATE * 16_000)) / 16_000
    sound = np.pad(np.interp(times, np.arange(len(german)) / VOICE_RATE, german), 4000)
    heard = recogniser(features_of(sound))
    assert heard.text == "" or heard.doubt.startswith("doubtful, mean probability of a word 0.")
    assert recogniser(features_of(voice)).doubt is None
    sure = Transcript("a b", (Word("a", 0, 1, 0.3), Word("b", 1, 2, 0.6)), "en", "m")
    assert sure.doubt == "doubtful, mean probability of a word 0.45"
    assert Transcript("a", (Word("a", 0, 1),), "en", "m").doubt is None


def test_long_speech_is_cut_at_pauses_into_pieces_that_a_recogniser_reads(voice):
    pauses = [np.zeros(20_000, np.float32), np.zeros(60_000, np.float32)]
    sound = np.concatenate([part for number in range(12) for part in (voice, pauses[number % 2])])
    pieces = list(pieces_with_speech(sound))
    assert all(0 < end - begin <= 28 * 16_000 for begin, end in pieces) and len(pieces) > 2
    assert all(before[1] <= after[0] for before, after in zip(pieces, pieces[1:], strict=False))
    loud = np.abs(sound) > 0.1
    covered = np.zeros(len(sound), bool)
    for begin, end in pieces:
        covered[begin:end] = True
    assert covered[loud].mean() > 0.99


def test_the_sound_of_a_recording_is_read_in_parts_that_overlap(make_clip, tmp_path):
    tones = np.repeat(np.linspace(0.1, 0.9, 10), 48_000) * np.sin(np.arange(480_000) / 20)
    path = make_clip(tmp_path / "long.mp4", seconds=10, fps=2, audio=tones)
    parts = list(decode_sound(Clip(path), 4, 0.5))
    assert [round(start, 1) for start, *_ in parts] == [0, 3.3, 6.7] and round(parts[-1][1]) == 10
    for start, end, first, sound in parts:
        assert first == pytest.approx(max(start - 0.5, 0), abs=0.01)
        assert len(sound) / 16_000 == pytest.approx(min(end + 0.5, 10) - first, abs=0.1), start
    assert list(decode_sound(Clip(make_clip(tmp_path / "mute.mp4", audio=None)), 4, 0.5)) == []


def test_a_prediction_without_a_text_uses_what_was_heard_and_says_so(
    tiny_model, tiny_processor, clip, recogniser
):
    pipeline = MSAPipeline(tiny_model, tiny_processor, transcribe=recogniser)
    heard = pipeline(clip)
    assert heard.transcribed and "text" in heard.modalities and "river" in heard.transcript.text
    plain = json.loads(json.dumps(heard.to_dict()))
    assert plain["transcribed"] is True and plain["transcript"]["words"][0]["start"] > 0
    assert any(line.startswith("  heard by whisper-tiny.en: ") for line in prediction_lines([heard]))
    same = MSAPipeline(tiny_model, tiny_processor)(clip, text=heard.transcript.text)
    assert same.score == heard.score and not same.transcribed and same.transcript is None
    given = pipeline(clip, text="a good movie")
    assert given.transcript is None and not given.to_dict()["transcribed"]
    assert pipeline(clip, text="").missing == {"text": "empty text"}


def test_where_nothing_is_said_the_text_stays_missing(tiny_model, tiny_processor, make_clip, tmp_path):
    path = make_clip(tmp_path / "tone.mp4")
    prediction = MSAPipeline(tiny_model, tiny_processor, transcribe="tiny.en")(path)
    assert prediction.missing == {"text": "no speech found by tiny.en"} and not prediction.transcribed


def test_the_windows_of_a_recording_have_the_words_that_are_spoken_in_them(
    tiny_model, tiny_processor, clip, recogniser
):
    pipeline = MSAPipeline(tiny_model, tiny_processor, transcribe=recogniser)
    timeline = predict_timeline(pipeline, Clip(clip), seconds=2, step=2)
    whole = timeline.overall.transcript
    assert "river" in whole.text
    assert "road" in timeline.windows[0].text and "bridge" in timeline.windows[-1].text
    assert "bridge" not in timeline.windows[0].text
    assert timeline.to_dict()["windows"][0]["transcribed"]


def test_predict_transcribes_a_folder_once_and_its_rows_say_so(
    tiny_model, tiny_processor, clip, tmp_path, cache_dir, capsys
):
    MSAPipeline(tiny_model, tiny_processor)  # the checkpoint of a run
    run = tmp_path / "run"
    tiny_model.save_pretrained(run)
    tiny_processor.save_pretrained(run)
    out = tmp_path / "rows.csv"
    command = ["predict", str(clip.parent), "--model", str(run), "--out", str(out), "--transcribe"]
    assert main(command) == 0
    (row,) = csv.DictReader(out.open())
    assert row["transcribed"] == "True" and "river" in row["text"] and json.loads(row["transcript_words"])
    assert main(command) == 0 and "1 of them from an earlier run" in capsys.readouterr().out
    assert main([*command[:-1]]) == 0  # without a recogniser the result is another one
    (row,) = csv.DictReader(out.open())
    assert row["text"] == "" and row["transcribed"] == "False"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transcribe", "tiny.en", "--language", "de"], "tiny.en knows English (en) only"),
        (["--transcribe", "nonsense/model"], "neither a folder nor in the cache of models"),
        (["--transcribe", "large-v9"], "neither a folder nor in the cache of models"),
        (["--transcribe", "{clip}"], "is a file, not a speech recogniser"),
        (["--transcribe", "{folder}"], "has neither model.bin (CTranslate2) nor config.json"),
    ],
)
def test_a_recogniser_that_cannot_be_used_is_one_line_before_anything_is_read(
    clip, options, message, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = [option.format(clip=clip, folder=clip.parent) for option in options]
    assert main(["predict", str(clip), "--model", "no/such/run", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_language_without_a_recogniser_is_refused(tiny_model, tiny_processor, capsys):
    with pytest.raises(TranscriptionError, match="language de applies to recognised speech only"):
        MSAPipeline(tiny_model, tiny_processor, language="de")
    assert main(["predict", "a.mp4", "--model", "run", "--language", "de"]) == 1
    assert "language de applies to recognised speech only" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TranscriptionError, match=r"pip install 'msa_online\[transcribe\]'"):
        Transcriber()


def test_a_damaged_recogniser_is_one_line(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x" * 100)
    with pytest.raises(TranscriptionError, match=r"has no tokenizer\.json"):
        Transcriber(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TranscriptionError, match="cannot be read"):
        Transcriber(str(tmp_path))


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory) -> Path:
    """A random wav2vec 2.0 with letters, as a published recogniser is saved."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({each: place for place, each in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def test_a_recogniser_of_transformers_can_be_used(ctc_folder, voice, monkeypatch):
    transcriber = Transcriber(str(ctc_folder))
    heard = transcriber(features_of(voice))
    assert transcriber.gives_times and heard.model == ctc_folder.name
    assert heard.text and heard.words, "random letters"
    times = [time for word in heard.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[-1] <= len(voice) / 16_000
    with pytest.raises(TranscriptionError, match="no choice of language"):
        Transcriber(str(ctc_folder), language="en")
    monkeypatch.setenv("HOME", str(ctc_folder.parent))
    assert Transcriber(f"~/{ctc_folder.name}").name == ctc_folder.name, "a model card holds no local path"


def test_a_whisper_of_transformers_gives_times_too(tmp_path, voice):
    """A random one, with the tokenizer of the real one."""
    import torch
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    tokenizer = get_asset("whisper-tiny.en") / "tokenizer.json"
    WhisperTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    sizes = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    ids = {"pad_token_id": 50_256, "eos_token_id": 50_256, "bos_token_id": 50_257}
    config = WhisperConfig(
        vocab_size=51_864,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=64,
        decoder_start_token_id=50_257,
        **dict.fromkeys(sizes, 1),
        **ids,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    settings = {"alignment_heads": [[0, 0]], "no_timestamps_token_id": 50_362, "is_multilingual": False}
    settings |= {"max_length": 20, "suppress_tokens": [], "_from_model_config": False}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    transcriber = Transcriber(str(tmp_path))
    heard = transcriber(features_of(voice))
    assert transcriber.gives_times and heard.language == "en"
    assert [heard.text[begin:end] for begin, end in heard.places()] == [word.text for word in heard.words]
    with pytest.raises(TranscriptionError, match="knows English"):
        Transcriber(str(tmp_path), language="fr")


def test_texts_that_repeat_a_phrase_are_recognised():
    assert is_repetitive("Thank you for watching. " * 8)
    assert not is_repetitive("It is good, it is very good, and it is good that it is good.")


def test_an_encoder_is_no_recogniser(tiny_text_encoder):
    with pytest.raises(TranscriptionError, match="a bert is no model for speech recognition"):
        Transcriber(str(tiny_text_encoder))


@pytest.fixture
def spoken_corpus(clip, make_clip, tmp_path) -> Path:
    """Six clips without a column of texts: one with speech, copies of a tone."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy(clip, folder / "0.mp4")
    make_clip(folder / "1.mp4", seconds=0.6, fps=5)
    for number in range(2, 6):
        shutil.copy(folder / "1.mp4", folder / f"{number}.mp4")
    splits = ("train", "valid", "train", "valid", "train", "train")
    lines = [f"{number}.mp4,{number / 2},{split},s{number}" for number, split in enumerate(splits)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label,split,speaker", *lines]) + "\n")
    return folder


def test_prepare_transcribes_clips_of_a_table_without_texts(spoken_corpus, cache_dir, capsys):
    assert main(["prepare", str(spoken_corpus), "--workers", "1"]) == 1
    assert "--transcribe (data.transcribe in training) recognises" in capsys.readouterr().err
    assert main(["prepare", str(spoken_corpus), "--workers", "1", "--transcribe"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"text recognised by a machine +│ +1 ", shown), shown
    assert re.search(r"no speech recognised +│ +5 ", shown) and "by whisper-tiny.en" in shown


def test_texts_that_are_given_stay_and_only_missing_ones_are_recognised(
    spoken_corpus, cache_dir, recogniser, tiny_processor, tiny_config
):
    table = (spoken_corpus / "metadata.csv").read_text().splitlines()
    texts = ["text", "", "😀", "it is good", " ", "", ""]
    rows = [f"{line},{text}" for line, text in zip(table, texts, strict=True)]
    (spoken_corpus / "metadata.csv").write_text("\n".join(rows) + "\n")
    corpus = read_corpus(spoken_corpus, label_range=(-3, 3))
    prepared = prepare(corpus, FeatureCache(), ExtractionSettings(), 1, transcriber=recogniser)
    said = [sample.text for sample in prepared.samples]
    assert "river" in said[0] and said[1:] == ["😀", "it is good", "", "", ""]
    assert set(prepared.transcripts) == {"0.mp4", "3.mp4", "4.mp4", "5.mp4"}
    assert prepared.present("train")[:, 0].tolist() == [True, True, False, False]
    dataset = make_dataset(prepared, "train", tiny_processor, tiny_config)
    spans = [dataset.inputs(row)["text_spans"] for row in range(4)]
    assert [each.isfinite().any().item() for each in spans] == [True, False, False, False]
    assert 0 < spans[0][1, 0, 0] < spans[0][-2, 0, 1] < 1 and spans[0][-2, 1, 1] <= 8
    batch = tiny_processor.pad([dataset.inputs(row) for row in range(4)])
    assert batch["text_spans"].shape[:2] == batch["text_mask"].shape


def test_init_data_writes_what_is_said(clip, make_clip, tmp_path, cache_dir, capsys):
    shutil.copy(clip, tmp_path / "a.mp4")
    make_clip(tmp_path / "b.mp4", seconds=0.6, fps=5)
    (tmp_path / "b.txt").write_text("it is good")
    (tmp_path / "c.mp4").write_bytes(b"no media")
    assert main(["init-data", str(tmp_path), "--transcribe"]) == 0
    rows = list(csv.DictReader((tmp_path / "metadata.csv").open()))
    assert "river" in rows[0]["text"] and [row["text"] for row in rows[1:]] == ["it is good", ""]
    shown = capsys.readouterr().out
    assert "1 texts were recognised by whisper-tiny.en" in shown and "1 clips cannot be read" in shown


@pytest.mark.slow
def test_a_checkpoint_says_which_of_its_texts_a_machine_made(
    spoken_corpus, tiny_text_encoder, cache_dir, tmp_path, capsys, fresh_accelerate
):
    run = tmp_path / "run"
    keys = {
        "data.path": spoken_corpus,
        "data.transcribe": "whisper-tiny.en",
        "data.num_frames": 2,
        "model.text_encoder": tiny_text_encoder,
        "training.output_dir": run,
        "training.epochs": 1,
        "training.batch_size": 2,
    }
    changes = [f"{key}={value}" for key, value in keys.items()]
    assert main(["train", "late_fusion", *changes]) == 0
    record = json.loads((run / "config.json").read_text())["trained_on"]["transcripts"]
    assert record == {"model": "whisper-tiny.en", "language": None, "made": 1, "of": 6}
    card = (run / "README.md").read_text()
    assert "1 of 6 were recognised by whisper-tiny.en" in card and "`--transcribe whisper-tiny.en`" in card
    capsys.readouterr()
    assert main(["predict", str(spoken_corpus / "1.mp4"), "--model", str(run)]) == 0
    shown = capsys.readouterr().err
    assert "1 of 1 clips have no text; the model was trained with --transcribe whisper-tiny.en" in shown


def test_a_run_on_features_cannot_transcribe(tmp_path):
    np.savez(tmp_path / "features.npz", id=np.arange(2))
    with pytest.raises(ConfigurationError, match=r"data\.transcribe=tiny\.en needs clips"):
        read_data(DataArguments(path=str(tmp_path / "features.npz"), transcribe="tiny.en"))
