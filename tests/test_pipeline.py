# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from feature_extractors import Clip, ClipError, FaceExtractor, FeatureCache, decode, face
from msa_online import MSAConfig, MSAModel, MSAPipeline, MSAProcessor, Prediction
from msa_online.commands.predict import prediction_lines
from msa_online.confidence import Confidence
from msa_online.evaluation.conditions import UndefinedScoreError
from msa_online.hub import CheckpointError
from msa_online.methods import HEADS


@pytest.fixture
def pipeline(tiny_model, tiny_processor):
    return MSAPipeline(tiny_model, tiny_processor)


def test_a_clip_with_its_words_uses_all_three(pipeline, make_clip, tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    prediction = pipeline(clip, text="a good movie")
    assert prediction.modalities == ("text", "audio", "vision")
    assert prediction.missing == {} and prediction.label is None and prediction.probabilities == {}
    assert json.loads(json.dumps(prediction.to_dict()))["score"] == prediction.score


def test_without_a_transcript_the_text_is_missing_and_the_output_says_so(pipeline, make_clip, tmp_path):
    prediction = pipeline(make_clip(tmp_path / "a.mp4"))
    assert prediction.modalities == ("audio", "vision")
    assert prediction.missing == {"text": "no transcript given"}


def test_what_makes_a_face_doubtful_is_reported(pipeline, make_clip, face_image, tmp_path):
    pair = np.broadcast_to(np.concatenate([face_image, face_image], axis=1), (8, 160, 320, 3))
    path = make_clip(tmp_path / "a.mp4", frames=pair, size=(320, 160), fps=8, audio=None)
    prediction = pipeline(path, text="a good movie")
    assert prediction.findings == ("several faces",) and prediction.missing == {"audio": "no audio stream"}
    assert prediction.to_dict()["findings"] == ("several faces",)
    assert "  found: several faces" in prediction_lines([prediction])
    assert pipeline(Clip(path, region=(0, 0, 0.5, 1))).findings == ()


def test_speech_after_the_part_that_is_read_is_not_used_and_named(pipeline, make_clip, tmp_path):
    sound = np.concatenate([np.zeros(32 * 48_000), 0.3 * np.sin(np.arange(48_000) / 20)])
    path = make_clip(tmp_path / "late.wav", video=False, audio=sound)
    prediction = pipeline(path, text="good")
    assert prediction.modalities == ("text",) and prediction.contributions["audio"] == 0
    assert prediction.missing["audio"] == (
        "silent in the first 30 s, which are read; the sound starts at 32.0 s: give start and end of the "
        "part to read"
    )
    assert prediction.cut["audio"] == "first 30.0 of 33.0 s"
    assert "audio" in pipeline(Clip(path, 31, 33)).modalities


def test_the_audio_track_of_training_is_heard_where_there_is_one(pipeline, tmp_path):
    voice = 0.3 * np.sin(np.arange(48_000) / 20)
    two = two_tracks(tmp_path / "two.mka", voice, 0 * voice)
    one = two_tracks(tmp_path / "one.mka", voice)
    assert pipeline(two, text="good").findings == ("audio track 1 of 2",)
    pipeline.model.config.trained_on = {"audio_track": 2}
    assert pipeline(two, text="good").missing["audio"] == "silent audio"
    assert "audio" in pipeline(Clip(two, audio_track=1), text="good").modalities
    assert "audio" in pipeline(one, text="good").modalities
    with pytest.raises(ClipError, match="no such file"):
        pipeline(tmp_path / "none.mka", text="good")


def two_tracks(path, *tracks: np.ndarray):
    """A file with these audio tracks of 48 kHz."""
    import av

    with av.open(str(path), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=48_000, layout="mono") for _ in tracks]
        for stream, samples in zip(streams, tracks, strict=True):
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate = 48_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def test_text_alone_is_legal(pipeline):
    prediction = pipeline(text="a good movie")
    assert prediction.modalities == ("text",)
    assert prediction.missing == {"audio": "no clip given", "vision": "no clip given"}


