# SPDX-License-Identifier: Apache-2.0
import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_extractors.clip import Clip
from feature_extractors.decoding import decode
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.reading import read_corpus
from msa_online.modalities import MODALITIES
from msa_online.synthetic.corpus import (
    CorpusRecipe,
    bayes_weights,
    ideal_contributions,
    plan_corpus,
    render_corpus,
)
from msa_online.synthetic.face import FaceRenderer, Look, Pose
from msa_online.synthetic.text import sentence
from msa_online.synthetic.voice import CARRIERS, VOICE_RATE, VOICES, prosody, speak

LOVING = ("perfect", "adored", "fantastic", "amazing", "wonderful", "excellent", "loved", "great")
SMALL = CorpusRecipe(clips=12, speakers=6, contradicting=0.25, missing=0.25, seconds=(0.8, 1.2))
PLAIN_LOOK = Look(mirrored=False, zoom=1.0, colour=(1, 1, 1), contrast=1.0, jaw=0.0, chin=0.0, brows=0.0)


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    return render_corpus(tmp_path_factory.mktemp("synthetic") / "corpus", SMALL, workers=2)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rendered_corpus_is_one_that_our_reader_accepts(small_corpus):
    corpus = read_corpus(small_corpus, label_range=(-3, 3))
    assert len(corpus.samples) == SMALL.clips
    speakers = {split: {s.speaker for s in corpus.split(split)} for split in ("train", "valid", "test")}
    assert all(speakers.values())
    assert sum(len(names) for names in speakers.values()) == len(set.union(*speakers.values()))


def test_table_says_what_each_clip_carries(small_corpus):
    rows = table(small_corpus)
    assert list(rows[0]) == [
        *("file_name", "text", "label", "split", "speaker"),
        *("text_cue", "audio_cue", "vision_cue", "contradicting", "missing"),
    ]
    assert sorted(row["missing"] for row in rows) == [""] * 9 + ["audio", "text", "vision"]
    assert sorted(row["contradicting"] for row in rows) == [""] * 9 + ["audio", "text", "vision"]
    for row in rows:
        assert not (row["missing"] and row["contradicting"])
        for name in MODALITIES:
            assert (row[f"{name}_cue"] == "") == (row["missing"] == name)
        assert (row["text"] == "") == (row["missing"] == "text")


def test_clips_decode_and_lack_exactly_what_the_table_says(small_corpus, face_extractor):
    for row in table(small_corpus):
        raw = decode(Clip(small_corpus / row["file_name"]))
        assert raw.has_video and raw.frames.shape[1:] == (160, 160, 3)
        assert 0.7 < raw.duration < 1.4
        assert raw.has_audio == (row["missing"] != "audio")
        if raw.has_audio:
            assert np.abs(raw.waveform).max() > 0.02
        assert face_extractor.extract(raw.frames).found.all() == (row["missing"] != "vision")


def test_same_recipe_gives_the_same_table_frames_and_sound_with_any_number_of_workers(small_corpus, tmp_path):
    again = render_corpus(tmp_path / "again", SMALL, workers=1)
    assert (again / "metadata.csv").read_bytes() == (small_corpus / "metadata.csv").read_bytes()
    for row in table(again):
        first, second = (decode(Clip(folder / row["file_name"])) for folder in (small_corpus, again))
        assert np.array_equal(first.frames, second.frames)
        assert np.array_equal(first.waveform, second.waveform)


def test_a_finished_folder_is_left_alone_and_an_interrupted_one_completed(tmp_path):
    recipe = CorpusRecipe(clips=3, speakers=3, seconds=(0.5, 0.6))
    folder = render_corpus(tmp_path / "corpus", recipe)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert render_corpus(folder, recipe) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    content = (folder / "metadata.csv").read_bytes()
    (folder / "metadata.csv").unlink()
    (folder / "clips" / "00001.mp4").unlink()
    render_corpus(folder, recipe)
    assert (folder / "metadata.csv").read_bytes() == content
    kept = folder / "clips" / "00000.mp4"
    assert kept.stat().st_mtime_ns == before[kept]
    assert sorted(path.name for path in (folder / "clips").iterdir()) == [f"0000{i}.mp4" for i in range(3)]


