# SPDX-License-Identifier: Apache-2.0
"""Tables as spreadsheet programs of all countries write them: read as they are, or refused with a remedy."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.reading import read_corpus

SENTIMENT = {"label_range": (-3.0, 3.0)}
ROWS = "file_name,text,label\na.mp4,café déjà vu,1.5\nb.mp4,naïve “words”,-2\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"media")
    return tmp_path


def contents(folder: Path) -> list[tuple]:
    samples = read_corpus(folder, **SENTIMENT).samples
    return [(sample.clip.path.name, sample.text, sample.label) for sample in samples]


EXPECTED = [("a.mp4", "café déjà vu", 1.5), ("b.mp4", "naïve “words”", -2.0)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("declared", [False, True])
def test_separators_of_spreadsheets_are_recognised(folder, separator, declared):
    text = ROWS.replace(",", separator)
    (folder / "metadata.csv").write_text((f"sep={separator}\r\n" if declared else "") + text, "utf-8")
    assert contents(folder) == EXPECTED
    assert [sample.line for sample in read_corpus(folder, **SENTIMENT).samples] == [
        2 + declared,
        3 + declared,
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings_are_read_with_and_without_a_mark(folder, encoding):
    (folder / "metadata.csv").write_bytes(ROWS.encode(encoding))
    assert contents(folder) == EXPECTED


def test_what_excel_calls_unicode_text_is_read(folder):
    """UTF-16 with a mark, tabs and Windows line ends."""
    text = ROWS.replace(",", "\t").replace("\n", "\r\n")
    (folder / "metadata.csv").write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    assert contents(folder) == EXPECTED


def test_commas_within_texts_do_not_hide_the_semicolons_of_the_header(folder):
    (folder / "metadata.csv").write_text("file_name;text;label\na.mp4;well, yes, no;1\nb.mp4;x;0\n")
    assert contents(folder)[0] == ("a.mp4", "well, yes, no", 1.0)


def test_semicolons_in_the_header_of_a_comma_file_separate_nothing(folder):
    (folder / "metadata.csv").write_text("file_name,text,label,scale (1;2;3;4;5)\na.mp4,x,1,3\nb.mp4,x,1,3\n")
    assert len(contents(folder)) == 2


def test_decimal_commas_and_typeset_minus_signs_are_numbers(folder):
    rows = ["file_name;text;label;start;end", "a.mp4;x;1,5;0,25;2", "b.mp4;y;\N{MINUS SIGN}0,5;;"]
    (folder / "metadata.csv").write_text("\n".join(rows), "utf-8")
    first, second = read_corpus(folder, **SENTIMENT).samples
    assert (first.label, first.clip.start, second.label) == (1.5, 0.25, -0.5)


def test_a_number_with_an_underscore_is_none(folder):
    (folder / "metadata.csv").write_text("file_name,text,label\na.mp4,x,0_1\nb.mp4,x,1\nb.mp4,x,1\n")
    with pytest.raises(CorpusError, match="label '0_1' is not a number"):
        read_corpus(folder, **SENTIMENT)


def test_empty_rows_that_spreadsheets_leave_behind_are_skipped(folder):
    (folder / "metadata.csv").write_text(ROWS + ",,\n ,,\n\n", "utf-8")
    assert contents(folder) == EXPECTED


@pytest.mark.parametrize(
    ("encoding", "text", "name"),
    [
        ("cp1252", "café “naïve” – 5 €", "WINDOWS-1252"),
        ("latin-1", "Größe", "WINDOWS-1252"),
        ("cp1251", "очень хороший фильм", "WINDOWS-1251"),
        ("gb18030", "这部电影很好看", "GB18030"),
        ("shift_jis", "とても良い映画でした", "SHIFT_JIS"),
        ("euc_kr", "아주 좋은 영화였다", "EUC-KR"),
    ],
)
def test_a_legacy_encoding_is_named_with_a_command_that_works(folder, encoding, text, name):
    table = folder / "metadata.csv"
    table.write_bytes(f"file_name,text,label\na.mp4,{text},1\nb.mp4,x,0\n".encode(encoding))
    with pytest.raises(CorpusError) as caught:
        read_corpus(folder, **SENTIMENT)
    message = str(caught.value)
    assert "metadata.csv line 2: byte" in message and "is not UTF-8" in message and f"-f {name} " in message
    assert repr(text.split()[0]) in message or repr(text.split()[1]) in message
    if shutil.which("iconv"):
        command = message.partition("convert it with: ")[2]
        subprocess.run(["bash", "-c", command], cwd=folder, check=True)
        assert contents(folder)[0][1] == text


def test_the_command_quotes_the_name_of_the_file(folder):
    (folder / "$(touch hacked) '.csv").write_bytes("file_name,text,label\na.mp4,café,1\n".encode("cp1252"))
    with pytest.raises(CorpusError) as caught:
        read_csv(folder / "$(touch hacked) '.csv")
    subprocess.run(
        ["bash", "-c", str(caught.value).partition("convert it with: ")[2]], cwd=folder, check=False
    )
    assert not (folder / "hacked").exists()


def test_bytes_of_no_encoding_get_no_command(folder):
    (folder / "metadata.csv").write_bytes(b"file_name,text,label\na.mp4,\x81\x8d\x90 x,1\n")
    with pytest.raises(CorpusError, match="is not UTF-8. Save the file as UTF-8") as caught:
        read_corpus(folder, **SENTIMENT)
    assert "iconv" not in str(caught.value)


def test_a_cell_beyond_the_limit_gets_a_message_of_its_own(folder):
    for text in ("x" * 200_000, '"' + "never closed\n" * 20_000):
        (folder / "metadata.csv").write_text(f"file_name,text,label\na.mp4,x,1\nb.mp4,{text},1\n")
        with pytest.raises(CorpusError, match="line 3: a cell .* is longer than 131,072 characters. Shorten"):
            read_corpus(folder, **SENTIMENT)


def test_a_workbook_under_the_name_of_a_table_is_named(folder):
    (folder / "metadata.csv").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(
        CorpusError, match="is a workbook of a spreadsheet program, not csv: save it as CSV UTF-8"
    ):
        read_corpus(folder, **SENTIMENT)


def test_nul_bytes_in_the_header_are_refused(folder):
    (folder / "metadata.csv").write_bytes(b"file\0_name,text,label\n")
    with pytest.raises(CorpusError, match="is damaged, or in an encoding that is not recognised"):
        read_corpus(folder, **SENTIMENT)


@pytest.mark.parametrize("name", ["Metadata.csv", "METADATA.CSV", "metadata.tsv"])
def test_a_table_is_found_in_any_case_of_letters(folder, name):
    (folder / name).write_text(ROWS, "utf-8")
    assert contents(folder) == EXPECTED
    assert [sample.line for sample in read_corpus(folder / name, **SENTIMENT).samples] == [2, 3]


def test_precomputed_features_in_place_of_clips_get_a_message_of_their_own(folder):
    np.savez(folder / "features.npz", id=np.array(["a"]), text=np.zeros((1, 2)))
    (folder / "data.pkl").write_bytes(b"\x80\x04.")
    (folder / "features.safetensors").write_bytes(b"")
    for path in (folder / "features.npz", folder / "data.pkl", folder):
        with pytest.raises(CorpusError, match="holds precomputed features, not clips") as caught:
            read_corpus(path)
        assert "convert-features" in str(caught.value) and "model.feature_widths" in str(caught.value)


def test_upper_case_suffixes_of_features_mean_the_same(tmp_path):
    from msa_online.precomputed.reading import read_features

    parts = {"label": np.array([1.0]), "split": np.array(["train"]), "text": np.ones((1, 2))}
    np.savez(tmp_path / "features.npz", id=np.array(["a"]), **parts)
    (tmp_path / "features.npz").rename(tmp_path / "FEATURES.NPZ")
    assert len(read_features(tmp_path / "FEATURES.NPZ", **SENTIMENT).samples) == 1