def test_a_model_that_has_diverged_gives_no_score(pipeline):
    with torch.no_grad():
        next(pipeline.model.encoders["text"].parameters()).fill_(float("nan"))
    with pytest.raises(UndefinedScoreError, match="not finite; training has diverged"):
        pipeline(text="a good film")


def test_a_score_has_the_interval_of_the_modalities_that_it_uses(tiny_model, tiny_processor):
    fitted = Confidence("valid", {}, half_widths={"text": 0.5, "nothing": 9.0})
    tiny_model.config.confidence = fitted.to_dict()
    pipeline = MSAPipeline(tiny_model, tiny_processor)
    for attribute in (False, True):
        seen = pipeline(text="a good film", attribute=attribute)
        assert (seen.interval.low, seen.interval.high) == (seen.score - 0.5, seen.score + 0.5)
    nothing, sound = (pipeline(audio=gain * voice(), sampling_rate=16_000) for gain in (0, 1))
    assert (nothing.interval.low, nothing.interval.high) == (-3, 3)
    assert sound.modalities == ("audio",) and sound.interval is None and sound.confidence is None
    plain = json.loads(json.dumps(seen.to_dict()))
    assert plain["interval"] == {"low": seen.interval.low, "high": seen.interval.high, "level": 0.9}
    lines = prediction_lines([seen, sound])
    assert lines[1] == f"  90% interval {seen.interval.low:+.3f} to {seen.interval.high:+.3f}"
    assert sum("interval" in line for line in lines) == 1


def test_a_class_has_a_confidence_where_its_probability_is_calibrated(tiny_config, tiny_processor):
    classes = {"label_range": None, "id2label": {0: "calm", 1: "happy"}}
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), **classes}))
    before = MSAPipeline(model, tiny_processor)(text="a good film")
    model.config.confidence = Confidence("valid", {}, temperatures={"text": 0.05}).to_dict()
    pipeline = MSAPipeline(model, tiny_processor)
    after, silent = pipeline(text="a good film"), pipeline(audio=voice(), sampling_rate=16_000)
    assert before.confidence is None and silent.confidence is None and after.interval is None
    assert after.label == before.label and after.confidence == after.probabilities[after.label]
    odds = [one.probabilities["calm"] / one.probabilities["happy"] for one in (before, after)]
    assert np.log(odds[1]) == pytest.approx(np.log(odds[0]) * 20, rel=1e-3)
    first, *_ = prediction_lines([after])
    assert first == f"(text only): {after.label} ({after.confidence:.1%}, calibrated)"


def voice() -> np.ndarray:
    """A second of a tone at 16 kHz."""
    return (0.3 * np.sin(np.arange(16_000) / 20)).astype(np.float32)


def test_sound_alone_is_legal(pipeline, make_clip, tmp_path):
    prediction = pipeline(make_clip(tmp_path / "a.wav", video=False))
    assert prediction.modalities == ("audio",)
    assert prediction.missing["vision"] == "no video stream"


def test_a_clip_with_nothing_to_see_or_hear_still_gets_a_prediction(pipeline, make_clip, tmp_path):
    import numpy as np

    clip = make_clip(tmp_path / "a.mp4", frames=np.zeros((10, 160, 160, 3), np.uint8), audio="silent")
    prediction = pipeline(clip)
    assert prediction.modalities == ()
    assert prediction.missing == {"text": "no transcript given", "audio": "silent audio", "vision": "no face"}
    assert prediction.score == pytest.approx(prediction.baseline, abs=1e-6)
    assert prediction.to_dict()["warning"] == prediction.warning
    assert "baseline" in prediction.warning and pipeline(clip, text="good").warning is None


def test_a_long_recording_says_how_much_of_it_was_read(pipeline, make_clip, tmp_path):
    import numpy as np

    picture = make_clip(tmp_path / "a.mkv", seconds=40.0, fps=1, audio=np.full(40 * 48_000, 0.1))
    long, short = pipeline([picture, None], text=["good " * 200, "a good movie"])
    assert long.to_dict()["cut"] == {
        "text": "128 of 202 tokens",
        "audio": "first 30.0 of 40.0 s",
        "vision": "4 frames over 40.0 s",
    }
    assert short.cut == {}


