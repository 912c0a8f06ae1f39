# SPDX-License-Identifier: Apache-2.0
"""The feature cache: found again, never mistaken, never half-written, safe for several writers."""

import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal
import stat

import numpy as np
import pytest

from feature_extractors import (
    CacheError,
    Clip,
    ClipError,
    ClipFeatures,
    ExtractionSettings,
    FaceExtractor,
    FeatureCache,
)

SETTINGS = ExtractionSettings(num_frames=2, face_size=32)


def example(seed: int = 0, samples: int = 1600) -> ClipFeatures:
    rng = np.random.default_rng(seed)
    return ClipFeatures(
        waveform=rng.integers(-999, 999, samples, np.int16),
        face_crops=rng.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8),
        blendshapes=rng.random((2, 52), np.float32),
        face_found=np.array([True, False]),
        timestamps=np.array([0.25, 0.75], np.float32),
        findings=("silent audio",),
        duration=1.0,
        full_scale=1.5,
    )


def assert_equal(ours: ClipFeatures, theirs: ClipFeatures) -> None:
    for field in dataclasses.fields(ClipFeatures):
        value, other = getattr(ours, field.name), getattr(theirs, field.name)
        np.testing.assert_array_equal(value, other, field.name)
        assert not isinstance(value, np.ndarray) or value.dtype == other.dtype


@pytest.mark.parametrize("features", [example(), ClipFeatures.absent(SETTINGS)])
def test_what_is_stored_is_loaded_unchanged(tmp_path, features):
    cache = FeatureCache(tmp_path)
    cache.store("ab" * 32, features)
    assert_equal(cache.load("ab" * 32), features)
    assert cache.load("cd" * 32) is None
    assert (tmp_path / "ab" / f"{'ab' * 32}.safetensors").is_file()


def test_the_key_follows_content_window_and_settings_and_not_the_name(tmp_path, make_clip):
    cache = FeatureCache(tmp_path / "cache")
    clip = Clip(make_clip(tmp_path / "a.mp4", seconds=0.2))
    copy = Clip(shutil.copy(clip.path, tmp_path / "b.mp4"))
    assert cache.key(copy, SETTINGS) == cache.key(clip, SETTINGS)
    others = {
        cache.key(Clip(clip.path, 0.0, 0.1), SETTINGS),
        cache.key(Clip(clip.path, None, 0.1), SETTINGS),
        cache.key(Clip(make_clip(tmp_path / "c.mp4", seconds=0.4)), SETTINGS),
        *(
            cache.key(clip, dataclasses.replace(SETTINGS, **change))
            for change in ({"num_frames": 3}, {"face_size": 48}, {"max_height": 240})
        ),
        cache.key(clip, dataclasses.replace(SETTINGS, face_choice="most_speaking")),
        cache.key(Clip(clip.path, region=(0, 0, 0.5, 1)), SETTINGS),
        cache.key(Clip(clip.path, audio_track=1), SETTINGS),
    }
    assert len(others) == 9 and cache.key(clip, SETTINGS) not in others


def test_integer_and_float_times_share_entries(tmp_path, make_clip):
    cache = FeatureCache(tmp_path / "cache")
    path = make_clip(tmp_path / "a.mp4", seconds=0.2)
    assert cache.key(Clip(path, 0, 1), SETTINGS) == cache.key(Clip(str(path), 0.0, 1.0), SETTINGS)


def test_a_file_that_is_overwritten_is_not_mistaken_for_the_old_one(tmp_path, make_clip):
    cache = FeatureCache(tmp_path / "cache")
    path = make_clip(tmp_path / "a.mp4", seconds=0.2)
    os.utime(path, (1e9, 1e9))
    before = cache.key(Clip(path), SETTINGS)
    assert cache.key(Clip(path), SETTINGS) == before
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.key(Clip(path), SETTINGS) != before


def test_digests_are_remembered_for_settled_files(tmp_path, make_clip):
    cache = FeatureCache(tmp_path / "cache")
    path = make_clip(tmp_path / "a.mp4", seconds=0.2)
    cache.key(Clip(path), SETTINGS)
    assert not list((cache.folder).rglob("digests/*/*"))  # just written: it may change within a tick
    os.utime(path, (1e9, 1e9))
    cache.key(Clip(path), SETTINGS)
    (memo,) = cache.folder.rglob("digests/*/*")
    memo.write_text("damaged")
    assert cache.key(Clip(path), SETTINGS) == FeatureCache(tmp_path / "new").key(Clip(path), SETTINGS)


