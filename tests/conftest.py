# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: clips written on the spot, tiny random encoders, the real recordings."""

import itertools
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models: threads that wait for each other cost more than they save
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("COLUMNS") == "80":  # set by pytest-xdist; tests print as into a pipe
    del os.environ["COLUMNS"]

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
SAMPLE_RATE = 48_000  # of the clips written here; the extractors resample
VIDEO_CODECS = {".flv": "flv", ".mpg": "mpeg1video", ".webm": "libvpx", ".avi": "mpeg4"}
AUDIO_CODECS = {
    ".flv": "libmp3lame",
    ".mpg": "mp2",
    ".webm": "libopus",
    ".avi": "libmp3lame",
    ".wav": "pcm_s16le",
}


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings; tests that need it skip, saying so, where it is absent."""
    folder = Path(os.environ.get("MSA_TEST_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
    if not (folder / "composite" / "metadata.csv").exists():
        message = f"no recordings at {folder}: set MSA_TEST_DATA to the folder that holds composite/"
        if os.environ.get("MSA_TEST_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def face_image() -> np.ndarray:
    """A real face, (160, 160, 3) uint8 RGB: the public-domain portrait that scikit-image carries."""
    import cv2
    from skimage.data import astronaut

    return cv2.resize(astronaut()[0:256, 96:352], (160, 160), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="session")
def make_clip(face_image: np.ndarray):
    """A function that writes a real media file with PyAV; the container follows from the suffix."""

    def write(
        path: Path,
        *,
        seconds: float = 1.0,
        fps: int = 25,
        size: tuple[int, int] = (160, 160),
        frames: np.ndarray | None = None,
        audio: str | np.ndarray | None = "tone",
        video: bool = True,
    ) -> Path:
        import av

        if video and frames is None:
            frames = np.broadcast_to(face_image, (round(seconds * fps), *face_image.shape))
        with av.open(str(path), "w") as container:
            pictures = sound = None
            if video:
                pictures = container.add_stream(VIDEO_CODECS.get(path.suffix, "libx264"), rate=fps)
                pictures.width, pictures.height, pictures.pix_fmt = size[0], size[1], "yuv420p"
                pictures.bit_rate = 2_000_000
            if audio is not None:
                sound = container.add_stream(AUDIO_CODECS.get(path.suffix, "aac"), rate=_audio_rate(path))
                sound.layout = "mono"
            if pictures is not None:
                _write_video(container, pictures, frames, size)
            if sound is not None:
                _write_audio(container, sound, _waveform(audio, seconds, sound.rate))
        return path

    return write


def _audio_rate(path: Path) -> int:
    return 44_100 if path.suffix == ".flv" else SAMPLE_RATE


def _write_video(container, stream, frames: np.ndarray, size: tuple[int, int]) -> None:
    import av

    for picture in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        container.mux(stream.encode(frame.reformat(width=size[0], height=size[1], format="yuv420p")))
    container.mux(stream.encode())


def _write_audio(container, stream, waveform: np.ndarray) -> None:
    import av

    frame = av.AudioFrame.from_ndarray(waveform[None].astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate = stream.rate
    frame.pts = 0
    fifo = av.AudioFifo()
    fifo.write(frame)
    resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=stream.rate)
    step = stream.frame_size or 1024
    while (chunk := fifo.read(step, partial=True)) is not None:
        for piece in resampler.resample(chunk):
            container.mux(stream.encode(piece))
    container.mux(stream.encode())


def _waveform(audio: str | np.ndarray, seconds: float, rate: int) -> np.ndarray:
    """A given waveform at `rate`, a voiced-like tone, or silence."""
    if not isinstance(audio, str):
        return audio
    times = np.arange(round(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * 150 * harmonic * times) / harmonic for harmonic in range(1, 6))
    return {"tone": 0.2 * tone, "silent": 0.0 * tone}[audio]


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of features that still sees the pretrained files already brought to this machine."""
    from feature_extractors.assets import cache_root

    models = cache_root() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "models").symlink_to(models)
    monkeypatch.setenv("MSA_CACHE", str(folder))
    return folder


WORDS = ["a", "the", "it", "is", "was", "i", "not", "very", "really", "and", "but"]
WORDS += ["loved", "liked", "hated", "film", "movie", "ending", "good", "bad", "great", "awful"]


@pytest.fixture
def fresh_accelerate() -> None:
    """Accelerate keeps one precision for a process: a test of a command starts as a new process would."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_text_config():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        dtype="float32",  # as a saved model says it; else who asks first decides
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def tiny_text_encoder(tiny_text_config, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a small random BERT and its tokenizer, as a pretrained one would be saved."""
    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    BertModel(tiny_text_config, add_pooling_layer=False).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_text_config):
    from msa_online import MSAConfig

    return MSAConfig(
        text_config=tiny_text_config,
        audio_channels=[16, 16],
        audio_width=16,
        face_channels=8,
        face_width=16,
        head_kwargs={"hidden_size": 16},
        label_range=[-3, 3],
    )