def test_several_clips_at_once_equal_each_alone(pipeline, make_clip, tmp_path):
    clips = [make_clip(tmp_path / "a.mp4", seconds=0.5), make_clip(tmp_path / "b.mp4", seconds=2.0)]
    together = pipeline(clips, text=["a good movie", None])
    alone = [pipeline(clips[0], text="a good movie"), pipeline(clips[1])]
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-5)


# --- what a prediction comes from ---


@pytest.fixture
def make_pipeline(tiny_config, tiny_processor):
    """A function that opens a pipeline on a model in which every hidden modality makes a difference."""

    def make(**changes) -> MSAPipeline:
        torch.manual_seed(4)
        model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), **changes}))
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return MSAPipeline(model, tiny_processor)

    return make


MOODS = {"label_range": None, "label2id": None, "id2label": {0: "calm", 1: "angry", 2: "happy"}}


def shared_out(prediction: Prediction) -> float:
    return prediction.score if prediction.label is None else prediction.probabilities[prediction.label]


@pytest.mark.parametrize("task", [{}, MOODS], ids=["regression", "classification"])
@pytest.mark.parametrize("head", HEADS)
def test_contributions_add_up_to_the_prediction_less_what_the_model_says_of_nothing(
    head, task, make_pipeline, make_clip, tmp_path
):
    pipeline = make_pipeline(head=head, **task)
    blind = tmp_path / "blind.wav"
    make_clip(blind, audio="silent", video=False)
    clip = make_clip(tmp_path / "a.mp4")
    seen, heard, nothing = pipeline([clip, clip, blind], text=["a good movie", None, None])
    for one in (seen, heard, nothing):
        assert one.baseline + sum(one.contributions.values()) == pytest.approx(shared_out(one), abs=1e-5)
    used = [{name for name, value in one.contributions.items() if value} for one in (seen, heard, nothing)]
    fused = {*pipeline.model.head.fuses}
    assert used == [fused, fused - {"text"}, set()]
    said_of_nothing = nothing.score if nothing.label is None else nothing.probabilities[seen.label]
    assert seen.baseline == pytest.approx(said_of_nothing, abs=1e-6)


def test_the_encoders_run_once_for_any_number_of_subsets(make_pipeline, make_clip, tmp_path):
    pipeline, calls = make_pipeline(), Counter()
    parts = {**pipeline.model.encoders, "head": pipeline.model.head}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    pipeline([make_clip(tmp_path / "a.mp4")] * 2, text=["a good movie", None])
    assert calls == {"text": 1, "audio": 1, "vision": 1, "head": 8}


def test_a_score_beyond_the_range_of_the_labels_is_not_cut_and_its_contributions_still_add_up(make_pipeline):
    pipeline = make_pipeline()
    torch.nn.init.constant_(pipeline.model.head.classifier.bias, 50.0)
    prediction = pipeline(text="a good movie")
    assert prediction.score > pipeline.model.config.label_range[1]
    total = prediction.baseline + sum(prediction.contributions.values())
    assert total == pytest.approx(prediction.score, abs=1e-5) and prediction.contributions["text"] != 0


def test_contributions_to_several_clips_at_once_equal_those_to_each_alone(make_pipeline, make_clip, tmp_path):
    pipeline = make_pipeline()
    clips = [make_clip(tmp_path / "a.mp4", seconds=0.5), make_clip(tmp_path / "b.wav", video=False)]
    together = pipeline(clips, text=[None, "a good movie"])
    alone = [pipeline(clips[0]), pipeline(clips[1], text="a good movie")]
    for one, other in zip(together, alone, strict=True):
        assert one.contributions == pytest.approx(other.contributions, abs=1e-5)
        assert one.baseline == pytest.approx(other.baseline, abs=1e-5)


