# SPDX-License-Identifier: Apache-2.0
"""Filling the cache: findings are counted, broken clips listed at once, and nothing is done twice."""

import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from feature_extractors.cache import CacheError, FeatureCache
from feature_extractors.clip import ClipExtent, ExtractionSettings
from msa_online import MSAProcessor
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.corpus import Corpus, CorpusError
from msa_online.corpora.prepared_corpus import PreparedCorpus, findings_record, findings_table
from msa_online.corpora.reading import read_corpus
from msa_online.processing_msa import InputLimits

SETTINGS = ExtractionSettings(num_frames=2)
ROWS = (
    "file_name,text,label,split,start,end",
    "good.mp4,well,1,train,,",  # line 2
    "copy.mkv,well,1,train,,",
    "good.mp4, ,1,train,0,0.5",
    "no_face.mp4,x,1,train,,",  # line 5
    "mute.webm,x,1,valid,,",
    "silent.avi,x,1,valid,,",
    "sound.wav,x,1,test,,",
    "truncated.mp4,x,1,test,,",  # line 9
    "letter.mp4,x,1,test,,",
    "good.mp4,x,1,test,60,61",
)


def printed(prepared: PreparedCorpus, limits: InputLimits | None = None, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(findings_table(prepared, limits or InputLimits()))
    return capture.get()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_clip) -> Corpus:
    """Clips of which two have everything, five lack something, and three rows cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "good.mp4", fps=8)
    shutil.copy(folder / "good.mp4", folder / "copy.mkv")
    noise = np.random.default_rng(0).integers(0, 255, (8, 160, 160, 3), np.uint8)
    make_clip(folder / "no_face.mp4", fps=8, frames=noise)
    make_clip(folder / "mute.webm", fps=25, audio=None)
    make_clip(folder / "silent.avi", fps=25, audio="silent")
    make_clip(folder / "sound.wav", video=False)
    (folder / "truncated.mp4").write_bytes((folder / "good.mp4").read_bytes()[:2000])
    (folder / "letter.mp4").write_text("Dear reader, this is no video.")
    (folder / "metadata.csv").write_text("\n".join(ROWS))
    return read_corpus(folder, label_range=(-3, 3))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def refusal(corpus, cache) -> CorpusError:
    with pytest.raises(CorpusError) as caught:
        prepare(corpus, cache, SETTINGS, workers=2)
    return caught.value


@pytest.fixture(scope="module")
def prepared(corpus, cache, refusal) -> PreparedCorpus:
    """The second run, which goes on without the broken clips that stopped the first."""
    return prepare(corpus, cache, SETTINGS, workers=1, skip_broken=True)


def test_broken_clips_are_listed_at_once_with_lines_and_remedies(refusal, corpus):
    assert [row.line for row in refusal.broken] == [9, 10, 11]
    message = str(refusal)
    assert f"{corpus.source}: 3 broken rows" in message and "--skip-broken" in message
    for line, name, remedy in (
        (9, "truncated.mp4", ""),
        (10, "letter.mp4", "convert it"),
        (11, "good.mp4", "window"),
    ):
        row = next(text for text in message.splitlines() if f"metadata.csv line {line}: " in text)
        assert name in row and remedy in row


def test_broken_clips_are_left_out_on_request_and_the_rest_is_not_extracted_twice(prepared):
    assert (prepared.total, prepared.extracted, prepared.cached) == (10, 0, 7)
    assert [row.line for row in prepared.broken] == [9, 10, 11]
    assert [sample.line for sample in prepared.samples] == [2, 3, 4, 5, 6, 7, 8]


def test_findings_name_the_lines_that_lack_a_modality(prepared):
    assert prepared.findings == {
        "no face": [5],
        "no video stream": [8],
        "no audio stream": [6],
        "silent audio": [7],
        "empty text": [4],
    }


def test_reported_and_masked_modalities_are_the_same(prepared, cache, tiny_tokenizer):
    processor = MSAProcessor(tiny_tokenizer, {"num_frames": 2})
    inputs = [
        processor.encode(cache.load(prepared.keys[sample.id]), sample.text) for sample in prepared.samples
    ]
    in_batches = torch.stack([one["modality_present"] for one in inputs])
    present = torch.empty_like(in_batches)
    for split in prepared.sizes:
        present[[sample.split == split for sample in prepared.samples]] = prepared.present(split)
    assert torch.equal(present, in_batches)
    assert in_batches.sum(dim=0).tolist() == [6, 5, 5]


def test_table_shows_counts_shares_and_lines(prepared):
    table = printed(prepared)
    assert "7 of 10 clips usable" in table and "0 extracted" in table and "7 cached" in table
    cells = {row[0]: row[1:] for row in map(table_cells, table.splitlines()) if len(row) == 4}
    assert cells["no face"] == ["1", "10.0%", "5"]
    assert cells["left out: broken"] == ["3", "30.0%", "9, 10, 11"]


def test_what_a_model_would_not_read_is_counted_with_figures(prepared):
    long = [replace(sample, text="word " * 300) for sample in prepared.samples[:2]]
    samples = (*long, *prepared.samples[2:])
    extents = prepared.extents | {samples[0].id: ClipExtent(182.4, 182.4, 8)}
    cut = replace(prepared, corpus=replace(prepared.corpus, samples=samples), extents=extents, found={})
    limits = InputLimits(max_text_tokens=100, max_audio_seconds=20)
    text = printed(cut, limits)
    cells = {row[0]: row[1:] for row in map(table_cells, text.splitlines()) if len(row) == 4}
    assert cells["text cut at 100 tokens"] == ["2", "20.0%", "2, 3; longest: 100 tokens of 300 words"]
    assert cells["sound cut at 20 s"] == ["1", "10.0%", "2; longest: first 20.0 of 182.4 s"]
    assert cells["few frames for the length"][2] == "2; longest: 8 frames over 182.4 s"
    assert "nothing is lacking" not in text and "model never sees the rest" in " ".join(text.split())
    assert findings_record(cut, limits)["cut"]["audio"] == {
        "lines": [2],
        "longest": "first 20.0 of 182.4 s",
    }
    narrow = printed(cut, limits, width=80).splitlines()
    assert max(map(len, narrow)) <= 80 and any("text cut at 100 tokens" in line for line in narrow)


def test_clips_of_ordinary_length_raise_no_alarm(prepared):
    assert prepared.cut(InputLimits()) == {}
    assert prepared.extents["good.mp4"] == ClipExtent(
        pytest.approx(1.0, abs=0.1), pytest.approx(1, 0.1), 2, pytest.approx(0, abs=0.1)
    )


def test_a_clip_with_nothing_to_see_hear_or_read_is_a_finding_of_its_own(make_clip, tmp_path):
    make_clip(tmp_path / "silent.wav", video=False, audio="silent")
    make_clip(tmp_path / "spoken.wav", video=False)
    (tmp_path / "metadata.csv").write_text("file_name,text\nsilent.wav,\nspoken.wav,\n")
    corpus = read_corpus(tmp_path, label_column=None)
    found = prepare(corpus, FeatureCache(tmp_path / "features"), SETTINGS, workers=1)
    assert found.findings["no modality at all"] == [2] and found.findings["empty text"] == [2, 3]
    assert "Without any modality a model can only predict its baseline" in " ".join(printed(found).split())


def test_sound_that_starts_after_the_part_that_is_read_is_missing(make_clip, tmp_path, tiny_tokenizer):
    sound = np.concatenate([np.zeros(2 * 48_000), 0.3 * np.sin(np.arange(48_000) / 20)])
    make_clip(tmp_path / "late.wav", video=False, audio=sound)
    make_clip(tmp_path / "early.wav", video=False, audio=sound[::-1])
    (tmp_path / "metadata.csv").write_text("file_name,text\nlate.wav,good\nearly.wav,good\n")
    corpus, cache = read_corpus(tmp_path, label_column=None), FeatureCache(tmp_path / "features")
    prepared = prepare(corpus, cache, SETTINGS, workers=1, max_audio_seconds=1.5)
    assert prepared.findings["silent in the part that is read"] == [2]
    assert "start and end select the part to read" in " ".join(printed(prepared).split())
    processor = MSAProcessor(tiny_tokenizer, {"num_frames": 2}, max_audio_seconds=1.5)
    for sample in prepared.samples:
        encoded = processor.encode(cache.load(prepared.keys[sample.id]), sample.text)
        said = {name for name, ids in prepared.found.items() if sample in ids}
        assert bool(encoded["modality_present"][1]) == ("silent in the part that is read" not in said)
    assert "silent in the part that is read" not in prepare(corpus, cache, SETTINGS).findings


def test_the_track_in_use_is_a_finding(make_clip, tmp_path):
    import av

    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        for level, track in zip((0, 5000), tracks, strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), level, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(track.encode(frame) + track.encode())
    (tmp_path / "metadata.csv").write_text("file_name,text\ntwo.mkv,good\n")
    cache = FeatureCache(tmp_path / "features")
    corpora = [read_corpus(tmp_path, label_column=None, audio_track=track) for track in (None, 1)]
    first, second = (prepare(corpus, cache, SETTINGS, workers=1) for corpus in corpora)
    assert first.findings["audio track 2 of 2, track 1 is silent"] == [2]
    assert "audio track 2 of 2, track 1 is silent" in printed(first)
    assert "silent audio" in second.findings and second.extracted == 1


def table_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_keys_lead_to_the_features_and_equal_files_share_theirs(prepared, cache):
    keys = prepared.keys
    assert set(keys) == {sample.id for sample in prepared.samples}
    assert keys["good.mp4"] == keys["copy.mkv"] != keys["good.mp4@0.0-0.5"]
    assert cache.load(keys["good.mp4"]).has_face and not cache.load(keys["no_face.mp4"]).has_face
    assert cache.load(keys["good.mp4@0.0-0.5"]).duration == pytest.approx(0.5)


def test_complete_clips_are_reported_and_need_no_worker(prepared, cache):
    whole = replace(prepared.corpus, samples=prepared.samples[:2], broken=())
    began = time.perf_counter()
    again = prepare(whole, cache, SETTINGS)
    assert again.cached == 2 and time.perf_counter() - began < 1
    assert "nothing is lacking" in printed(again)


def test_all_clips_broken_is_an_error_even_when_they_may_be_skipped(corpus, cache):
    only_broken = replace(corpus, samples=(corpus.samples[8],))
    with pytest.raises(CorpusError, match="line 10"):
        prepare(only_broken, cache, SETTINGS, skip_broken=True)


def test_too_little_disk_is_reported_before_anything_is_extracted(corpus, tmp_path):
    enormous = ExtractionSettings(num_frames=10**12)
    with pytest.raises(
        CacheError, match=r"need about [\d,]+ bytes but .* has [\d,]+ bytes free; .*MSA_CACHE"
    ):
        prepare(corpus, FeatureCache(tmp_path / "new"), enormous)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_no_clip_is_lost(corpus, tmp_path):
    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    prepared = prepare(corpus, FeatureCache(tmp_path), SETTINGS, workers=1, skip_broken=True)
    killer.join()
    assert prepared.extracted == len(prepared.samples) == 7
    assert [row.line for row in prepared.broken] == [9, 10, 11]


def kill_first_worker() -> None:
    wait_until(multiprocessing.active_children)
    multiprocessing.active_children()[0].kill()


INTERRUPTED = """
import sys
from feature_extractors.cache import FeatureCache
from feature_extractors.clip import ExtractionSettings
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.cache_filling import prepare

