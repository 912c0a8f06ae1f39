# SPDX-License-Identifier: Apache-2.0
"""Sound as it stands in the file: at its timestamps, from all channels, of the right track, to its end."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from feature_extractors import SAMPLE_RATE, Clip, ClipError, decode
from feature_extractors.audio import is_silent
from feature_extractors.collecting import FrameSampler, WaveformCollector

RATE = SAMPLE_RATE
CODECS = {".mp4": "aac", ".mov": "pcm_s16le", ".ogg": "libopus", ".webm": "libopus", ".aac": "aac"}
CODECS |= {".mp3": "libmp3lame", ".ac3": "ac3", ".flv": "aac", ".ts": "aac"}
RATES = {"libopus": 48_000, "ac3": 48_000}


def tone(seconds: float, amplitude: float = 0.3, rate: int = RATE) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * 440 * times)).astype(np.float32)


def onsets(sound: np.ndarray) -> list[float]:
    """When tones begin, in seconds; pauses shorter than 0.1 s do not count."""
    loud = np.flatnonzero(np.abs(sound) > 0.1) / SAMPLE_RATE
    return [
        round(float(time), 3) for time, gap in zip(loud, np.diff(loud, prepend=-1), strict=True) if gap > 0.1
    ]


def write(
    path: Path,
    *tracks: Sequence[tuple[float, np.ndarray]],
    layout: str = "mono",
    codec: str | None = None,
    rate: int | None = None,
    frame: int = 1600,
    picture: tuple[float, float] | None = None,
    subtitle: float | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A media file with audio packets at any times.

    Args:
        path: Where to write; its suffix decides the container and, by default, the codec.
        tracks: For each audio track, pieces of sound (start in seconds, samples (channels, samples)).
        layout: Channel layout of all tracks.
        codec: Audio codec.
        rate: Sample rate.
        frame: Samples in a packet, for codecs without a frame size of their own.
        picture: Start and end of the video in seconds; None for no video.
        subtitle: When the last subtitle ends; None for no subtitles.
        options: Of the container.
    """
    import av

    codec = codec or CODECS.get(path.suffix, "pcm_s16le")
    rate = rate or RATES.get(codec, RATE)
    packets = []
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=10) if picture else None
        streams = [container.add_stream(codec, rate=rate, layout=layout) for _ in tracks]
        if subtitle is not None:
            packets += subtitles(container, path, subtitle)
        if video:
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            for number in range(*(round(10 * time) for time in picture)):
                still = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 100, np.uint8))
                still.pts, still.time_base = number, Fraction(1, 10)
                packets += video.encode(still)
            packets += video.encode()
        for stream, pieces in zip(streams, tracks, strict=True):
            packets += encoded(stream, pieces, layout, rate, frame)
        packets = [packet for packet in packets if packet.dts is not None]
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)
    return path


def encoded(stream, pieces, layout: str, rate: int, frame: int) -> list:
    import av

    packets, step = [], stream.codec_context.frame_size or frame
    for start, samples in pieces:
        samples = np.atleast_2d(samples).astype(np.float32)
        for at in range(0, samples.shape[1], step):
            part = samples[:, at : at + step]
            if stream.codec_context.frame_size:
                part = np.pad(part, ((0, 0), (0, step - part.shape[1])))
            raw = av.AudioFrame.from_ndarray(part.T.reshape(1, -1), "flt", layout)
            raw.sample_rate = rate
            for converted in av.AudioResampler(stream.format.name, layout, rate).resample(raw):
                converted.pts, converted.time_base = round(start * rate) + at, Fraction(1, rate)
                packets += stream.encode(converted)
    return packets + stream.encode()


def subtitles(container, path: Path, end: float) -> list:
    """One subtitle of a second, ready to be muxed."""
    import av

    words = path.with_suffix(".srt")
    words.write_text(f"1\n00:00:{end - 1:06.3f} --> 00:00:{end:06.3f}\nHello\n".replace(".", ","))
    with av.open(str(words)) as source:
        stream = container.add_stream_from_template(source.streams[0])
        packets = [packet for packet in source.demux() if packet.size]
    for packet in packets:
        packet.stream = stream
    return packets


