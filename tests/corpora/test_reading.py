# SPDX-License-Identifier: Apache-2.0
"""Reading corpora: every layout is understood, and every bad row is named with line, value and remedy."""

import csv
import logging
import os
import random
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from msa_online.corpora import arrow_tables, csv_table
from msa_online.corpora.corpus import CorpusError, require_splits
from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.validation import check_class_names

SENTIMENT = {"label_range": (-3.0, 3.0)}


def write_csv(path: Path, *lines: str) -> Path:
    """A csv file of these lines, and a small file for every clip that its first column names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"media " + name.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four clips, a.mp4 .. d.mp4, that still lacks its metadata."""
    touch(tmp_path / "corpus", "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    return tmp_path / "corpus"


def complaint(folder: Path, **arguments) -> CorpusError:
    with pytest.raises(CorpusError) as caught:
        read_corpus(folder, **{**SENTIMENT, **arguments})
    return caught.value


def assert_names(error: CorpusError, *parts: str) -> None:
    for part in parts:
        assert part in str(error)


# layouts


def test_metadata_folder_gives_every_column(folder):
    write_csv(
        folder / "metadata.csv",
        "file_name,text,label,split,start,end,speaker",
        'a.mp4,"well, yes",-1.5,train,0.5,2,ann',
        "a.mp4,,3,dev,2,,",
        "",
        "b.mp4,no,0,Test,,,bob",
    )
    first, second, third = read_corpus(folder, **SENTIMENT).samples
    assert (first.clip.path, first.clip.start, first.clip.end) == (folder / "a.mp4", 0.5, 2.0)
    assert (first.text, first.label, first.split, first.speaker) == ("well, yes", -1.5, "train", "ann")
    assert (second.text, second.split, second.speaker, second.line) == ("", "valid", None, 3)
    assert (third.split, third.line, third.clip.start) == ("test", 5, None)
    assert [first.id, second.id, third.id] == ["a.mp4@0.5-2.0", "a.mp4@2.0-end", "b.mp4"]


def test_words_that_look_like_missing_values_stay_text(folder):
    names = ["a.mp4,null,NA", "b.mp4,NA,None", "c.mp4,None,null"]
    write_csv(folder / "metadata.csv", "file_name,text,emotion", *names)
    samples = read_corpus(folder, label_column="emotion").samples
    assert [sample.text for sample in samples] == ["null", "NA", "None"]
    assert [sample.label for sample in samples] == ["NA", "None", "null"]


def test_line_is_the_first_of_a_text_that_spans_several(folder):
    write_csv(folder / "metadata.csv", "file_name,text,label", 'a.mp4,"two\nlines",1', "b.mp4,x,2")
    assert [sample.line for sample in read_corpus(folder, **SENTIMENT).samples] == [2, 4]


def test_byte_order_mark_and_windows_line_ends_are_accepted(folder):
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text,label\r\na.mp4,caf\xc3\xa9,1\r\n")
    assert read_corpus(folder, **SENTIMENT).samples[0].text == "café"


def test_labels_are_not_needed_where_none_are_asked_for(folder):
    write_csv(folder / "metadata.csv", "file_name,text", "a.mp4,x")
    assert read_corpus(folder, label_column=None).samples[0].label is None


def test_clips_in_split_folders_belong_to_these_splits(folder):
    touch(folder, "train/a.mp4", "validation/a.mp4", "test/a.mp4")
    rows = ["./train/a.mp4,x,1", "validation/a.mp4,x,1", "test/a.mp4,x,1"]
    write_csv(folder / "metadata.csv", "file_name,text,label", *rows)
    assert [sample.split for sample in read_corpus(folder, **SENTIMENT).samples] == ["train", "valid", "test"]


def test_metadata_inside_split_folders_is_read(tmp_path):
    for name in ("test", "train", "val"):
        touch(tmp_path / name, "a.mp4")
        write_csv(tmp_path / name / "metadata.csv", "file_name,text,label", "a.mp4,x,1")
    samples = read_corpus(tmp_path, **SENTIMENT).samples
    assert [(sample.split, sample.id) for sample in samples] == [
        ("train", "train/a.mp4"),
        ("valid", "val/a.mp4"),
        ("test", "test/a.mp4"),
    ]


def test_broken_row_inside_a_split_folder_names_that_folder(tmp_path):
    touch(tmp_path / "test", "a.mp4")
    write_csv(tmp_path / "test" / "metadata.csv", "file_name,text,label", "a.mp4,x,9")
    assert_names(complaint(tmp_path), "test/metadata.csv line 2: label '9'")


def test_mmsa_layout_finds_clips_by_stem(tmp_path):
    touch(tmp_path / "Raw", "03bSn/1.mp4", "03bSn/10.flv", "03bSn/1.wav", "video_0001/0002.mp4")
    write_csv(
        tmp_path / "label.csv",
        "video_id,clip_id,text,label,annotation,mode",
        "03bSn,1,GOOD,2.4,Positive,train",
        "03bSn,10,SAD,-1.2,Negative,valid",
        "video_0001,0002,很好,0.8,Positive,test",
    )
    samples = read_corpus(tmp_path, **SENTIMENT).samples
    assert [sample.id for sample in samples] == [
        "Raw/03bSn/1.mp4",
        "Raw/03bSn/10.flv",
        "Raw/video_0001/0002.mp4",
    ]
    assert [sample.split for sample in samples] == ["train", "valid", "test"]
    assert [sample.speaker for sample in samples] == ["03bSn", "03bSn", "video_0001"]


def test_mmsa_clip_that_is_missing_is_named(tmp_path):
    touch(tmp_path / "Raw", "v/2.mp4")
    write_csv(
        tmp_path / "label.csv", "video_id,clip_id,text,label,mode", "v,1,x,0,train", "../..,1,x,0,train"
    )
    assert_names(
        complaint(tmp_path), "line 2: 'Raw/v/1.mp4' does not exist", "line 3: 'Raw/../../1.mp4' leads out"
    )


def test_meld_layout_reads_three_csv_files_and_their_folders(tmp_path):
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
    places = {
        "train": "train_splits",
        "dev": "dev/dev_splits_complete",
        "test": "output_repeated_splits_test",
    }
    for split, place in places.items():
        touch(tmp_path / place, "dia0_utt3.mp4")
        write_csv(tmp_path / f"{split}_sent_emo.csv", header, f"1,Hi from {split},Ross,joy,positive,0,3")
    samples = read_corpus(tmp_path, label_column="Emotion").samples
    assert [sample.split for sample in samples] == ["train", "valid", "test"]
    assert [sample.id for sample in samples] == [f"{place}/dia0_utt3.mp4" for place in places.values()]
    assert (samples[1].text, samples[1].speaker, samples[1].label) == ("Hi from dev", "Ross", "joy")
    assert_names(
        complaint(tmp_path, label_column="Emotions"), "no column 'Emotions' (did you mean 'Emotion'?)"
    )


def test_meld_without_its_clips_says_what_was_looked_for(tmp_path):
    header = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID"
    write_csv(tmp_path / "dev_sent_emo.csv", header, "Hi,Ross,joy,0,3")
    assert_names(complaint(tmp_path, label_column="Emotion"), "dev_sent_emo.csv", "found: none", "Unpack")


# Arrow tables and the Hub


@pytest.fixture
def stored(tmp_path, cache_dir):
    """Columns of two clips whose bytes are stored in the table."""
    return {
        "video": [{"bytes": b"one", "path": "one.mkv"}, {"bytes": b"two", "path": None}],
        "text": ["null", None],
        "label": [1.5, -3.0],
        "speaker": ["ann", "bob"],
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_arrow_tables_bring_their_clips_into_the_cache_once(stored, kind, tmp_path, cache_dir):
    import datasets

    part = datasets.Dataset.from_dict(stored)
    target = tmp_path / "table"
    if kind == "parquet":
        target.mkdir()
        part.to_parquet(target / "train-00000-of-00001.parquet")
    elif kind == "arrow":
        part.save_to_disk(target)
        target = next(target.glob("*.arrow")).rename(tmp_path / "validation.arrow")
    else:
        datasets.DatasetDict(train=part.select([0]), validation=part.select([1])).save_to_disk(target)
    before = os.umask(0o027)
    try:
        first, second = read_corpus(target, **SENTIMENT).samples
    finally:
        os.umask(before)
    assert first.clip.path.read_bytes() == b"one" and second.clip.path.read_bytes() == b"two"
    assert (first.clip.path.suffix, second.clip.path.suffix) == (".mkv", ".mp4")
    assert cache_dir in first.clip.path.parents
    assert stat.S_IMODE(first.clip.path.stat().st_mode) == 0o640
    assert (first.text, first.label, first.speaker, first.line) == ("null", 1.5, "ann", 1)
    splits = {"parquet": ("train", "train"), "arrow": ("valid", "valid"), "saved": ("train", "valid")}
    assert (first.split, second.split) == splits[kind]
    written = first.clip.path.stat().st_mtime_ns
    assert read_corpus(target, **SENTIMENT).samples[0].clip.path.stat().st_mtime_ns == written


def test_a_saved_data_set_that_names_tables_outside_its_folder_is_refused(tmp_path):
    import datasets

    for name in ("one", "other"):
        rows = datasets.Dataset.from_dict({"file_name": ["a.mp4"], "text": ["x"], "label": [1.0]})
        rows.save_to_disk(tmp_path / name)
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../other/data-00000"))
    assert "a table outside its folder" in str(complaint(tmp_path / "one"))
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    assert "a table outside its folder" in str(complaint(tmp_path / "dict"))


def test_arrow_table_of_paths_and_class_numbers(tmp_path):
    import datasets

    touch(tmp_path, "clips/a.mp4")
    features = datasets.Features(
        {
            "file_name": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["joy", "anger"]),
            "dialogue": datasets.Value("string"),
            "turn": datasets.Value("int64"),
        }
    )
    columns = {"file_name": ["clips/a.mp4", "clips/b.mp4"], "text": ["x", "y"], "label": [1, 0]}
    columns |= {"dialogue": ["d", "d"], "turn": [3, 4]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "all.parquet")
    corpus = read_corpus(tmp_path / "all.parquet", skip_broken=True)
    assert [(each.label, each.dialogue, each.turn) for each in corpus.samples] == [("anger", "d", "3")]
    assert corpus.broken[0].line == 2
    assert_names(complaint(tmp_path, label_range=None), "all.parquet row 2: 'clips/b.mp4' does not exist")


def zeros(rows: int, value: object):
    """A column that names one value in every row, and holds it once."""
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int8)), [value])


