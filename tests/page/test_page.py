# SPDX-License-Identifier: Apache-2.0
"""The page as visitors use it: over HTTP, with a real server and a tiny model."""

import logging
import re
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import httpx
import numpy as np
import pytest
import soundfile
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from msa_online import MSAPipeline, Prediction
from msa_online.confidence import Interval
from msa_online.modalities import MODALITIES
from msa_online.page import blocks, serving
from msa_online.page.result import result_html
from msa_online.pipeline import HIDDEN
from msa_online.synthetic.voice import VOICE_RATE, Speech, speak
from msa_online.timeline import Timeline, WindowPrediction
from msa_online.transcription import Transcriber
from msa_online_cli import main

NO_CROPS = np.zeros((0, 0, 0, 3), np.uint8)
SCORE = Prediction(
    clip="/srv/secret/a.mp4",
    score=1.25,
    label=None,
    probabilities={},
    modalities=("text", "vision"),
    missing={"audio": "silent audio"},
    baseline=0.5,
    contributions={"text": 1.0, "audio": 0.0, "vision": -0.25},
    cut={"text": "first 126 of 300 tokens"},
    findings=("several faces",),
    interval=Interval(-0.5, 2.5, 0.9),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where temporary files are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def pipeline(tiny_model, tiny_processor):
    with torch.no_grad():
        for parameter in tiny_model.head.parameters():
            parameter *= 3  # so that scores differ in the digits that the page shows
    with MSAPipeline(tiny_model, tiny_processor) as pipeline:
        yield pipeline


@pytest.fixture
def serve(pipeline, folder):
    """A context with a served page and a client."""

    @contextmanager
    def serving_page():
        with serving.running_page(pipeline, "tiny", port=free_port()) as address:
            client = Client(address, verbose=False, download_files=False)
            yield client
            client.close()
        assert not [*folder.glob("msa_online_page_*")], "the page leaves files behind"

    return serving_page


def ask(client: Client, video=None, sound=None, text="", used=MODALITIES) -> str:
    files = [None if path is None else handle_file(path) for path in (video, sound)]
    return client.predict(*files, text, list(used), api_name="/predict")


def words_of(html: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def uploads_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".mp4", ".wav", ".txt")]


# --- over HTTP ---


def test_a_visitor_sees_the_prediction_and_hides_a_modality(serve, pipeline, folder, make_clip, tmp_path):
    clip = make_clip(tmp_path / "my holiday 🎬 'é.mp4", seconds=0.6, fps=10)
    expected = pipeline(clip, text="a good movie")
    with serve() as client:
        everything = ask(client, clip, text="a good movie")
        assert f"Predicted score {expected.score:+.2f}".replace("-", "−") in words_of(everything)
        assert everything.count("data:image/png") == 4  # a face for each frame that is read
        faceless = ask(client, clip, text="a good movie", used=["text", "audio"])
        assert "The face off" in words_of(faceless) and "data:image" not in faceless
        assert words_of(faceless)[:25] != words_of(everything)[:25]
        (first,) = uploads_in(folder)
        ask(client, make_clip(tmp_path / "another.mp4", seconds=0.6, fps=10))
        (second,) = uploads_in(folder)
        assert second.name == "another.mp4" and not first.exists()