def test_nothing_of_another_recipe_or_of_somebody_else_is_overwritten(small_corpus, tmp_path):
    with pytest.raises(CorpusError, match="another recipe"):
        render_corpus(small_corpus, CorpusRecipe(clips=12, speakers=6, seed=2))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"not empty and has no recipe\.json"):
        render_corpus(tmp_path, SMALL)
    with pytest.raises(CorpusError, match="is a file"):
        render_corpus(tmp_path / "thesis.txt", SMALL)
    with pytest.raises(CorpusError, match=r"thesis\.txt is a file, not a folder"):
        render_corpus(tmp_path / "thesis.txt" / "corpus", SMALL)


@pytest.mark.parametrize("library", ["skimage", "espeakng_loader"])
def test_missing_libraries_are_named_with_the_command_that_brings_them(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CorpusError, match=rf"{library} is not installed: pip install 'msa_online\[demo\]'"):
        render_corpus(tmp_path / "corpus", SMALL)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strengths": {"text": 1.2, "audio": 0.6, "vision": 0.8}}, "strength of text is 1.2"),
        ({"strengths": {"text": 1.0, "audio": float("nan"), "vision": 0.8}}, "strength of audio is nan"),
        ({"strengths": {"text": 1.0}}, "give one for each"),
        ({"missing": -0.1}, "missing is -0.1"),
        ({"missing": 0.6, "contradicting": 0.6}, "add up to at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"speakers": 2}, "at least 3"),
        ({"clips": 10}, "too few for 15 speakers"),
        ({"seconds": (2.0, 1.0)}, "seconds are"),
        ({"seconds": (1.0, 60.0)}, "seconds are"),
    ],
)
def test_a_recipe_that_cannot_be_rendered_says_which_value_and_what_to_choose(values, message):
    with pytest.raises(CorpusError, match=message):
        CorpusRecipe(**values)


def test_default_corpus_is_split_three_to_one_to_one_with_disjoint_speakers():
    plan = plan_corpus(CorpusRecipe())
    splits = {name: [clip for clip in plan if clip.split == name] for name in ("train", "valid", "test")}
    assert [len(clips) for clips in splits.values()] == [144, 48, 48]
    speakers = [{clip.speaker for clip in clips} for clips in splits.values()]
    assert [len(names) for names in speakers] == [9, 3, 3] and len(set.union(*speakers)) == 15
    assert sum(clip.missing != "" for clip in plan) == sum(clip.contradicting != "" for clip in plan) == 24


@pytest.fixture(scope="module")
def large_plan():
    """Cues and labels of a recipe on which chance is small: `(clips, 3)`, `(clips,)`, and the recipe."""
    recipe = CorpusRecipe(
        clips=6000, strengths={"text": 0.9, "audio": 0.4, "vision": 0.7}, contradicting=0.15
    )
    complete = [clip for clip in plan_corpus(recipe) if not clip.missing]
    cues = np.array([[clip.cues[name] for name in MODALITIES] for clip in complete])
    return cues, np.array([clip.label for clip in complete]), complete, recipe


def test_closed_form_weights_are_those_that_a_regression_on_the_cues_finds(large_plan):
    cues, labels, _, recipe = large_plan
    empirical = np.linalg.lstsq(cues, labels, rcond=None)[0]
    assert list(bayes_weights(recipe).values()) == pytest.approx(empirical, abs=0.025)
    shares = list(ideal_contributions(recipe).values())
    assert shares == pytest.approx(empirical / empirical.sum(), abs=0.025)
    assert sum(shares) == pytest.approx(1)


def test_each_cue_has_the_requested_strength_and_contradictions_are_opposite(large_plan):
    cues, labels, clips, recipe = large_plan
    agreeing = np.array([not clip.contradicting for clip in clips])
    for column, name in enumerate(MODALITIES):
        correlation = np.corrcoef(cues[agreeing, column], labels[agreeing])[0, 1]
        assert correlation == pytest.approx(recipe.strengths[name], abs=0.03)
        opposite = np.array([clip.contradicting == name for clip in clips])
        assert np.corrcoef(cues[opposite, column], labels[opposite])[0, 1] < -recipe.strengths[name] + 0.15


def test_weights_without_contradictions_are_the_gaussian_posterior():
    strengths = {"text": 0.9, "audio": 0.6, "vision": 0.8}
    odds = {name: r / (1 - r**2) for name, r in strengths.items()}
    scale = 1 + sum(r**2 / (1 - r**2) for r in strengths.values())
    weights = bayes_weights(CorpusRecipe(strengths=strengths, contradicting=0))
    assert weights == pytest.approx({name: value / scale for name, value in odds.items()})