def test_a_copy_of_a_known_clip_needs_no_permission_to_write(tmp_path, make_clip):
    """A shared cache may be read-only; what is remembered about files only saves time."""
    cache, path = FeatureCache(tmp_path / "cache"), make_clip(tmp_path / "a.mp4", seconds=0.2)
    cache.folder.mkdir()
    (cache.folder / "digests").write_text("")  # no file can be written below it, even by root
    os.utime(path, (1e9, 1e9))
    assert cache.key(Clip(path), SETTINGS) == FeatureCache(tmp_path / "new").key(Clip(path), SETTINGS)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_entry_is_made_again(tmp_path, make_clip, damage):
    cache, clip = FeatureCache(tmp_path / "cache"), Clip(make_clip(tmp_path / "a.mp4", seconds=0.3))
    with FaceExtractor(SETTINGS) as face_extractor:
        features = cache.get(clip, SETTINGS, face_extractor)
        key = cache.key(clip, SETTINGS)
        (entry,) = cache.folder.rglob("*.safetensors")
        content = bytearray(entry.read_bytes())
        content[-100] ^= 255
        damaged = {"cut": content[:-50], "flipped": content, "empty": b"", "text": b"no entry at all"}
        entry.write_bytes(damaged[damage])
        assert cache.load(key) is None
        assert_equal(cache.get(clip, SETTINGS, face_extractor), features)
    assert_equal(cache.load(key), features)


@pytest.mark.parametrize(
    ("stored", "damaged"),
    [
        (b"silent audio", b"silent cudio"),
        (b": 1.0,", b": 1.5,"),
        (b": 1.5}", b": 0.5}"),
        (b"[1600]", b"[16000]"),
        (b'checksum":"', b'checksum":"9'),
        (b"findings", b"fundings"),
    ],
)
def test_a_damaged_header_never_changes_findings_duration_or_shapes(tmp_path, stored, damaged):
    cache = FeatureCache(tmp_path)
    cache.store("ab" * 32, example())
    (entry,) = tmp_path.rglob("*.safetensors")
    content = entry.read_bytes()
    assert content.count(stored) == 1
    entry.write_bytes(content.replace(stored, damaged))
    assert cache.load("ab" * 32) is None


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path):
    cache, features = FeatureCache(tmp_path), example(samples=3)
    cache.store("ab" * 32, features)
    (entry,) = tmp_path.rglob("*.safetensors")
    content = entry.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(header):
        damaged = bytearray(content)
        damaged[position] ^= 1
        entry.write_bytes(damaged)
        if (loaded := cache.load("ab" * 32)) is not None:
            assert_equal(loaded, features)  # white space that carries nothing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_entries_and_digests_have_the_permissions_that_the_umask_gives(tmp_path, make_clip, umask, mode):
    cache, path = FeatureCache(tmp_path / "cache"), make_clip(tmp_path / "a.mp4", seconds=0.2)
    os.utime(path, (1e9, 1e9))
    before = os.umask(umask)
    try:
        cache.store(cache.key(Clip(path), SETTINGS), example())
    finally:
        os.umask(before)
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) == 2 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_stored_clip_needs_no_face_model(tmp_path, make_clip, monkeypatch):
    cache, clip = FeatureCache(tmp_path / "cache"), Clip(make_clip(tmp_path / "a.mp4", seconds=0.3))
    features = cache.get(clip, SETTINGS)
    monkeypatch.setenv("MSA_MODEL_FACE_LANDMARKER", str(tmp_path / "nowhere"))
    assert_equal(cache.get(clip, SETTINGS), features)


def test_a_missing_clip_is_a_clip_error(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    for path, problem in ((tmp_path / "no.mp4", "missing"), (tmp_path, "not a file")):
        with pytest.raises(ClipError) as caught:
            cache.key(Clip(path), SETTINGS)
        assert caught.value.problem == problem


def _write_many(folder, samples, rounds):
    cache = FeatureCache(folder)
    for _ in range(rounds):
        cache.store("ee" * 32, example(samples, samples))


def test_readers_see_whole_entries_while_several_processes_write(tmp_path):
    context = multiprocessing.get_context("spawn")
    lengths = (800, 480_000)
    writers = [context.Process(target=_write_many, args=(tmp_path, samples, 60)) for samples in lengths]
    for writer in writers:
        writer.start()
    cache, seen = FeatureCache(tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        entry = tmp_path / "ee" / f"{'ee' * 32}.safetensors"
        if entry.exists():
            features = cache.load("ee" * 32)
            assert_equal(features, example(len(features.waveform), len(features.waveform)))
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0] and seen > 0
    assert [path.name for path in (tmp_path / "ee").iterdir()] == [f"{'ee' * 32}.safetensors"]


def _store_with_little_room(folder, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        FeatureCache(folder).store("ab" * 32, example())
    except CacheError as error:
        queue.put(str(error))


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    writer = context.Process(target=_store_with_little_room, args=(tmp_path, queue))
    writer.start()
    message = queue.get(timeout=30)
    writer.join()
    assert f"cannot write the feature cache in {tmp_path}" in message and "MSA_CACHE" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="^cannot write the feature cache"):
        FeatureCache(tmp_path / "cache").store("ab" * 32, example())


def test_the_default_folder_follows_the_environment(cache_dir):
    assert FeatureCache().folder == cache_dir / "features"