def wav(path: Path, samples: np.ndarray) -> Path:
    """A WAV file of samples (channels, samples), without a channel layout; of any number of channels."""
    kind, size, channels = {"f": 3, "i": 1, "u": 1}[samples.dtype.kind], samples.dtype.itemsize, len(samples)
    header = struct.pack("<HHIIHH", kind, channels, RATE, RATE * size * channels, size * channels, 8 * size)
    content = samples.T.tobytes()
    chunks = (
        b"WAVEfmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", len(content)) + content
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    return path


# --- times


@pytest.mark.parametrize("suffix", [".mkv", ".mka", ".webm", ".mp4", ".ogg", ".ts", ".flv", ".nut"])
def test_sound_after_a_gap_stands_at_its_time(tmp_path, suffix):
    rate = 48_000 if suffix in (".webm", ".ogg") else 44_100 if suffix == ".flv" else RATE
    pieces = [(0, tone(2, rate=rate)), (6, tone(2, rate=rate))]
    path = write(tmp_path / f"gap{suffix}", pieces, rate=rate)
    raw = decode(Clip(path))
    late = 0.12 if suffix in (".mp4", ".ts", ".flv") else 0.02  # AAC begins with silence
    assert raw.duration == pytest.approx(8, abs=0.2)
    first, second = (time for time in onsets(raw.waveform) if not 2 < time < 2.2)
    assert first == pytest.approx(0, abs=late) and second == pytest.approx(6, abs=late)
    inside, after = decode(Clip(path, 3, 5)), decode(Clip(path, 5.5, 7.5))
    assert len(inside.waveform) == 2 * SAMPLE_RATE and not inside.waveform.any() and inside.has_audio
    assert onsets(after.waveform) == [pytest.approx(0.5, abs=late)]


def test_a_gap_in_the_sound_of_a_video_stays(tmp_path):
    path = write(tmp_path / "gap.mkv", [(0, tone(2)), (4, tone(2))], picture=(0, 6))
    raw = decode(Clip(path))
    assert onsets(raw.waveform) == [0, 4] and len(raw.waveform) == 6 * SAMPLE_RATE and len(raw.frames) == 8
    assert onsets(decode(Clip(path, 4, 5)).waveform) == [0]


def test_packets_that_are_not_sent_in_pauses_leave_their_pauses(tmp_path):
    """Discontinuous transmission: single packets of 20 ms between pauses of any length."""
    starts = [0.0, 0.02, 0.06, 0.08, 0.2, 0.6, 1.0, 1.4, 1.42, 1.46]
    path = write(tmp_path / "dtx.mka", [(start, np.full(320, 0.5)) for start in starts], frame=320)
    sound = decode(Clip(path)).waveform
    expected = np.zeros(round(1.48 * SAMPLE_RATE))
    for start in starts:
        expected[round(start * SAMPLE_RATE) :][:320] = 0.5
    np.testing.assert_allclose(sound, expected, atol=1e-4)


@pytest.mark.parametrize("start", [0.6, 100])
@pytest.mark.parametrize("suffix", [".mkv", ".mka", ".mp4", ".mov", ".ogg", ".webm", ".ts", ".nut"])
def test_media_that_start_late_begin_at_zero(tmp_path, start, suffix):
    rate = 48_000 if suffix in (".webm", ".ogg") else RATE
    picture = (start, start + 2) if suffix in (".mkv", ".mp4", ".mov", ".ts", ".nut") else None
    path = write(tmp_path / f"late{suffix}", [(start, tone(2, rate=rate))], rate=rate, picture=picture)
    raw = decode(Clip(path))
    assert raw.duration == pytest.approx(2, abs=0.13)
    assert onsets(raw.waveform) == [pytest.approx(0, abs=0.1)] and len(raw.frames) == (8 if picture else 0)
    assert onsets(decode(Clip(path, 1, 2)).waveform) == [0]
    with pytest.raises(ClipError, match=r"beyond the clip, which lasts (2\.|1\.9)"):
        decode(Clip(path, 1, 3))