if __name__ == "__main__":
    corpus = read_corpus(sys.argv[1], label_column=None)
    prepare(corpus, FeatureCache(sys.argv[2]), ExtractionSettings(num_frames=2), workers=1)
"""


@pytest.mark.slow
def test_killed_run_leaves_a_usable_cache_and_no_process_behind(make_clip, tmp_path):
    make_clip(tmp_path / "long.mp4", fps=8, seconds=4)
    windows = [f"long.mp4,x,{start / 100},{start / 100 + 1}" for start in range(300)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,start,end", *windows]))
    (tmp_path / "run.py").write_text(INTERRUPTED)
    cache = FeatureCache(tmp_path / "features")
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path, cache.folder], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(list(cache.folder.rglob("*.safetensors"))) > 2)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    corpus = read_corpus(tmp_path, label_column=None)
    begun = replace(corpus, samples=corpus.samples[:2])
    assert prepare(begun, cache, SETTINGS).cached == 2


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_real_clips_of_many_containers_are_prepared(shared_data, tmp_path):
    names = [
        *("crema_d/1001_DFA_ANG_XX.flv", "crema_d/1001_DFA_HAP_XX.flv", "grid/bbaf2n.mpg"),
        *(
            "edge_cases/no_face.mp4",
            "edge_cases/face_no_audio_stream.mp4",
            "edge_cases/face_silent_audio.mp4",
        ),
    ]
    names += [sample.id for sample in read_corpus(shared_data / "composite").split("valid")[:3]]
    rows = ["file_name,text"]
    for name in names:
        source = shared_data / name if (shared_data / name).exists() else shared_data / "composite" / name
        shutil.copy(source, tmp_path / Path(name).name)
        rows.append(f"{Path(name).name},some words")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    corpus = read_corpus(tmp_path, label_column=None)
    prepared = prepare(corpus, FeatureCache(tmp_path / "features"), SETTINGS, workers=2)
    assert prepared.extracted == 9
    assert prepared.findings == {"no face": [5], "no audio stream": [6], "silent audio": [7]}