def test_nothing_to_predict_from_and_unequal_lists_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="give a clip, a text, or both"):
        pipeline()
    with pytest.raises(ValueError, match="2 clips but 1 texts"):
        pipeline([None, None], text=["a"])
    with pytest.raises(ClipError, match="nosuch.mp4"):
        pipeline(tmp_path / "nosuch.mp4")


@pytest.mark.parametrize(
    ("clips", "text", "message"),
    [
        (["a.mp4", "b.mp4"], "well", "a list of 2 clips but one text"),
        (["a.mp4"], "well", "a list of 1 clips but one text"),
        ("a.mp4", ["well", "ill"], "one clip but a list of 2 texts"),
        (["a.mp4", 3], None, "clip 2 is 3: give a path"),
        (["a.mp4"], [float("nan")], "text 1 is nan: give a string, or None"),
    ],
)
def test_one_text_is_not_taken_for_several_clips(pipeline, clips, text, message):
    with pytest.raises(ValueError, match=message):
        pipeline(clips, text=text)


def test_texts_in_a_list_need_no_clips_and_clips_no_texts(pipeline, make_clip, tmp_path):
    assert [one.modalities for one in pipeline(text=["a good movie", "bad"])] == [("text",)] * 2
    (one,) = pipeline([make_clip(tmp_path / "a.wav", video=False)], text=None)
    assert one.modalities == ("audio",)
    assert pipeline([]) == []


def test_a_broken_clip_stands_in_its_place_on_request(pipeline, make_clip, tmp_path):
    clip = make_clip(tmp_path / "a.wav", video=False)
    clips = [clip, tmp_path / "nosuch.mp4", clip]
    with pytest.raises(ClipError, match="nosuch.mp4"):
        pipeline(clips)
    first, broken, third = pipeline(clips, text=["bad", "good", "a good movie"], skip_broken=True)
    assert isinstance(broken, ClipError) and broken.path == tmp_path / "nosuch.mp4"
    assert first.score == pytest.approx(pipeline(clip, text="bad").score, abs=1e-5)
    assert third.score == pytest.approx(pipeline(clip, text="a good movie").score, abs=1e-5)


def test_more_clips_than_fit_one_forward_pass_keep_their_order(pipeline):
    texts = ["good", "bad", "a great film"] * 7
    together = pipeline(text=texts)
    alone = {text: pipeline(text=text).score for text in set(texts)}
    assert [one.score for one in together] == pytest.approx([alone[text] for text in texts], abs=1e-5)


def test_a_model_of_features_is_refused_saying_what_it_takes_and_what_to_do(tmp_path):
    widths = {"text": 4, "audio": 3, "vision": 2}
    MSAModel(MSAConfig(feature_widths=widths, head_kwargs={"hidden_size": 8})).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="text 4, audio 3, vision 2.*not clips.*msa-online evaluate"):
        MSAPipeline.from_pretrained(tmp_path)


def test_real_clips_without_sound_or_without_a_face_owe_nothing_to_it(make_pipeline, shared_data):
    names = ("face_no_audio_stream.mp4", "no_face.mp4")
    deaf, faceless = make_pipeline()([shared_data / "edge_cases" / name for name in names])
    assert deaf.contributions["audio"] == 0 and deaf.contributions["vision"] != 0
    assert faceless.contributions["vision"] == 0 and faceless.contributions["audio"] != 0


def test_real_clips_of_other_corpora_are_understood(pipeline, shared_data):
    clips = (
        sorted((shared_data / "crema_d").glob("*.flv"))[:2] + sorted((shared_data / "grid").glob("*.mpg"))[:2]
    )
    for prediction in pipeline(clips):
        assert {"audio", "vision"} <= set(prediction.modalities)


# --- what a clip may come as ---


def scores(predictions) -> list[float]:
    return [prediction.score for prediction in predictions]