def test_sound_and_picture_that_start_apart_stay_apart(tmp_path):
    sound_first = decode(Clip(write(tmp_path / "a.mkv", [(0, tone(4))], picture=(2, 4))), num_frames=4)
    assert onsets(sound_first.waveform) == [0] and sound_first.timestamps[0] == pytest.approx(2)
    picture_first = decode(Clip(write(tmp_path / "b.mkv", [(1.5, tone(2))], picture=(0, 4))))
    assert onsets(picture_first.waveform) == [1.5] and len(picture_first.waveform) == 3.5 * SAMPLE_RATE


def test_of_sound_that_overlaps_the_earlier_is_kept(tmp_path):
    first, second = np.full(2 * RATE, 0.2), np.full(2 * RATE, 0.4)
    path = write(tmp_path / "overlap.mka", [(0, first), (1, second)], frame=2 * RATE)
    raw = decode(Clip(path))
    assert raw.duration == pytest.approx(3, abs=0.01)
    np.testing.assert_allclose(raw.waveform, np.repeat([0.2, 0.4], [2 * RATE, RATE]), atol=1e-3)


def collect(times: Sequence[float], samples: np.ndarray, end: float, start: float = 0.0) -> np.ndarray:
    """What the collector makes of frames of 16 kHz sound (frames, samples) at these times in seconds."""
    import av

    collector = WaveformCollector(start, end)
    for time, values in zip(times, samples, strict=True):
        frame = av.AudioFrame.from_ndarray(values[None].astype(np.float32), "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, round(time * 1e6), Fraction(1, 1_000_000)
        collector.add(frame, origin=0.0)
    return collector.finish()


@pytest.mark.parametrize("speed", [0.9995, 1.0, 1.0005])
def test_sound_does_not_drift_from_its_timestamps_within_ten_minutes(speed):
    """The recorder's clock is slower or faster than its sample rate says, by 0.3 s in ten minutes."""
    frames = np.zeros((30_000, 320))
    frames[::50, 0] = 0.5  # a click a second
    times = np.floor(np.arange(30_000) * 0.02 * speed * 1000) / 1000  # in milliseconds, as Matroska has them
    sound = collect(times, frames, end=600)
    clicks = np.flatnonzero(sound > 0.25) / SAMPLE_RATE
    wanted = times[::50]
    assert len(clicks) == pytest.approx(len(wanted), abs=1)
    assert np.abs(clicks[:, None] - wanted[None, : len(wanted)]).min(axis=1).max() < 0.0115
    assert len(sound) == pytest.approx(600 * min(speed, 1) * SAMPLE_RATE, abs=0.03 * SAMPLE_RATE)


def test_resampling_does_not_drift_within_ten_minutes(tmp_path):
    import av

    collector, rate = WaveformCollector(0, 600), 44_100
    for number in range(600 * rate // 1024):
        values = np.zeros((1, 1024), np.float32)
        if number % 100 == 0:
            values[:] = 0.5
        frame = av.AudioFrame.from_ndarray(values, "flt", "mono")
        frame.sample_rate, frame.pts = rate, round(number * 1024 / rate * 1000)
        frame.time_base = Fraction(1, 1000)
        collector.add(frame, origin=0.0)
    sound = collector.finish()
    loud = np.flatnonzero(np.abs(sound) > 0.25) / SAMPLE_RATE
    begins = loud[np.diff(loud, prepend=-1) > 0.1]
    np.testing.assert_allclose(begins, np.arange(len(begins)) * 100 * 1024 / rate, atol=0.001)


def test_noise_of_timestamps_leaves_no_seam():
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (500, 320))
    times = np.arange(500) * 0.02
    noisy = times + np.random.default_rng(1).uniform(-0.006, 0.006, 500)
    noisy[0], noisy[200], noisy[300] = 0, 900.0, 1.0  # and two are damaged
    np.testing.assert_array_equal(collect(noisy, samples, end=10), samples.reshape(-1).astype(np.float32))


def test_timestamps_that_begin_anew_go_on():
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 320))
    times = np.tile(np.arange(100) * 0.02, 2)
    np.testing.assert_array_equal(collect(times, samples, end=4), samples.reshape(-1).astype(np.float32))


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4"])
def test_windows_of_sound_with_gaps_equal_the_whole(tmp_path, suffix):
    rate = 48_000 if suffix == ".webm" else RATE
    noise = np.convolve(np.random.default_rng(0).uniform(-9, 9, 12 * rate), np.ones(rate // 20) * 20 / rate)
    pieces = [(0, noise[: 3 * rate]), (4.5, noise[: 3 * rate]), (8, noise[: 2 * rate])]
    path = write(tmp_path / f"gaps{suffix}", pieces, rate=rate)
    whole = decode(Clip(path)).waveform
    for start, end in ((2.5, 5), (4, 7), (7, 9.5), (8.5, 9.5)):
        part = decode(Clip(path, start, end)).waveform
        same = whole[round(start * SAMPLE_RATE) :][: len(part)]
        assert np.corrcoef(part[800:-800], same[800:-800])[0, 1] > 0.98


# --- channels


@pytest.mark.parametrize("channels", [2, 3, 5, 6, 8, 10, 16, 64])
@pytest.mark.parametrize("speaking", [0, -1, "fourth"])
def test_one_speaking_channel_of_many_is_heard_at_its_share(tmp_path, channels, speaking):
    samples = np.zeros((channels, RATE), np.float32)
    samples[min(3, channels - 1) if speaking == "fourth" else speaking] = tone(1, 0.9)
    sound = decode(Clip(wav(tmp_path / "a.wav", samples))).waveform
    np.testing.assert_allclose(sound, samples.mean(axis=0), atol=1e-6)
    assert not is_silent(sound)


@pytest.mark.parametrize(
    ("layout", "channels"),
    [("stereo", 2), ("2.1", 3), ("quad", 4), ("5.1", 6), ("7.1", 8), ("hexadecagonal", 16)],
)
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le", "wavpack"])  # the last with separate channels
def test_named_layouts_give_the_mean_of_all_channels(tmp_path, layout, channels, codec):
    librosa = pytest.importorskip("librosa")
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (channels, RATE)).astype(np.float32)
    path = write(tmp_path / "a.mkv", [(0, samples)], layout=layout, codec=codec)
    accuracy = 5e-3 if codec == "wavpack" else 1e-4  # of eight bits
    np.testing.assert_allclose(decode(Clip(path)).waveform, librosa.to_mono(samples), atol=accuracy)


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le", "aac", "libopus", "flac"])
def test_the_same_voice_is_as_loud_from_two_channels_as_from_one(tmp_path, codec):
    rate = RATES.get(codec, RATE)
    voice = tone(1, rate=rate)
    mono, both, left = (
        decode(Clip(write(tmp_path / f"{n}.mkv", [(0, samples)], layout=layout, codec=codec, rate=rate)))
        for n, (samples, layout) in enumerate(
            [(voice, "mono"), (np.stack([voice, voice]), "stereo"), (np.stack([voice, 0 * voice]), "stereo")]
        )
    )
    level = np.sqrt(np.mean(mono.waveform[4000:12000] ** 2))
    assert np.sqrt(np.mean(both.waveform[4000:12000] ** 2)) == pytest.approx(level, rel=0.03)
    assert np.sqrt(np.mean(left.waveform[4000:12000] ** 2)) == pytest.approx(level / 2, rel=0.03)


@pytest.mark.parametrize("kind", ["u8", "s16le", "s24le", "s32le", "s64le", "f32le", "f64le"])
def test_every_kind_of_sample_has_the_same_scale(tmp_path, kind):
    samples = np.stack([tone(0.5), tone(0.5, 0.1)])
    path = write(tmp_path / "a.wav", [(0, samples)], layout="stereo", codec=f"pcm_{kind}")
    expected, sound = samples.mean(axis=0), decode(Clip(path)).waveform
    np.testing.assert_allclose(sound, expected, atol=0.01 if kind == "u8" else 1e-4)


@pytest.mark.parametrize(("left", "right", "channel"), [(0.3, -0.3, 1), (0.2, -0.3, 2), (0.3, -0.27, 1)])
def test_opposite_channels_are_heard_through_the_louder_one(tmp_path, left, right, channel):
    voice = tone(2, 1.0)
    samples = np.stack([left * voice, right * voice])
    path = write(tmp_path / "a.mkv", [(0, samples)], layout="stereo", picture=(0, 2))
    raw = decode(Clip(path))
    assert raw.findings == (f"opposite channels, only channel {channel} is used",)
    np.testing.assert_allclose(raw.waveform, samples[channel - 1], atol=1e-3)
    assert len(raw.frames) == 8
    assert decode(Clip(path, 0.5, 1.5)).findings == raw.findings


def test_independent_and_silent_channels_are_not_taken_for_opposite_ones(tmp_path):
    random = np.random.default_rng(0)
    partly = np.stack([tone(1), -0.5 * tone(1)])
    for samples in (*(random.normal(0, 0.1, (count, RATE)) for count in (2, 6)), np.zeros((2, RATE)), partly):
        assert decode(Clip(wav(tmp_path / "a.wav", samples.astype(np.float32)))).findings == ()


# --- tracks


def default_track(path: Path, number: int) -> Path:
    """The same Matroska file with one default audio track, counted from 0."""
    import av
    from av.stream import Disposition

    copy = path.with_stem(path.stem + "_default")
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for index, stream in enumerate(s for s in streams.values() if s.type == "audio"):
            stream.disposition = Disposition.default if index == number else Disposition(0)
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return copy


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_audible_track_is_taken_if_the_first_is_silent(tmp_path, suffix):
    silent, voice = [(0, 0 * tone(3))], [(0, tone(3))]
    path = write(tmp_path / f"obs{suffix}", silent, silent, voice, picture=(0, 3))
    raw = decode(Clip(path))
    assert raw.findings == ("audio track 3 of 3, track 1 is silent",)
    assert np.abs(raw.waveform).max() > 0.2 and raw.has_audio and len(raw.frames) == 8
    part = decode(Clip(path, 2.2, 2.8))
    assert len(part.waveform) == pytest.approx(0.6 * SAMPLE_RATE, abs=1) and part.findings == raw.findings


def test_the_default_track_is_taken_if_it_is_audible(tmp_path):
    path = write(tmp_path / "two.mkv", [(0, tone(1, 0.2))], [(0, tone(1, 0.4))])
    for number in (0, 1):
        raw = decode(Clip(default_track(path, number)))
        assert raw.findings == (f"audio track {number + 1} of 2",)
        assert np.abs(raw.waveform).max() == pytest.approx([0.2, 0.4][number], abs=0.01)


def test_a_track_can_be_chosen(tmp_path):
    path = write(tmp_path / "two.mkv", [(0, tone(1, 0.2))], [(0, 0 * tone(1))], picture=(0, 1))
    first, second = (decode(Clip(path, audio_track=number)) for number in (1, 2))
    assert np.abs(first.waveform).max() == pytest.approx(0.2, abs=0.01) and is_silent(second.waveform)
    assert first.findings == second.findings == () and second.has_audio
    for number in (0, 3, -1):
        with pytest.raises(
            ClipError, match=f"has 2 audio tracks, none .* is number {number}; give the"
        ) as caught:
            decode(Clip(path, audio_track=number))
        assert caught.value.problem == "no such track"


def test_a_clip_without_sound_has_no_track_to_choose(tmp_path):
    raw = decode(Clip(write(tmp_path / "mute.mkv", picture=(0, 1)), audio_track=2))
    assert not raw.has_audio and len(raw.frames) == 8


def test_silent_tracks_stay_silent_and_are_named(tmp_path):
    raw = decode(Clip(write(tmp_path / "two.mkv", [(0, 0 * tone(1))], [(0, 0 * tone(1))])))
    assert is_silent(raw.waveform) and raw.findings == ("audio track 1 of 2",)


@pytest.mark.parametrize("picture", [None, (0, 1)])
def test_a_clip_lasts_as_long_as_the_track_in_use(tmp_path, picture):
    tracks = [(0, 0 * tone(1))], [(0, tone(1)), (3, tone(1))]
    raw = decode(Clip(write(tmp_path / "two.mkv", *tracks, codec="pcm_s16le", picture=picture)))
    assert raw.findings == ("audio track 2 of 2, track 1 is silent",)
    assert raw.duration == pytest.approx(4, abs=0.02) and onsets(raw.waveform) == [0, 3]


def test_opposite_channels_of_a_later_track_are_heard(tmp_path):
    voice, silent = np.stack([tone(1), -tone(1)]), np.zeros((2, RATE))
    raw = decode(Clip(write(tmp_path / "two.mkv", [(0, silent)], [(0, voice)], layout="stereo")))
    assert raw.findings == (
        "audio track 2 of 2, track 1 is silent",
        "opposite channels, only channel 1 is used",
    )
    assert np.abs(raw.waveform).max() == pytest.approx(0.3, abs=0.01)


# --- lengths


@pytest.mark.parametrize("suffix", [".aac", ".mp3", ".ac3", ".mp2", ".flac"])
@pytest.mark.parametrize("loud_first", [True, False])
def test_the_length_of_raw_sound_comes_from_its_packets(tmp_path, suffix, loud_first):
    """Guessed from the bit rate of the beginning, 12 s of noise and silence last 7 s, or 200."""
    codec = {".mp2": "mp2", ".flac": "flac"}.get(suffix)
    rate = 48_000 if suffix == ".ac3" else RATE
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 6 * rate)
    halves = [noise, 1e-4 * noise] if loud_first else [1e-4 * noise, noise]
    options = {"write_xing": "0", "id3v2_version": "0"} if suffix == ".mp3" else {}
    pieces = [(0, np.concatenate(halves))]
    path = write(tmp_path / f"raw{suffix}", pieces, codec=codec, rate=rate, options=options)
    raw = decode(Clip(path))
    assert raw.duration == pytest.approx(12, abs=0.15)
    assert len(raw.waveform) == pytest.approx(12 * SAMPLE_RATE, abs=0.15 * SAMPLE_RATE)
    second = np.abs(raw.waveform[7 * SAMPLE_RATE : 11 * SAMPLE_RATE]).max()
    assert (second > 0.2) != loud_first
    assert len(decode(Clip(path, 10, 11.5)).waveform) == 1.5 * SAMPLE_RATE
    with pytest.raises(ClipError, match=r"beyond the clip, which lasts 1[12]\."):
        decode(Clip(path, 11, 20))


