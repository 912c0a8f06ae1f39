# SPDX-License-Identifier: Apache-2.0
"""Any container to frames and sound, by timestamps; every kind of bad file named in one message."""

import multiprocessing
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from feature_extractors import SAMPLE_RATE, Clip, ClipError, decode
from feature_extractors.collecting import WaveformCollector
from feature_extractors.decoding import check_file

SIZE = (96, 64)  # width, height
ALLOWED_AFTER_DAMAGE = {"undecodable", "truncated", "no streams", "window beyond clip", "bad samples"}
ALLOWED_AFTER_DAMAGE |= {"format", "picture too large", "too long", "unusual sound"}
CONTAINERS = (".mp4", ".mov", ".mkv", ".webm", ".flv", ".mpg", ".avi")


def gray_frames(count: int) -> np.ndarray:
    """Frames whose brightness tells their number: frame i has the value `10 + 9 * i`."""
    values = 10 + 9 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, SIZE[1], SIZE[0], 3))


def frame_numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 9) for frame in frames]


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container_gives_frames_and_sound(tmp_path, make_clip, suffix):
    raw = decode(Clip(make_clip(tmp_path / f"clip{suffix}", seconds=1.2, fps=25)), num_frames=6)
    assert raw.frames.shape == (6, 160, 160, 3) and raw.frames.dtype == np.uint8
    assert raw.frames.std() > 20
    assert raw.duration == pytest.approx(1.2, abs=0.15)
    assert len(raw.waveform) == pytest.approx(1.2 * SAMPLE_RATE, abs=0.15 * SAMPLE_RATE)
    assert raw.waveform.dtype == np.float32 and 0.05 < np.abs(raw.waveform).max() < 2
    assert raw.has_video and raw.has_audio


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_frames_are_the_ones_on_show_at_interval_midpoints(tmp_path, make_clip, suffix):
    path = make_clip(tmp_path / f"clip{suffix}", frames=gray_frames(24), size=SIZE, fps=8, audio=None)
    raw = decode(Clip(path), num_frames=4)
    shift = raw.duration - 3  # AVI counts one frame more
    expected = [int(8 * (3 + shift) * (i + 0.5) / 4 + 1e-6) for i in range(4)]
    assert frame_numbers(raw.frames) == expected
    assert raw.timestamps == pytest.approx(np.array(expected) / 8, abs=0.01)


