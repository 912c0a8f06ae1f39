# SPDX-License-Identifier: Apache-2.0
"""The page: what a visitor gives, what the model may use of it, and the answer."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
import numpy as np

from feature_extractors import Clip, ClipError, ClipFeatures
from feature_extractors.decoding import media_seconds
from msa_online.evaluation.conditions import UndefinedScoreError
from msa_online.modalities import MODALITIES
from msa_online.page.examples import Example
from msa_online.page.result import NAMES, clip_problem, problem_html, result_html
from msa_online.pipeline import MSAPipeline, Prediction
from msa_online.pipeline_inputs import Sample
from msa_online.processing_msa import clean_text
from msa_online.timeline import Timeline, exceeds_reach, predict_timeline
from msa_online.transcription import TranscriptionError

MAX_BYTES = 200 * 2**20
"""Size of an upload."""

MAX_SECONDS = 600
"""Length of a clip; longer ones would keep the other visitors waiting for minutes."""

MAX_CHARACTERS = 5_000
"""Length of a text."""

KEPT_SECONDS = 600
"""Age at which an upload is deleted, even if its page is still open."""

Memory = tuple[Path, ClipFeatures] | None
"""The clip that a visitor asked about last, and its features."""

TITLE = "Sentiment of a video clip"
INTRODUCTION = """\
# {title}
Give a short clip of one person who talks. The model reads the words, the voice and the face, and estimates \
how people would rate what is expressed.
"""
ABOUT = """\
**What this is not.** It is no lie detector, and it does not know what somebody feels or thinks. It imitates \
how people rate short clips, and it is often wrong. Do not use it to judge people. Use only clips of people \
who agree.