def test_a_cut_off_file_is_refused_if_its_media_start_late(tmp_path):
    path = write(tmp_path / "late.mkv", [(100, tone(4))], picture=(100, 104))
    assert decode(Clip(path)).duration == pytest.approx(4, abs=0.05)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    with pytest.raises(ClipError, match="is truncated"):
        decode(Clip(path))


def test_a_header_that_declares_too_little_cuts_nothing(tmp_path):
    path = write(tmp_path / "a.mka", [(0, tone(2)), (3, tone(2))])
    content = path.read_bytes()
    at = content.index(b"\x44\x89\x88") + 3  # Duration, an eight-byte float in milliseconds
    path.write_bytes(content[:at] + struct.pack(">d", 1500.0) + content[at + 8 :])
    raw = decode(Clip(path))
    assert raw.duration == pytest.approx(5, abs=0.01) and onsets(raw.waveform) == [0, 3]
    assert onsets(decode(Clip(path, 3, 4)).waveform) == [0]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".h264", "libx264"), (".hevc", "libx265"), (".m2v", "mpeg2video")]
)
def test_raw_video_is_read(tmp_path, suffix, codec):
    import av

    path = tmp_path / f"raw{suffix}"
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt = 128, 128, "yuv420p"
        for number in range(75):
            picture = np.full((128, 128, 3), 20 + 3 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    raw = decode(Clip(path), num_frames=5)
    assert raw.duration == pytest.approx(3, abs=0.05)
    expected = 20 + 3 * (75 * (np.arange(5) + 0.5) / 5).astype(int)
    np.testing.assert_allclose(raw.frames.mean(axis=(1, 2, 3)), expected, atol=4)


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "no tags"])
def test_a_subtitle_that_outlasts_the_media_is_no_truncation(tmp_path, tagged):
    path = write(tmp_path / "a.mkv", [(0, tone(3))], picture=(0, 3), subtitle=9)
    if not tagged:  # only the header of the file declares a duration then
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTHING!"))
    raw = decode(Clip(path))
    assert raw.duration == pytest.approx(3, abs=0.05) and len(raw.frames) == 8
    assert np.diff(raw.timestamps).max() < 0.5
    assert len(decode(Clip(path, 2.5, 3)).waveform) == SAMPLE_RATE // 2
    with pytest.raises(ClipError, match=r"5 to 6 s reaches beyond the clip, which lasts 3\.0") as caught:
        decode(Clip(path, 5, 6))
    assert caught.value.problem == "window beyond clip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClipError, match="is truncated"):
        decode(Clip(path))