def harmful_table(kind: str, folder: Path) -> Path:
    """A small file that holds, or says that it holds, far more than a table of its size does."""
    import pyarrow
    import pyarrow.parquet

    path = folder / ("train.arrow" if kind.startswith("arrow") else "train.parquet")
    few = {"file_name": ["a.mp4"] * 4, "label": [1.0] * 4}
    long = pyarrow.array(["x" * 150_000_000, "b", "c", "d"])
    columns = {
        "one text many times": {
            "file_name": zeros(500, "a.mp4"), "text": zeros(500, "x" * 5_000_000), "label": zeros(500, 1.0)
        },
        "a long clip": {
            "video": [{"bytes": b"x" * 150_000_000, "path": "a.mp4"}], "text": ["x"], "label": [1.0]
        },
        "many rows": {
            "file_name": zeros(2_000_001, "a.mp4"), "text": zeros(2_000_001, "x"),
            "label": zeros(2_000_001, 1.0),
        },
        "a long text": few | {"text": long},
        "arrow, a long text": few | {"text": long},
        "arrow, rows without a byte": {
            name: pyarrow.nulls(10**9) for name in ("file_name", "text", "label")
        },
    }[kind]  # fmt: skip
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary="times" in kind)
        return path
    packed = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(path, table.schema, options=packed) as stream:
        stream.write_table(table)
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("one text many times", r"\(.* bytes\) needs more than 0.1 GB (on disk|of memory) to be read"),
        ("a long clip", r"\(.* bytes\) needs more than 0.1 GB of memory to be read"),
        ("many rows", "has more than 2,000,000 rows"),
        ("a long text", r"\(.* bytes\) needs more than 0.1 GB of memory to be read"),
        ("arrow, a long text", r"\(.* bytes\) needs more than 0.1 GB of memory to be read"),
        ("arrow, rows without a byte", "has more than 2,000,000 rows"),
    ],
)
def test_a_table_that_needs_far_more_than_its_size_is_refused_naming_the_limit(
    kind, expected, tmp_path, cache_dir, monkeypatch
):
    monkeypatch.setattr(arrow_tables, "SMALL", 100_000_000)
    path = harmful_table(kind, tmp_path)
    assert path.stat().st_size < 400_000
    message = str(complaint(path))
    assert message.startswith(str(path)) and re.search(expected, message)
    assert not [*cache_dir.rglob("*.mp4")]