@pytest.mark.parametrize("start", [0, 3])
def test_a_pause_between_reordered_frames_makes_no_clip_longer(tmp_path, start):
    import av

    path = tmp_path / "pause.mp4"  # its packets have lengths by decoding times, so the pause counts twice
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2"})
        stream.width, stream.height = SIZE
        stream.codec_context.time_base = Fraction(1, 25)
        for number, picture in enumerate(gray_frames(24)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts = 25 * start + number + (125 if number > 11 else 0)
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    raw = decode(Clip(path), num_frames=4)
    assert raw.duration == pytest.approx(24 / 25 + 5, abs=0.13)
    assert frame_numbers(raw.frames) == [11]
    assert decode(Clip(path, 5.5, 5.9)).duration == pytest.approx(0.4)


def test_a_short_clip_gives_each_frame_once(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", frames=gray_frames(3), size=SIZE, fps=10, audio=None)
    raw = decode(Clip(path), num_frames=8)
    assert frame_numbers(raw.frames) == [0, 1, 2]
    assert raw.timestamps == pytest.approx([0, 0.1, 0.2])


def test_a_window_cuts_frames_and_sound_at_the_same_times(tmp_path, make_clip):
    rate = 48_000
    ramp = np.repeat([0.0, 0.5], rate * 3 // 2).astype(np.float32)  # silent for 1.5 s, then loud
    ramp *= np.sin(2 * np.pi * 440 * np.arange(len(ramp)) / rate)
    path = make_clip(tmp_path / "clip.mkv", seconds=3, frames=gray_frames(24), size=SIZE, fps=8, audio=ramp)
    raw = decode(Clip(path, 1.0, 2.0), num_frames=4)
    assert frame_numbers(raw.frames) == [9, 11, 13, 15]
    assert raw.timestamps == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.01)
    assert raw.duration == pytest.approx(1) and len(raw.waveform) == SAMPLE_RATE
    onset = int(np.argmax(np.abs(raw.waveform) > 0.2)) / SAMPLE_RATE
    assert onset == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv", ".mpg", ".wav"])
def test_a_window_reached_by_seeking_equals_the_same_part_of_the_whole(tmp_path, make_clip, suffix):
    video = suffix != ".wav"
    frames = np.repeat(gray_frames(25), 8, axis=0)  # 8 s at 25 frames per second
    path = make_clip(tmp_path / f"long{suffix}", seconds=8, frames=frames, fps=25, size=SIZE, video=video)
    whole, part = decode(Clip(path), num_frames=1), decode(Clip(path, 5.0, 6.0), num_frames=5)
    assert len(part.waveform) == SAMPLE_RATE
    reference = whole.waveform[5 * SAMPLE_RATE : 6 * SAMPLE_RATE]
    assert np.corrcoef(reference, part.waveform)[0, 1] > 0.98
    if video:
        assert frame_numbers(part.frames) == [int(25 * (5.1 + 0.2 * i)) // 8 for i in range(5)]


def test_large_frames_are_scaled_down_and_keep_their_shape(tmp_path, make_clip, face_image):
    path = make_clip(tmp_path / "clip.mp4", seconds=0.5, size=(640, 400))
    assert decode(Clip(path), num_frames=2, max_height=200).frames.shape == (2, 200, 320, 3)


@pytest.mark.parametrize("suffix", [".wav", ".mp4", ".mov", ".mkv"])
def test_audio_only_files_are_legal(tmp_path, make_clip, suffix):
    raw = decode(Clip(make_clip(tmp_path / f"sound{suffix}", seconds=1, video=False)))
    assert raw.has_audio and not raw.has_video
    assert raw.frames.shape[0] == 0 and len(raw.timestamps) == 0
    assert len(raw.waveform) == pytest.approx(SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)


def test_video_without_sound_is_legal(tmp_path, make_clip):
    raw = decode(Clip(make_clip(tmp_path / "mute.mp4", audio=None)))
    assert raw.has_video and not raw.has_audio and len(raw.waveform) == 0


def test_sound_that_begins_late_stays_in_step_with_the_picture(tmp_path):
    import av

    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(np.full((1, SAMPLE_RATE), 9000, np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, SAMPLE_RATE  # begins at 1 s
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    sound = decode(Clip(path)).waveform
    assert not sound[: SAMPLE_RATE - 200].any() and sound[SAMPLE_RATE + 200 :].min() > 0.2


def test_a_file_without_declared_duration_is_measured(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mkv", seconds=2, frames=gray_frames(16), size=SIZE, fps=8, audio=None)
    content = path.read_bytes()
    at = content.index(b"\x44\x89\x88")  # Duration, an eight-byte float, in the segment's header
    path.write_bytes(content[:at] + b"\xec\x89" + content[at + 2 :])  # becomes padding
    raw = decode(Clip(path), num_frames=4)
    assert raw.duration == pytest.approx(2, abs=0.13)
    assert frame_numbers(raw.frames) == [2, 6, 10, 14]


def test_a_phone_video_lying_on_its_side_is_turned_upright(tmp_path):
    import av

    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48] = 255
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for _ in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    content = path.read_bytes()
    track = content.index(b"tkhd") + 4 + 40  # the 3 x 3 display matrix of the track's header
    one = (1 << 16).to_bytes(4, "big", signed=True)
    minus, zero, last = (-(1 << 16)).to_bytes(4, "big", signed=True), bytes(4), (1 << 30).to_bytes(4, "big")
    matrix = zero + one + zero + minus + zero + zero + zero + zero + last  # a quarter turn clockwise
    path.write_bytes(content[:track] + matrix + content[track + 36 :])
    frame = decode(Clip(path), num_frames=1).frames[0]
    assert frame.shape == (96, 64, 3)
    assert frame[:40].mean() > 200 and frame[-40:].mean() < 50


def broken(tmp_path, make_clip, kind: str) -> Clip:
    path = tmp_path / "clip.mp4"
    if kind == "missing":
        return Clip(path)
    if kind == "folder":
        return Clip(tmp_path)
    if kind == "empty":
        path.touch()
        return Clip(path)
    if kind == "text":
        path.write_text("Not a film.\n" * 100)
        return Clip(path)
    if kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
        return Clip(path)
    make_clip(path, seconds=1)
    if kind == "no header":  # an MP4 copied by halves: its index comes last
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return Clip(path)
    windows = {"reversed": (0.8, 0.2), "negative": (-1, 0.5), "nan": (float("nan"), 1), "beyond": (0.5, 7)}
    return Clip(path, *(windows | {"after": (3, None), "zero": (None, 0)})[kind])


@pytest.mark.parametrize(
    ("kind", "problem", "words"),
    [
        ("missing", "missing", "no such file"),
        ("folder", "not a file", "is a folder"),
        ("empty", "empty", "0 bytes"),
        ("text", "undecodable", "cannot be decoded"),
        ("noise", "undecodable", "cannot be decoded"),
        ("no header", "undecodable", "cannot be decoded"),
        ("reversed", "bad window", "start 0.8 s is not before end 0.2 s"),
        ("negative", "bad window", "start is -1 s"),
        ("nan", "bad window", "start is nan s"),
        ("zero", "bad window", "not before end 0 s"),
        ("beyond", "window beyond clip", "0.5 to 7 s reaches beyond the clip, which lasts 1.0"),
        ("after", "window beyond clip", "beyond the clip"),
    ],
)
def test_a_bad_clip_is_named_with_its_problem_and_a_remedy(tmp_path, make_clip, kind, problem, words):
    clip = broken(tmp_path, make_clip, kind)
    with pytest.raises(ClipError) as caught:
        decode(clip)
    error = caught.value
    assert error.problem == problem and error.path == clip.path
    assert str(error).startswith(f"{clip.path}: ") and words in str(error) and ";" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".webm", ".mp4"])
def test_a_truncated_file_is_refused(tmp_path, make_clip, suffix):
    frames = np.random.default_rng(0).integers(0, 255, (75, 160, 160, 3), dtype=np.uint8)
    path = make_clip(tmp_path / f"clip{suffix}", seconds=3, fps=25, frames=frames)
    if suffix == ".mp4":
        path = index_first(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ClipError, match="truncated: decoding stops at .* of the declared") as caught:
        decode(Clip(path))
    assert caught.value.problem == "truncated"


def index_first(path):
    """The same MP4 as web servers store it: such a file opens although its end is missing."""
    import av

    moved = path.with_name("moved.mp4")
    with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "faststart"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return moved


def test_music_with_a_cover_picture_has_no_video(tmp_path, make_clip):
    import av

    path, cover = tmp_path / "song.mp3", np.full((64, 64, 3), 200, np.uint8)
    with av.open(str(path), "w") as container:
        audio = container.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        picture = container.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
        container.mux(picture.encode(frame))
        container.mux(picture.encode())
        sound = av.AudioFrame.from_ndarray(np.full((1, SAMPLE_RATE), 0.1, np.float32), "fltp", "mono")
        sound.sample_rate, sound.pts = SAMPLE_RATE, 0
        resampler = av.AudioResampler(audio.format.name, "mono", SAMPLE_RATE, frame_size=audio.frame_size)
        for piece in [*resampler.resample(sound), *resampler.resample(None)]:
            container.mux(audio.encode(piece))
        container.mux(audio.encode())
    raw = decode(Clip(path))
    assert raw.has_audio and not raw.has_video and len(raw.frames) == 0


def test_a_window_may_pass_the_end_by_a_rounding_error(tmp_path, make_clip):
    raw = decode(Clip(make_clip(tmp_path / "clip.mp4", seconds=1), 0.5, 1.1))
    assert raw.duration == pytest.approx(0.5, abs=0.06)


def test_a_file_of_subtitles_has_no_streams(tmp_path):
    path = tmp_path / "words.srt"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n\n")
    with pytest.raises(ClipError, match="neither an audio nor a video stream") as caught:
        decode(Clip(path))
    assert caught.value.problem == "no streams"


def test_a_clip_error_travels_between_processes(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(ClipError) as caught:
        pool.apply(check_file, (tmp_path / "empty.mp4",))
    assert caught.value.problem == "empty" and "the file is empty" in str(caught.value)


def test_tags_that_are_not_utf8_do_no_harm(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.avi", seconds=0.5)
    content = path.read_bytes()
    assert content.count(b"Lavf") == 1  # the name of the writing program
    path.write_bytes(content.replace(b"Lavf", b"caf\xe9"))
    assert decode(Clip(path)).has_video


def test_damage_anywhere_gives_a_clip_or_a_clip_error(tmp_path, make_clip):
    rng = np.random.default_rng(0)
    for suffix in (".mp4", ".mpg", ".flv", ".avi", ".webm"):
        content = np.frombuffer(make_clip(tmp_path / f"good{suffix}", seconds=0.4).read_bytes(), np.uint8)
        for _ in range(8):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 60)] = rng.integers(0, 256, 60)
            path = tmp_path / f"bad{suffix}"
            path.write_bytes(damaged.tobytes())
            try:
                assert np.isfinite(decode(Clip(path), num_frames=2).waveform).all()
            except ClipError as error:
                assert error.problem in ALLOWED_AFTER_DAMAGE


def wav(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE, channels: int = 1) -> Path:
    """A WAV file written byte by byte: any sample values, rates and numbers of channels."""
    kind, size = {"f": 3, "i": 1}[samples.dtype.kind], samples.dtype.itemsize
    layout = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * size * channels % 2**32, size * channels, 8 * size
    )
    content = np.repeat(samples, channels).tobytes()
    chunks = (
        b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", len(content)) + content
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    return path


def tone(count: int = SAMPLE_RATE, kind: type = np.float32) -> np.ndarray:
    return (0.3 * np.sin(np.arange(count) / 20)).astype(kind)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 32768.0])
@pytest.mark.parametrize(("kind", "rate"), [(np.float32, 16_000), (np.float32, 48_000), (np.float64, 44_100)])
def test_a_sample_that_is_no_sound_is_refused_with_its_time(tmp_path, value, kind, rate):
    samples = tone(rate, kind)
    samples[rate // 2] = value
    with pytest.raises(
        ClipError, match=r"the sound has the value \S+ at 0\.(49|50) s, where full scale is 1"
    ) as caught:
        decode(Clip(wav(tmp_path / "a.wav", samples, rate)))
    assert caught.value.problem == "bad samples" and "from -1 to 1" in str(caught.value)


def test_the_time_of_a_bad_sample_counts_from_the_beginning_of_the_file(tmp_path):
    samples = tone(2 * SAMPLE_RATE)
    samples[-SAMPLE_RATE // 2] = np.nan
    with pytest.raises(ClipError, match=r"the value nan at 1\.(49|50) s"):
        decode(Clip(wav(tmp_path / "a.wav", samples), start=1.0))


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".caf", ".au", ".aiff", ".nut", ".w64"])
def test_samples_that_are_no_sound_are_refused_in_every_container_of_float_sound(tmp_path, suffix):
    import av

    path, samples = tmp_path / f"a{suffix}", tone()
    samples[8000] = np.nan
    codec = "pcm_f32be" if suffix in (".caf", ".au", ".aiff") else "pcm_f32le"
    with av.open(str(path), "w") as container:
        audio = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    with pytest.raises(ClipError, match="the sound has the value nan at 0.50 s"):
        decode(Clip(path))
    assert np.isfinite(decode(Clip(path, 0.0, 0.4)).waveform).all()  # outside the window it does no harm


def test_loud_float_sound_beyond_full_scale_is_kept(tmp_path):
    raw = decode(Clip(wav(tmp_path / "loud.wav", 100 * tone())))
    assert np.abs(raw.waveform).max() == pytest.approx(30, rel=0.01)


@pytest.mark.parametrize("channels", [2, 3, 8, 9, 24, 33, 64])
def test_sound_of_many_channels_is_mixed_to_one(tmp_path, channels):
    raw = decode(Clip(wav(tmp_path / "a.wav", tone(), channels=channels)))
    assert len(raw.waveform) == SAMPLE_RATE
    assert np.corrcoef(raw.waveform, tone())[0, 1] > 0.99


def test_sound_before_the_window_is_not_kept_in_memory():
    import av

    collector = WaveformCollector(start=100, end=101)
    tracemalloc.start()
    for second in range(102):
        frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), second / 1000, np.float32), "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 16_000 * second, Fraction(1, 16_000)
        collector.add(frame, origin=0.0)
    waveform = collector.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(waveform, np.full(16_000, 0.1), atol=1e-6)
    assert peak < 1_000_000  # the whole sound has 6.5 MB


def test_a_file_without_media_is_not_said_to_have_a_window(tmp_path):
    from PIL import Image

    path = tmp_path / "a.apng"
    pictures = [Image.new("L", (16, 16), level) for level in (0, 99, 200)]
    pictures[0].save(path, format="PNG", save_all=True, append_images=pictures[1:])
    assert len(decode(Clip(path)).frames) == 3
    content = bytearray(path.read_bytes())
    content[content.index(b"fcTL") + 8] = 0x40  # the first frame is wider than the picture
    path.write_bytes(content)
    with pytest.raises(ClipError, match="it contains no media"):
        decode(Clip(path))