def test_a_longer_track_that_is_not_heard_is_no_truncation(tmp_path):
    path = write(tmp_path / "a.mp4", [(0, tone(3))], [(0, tone(9, 0.1))], picture=(0, 3))
    raw = decode(Clip(path, audio_track=1))
    assert raw.duration == pytest.approx(3, abs=0.15) and len(raw.frames) == 8
    assert decode(Clip(path, audio_track=2)).duration == pytest.approx(9, abs=0.15)


# --- samples and channels that cannot be used


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("case", ["one channel", "opposite channels", "second track"])
def test_samples_that_are_no_sound_are_refused_on_every_path(tmp_path, value, case):
    sound = np.stack([tone(1), -tone(1) if case == "opposite channels" else tone(1)])
    sound[1, 9000] = value
    tracks = [[(0, 0 * np.stack([tone(1)] * 2))]] if case == "second track" else []
    path = write(tmp_path / "a.mka", *tracks, [(0, sound)], layout="stereo", codec="pcm_f32le")
    with pytest.raises(ClipError, match=r"the sound has the value \S+ at 0\.5\d s") as caught:
        decode(Clip(path))
    assert caught.value.problem == "bad samples"


def test_an_impossible_number_of_channels_is_named(tmp_path):
    with pytest.raises(ClipError, match="more than 64 sound channels, or a damaged number") as caught:
        decode(Clip(wav(tmp_path / "a.wav", np.zeros((600, 1600), np.int16))))
    assert caught.value.problem == "unusual sound"