def test_bytes_and_open_files_predict_as_their_file_does(pipeline, make_clip, tmp_path):
    path = make_clip(tmp_path / "a.mp4")
    expected = pipeline(path, "a good movie")
    with open(path, "rb") as file:
        from_file = pipeline(file, "a good movie")
    from_bytes = pipeline([path.read_bytes()], ["a good movie"])[0]
    from_memory = pipeline(io.BytesIO(path.read_bytes()), "a good movie")
    assert scores([from_file, from_bytes, from_memory]) == [expected.score] * 3
    assert (from_file.clip, from_bytes.clip) == (str(path), "(bytes)")
    with pytest.raises(ClipError, match=r"^\(bytes\): cannot be decoded"):
        pipeline(b"neither sound nor pictures, but words")
    with open(path, encoding="latin-1") as file, pytest.raises(ValueError, match="open it in binary mode"):
        pipeline(file)


def test_arrays_predict_as_the_file_they_come_from_does(pipeline, make_clip, tmp_path):
    path = make_clip(tmp_path / "a.mkv", seconds=2.0)
    raw = decode(Clip(path), num_frames=4)
    expected = pipeline(path, "a good movie")
    arrays = {"audio": raw.waveform, "sampling_rate": 16_000, "frames": raw.frames}
    found = pipeline(text="a good movie", **arrays)
    assert found.modalities == ("text", "audio", "vision") and found.clip is None
    assert found.score == pytest.approx(expected.score, abs=1e-6)
    assert pipeline([{"text": "a good movie", **arrays}, {"clip": path}])[0].score == pytest.approx(
        found.score, abs=1e-6
    )
    assert pipeline(audio=torch.from_numpy(raw.waveform), sampling_rate=16_000).modalities == ("audio",)
    assert pipeline(frames=raw.frames).modalities == ("vision",)


def test_start_and_end_are_those_of_a_clip(pipeline, make_clip, tmp_path):
    path = make_clip(tmp_path / "a.mp4", seconds=3.0)
    expected = pipeline(Clip(path, 0.5, 1.5)).score
    assert pipeline(path, start=0.5, end=1.5).score == expected
    assert pipeline(path.read_bytes(), start=0.5, end=1.5).score == expected
    (found,) = pipeline([{"clip": path, "start": 0.5, "end": 1.5}])
    assert found.score == expected
    with pytest.raises(ClipError, match="beyond the clip"):
        pipeline(path, start=2, end=9)


def test_a_generator_is_read_one_batch_at_a_time(pipeline, make_clip, tmp_path):
    path, read = make_clip(tmp_path / "a.wav", video=False), []

    def clips():
        for number in range(5):
            read.append(number)
            yield {"clip": path, "text": "good"} if number % 2 else path

    predictions = pipeline(clips(), batch_size=2)
    assert read == []
    first = next(predictions)
    assert read == [0, 1]
    assert scores([first, *predictions]) == pytest.approx(
        scores(pipeline([path] * 5, [None, "good"] * 2 + [None])), abs=1e-6
    )
    texts = pipeline(text=(text for text in ("good", "bad", "awful")))
    assert scores(texts) == pytest.approx(scores(pipeline(text=["good", "bad", "awful"])), abs=1e-6)