def test_a_clip_that_many_rows_share_is_stored_once(tmp_path, cache_dir, monkeypatch):
    """Windows of one recording: the table holds its bytes once, and no two rows are held together."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(arrow_tables, "SMALL", 100_000_000)
    clip = np.random.default_rng(0).bytes(5_000_000)
    columns = {
        "video": [{"bytes": clip, "path": "a.mkv"}] * 100,
        "text": ["x"] * 100,
        "label": [1.0] * 100,
        "start": [float(number) for number in range(100)],
        "end": [number + 1.0 for number in range(100)],
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", dictionary_pagesize_limit=1 << 24)
    assert (tmp_path / "train.parquet").stat().st_size < 6_000_000
    corpus = read_corpus(tmp_path / "train.parquet", **SENTIMENT)
    assert len(corpus.samples) == 100 and len({sample.clip.path for sample in corpus.samples}) == 1
    assert corpus.samples[0].clip.path.read_bytes() == clip


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_table_is_one_message(seed, stored, tmp_path, cache_dir):
    import datasets

    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(stored).to_parquet(path)
    random, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for place in random.integers(4, len(content) - 8, size=60):
        content[place] = random.integers(256)
    path.write_bytes(content)
    message = str(complaint(path))
    assert message.startswith(str(path)) and len(message) < 600 and "Traceback" not in message


def test_the_process_that_reads_tables_starts_without_torch():
    code = f"import runpy, sys; runpy.run_path({str(arrow_tables.READER)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_metadata_is_read_where_a_table_of_something_else_lies_beside_it(folder):
    (folder / "features.parquet").write_bytes(b"features of another tool")
    write_csv(folder / "metadata.csv", "file_name,text,label", "a.mp4,x,1")
    assert read_corpus(folder, **SENTIMENT).samples[0].id == "a.mp4"


def test_arrow_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table at all")
    assert_names(
        complaint(tmp_path / "x.parquet"), "x.parquet", "not a complete Arrow table", "copy it again"
    )


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub's files, and no network to reach the Hub by."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_repository_in_the_hub_cache_is_read_through_its_links(hub_cache):
    repository = hub_cache / "datasets--owner--clips"
    snapshot = repository / "snapshots" / ("0" * 40)
    touch(repository / "blobs", "123", "124")
    (repository / "blobs" / "124").write_text("file_name,text,label\na.mp4,x,1\n")
    (snapshot / "train").mkdir(parents=True)
    (snapshot / "train" / "a.mp4").symlink_to("../../../blobs/123")
    (snapshot / "train" / "metadata.csv").symlink_to("../../../blobs/124")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (sample,) = read_corpus("owner/clips", **SENTIMENT).samples
    assert (sample.id, sample.split, sample.clip.path) == (
        "train/a.mp4",
        "train",
        snapshot / "train" / "a.mp4",
    )


def test_links_of_a_repository_to_files_outside_it_are_refused(hub_cache):
    repository = hub_cache / "datasets--owner--clips"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (hub_cache / "datasets--owner--clips-of-others").write_bytes(b"media")
    (snapshot / "a.mp4").symlink_to("../../../datasets--owner--clips-of-others")
    (snapshot / "metadata.csv").write_text(
        "file_name,text,label,split\na.mp4,x,1,train\n../../../datasets--owner--clips-of-others,x,1,train\n"
    )
    message = str(complaint("owner/clips"))
    assert message.count("leads out of the corpus to") == 2


def test_a_repository_whose_clips_stayed_on_the_machine_of_its_import_is_refused(hub_cache, folder):
    repository = hub_cache / "datasets--owner--clips"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    write_csv(snapshot / "metadata.csv", "file_name,text,label", f"{folder}/a.mp4,x,1")
    write_csv(snapshot / "imported.json", f'{{"clips": "{folder}"}}')
    assert_names(complaint("owner/clips"), "'owner/clips' names clips on the machine", "publish the clips")


def test_repository_without_network_is_one_clear_message(hub_cache):
    error = complaint("owner/clips")
    assert_names(
        error, "'owner/clips' is neither a local folder nor a data set that the Hub returned", "the network"
    )
    assert len(str(error).splitlines()) == 1


# splits


def speakers_corpus(folder: Path, order: list[int]) -> Path:
    touch(folder, *(f"{number}.mp4" for number in order))
    rows = [f"{number}.mp4,x,0,speaker{number % 24}" for number in order]
    write_csv(folder / "metadata.csv", "file_name,text,label,speaker", *rows)
    return folder


def test_seeded_split_keeps_speakers_apart_and_ignores_row_order(tmp_path, caplog):
    order = list(range(240))
    with caplog.at_level(logging.INFO):
        straight = read_corpus(speakers_corpus(tmp_path / "one", order), **SENTIMENT).samples
    assert "gives no splits" in caplog.text and "24 speakers" in caplog.text and "seed 1111" in caplog.text
    random.Random(0).shuffle(order)
    shuffled = read_corpus(speakers_corpus(tmp_path / "two", order), **SENTIMENT).samples
    assert {sample.id: sample.split for sample in straight} == {
        sample.id: sample.split for sample in shuffled
    }
    assert len({(sample.speaker, sample.split) for sample in straight}) == 24
    sizes = Counter(sample.split for sample in straight)
    assert (
        sizes["train"] == pytest.approx(168, abs=12) and sizes["valid"] > 0 and sizes["test"] > sizes["valid"]
    )
    other = read_corpus(tmp_path / "one", seed=1, **SENTIMENT).samples
    assert [sample.split for sample in other] != [sample.split for sample in straight]


def test_windows_of_one_file_stay_in_one_split(folder):
    rows = [f"{name}.mp4,x,0,{start},{start + 1}" for name in "abcd" for start in range(10)]
    write_csv(folder / "metadata.csv", "file_name,text,label,start,end", *rows)
    samples = read_corpus(folder, **SENTIMENT).samples
    assert len({(sample.clip.path, sample.split) for sample in samples}) == 4
    assert {sample.split for sample in samples} == {"train", "valid", "test"}


def test_windows_that_differ_late_in_a_long_file_have_ids_of_their_own(folder):
    rows = ["a.mp4,x,0,12345.671,12345.9", "a.mp4,x,0,12345.672,12345.9"]
    write_csv(folder / "metadata.csv", "file_name,text,label,start,end", *rows)
    samples = read_corpus(folder, **SENTIMENT).samples
    assert samples[0].id == "a.mp4@12345.671-12345.9" != samples[1].id


def test_people_side_by_side_are_samples_of_their_own(folder):
    rows = ["a.mp4,x,0,0 0 0.5 1,,", 'a.mp4,x,1,"0.5, 0, 0.5, 1",,', "a.mp4,x,1,,,", "a.mp4,x,1,0 0 .5 1,1,2"]
    write_csv(folder / "metadata.csv", "file_name,text,label,region,start,end", *rows)
    samples = read_corpus(folder, **SENTIMENT).samples
    assert [sample.clip.region for sample in samples] == [
        (0, 0, 0.5, 1),
        (0.5, 0, 0.5, 1),
        None,
        (0, 0, 0.5, 1),
    ]
    assert samples[0].id == "a.mp4@0.0-end@0.0,0.0,0.5,1.0" and samples[2].id == "a.mp4"
    assert len({sample.id for sample in samples}) == 4
    assert len({sample.split for sample in samples[:3]}) == 1  # one file stays in one split
    write_csv(
        folder / "metadata.csv", "file_name,text,label,region", "a.mp4,x,0,0 0 1 1", "a.mp4,x,0,0 0 1 1"
    )
    assert "delete one of the two rows" in str(complaint(folder))


@pytest.mark.parametrize(
    "region", ["left", "0 0 1", "0 0 0 1", "0.6 0 0.6 1", "-0.1 0 0.5 1", "0 0 nan 1", "0 0 320 240"]
)
def test_a_region_that_is_no_part_of_the_frame_is_refused_with_its_line(folder, region):
    write_csv(folder / "metadata.csv", "file_name,text,label,region", f"a.mp4,x,0,{region}")
    assert_names(complaint(folder), "metadata.csv line 2", repr(region), "0.5 0 0.5 1 for the right half")


@pytest.mark.parametrize("region", ["0 0 0.5 1", [0.0, 0.0, 0.5, 1.0]])
def test_a_table_may_give_regions_as_text_or_as_numbers(folder, region):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"file_name": ["a.mp4"], "text": ["x"], "label": [1.0], "region": [region]})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    assert read_corpus(folder, **SENTIMENT).samples[0].clip.region == (0, 0, 0.5, 1)


def test_an_audio_track_may_be_given_for_a_row_or_for_all(folder):
    rows = ("a.mp4,x,0,2", "a.mp4,x,0,3", "b.mp4,x,0,", "b.mp4,x,0, 1.0 ")
    write_csv(folder / "metadata.csv", "file_name,text,label,audio_track", *rows)
    samples = read_corpus(folder, **SENTIMENT).samples
    assert [sample.clip.audio_track for sample in samples] == [2, 3, None, 1]
    assert [sample.id for sample in samples] == ["a.mp4@track2", "a.mp4@track3", "b.mp4", "b.mp4@track1"]
    filled = read_corpus(folder, audio_track=4, **SENTIMENT).samples
    assert [sample.clip.audio_track for sample in filled] == [2, 3, 4, 1]


@pytest.mark.parametrize("track", ["0", "-1", "1.5", "english", "nan", "inf", "1e9"])
def test_an_audio_track_that_is_no_number_is_refused_with_its_line(folder, track):
    write_csv(folder / "metadata.csv", "file_name,text,label,audio_track", f"a.mp4,x,0,{track}")
    assert_names(complaint(folder), "metadata.csv line 2", repr(track), "its number among the audio tracks")


def test_empty_split_is_refused_with_its_sizes(folder):
    write_csv(folder / "metadata.csv", "file_name,text,label,split", "a.mp4,x,1,train", "b.mp4,x,1,test")
    corpus = read_corpus(folder, **SENTIMENT)
    require_splits(corpus, ["train", "test"])
    with pytest.raises(CorpusError, match=r"the valid split is empty \(samples: 1 train, 0 valid, 1 test\)"):
        require_splits(corpus, ["train", "valid"])


# bad input


def test_folder_without_metadata_says_what_it_holds_and_what_was_looked_for(folder):
    assert_names(
        complaint(folder),
        "has no metadata.csv",
        "label.csv with Raw/",
        "a.mp4, b.mp4",
        "Write a metadata.csv",
        "msa-online init-data",
        "msa-online import auto",
    )
    assert_names(complaint(folder / "nowhere"), "nowhere does not exist")
    assert_names(complaint(folder / "a.mp4"), "is not a .csv")


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (
            "filename,text,label",
            ["no column 'file_name' (did you mean 'filename'?)", "filename, text, label"],
        ),
        ("file_name,text,Label", ["no column 'label' (did you mean 'Label'?)", "label_column"]),
        ("file_name,score", ["no column 'text'", "no column 'label'"]),
        ("file_name,text,label,text", ["'text' more than once", "Keep one"]),
    ],
)
def test_header_that_does_not_serve_is_explained(folder, header, parts):
    write_csv(folder / "metadata.csv", header)
    assert_names(complaint(folder), "metadata.csv line 1", *parts)


def test_empty_files_are_refused(folder):
    (folder / "metadata.csv").write_text("")
    assert_names(complaint(folder), "metadata.csv is empty", "file_name,text,label")
    (folder / "metadata.csv").write_text("file_name,text,label\n")
    assert_names(complaint(folder), "has no usable row")


def test_file_in_another_encoding_names_byte_and_line(folder):
    (folder / "metadata.csv").write_bytes("file_name,text,label\na.mp4,café,1\n".encode("latin-1"))
    assert_names(complaint(folder), "metadata.csv line 2: byte 30 (0xe9) is not UTF-8", "iconv")


def test_open_quote_names_the_line_where_it_begins(folder):
    write_csv(folder / "metadata.csv", "file_name,text,label", "a.mp4,x,1", 'b.mp4,"y,1', "c.mp4,z,1")
    assert_names(complaint(folder), "metadata.csv line 3", "not well-formed csv", "Close every quoted cell")


def test_a_csv_file_without_end_is_refused(tmp_path):
    """A device, or a link to one, in place of the metadata."""
    with pytest.raises(CorpusError, match="/dev/zero is larger than 268 MB: split it into parts"):
        read_csv(Path("/dev/zero"))


def test_more_rows_than_any_corpus_has_are_refused(folder, monkeypatch):
    monkeypatch.setattr(csv_table, "MOST_ROWS", 3)
    rows = ["a.mp4,x,1", "b.mp4,x,1", "c.mp4,broken"]
    write_csv(folder / "metadata.csv", "file_name,text,label", *rows)
    assert "cells under 3 columns" in str(complaint(folder))
    write_csv(folder / "metadata.csv", "file_name,text,label", *rows, "d.mp4,x,1")
    assert_names(complaint(folder), "metadata.csv has more than 3 rows: split it into parts")


def test_a_header_of_a_hundred_thousand_names_is_refused_at_once(folder):
    """Looking for repeated names among them used to take hours."""
    write_csv(folder / "metadata.csv", ",".join(f"column{number}" for number in range(100_000)))
    assert_names(complaint(folder), "metadata.csv line 1: the header names 100,000 columns, more than 10,000")


def test_what_is_left_over_in_a_row_is_shown_in_part(folder):
    write_csv(folder / "metadata.csv", "file_name,text,label", "a.mp4,x,1," + "y" * 10_000)
    assert len(str(complaint(folder))) < 1000


HEADER = "file_name,text,label,split,start,end"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a.mp4,x,good,train,,", "label 'good' is not a number: write a number from -3 to 3"),
        ("a.mp4,x,nan,train,,", "label 'nan' is not finite: write a number"),
        ("a.mp4,x,-inf,train,,", "label '-inf' is not finite"),
        ("a.mp4,x,3.1,train,,", "label '3.1' is outside [-3, 3]: write a number"),
        ("a.mp4,x,,train,,", "the label is empty: rate the clip"),
        ("a.mp4,x,1,trian,,", "split 'trian' is unknown (did you mean 'train'?): write train, valid or test"),
        ("a.mp4,x,1,,,", "no split is given here although other rows have one: write train"),
        ("a.mp4,x,1,train,2,1.5", "start 2.0 is not before end 1.5: write seconds"),
        ("a.mp4,x,1,train,,0", "start 0.0 is not before end 0.0"),
        ("a.mp4,x,1,train,-1,2", "start '-1' is not a time: write seconds"),
        ("a.mp4,x,1,train,,0:30", "end '0:30' is not a time"),
        ("a.mp4,x,1,train,nan,", "start 'nan' is not a time"),
        ("e.mp4,x,1,train,,", "'e.mp4' does not exist"),
        ("a.MP4,x,1,train,,", "'a.MP4' does not exist (but 'a.mp4' does): copy it to"),
        ("clips/b.mp4,x,1,train,,", "'clips/b.mp4' does not exist (but 'b.mp4' does)"),
        ("a_long_nam.mp4,x,1,train,,", "(did you mean 'a_long_name.mp4'?)"),
        ("../outside.mp4,x,1,train,,", "'../outside.mp4' leads out of the corpus to"),
        ("/etc/hostname,x,1,train,,", "'/etc/hostname' is an absolute path: write it relative to"),
        ("link.mp4,x,1,train,,", "'link.mp4' leads out of the corpus to"),
        ("zero.mp4,x,1,train,,", "'zero.mp4' has zero bytes: copy or download it again"),
        ("inner,x,1,train,,", "'inner' is not a file: name the clip itself"),
        (",x,1,train,,", "file name '' is empty"),
        ("d.mp4,x,1,train,,", "'d.mp4' has the clip and window of corpus/metadata.csv line 2: delete one"),
        ("d.mp4,x,1,train,0,", "'d.mp4' has the clip and window of corpus/metadata.csv line 2"),
        (
            "a.mp4,well, yes,1,train,,",
            "7 cells under 6 columns, '' is left over: put texts that contain a comma",
        ),
        ("a.mp4,x,1", "3 cells under 6 columns: write a comma for every cell"),
    ],
)
def test_broken_row_is_named_with_line_value_and_remedy(folder, row, problem):
    touch(folder.parent, "outside.mp4")
    touch(folder, "a_long_name.mp4", "inner/x.mp4")
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "zero.mp4").touch()
    write_csv(folder / "metadata.csv", HEADER, "d.mp4,x,1,train,,", row)
    error = complaint(folder)
    assert_names(
        error,
        f"{folder / 'metadata.csv'}: 1 broken row\n",
        "corpus/metadata.csv line 3: ",
        problem,
        "--skip-broken",
    )
    assert [each.line for each in error.broken] == [3]
    corpus = read_corpus(folder, skip_broken=True, **SENTIMENT)
    assert [sample.line for sample in corpus.samples] == [2] and corpus.broken == error.broken


def test_link_that_stays_inside_is_fine(folder):
    (folder / "link.mp4").symlink_to("a.mp4")
    write_csv(folder / "metadata.csv", "file_name,text,label", "link.mp4,x,1")
    assert read_corpus(folder, **SENTIMENT).samples[0].clip.path == folder / "link.mp4"


def test_all_broken_rows_and_all_their_problems_come_at_once(folder, caplog):
    rows = [f"gone{number}.mp4,x,{4 if number < 14 else 1},nowhere" for number in range(4, 104)]
    write_csv(folder / "metadata.csv", "file_name,text,label,split", "a.mp4,x,1,train", *rows)
    error = complaint(folder)
    assert len(error.broken) == 100 and len(str(error).splitlines()) == 53
    assert_names(
        error,
        "100 broken rows",
        "line 3: 'gone4.mp4' does not exist",
        "; label '4' is outside",
        "and 50 more",
    )
    assert "; split 'nowhere' is unknown" in error.broken[-1].problem
    corpus = read_corpus(folder, skip_broken=True, **SENTIMENT)
    assert len(corpus.samples) == 1 and "left out 100 broken rows of 101" in caplog.text


# a column that is of another kind than the task


def labelled(folder: Path, *labels: str) -> Path:
    """A corpus of as many windows of one clip as there are labels."""
    rows = [f"a.mp4,x,{label},{number},{number + 1}" for number, label in enumerate(labels)]
    write_csv(folder / "metadata.csv", "file_name,text,label,start,end", *rows)
    return folder


@pytest.mark.parametrize("skip_broken", [False, True])
def test_emotions_under_a_regression_name_the_other_task_once(folder, skip_broken):
    error = complaint(labelled(folder, *["anger", "joy"] * 30, "0", "1"), skip_broken=skip_broken)
    assert len(str(error).splitlines()) == 1
    assert_names(
        error,
        "corpus/metadata.csv line 2: the label column 'label' contains words ('anger'; 60 of 62 rows)",
        "data.task=classification",
        "--label-column",
    )


def test_one_word_among_scores_is_a_broken_row(folder):
    assert_names(complaint(labelled(folder, "1", "2", "good", "-1")), "1 broken row", "line 4: label 'good'")


def test_ratings_of_another_scale_name_the_range_that_would_fit_once(folder):
    stars = labelled(folder, *["1", "2.5", "5", "4"] * 30)
    error = complaint(stars)
    assert len(str(error).splitlines()) == 1
    assert_names(error, "line 4: label '5' is outside [-3, 3], as in 60 of 120", "data.label_range=[1,5]")
    assert len(read_corpus(stars, skip_broken=True, **SENTIMENT).samples) == 60
    assert len(read_corpus(stars, label_range=(1, 5)).samples) == 120


def test_a_word_among_ratings_does_not_widen_the_range_that_is_proposed(folder):
    error = complaint(labelled(folder, *["2", "5", "4"] * 10, "unknown"))
    assert_names(error, "column 'label' runs from 2 to 5", "data.label_range=[2,5]")


def test_an_empty_label_column_is_one_line_and_labels_of_a_part_are_used_on_request(folder):
    partly = labelled(folder, *["", "", "", "1"] * 20)
    error = complaint(partly)
    assert len(str(error).splitlines()) == 1
    assert_names(error, "line 2: the label column 'label' is empty, as in 60 of 80 rows", "data.label_column")
    assert len(read_corpus(partly, skip_broken=True, **SENTIMENT).samples) == 20


def test_scores_are_not_made_classes(caplog):
    source = Path("corpus/metadata.csv")
    with pytest.raises(CorpusError, match=r"scores \(3 distinct numbers, like '-1.8'\)"):
        check_class_names(source, "label", {"2.0", "-1.8", "0"})
    check_class_names(source, "emotion", {"0", "1", "2.0", "-1"})
    check_class_names(source, "emotion", {"joy", "0.5"})
    with pytest.raises(CorpusError, match="contains one class only, 'joy'.*needs two or more"):
        check_class_names(source, "emotion", {"joy"})
    assert not caplog.records
    check_class_names(source, "rating", {str(number) for number in range(101)})
    assert "column 'rating' gives 101 classes" in caplog.text and "data.label_range" in caplog.text


def test_all_rows_broken_is_an_error_even_when_broken_rows_may_be_skipped(folder):
    write_csv(folder / "metadata.csv", "file_name,text,label", "gone.mp4,x,1")
    assert_names(complaint(folder, skip_broken=True), "has no usable row")


# real corpora


def test_composite_corpus_is_read_whole_and_fast(shared_data):
    began = time.process_time()
    corpus = read_corpus(shared_data / "composite", **SENTIMENT)
    assert time.process_time() - began < 1
    assert [len(corpus.split(name)) for name in ("train", "valid", "test")] == [1284, 229, 686]
    assert corpus.samples[0].line == 2 and re.fullmatch(r"ravdess_\d+", corpus.samples[0].speaker)


def test_corpora_with_other_labels_or_none_are_read(shared_data):
    emotions = [
        sample.label for sample in read_corpus(shared_data / "crema_d", label_column="emotion").samples
    ]
    assert len(set(emotions)) == 6 and "anger" in emotions
    assert len(read_corpus(shared_data / "grid", label_column=None).samples) == 11


def test_csv_reader_agrees_with_the_csv_module(shared_data):
    with open(shared_data / "composite" / "metadata.csv", newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert [sample.text for sample in read_corpus(shared_data / "composite", **SENTIMENT).samples] == texts
