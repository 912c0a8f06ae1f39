# SPDX-License-Identifier: Apache-2.0
"""Names of clips as other systems write them: found, or hinted at; links out of a corpus are one line."""

import subprocess
import unicodedata
from pathlib import Path

import pytest

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.reading import read_corpus


def corpus_of(folder: Path, on_disk: list[str], written: list[str]) -> Path:
    for name in on_disk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"media " + name.encode())
    folder.mkdir(exist_ok=True)
    rows = "".join(f'"{name}",x,1\n' for name in written)
    (folder / "metadata.csv").write_text("file_name,text,label\n" + rows, "utf-8")
    return folder


def complaint(folder: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        read_corpus(folder, label_range=(-3.0, 3.0))
    return str(caught.value)


NFC, NFD = (unicodedata.normalize(form, "café/Zoë.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "written"), [(NFC, NFD), (NFD, NFC), (NFD, NFC.replace("/", "\\"))])
def test_composed_and_decomposed_letters_are_the_same_name(tmp_path, on_disk, written):
    (sample,) = read_corpus(corpus_of(tmp_path, [on_disk], [written]), label_range=(-3.0, 3.0)).samples
    assert sample.clip.path.read_bytes().startswith(b"media")
    assert sample.id == NFC


def test_backslashes_of_windows_are_slashes(tmp_path):
    corpus = corpus_of(tmp_path, ["clips/a.mp4", "b\\c.mp4"], ["clips\\a.mp4", "b\\c.mp4"])
    first, second = read_corpus(corpus, label_range=(-3.0, 3.0)).samples
    assert first.clip.path == tmp_path / "clips/a.mp4" and first.id == "clips/a.mp4"
    assert second.clip.path == tmp_path / "b\\c.mp4"  # a legal name on other systems


def test_a_clip_under_two_spellings_is_one_clip(tmp_path):
    message = complaint(corpus_of(tmp_path, ["clips/a.mp4"], ["clips/a.mp4", "clips\\a.mp4"]))
    assert "has the clip and window of" in message


def test_backslashes_do_not_lead_out_of_the_corpus(tmp_path):
    (tmp_path / "outside.mp4").write_bytes(b"media")
    assert "leads out of the corpus" in complaint(corpus_of(tmp_path / "corpus", [], ["..\\outside.mp4"]))
    assert "is an absolute path" in complaint(corpus_of(tmp_path / "corpus", [], ["C:\\clips\\a.mp4"]))


@pytest.mark.parametrize("name", ["\\etc\\hostname", "\\etc\\hostnam", "\\", "\\\\server\\share\\a.mp4"])
def test_a_path_from_the_root_of_windows_is_absolute(tmp_path, name):
    assert "is an absolute path" in complaint(corpus_of(tmp_path, [], [name]))


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_hint_names_no_file_outside_the_corpus(tmp_path, separator):
    (tmp_path / "secret.mp4").write_bytes(b"media")
    written = [f"..{separator}secrets.mp4", f"missing{separator}..{separator}..{separator}secrets.mp4"]
    message = complaint(corpus_of(tmp_path / "corpus", ["clips/a.mp4"], written))
    assert "secret.mp4" not in message
    message = complaint(corpus_of(tmp_path / "corpus", [], [f"sub{separator}..{separator}a.mp4"]))
    assert "(but 'clips/a.mp4' does)" in message


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("1", "(but '0001.mp4' does; spreadsheet programs drop leading zeros)"),
        ("1.mp4", "(but '0001.mp4' does; spreadsheet programs drop leading zeros)"),
        ("1.0", "(but '0001.mp4' does; spreadsheet programs drop leading zeros)"),
        ("0001", "(but '0001.mp4' does)"),
        ("0001.MP4", "(but '0001.mp4' does)"),
        ("take.mp4", "(but 'TAKE.MP4' does)"),
        ("other/0001.mp4", "(but '0001.mp4' does)"),
        ("other\\0001.mp4", "(but '0001.mp4' does)"),
    ],
)
def test_the_file_that_was_probably_meant_is_named(tmp_path, written, hint):
    assert hint in complaint(corpus_of(tmp_path, ["0001.mp4", "TAKE.MP4"], [written]))


def test_upper_case_suffixes_are_found_where_the_layout_names_no_suffix(tmp_path):
    (tmp_path / "Raw/v").mkdir(parents=True)
    (tmp_path / "Raw/v/1.MP4").write_bytes(b"media")
    (tmp_path / "label.csv").write_text("video_id,clip_id,text,label,mode\nv,1,x,0,train\n")
    assert read_corpus(tmp_path, label_range=(-3.0, 3.0)).samples[0].id == "Raw/v/1.MP4"
    meld = tmp_path / "meld"
    (meld / "train_splits").mkdir(parents=True)
    (meld / "train_splits" / "dia0_utt3.MP4").write_bytes(b"media")
    (meld / "train_sent_emo.csv").write_text(
        "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\nHi,R,joy,0,3\n"
    )
    assert read_corpus(meld, label_column="Emotion").samples[0].id == "train_splits/dia0_utt3.MP4"


def test_a_linked_folder_is_one_line_with_commands_that_work(tmp_path):
    names = [f"clips/{number}.mp4" for number in range(60)]
    corpus_of(tmp_path / "else where", names, [])
    corpus = corpus_of(tmp_path / "corpus", [], names)
    (corpus / "clips").symlink_to(tmp_path / "else where/clips")
    lines = complaint(corpus).splitlines()
    assert len(lines) == 3 and lines[0].endswith(": 60 broken rows")
    assert "line 2, 3, 4, 5, 6, 7, 8, 9 and 52 more: the folder 'clips' is a link that leads out" in lines[1]
    command = lines[1].partition("what it names: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert len(read_corpus(corpus, label_range=(-3.0, 3.0)).samples) == 60


def test_a_corpus_that_is_itself_behind_a_link_works(tmp_path):
    corpus_of(tmp_path / "real", ["a.mp4"], ["a.mp4"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(read_corpus(tmp_path / "link", label_range=(-3.0, 3.0)).samples) == 1


def test_rows_of_one_problem_share_a_line(tmp_path):
    corpus_of(tmp_path, ["a.mp4"], ["a.mp4"])
    rows = "".join(f"a.mp4,x,,{number},{number + 1}\n" for number in range(30))
    full = "".join(f"a.mp4,x,1,{number},{number + 1}\n" for number in range(30, 99))
    (tmp_path / "metadata.csv").write_text("file_name,text,label,start,end\n" + rows + full)
    lines = complaint(tmp_path).splitlines()
    assert len(lines) == 3 and "9 and 22 more: the label is empty" in lines[1]