def test_a_generator_with_a_broken_clip_goes_on_only_on_request(pipeline, make_clip, tmp_path):
    clips = [make_clip(tmp_path / "a.wav", video=False), tmp_path / "nosuch.mp4"]
    with pytest.raises(ClipError, match=r"nosuch\.mp4"):
        list(pipeline(iter(clips)))
    kinds = [type(result) for result in pipeline(iter([*clips, clips[0]]), skip_broken=True)]
    assert kinds == [Prediction, ClipError, Prediction]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: {"clips": iter([None, None]), "text": ["one"]}, "too few texts"),
        (lambda: {"clips": [], "text": iter(["one"])}, "too few clips"),
        (lambda: {"clips": iter(["a"]), "text": "one"}, "one of texts but an iterator"),
        (lambda: {"clips": "a", "text": iter(["one"])}, "one of clips but an iterator"),
        (lambda: {"clips": ["a"], "start": 1.0}, "start of several clips: give a dict"),
        (lambda: {"clips": [{"clip": "a", "words": "b"}]}, "clip 1 has words: known are clip, text"),
        (lambda: {"clips": [{"clip": "a"}], "text": ["b"]}, "clip 1 is a dict: give its text"),
        (lambda: {"clips": "a", "frames": np.zeros((1, 9, 9, 3), np.uint8)}, "has a file and arrays"),
        (lambda: {"audio": np.ones(9), "sampling_rate": 8000, "end": 1}, "cut the arrays instead"),
        (lambda: {"audio": np.ones(9)}, "sampling_rate is None"),
        (lambda: {"text": "good", "start": 1}, "a window but no file"),
        (lambda: {"clips": Clip(Path("a"), 1, 2), "start": 0}, "has its own window"),
        (lambda: {"text": ["good"], "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(pipeline(**arguments()))


def test_the_batch_size_is_that_of_the_forward_pass_and_changes_no_score(pipeline):
    sizes, texts = [], ["good", "bad", "a great film", "awful", "not bad"]
    pipeline.model.head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]["text"].mask)))
    expected = scores(pipeline(text=texts))
    assert set(sizes) == {5}
    sizes.clear()
    assert scores(pipeline(text=texts, batch_size=2)) == pytest.approx(expected, abs=1e-6)
    assert sizes == [2] * 16 + [1] * 8


@pytest.mark.parametrize("task", [{}, MOODS], ids=["regression", "classification"])
def test_without_contributions_the_head_runs_once_and_the_prediction_is_the_same(task, make_pipeline):
    pipeline, calls = make_pipeline(**task), []
    pipeline.model.head.register_forward_hook(lambda *_: calls.append(1))
    whole = pipeline(text="a good movie").to_dict()
    assert len(calls) == 8
    short = pipeline(text="a good movie", attribute=False).to_dict()
    assert len(calls) == 9
    assert (short.pop("baseline"), short.pop("contributions")) == (None, {})
    assert short == {name: whole[name] for name in short}


# --- MediaPipe ---


def test_mediapipe_is_opened_once_and_closed_with_the_pipeline(
    tiny_model, tiny_processor, make_clip, tmp_path, monkeypatch
):
    path, opened, closed = make_clip(tmp_path / "a.mp4"), [], []
    monkeypatch.setattr(face._Loan, "_idle", [])
    init, close = FaceExtractor.__init__, FaceExtractor.close
    monkeypatch.setattr(
        FaceExtractor, "__init__", lambda self, *given: opened.append(1) or init(self, *given)
    )
    monkeypatch.setattr(FaceExtractor, "close", lambda self: closed.append(1) or close(self))
    with MSAPipeline(tiny_model, tiny_processor) as pipeline:
        assert pipeline(text="good") and not opened
        first = pipeline(path).score
        next(pipeline.stream([path] * 3, batch_size=1))  # abandoned
        next(pipeline(iter([path] * 3), batch_size=1))
        with ThreadPoolExecutor(4) as threads:
            assert set(threads.map(lambda _: pipeline(path).score, range(8))) == {first}
        assert (len(opened), len(closed)) == (1, 0)
    assert len(closed) == 1
    assert pipeline(path).score == first and len(opened) == 2
    pipeline.close()


def test_abandoning_a_stream_in_a_program_that_ends_neither_hangs_nor_complains(
    tiny_model, tiny_processor, make_clip, tmp_path, repository
):
    clip = make_clip(tmp_path / "a.mp4")
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    program = (
        "import sys, gc; from msa_online import MSAPipeline\n"
        "def abandon():\n"
        "    pipeline = MSAPipeline.from_pretrained(sys.argv[1])\n"
        "    predictions = pipeline.stream([sys.argv[2]] * 3, batch_size=1)\n"
        "    circle = [predictions]; circle.append(circle)\n"
        "    print(next(predictions).score)\n"
        "    return pipeline.model\n"
        "import weakref\n"
        "models = [weakref.ref(abandon()) for _ in range(2)]\n"
        "gc.collect()\n"
        "assert [model() for model in models] == [None, None]\n"
        "left = MSAPipeline.from_pretrained(sys.argv[1]).stream([sys.argv[2]] * 3, batch_size=1)\n"
        "print(next(left).score)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model"), str(clip)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0 and len(set(ended.stdout.split())) == 1, ended.stderr
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr


# --- opening a checkpoint ---


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_opens_with_the_type_and_the_devices_asked_for(checkpoint):
    expected = MSAPipeline.from_pretrained(checkpoint)
    assert expected.model.dtype == torch.float32
    score = expected(text="a good movie").score
    for dtype in (torch.bfloat16, "bfloat16"):
        pipeline = MSAPipeline.from_pretrained(checkpoint, dtype=dtype)
        assert pipeline.model.dtype == torch.bfloat16
        assert pipeline(text="a good movie").score == pytest.approx(score, abs=0.02)
    for device_map in ("auto", {"": "cpu"}):
        pipeline = MSAPipeline.from_pretrained(checkpoint, device_map=device_map)
        assert pipeline(text="a good movie").score == pytest.approx(score, abs=1e-5)
    placed = MSAPipeline.from_pretrained(checkpoint, "cpu")
    assert placed.device == torch.device("cpu")
    with pytest.raises(ValueError, match="device and device_map are both given"):
        MSAPipeline.from_pretrained(checkpoint, device="cpu", device_map="auto")
    placed.model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="the model has a device map"):
        MSAPipeline(placed.model, placed.processor, device="cpu")


def test_the_features_of_a_clip_are_kept_in_the_cache_that_is_given(checkpoint, make_clip, tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    for cache in (tmp_path / "features", str(tmp_path / "features"), FeatureCache(tmp_path / "features")):
        with MSAPipeline.from_pretrained(checkpoint, cache=cache) as pipeline:
            scores([pipeline(clip), pipeline(clip.read_bytes()), pipeline(Clip(clip, 0, 0.5))])
        assert len(list((tmp_path / "features").glob("??/*.safetensors"))) == 2


def test_a_revision_of_a_repository_is_opened_with_the_token(checkpoint, tmp_path, monkeypatch, repository):
    """Two revisions lie in a cache of the Hub as its client writes it; no network is used."""
    other = MSAPipeline.from_pretrained(checkpoint)
    torch.nn.init.constant_(other.model.head.classifier.bias, 2.0)
    repo = tmp_path / "hub" / "models--me--mine"
    for name, commit, model in (("main", "1" * 40, None), ("v2", "2" * 40, other)):
        shutil.copytree(checkpoint, repo / "snapshots" / commit)
        if model:
            model.model.save_pretrained(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    program = (
        "from msa_online import MSAPipeline\n"
        "for revision in (None, 'v2', '2' * 40):\n"
        "    pipeline = MSAPipeline.from_pretrained('me/mine', revision=revision, token='hf_x')\n"
        "    print(pipeline(text='a good movie').score)\n"
        "MSAPipeline.from_pretrained('me/mine', revision='v3')\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    first, *second = map(float, ended.stdout.split())
    expected = other(text="a good movie").score
    assert second == pytest.approx([expected] * 2, abs=1e-5) and abs(first - expected) > 1, ended.stderr
    assert "CheckpointError: me/mine" in ended.stderr


def test_the_token_reaches_every_file(checkpoint, monkeypatch):
    seen = []
    for kind in (AutoConfig, MSAModel, MSAProcessor):
        original = kind.from_pretrained

        def spy(*args, original=original, **options):
            seen.append((options.get("token"), options.get("revision")))
            return original(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    MSAPipeline.from_pretrained(checkpoint, token="hf_x", revision="v2")
    assert seen[0] == ("hf_x", "v2") and len(seen) >= 3 and set(seen) == {("hf_x", "v2")}