def test_what_cannot_be_predicted_is_one_line_without_paths_of_the_server(
    serve, folder, make_clip, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "MAX_BYTES", 400_000)
    monkeypatch.setattr(blocks, "MAX_SECONDS", 1)
    note = tmp_path / "no media.txt"
    note.write_text("hello")
    long = make_clip(tmp_path / "long.wav", seconds=1.5, video=False, audio="silent")
    (tmp_path / "large.mp4").write_bytes(bytes(400_001))
    with serve() as client:
        lines = {
            "text": words_of(ask(client, text=" \u200b ")),
            "kind": words_of(ask(client, sound=note)),
            "length": words_of(ask(client, sound=long)),
            "characters": words_of(ask(client, text="a" * 5_001)),
        }
        with open(tmp_path / "large.mp4", "rb") as file:
            answer = httpx.post(f"{client.src}gradio_api/upload", files={"files": file})
        assert answer.status_code == 413 and "400000 bytes" in answer.text
        address = {"path": "http://example.org/a.mp4", "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(AppError, match="not an address"):
            client.predict(address, None, "", list(MODALITIES), api_name="/predict")
        assert "tokenizer knows no word" in words_of(ask(client, text="🎉🎉"))
    assert lines["text"] == "Nothing to predict from: give a clip, or type what was said."
    assert lines["kind"].startswith("no media.txt cannot be used: cannot be decoded")
    assert lines["length"] == "long.wav lasts 2 seconds: give a clip of at most 1 second."
    assert lines["characters"] == "The text has 5,001 characters: give at most 5,000."
    assert not [line for line in lines.values() if str(folder) in line or len(line) > 200]


def test_a_broken_upload_is_deleted_like_others_and_fills_no_log(serve, folder, caplog):
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n' + 9_999 * "x"
    with serve() as client:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        (uploads,) = folder.glob("msa_online_page_*/uploads")
        with socket.create_connection(("127.0.0.1", urlsplit(client.src).port)) as connection:
            connection.sendall((head + part).encode())
            wait_for(lambda: any(path.is_file() for path in uploads.rglob("*")))
        wait_for(lambda: "ClientDisconnect" in caplog.text, seconds=1)
        serving.delete_older(uploads, 60)
        assert any(path.is_file() for path in uploads.rglob("*"))
        serving.delete_older(uploads, -1)
        assert not any(path.is_file() for path in uploads.rglob("*"))
    assert "ClientDisconnect" not in caplog.text


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so, at most so many seconds."""
    until = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until:
        time.sleep(0.05)


def test_a_long_clip_without_words_is_shown_over_time(serve, make_clip, tmp_path):
    clip = make_clip(tmp_path / "long.mp4", seconds=17, fps=1)  # four frames are too far apart
    with serve() as client:
        assert "Along the recording" in ask(client, clip)
        assert "Along the recording" not in ask(client, clip, text="a good movie")


def test_old_uploads_are_deleted_while_the_page_runs(pipeline, folder, monkeypatch):
    monkeypatch.setattr(blocks, "KEPT_SECONDS", 2)
    monkeypatch.setattr(serving, "SWEEPING", 0.1)
    with serving.running_page(pipeline, "tiny", port=free_port()) as address:
        upload = httpx.post(f"{address}/gradio_api/upload", files={"files": ("whole.mp4", b"abc")})
        (path,) = map(Path, upload.json())
        wait_for(path.exists)
        assert path.exists() and folder in path.parents
        wait_for(lambda: not path.exists())
        assert not path.exists()


def test_two_visitors_with_the_same_file_do_not_delete_it_for_each_other(tmp_path):
    uploads, shared, example = blocks.Uploads({"example.mp4"}), tmp_path / "a.mp4", tmp_path / "example.mp4"
    shared.touch(), example.touch()
    uploads.show("one", shared)
    uploads.show("two", shared)
    uploads.show("one", example)
    assert shared.exists()
    uploads.show("two", None)
    uploads.show("one", None)
    assert not shared.exists() and example.exists()


def test_a_port_in_use_and_a_missing_checkpoint_are_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert main(["serve", str(tmp_path), "--port", str(busy.getsockname()[1])]) == 1
        assert "cannot be served: Address already in use" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none"), "--port", str(free_port())]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_what_is_said_is_written_down_for_the_visitor(pipeline, tmp_path):
    sentence = "the road goes along the river and turns left at the bridge"
    sound = np.pad(speak(sentence, Speech("en-us+m1", 48, 50, 150)), VOICE_RATE // 2)
    path = tmp_path / "spoken.wav"
    soundfile.write(path, sound, VOICE_RATE)
    pipeline.transcriber = Transcriber()
    answers, visitor = blocks.Answers(pipeline, blocks.Uploads(())), gr.Request(session_hash="a")
    text, _, memory = answers.transcribe(None, str(path), None, visitor)
    assert "the river and turns left" in text and memory[0] == path
    shown, _ = answers.answer(None, str(path), "", MODALITIES, memory, visitor)
    assert f"whisper-tiny.en heard, perhaps wrongly: {text}" in words_of(shown)
    soundfile.write(tmp_path / "silent.wav", 0 * sound, VOICE_RATE)
    _, problem, _ = answers.transcribe(None, str(tmp_path / "silent.wav"), None, visitor)
    assert words_of(problem) == "No speech was found in the clip."
    assert words_of(answers.transcribe(None, None, None, visitor)[1]).startswith("No speech to write down")


# --- the answer ---


def test_the_rows_of_the_plot_add_up_and_name_what_is_missing():
    words = words_of(result_html(SCORE, NO_CROPS, (-3, 3)))
    assert (
        "Starting point +0.50 What was said +1.00 How it was said missing The face −0.25 = score +1.25"
        in (words)
    )
    assert "between −0.50 and +2.50: too uncertain to tell negative from positive" in words
    assert "How it was said: not used: silent audio." in words and "first 126 of 300 tokens" in words
    assert "several faces" in words and "secret" not in words
    bars = re.findall(
        r'class="(up|down)" style="left:([\d.]+)%;width:([\d.]+)%', result_html(SCORE, NO_CROPS, None)
    )
    (_, left, width), (_, end, fall) = bars
    assert [kind for kind, *_ in bars] == ["up", "down"]
    assert float(left) + float(width) == pytest.approx(float(end) + float(fall), abs=0.2)  # from bar to bar


def test_a_model_without_intervals_or_range_has_an_answer_too():
    bare = replace(SCORE, interval=None, missing={"audio": HIDDEN}, warning="no text, sound or face")
    words = words_of(result_html(bare, NO_CROPS, None))
    assert "no text, sound or face" in words and "90" not in words and "not used" not in words


def test_names_of_classes_and_files_are_no_html():
    evil = "<img src=x onerror=alert(1)>"
    chosen = {evil: 0.7, "good": 0.3}
    classes = replace(SCORE, score=None, label=evil, probabilities=chosen, interval=None, findings=(evil,))
    shown = result_html(classes, NO_CROPS, None)
    assert "<img" not in shown and "70%" in shown
    windows = tuple(WindowPrediction(start, start + 5, None, SCORE) for start in (0, 2.5))
    plotted = result_html(Timeline(windows, replace(SCORE, clip=evil)), NO_CROPS, (-3, 3))
    assert plotted.count("<img") == 1