@pytest.fixture
def tiny_model(tiny_config):
    import torch

    from msa_online import MSAModel

    torch.manual_seed(0)
    return MSAModel(tiny_config).eval()


@pytest.fixture
def tiny_processor(tiny_tokenizer):
    from msa_online import MSAProcessor

    return MSAProcessor(tiny_tokenizer, {"face_size": 32, "num_frames": 4})


@pytest.fixture(scope="session")
def make_batch():
    """A function that makes a batch of random inputs as `MSAModel.forward` documents."""
    import torch

    def make(
        batch_size: int = 4, seed: int = 0, present: tuple[bool, bool, bool] = (True, True, True)
    ) -> dict:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (batch_size,), generator=generator)
        text_mask = torch.arange(9) < lengths[:, None]
        steps = torch.randint(20, 61, (batch_size,), generator=generator)
        ids = torch.randint(5, 5 + len(WORDS), (batch_size, 9), generator=generator)
        return {
            "text_input_ids": ids * text_mask,
            "text_mask": text_mask,
            "audio_values": torch.randn(batch_size, 60, 80, generator=generator),
            "audio_mask": torch.arange(60) < steps[:, None],
            "vision_values": torch.randint(0, 256, (batch_size, 4, 32, 32, 3), generator=generator).to(
                torch.uint8
            ),
            "vision_blendshapes": torch.rand(batch_size, 4, 52, generator=generator),
            "vision_mask": torch.tensor([True, True, False, True]).expand(batch_size, 4).clone(),
            "modality_present": torch.tensor(present).expand(batch_size, 3).clone(),
            "labels": torch.rand(batch_size, generator=generator) * 6 - 3,
            "index": torch.arange(batch_size),
        }

    return make


@pytest.fixture(scope="session")
def tiny_corpus(make_clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of thirty short clips with metadata.csv: 16 train, 6 valid, 8 test; some lack a modality."""
    import csv

    folder = tmp_path_factory.mktemp("tiny_corpus")
    random = np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label", "split", "speaker"])
        for number in range(30):
            name = f"clip_{number:02d}.mp4"
            make_clip(folder / name, seconds=0.6, fps=10, audio=None if number == 3 else "tone")
            split = "train" if number < 16 else "valid" if number < 22 else "test"
            words = "" if number == 5 else " ".join(random.choice(WORDS, size=random.integers(2, 8)))
            writer.writerow(
                [name, words, round(float(random.uniform(-3, 3)), 2), split, f"speaker_{number % 4}"]
            )
    return folder


@pytest.fixture
def mmsa_content() -> dict:
    """What MMSA pickles: for each split text aligned to 4 steps, audio and vision with their lengths."""

    def part(count: int, seed: int) -> dict:
        random = np.random.default_rng(seed)
        text = random.normal(size=(count, 4, 5)).astype(np.float32)
        text[0, 2:] = 0
        return {
            "id": [f"video{seed}$_${number}" for number in range(count)],
            "raw_text": np.array([f"line {number}, said" for number in range(count)]),
            "text": text,
            "text_bert": np.tile([[2, 1, 1, 3], [1, 1, 1, 1], [0, 0, 0, 0]], (count, 1, 1)),  # unknown words
            "audio": random.normal(size=(count, 6, 3)),
            "vision": random.normal(size=(count, 6, 2)),
            "audio_lengths": [6, 0, *[5] * (count - 2)],
            "vision_lengths": np.full(count, 3),
            "regression_labels": random.uniform(-3, 3, size=count).astype(np.float32),
            "annotations": ["Positive"] * count,
            "classification_labels": np.arange(count),
        }

    return {"train": part(4, 0), "valid": part(3, 1), "test": part(2, 2)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: the last file must not keep one process busy while others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a head, a modulator or a calibrator that the tables do not have."""
    if names := {name for marker in item.iter_markers("needs") for name in marker.args}:
        from msa_online.methods import CALIBRATORS, HEADS, MODULATORS

        if missing := names - {*HEADS, *MODULATORS, *CALIBRATORS}:
            pytest.skip(f"the tables of msa_online.methods have no {', '.join(sorted(missing))}")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how many tests each folder has and how long they took, if more than one folder was tested."""
    seconds, tests = Counter(), Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            folder = os.path.dirname(report.nodeid.partition("::")[0])
            seconds[folder] += report.duration
            tests[folder] += report.when == "call" or report.skipped
    if len(seconds) > 1:
        terminalreporter.section("time by folder")
        for folder, duration in seconds.most_common():
            terminalreporter.line(f"{duration:8.1f}s  {tests[folder]:5} tests  {folder}")