# --- pictures that need not be decoded


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", ".mp4"), ("libx264", ".mkv"), ("libx265", ".mkv"), ("mpeg4", ".mp4"), ("mpeg2video", ".ts")],
)
def test_frames_are_the_same_though_unwanted_ones_are_not_decoded(tmp_path, monkeypatch, codec, suffix):
    import av

    path = tmp_path / f"a{suffix}"
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"bf": "2"}
    random = np.random.default_rng(0)
    pattern = np.repeat(np.repeat(random.integers(0, 150, (8, 8, 3), dtype=np.uint8), 16, 0), 16, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt, video.bit_rate = 128, 128, "yuv420p", 1_000_000
        time = 0
        for number in range(100):
            picture = np.roll(pattern, number, axis=1)
            frame = av.VideoFrame.from_ndarray(picture + np.uint8(number), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            time += 1 if suffix == ".ts" else int(random.choice([1, 1, 2, 9]))  # of variable rate
            container.mux(video.encode(frame))
        container.mux(video.encode())
    skipped = []
    may_skip = FrameSampler.may_skip
    for window in ((None, None), (0.5, 2.5), (2.2, 3.5)):
        for num_frames in (1, 8, 40):
            monkeypatch.setattr(
                FrameSampler,
                "may_skip",
                lambda self, time: skipped.append(may_skip(self, time)) or skipped[-1],
            )
            ours = decode(Clip(path, *window), num_frames=num_frames)
            monkeypatch.setattr(FrameSampler, "may_skip", lambda self, time: False)
            full = decode(Clip(path, *window), num_frames=num_frames)
            np.testing.assert_array_equal(ours.timestamps, full.timestamps)
            np.testing.assert_array_equal(ours.frames, full.frames)
            assert ours.duration == full.duration
    assert sum(skipped) > 50