def test_ideal_contributions_of_the_limits_are_what_one_would_say():
    def shares(**strengths):
        return ideal_contributions(CorpusRecipe(strengths=strengths, contradicting=0))

    assert shares(text=0.7, audio=0.7, vision=0.7) == pytest.approx(dict.fromkeys(MODALITIES, 1 / 3))
    assert shares(text=0.7, audio=0, vision=0) == pytest.approx({"text": 1, "audio": 0, "vision": 0})
    assert shares(text=1, audio=0.5, vision=1) == pytest.approx({"text": 0.5, "audio": 0, "vision": 0.5})
    assert shares(text=0, audio=0, vision=0) == dict.fromkeys(MODALITIES, 0.0)


def test_sentences_are_many_follow_the_grade_and_keep_some_words_for_testing():
    rng = np.random.default_rng(0)
    train = {sentence(grade, rng, training=True) for grade in np.linspace(-3, 3, 600)}
    test = {sentence(grade, rng, training=False) for grade in np.linspace(-3, 3, 600)}
    assert len(train) > 500
    words = {word.strip(".,") for text in train for word in text.split()}
    unseen = {word.strip(".,") for text in test for word in text.split()} - words
    assert {"superb", "lousy", "museum"} <= unseen
    best, worst = ({sentence(grade, rng, training=True) for _ in range(40)} for grade in (2.9, -2.9))
    assert all(any(word in text for word in LOVING) for text in best)
    assert not any(word in text for text in worst for word in LOVING)


def test_smile_rises_and_frown_falls_with_the_vision_cue(face_extractor):
    expressions = np.linspace(-1, 1, 7)
    renderer = FaceRenderer()
    frames = [renderer.draw(PLAIN_LOOK, Pose(0.0, (0.0, 0.0), 1.0), e, 0.2) for e in expressions]
    faces = face_extractor.extract(np.stack(frames))
    assert faces.found.all()
    smile = blendshape(faces, "mouthSmileLeft") + blendshape(faces, "mouthSmileRight")
    assert (np.diff(smile) > 0).all() and smile[-1] - smile[0] > 1.5
    assert np.corrcoef(smile, expressions)[0, 1] > 0.9
    shrug = blendshape(faces, "mouthShrugUpper")  # raised chin and pressed lips, the mark of a frown here
    assert shrug[0] > shrug[3] > shrug[-1] and np.corrcoef(shrug, expressions)[0, 1] < -0.7


def test_expression_is_recovered_from_clips_of_all_speakers(small_corpus, face_extractor):
    cues, smiles = [], []
    for row in table(small_corpus):
        if row["vision_cue"]:
            faces = face_extractor.extract(decode(Clip(small_corpus / row["file_name"])).frames)
            cues.append(float(row["vision_cue"]))
            smiles.append(blendshape(faces, "mouthSmileLeft").mean())
    assert np.corrcoef(cues, smiles)[0, 1] > 0.85


@pytest.mark.parametrize("voice", VOICES[:2])
def test_happier_speech_is_higher_faster_and_louder_while_the_words_stay(voice):
    import librosa

    pitches, durations, energies = [], [], []
    for cue in (-2.5, 0.0, 2.5):
        speech, gain = prosody(cue, voice, 0.0)
        waveform = gain * speak(CARRIERS[0], speech)
        pitches.append(np.median(librosa.yin(waveform, fmin=50, fmax=500, sr=VOICE_RATE)))
        durations.append(len(waveform))
        energies.append(np.sqrt(np.mean(waveform**2)))
    assert pitches == sorted(pitches) and pitches[2] > 1.3 * pitches[0]
    assert durations == sorted(durations, reverse=True)
    assert energies == sorted(energies)


def test_an_utterance_does_not_depend_on_what_was_spoken_before():
    speech, _ = prosody(1.0, VOICES[1], 0.0)
    first = speak(CARRIERS[0], speech)
    speak(CARRIERS[1], prosody(-2.0, VOICES[0], 0.0)[0])
    assert np.array_equal(speak(CARRIERS[0], speech), first)


def test_a_voice_that_espeak_does_not_know_is_reported_by_name():
    speech, _ = prosody(0.0, "no-such-voice", 0.0)
    with pytest.raises(RuntimeError, match="no-such-voice"):
        speak(CARRIERS[0], speech)


@pytest.fixture(scope="module")
def face_extractor():
    from feature_extractors.face import FaceExtractor

    with FaceExtractor() as extractor:
        yield extractor


def blendshape(faces, name: str) -> np.ndarray:
    from feature_extractors.face import BLENDSHAPE_NAMES

    return faces.blendshapes[:, BLENDSHAPE_NAMES.index(name)]