**Your clip** goes only to the computer that serves this page. It is not stored: it is deleted when you \
close the page or give another clip, and after ten minutes in any case. The model is *{source}*.
"""
NOTHING_GIVEN = "Nothing to predict from: give a clip, or type what was said."
NO_CLIP = "No speech to write down: give a clip first."
NO_SPEECH = "No speech was found in the clip."
DELETED = "This clip has been deleted, as all are after ten minutes: give it again."
EMPTY = '<div class="msa"><p class="small empty">The answer appears here.</p></div>'


class Uploads:
    """The file that each visitor's page shows; others are deleted.

    Args:
        kept: Names of files that are never deleted here: the examples, which visitors share.
    """

    def __init__(self, kept: Collection[str]) -> None:
        self._kept = frozenset(kept)
        self._lock = Lock()
        self._shown: dict[str, Path] = {}

    def show(self, visitor: str | None, path: Path | None) -> None:
        """Remember the file of a visitor and delete the former one; None if there is none any more."""
        if visitor is None:
            return
        with self._lock:
            former = self._shown.pop(visitor, None)
            if path is not None:
                self._shown[visitor] = path
            if former is not None and former.name not in self._kept and former not in self._shown.values():
                former.unlink(missing_ok=True)


class Refusal(ValueError):
    """What a visitor gave is not predicted; the message says why."""


class Answers:
    """Predicts for what visitors give, and describes the answers as HTML.

    Args:
        pipeline: The model.
        uploads: The files of the visitors.
    """

    def __init__(self, pipeline: MSAPipeline, uploads: Uploads) -> None:
        self.pipeline = pipeline
        self.uploads = uploads

    def answer(
        self,
        video: str | None,
        sound: str | None,
        text: str | None,
        used: Sequence[str],
        memory: Memory,
        request: gr.Request,
    ) -> tuple[str, Memory]:
        """The answer, and the features of the clip for the next question about it."""
        path = self._path(video, sound, request)
        hidden = [name for name in MODALITIES if name not in used]
        try:
            result, memory = self._predict(path, _checked_text(text, path), hidden, memory)
        except ClipError as error:
            return problem_html(_unusable(error)), None
        except (Refusal, UndefinedScoreError, TranscriptionError) as error:
            return problem_html(str(error)), None
        crops = np.zeros((0, 0, 0, 3), np.uint8)
        if memory is not None and "vision" in used:
            crops = memory[1].face_crops[memory[1].face_found]
        return result_html(result, crops, self.pipeline.model.config.label_range), memory

    def transcribe(
        self, video: str | None, sound: str | None, memory: Memory, request: gr.Request
    ) -> tuple[Any, str, Memory]:
        """What the recogniser hears in a clip, for the visitor to correct; or why there is nothing."""
        path = self._path(video, sound, request)
        try:
            if path is None:
                raise Refusal(NO_CLIP)
            _check_length(path)
            if exceeds_reach(self.pipeline, Clip(path)):
                heard = self.pipeline.transcriber.recording(Clip(path))
            else:
                memory = self._remembered(path, memory)
                heard = self.pipeline.transcriber(memory[1])
            if not heard.text:
                raise Refusal(NO_SPEECH)
        except ClipError as error:
            return gr.skip(), problem_html(_unusable(error)), None
        except (Refusal, TranscriptionError) as error:
            return gr.skip(), problem_html(str(error)), memory
        return heard.text, EMPTY, memory

    def _path(self, video: str | None, sound: str | None, request: gr.Request) -> Path | None:
        path = Path(video or sound) if video or sound else None
        self.uploads.show(request.session_hash, path)
        return path

    def _predict(
        self, path: Path | None, text: str | None, hidden: Sequence[str], memory: Memory
    ) -> tuple[Prediction | Timeline, Memory]:
        sample = Sample(path and Clip(path), text)
        if path is None:
            (prediction,) = self.pipeline.predict([(sample, self.pipeline.extract(sample))], hidden=hidden)
            return prediction, None
        _check_length(path)
        if text is None and exceeds_reach(self.pipeline, sample.source):
            return predict_timeline(self.pipeline, sample.source, hidden=hidden), None
        memory = self._remembered(path, memory)
        (prediction,) = self.pipeline.predict([(sample, memory[1])], hidden=hidden)
        return prediction, memory

    def _remembered(self, path: Path, memory: Memory) -> tuple[Path, ClipFeatures]:
        """The features of a clip, extracted unless they are those of the last question."""
        if memory is not None and memory[0] == path:
            return memory
        return path, self.pipeline.extract(Sample(Clip(path), None))


def _unusable(error: ClipError) -> str:
    """The message on the page for a clip that cannot be used."""
    return DELETED if error.problem == "missing" else clip_problem(error)


def _check_length(path: Path) -> None:
    if (seconds := media_seconds(Clip(path))) > MAX_SECONDS:
        lasts, most = _length(seconds), _length(MAX_SECONDS)
        raise Refusal(f"{path.name} lasts {lasts}: give a clip of at most {most}.")


def _length(seconds: float) -> str:
    """A duration in words, rounded up."""
    unit, count = ("minute", math.ceil(seconds / 60)) if seconds >= 60 else ("second", math.ceil(seconds))
    return f"{count:,} {unit}{'s' * (count > 1)}"


def _checked_text(text: str | None, path: Path | None) -> str | None:
    text = clean_text(text) or None
    if path is None and text is None:
        raise Refusal(NOTHING_GIVEN)
    if text and len(text) > MAX_CHARACTERS:
        raise Refusal(f"The text has {len(text):,} characters: give at most {MAX_CHARACTERS:,}.")
    return text


def _take_no_addresses(component: gr.components.Component) -> None:
    """Refuse addresses in place of uploads: gradio would download a file of any size for any client."""
    move = component.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("Give a file, not an address.")
        return await move(path)

    component.async_move_resource_to_block_cache = move_upload


def build_page(
    pipeline: MSAPipeline, source: str, examples: Sequence[Example] = (), title: str = TITLE
) -> gr.Blocks:
    """The page as a gradio app; `serving.running_page` serves it with limits on uploads.

    Args:
        pipeline: The model.
        source: Name of the checkpoint, which the page shows.
        examples: Clips to try.
        title: Heading of the page.
    """
    uploads = Uploads({example.path.name for example in examples})
    answers = Answers(pipeline, uploads)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(title=title))
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                with gr.Tabs():
                    with gr.Tab("Video"):
                        video = gr.Video(
                            label="Drop or record a video",
                            sources=["upload", "webcam"],
                            webcam_options=gr.WebcamOptions(mirror=False),
                            elem_id="video",
                        )
                    with gr.Tab("Sound only"):
                        sound = gr.Audio(
                            label="Drop or record speech",
                            sources=["upload", "microphone"],
                            type="filepath",
                            editable=False,
                            elem_id="sound",
                        )
                text = gr.Textbox(
                    label="What was said",
                    placeholder="Type the words. Without them, the model only has the voice and the face.",
                    lines=2,
                    max_lines=6,
                    elem_id="text",
                )
                write = gr.Button(
                    "Write down what is said",
                    size="sm",
                    visible=pipeline.transcriber is not None,
                    elem_id="write",
                )
                used = gr.CheckboxGroup(
                    [(NAMES[name], name) for name in MODALITIES],
                    value=list(MODALITIES),
                    label="The model may use",
                    elem_id="used",
                )
                button = gr.Button("Predict", variant="primary", elem_id="predict")
                if examples:
                    gr.Markdown("Or try an example with a synthetic voice and an animated photo:")
                    with gr.Row(elem_id="examples"):
                        tries = [gr.Button(example.title, size="sm") for example in examples]
            with gr.Column(min_width=320):
                result = gr.HTML(EMPTY, elem_id="result")
        gr.Markdown(ABOUT.format(source=source), elem_id="about")
        _take_no_addresses(video)
        _take_no_addresses(sound)
        memory = gr.State(None, time_to_live=KEPT_SECONDS)
        job = {
            "fn": answers.answer,
            "inputs": [video, sound, text, used, memory],
            "outputs": [result, memory],
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress_on": result,
        }
        gr.on([button.click, text.submit], **job, api_name="predict")
        used.input(**job, trigger_mode="always_last", api_visibility="private")
        write.click(
            answers.transcribe,
            [video, sound, memory],
            [text, result, memory],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress_on=text,
            api_visibility="private",
        )
        # the clip that was given last counts
        video.input(None, None, sound, js="() => null", api_visibility="private")
        sound.input(None, None, video, js="() => null", api_visibility="private")
        if examples:
            for example, its_button in zip(examples, tries, strict=True):
                its_button.click(
                    _given(example),
                    None,
                    [video, sound, text],
                    api_visibility="private",
                    show_progress="hidden",
                ).then(**job, api_visibility="private")
        page.unload(_leave(uploads))
    return page


def _given(example: Example) -> Callable[[], tuple[str, None, str]]:
    return lambda: (str(example.path), None, example.text)


def _leave(uploads: Uploads) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        uploads.show(request.session_hash, None)

    return leave
