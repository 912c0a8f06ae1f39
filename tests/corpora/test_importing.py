# SPDX-License-Identifier: Apache-2.0
"""Downloaded data sets become a metadata.csv that can be read, and nothing is dropped silently."""

import csv
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from feature_extractors import ExtractionSettings, FaceExtractor, extract
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.downloads import LAYOUTS, recognise
from msa_online.corpora.downloads.layout import Files
from msa_online.corpora.importing import import_dataset, start_metadata
from msa_online.corpora.reading import read_corpus

SETTINGS = ExtractionSettings(num_frames=2)
RATINGS = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes0{n}F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()
[7.5712 - 10.4750]\tSes0{n}F_impro01_M000\texc\t[4.0000, 3.0000, 3.0000]
[10.5000 - 11.0000]\tSes0{n}F_impro01_F001\tfru\t[2.0000, 3.5000, 3.5000]
[11.0000 - 12.0000]\tSes0{n}F_impro01_M001\txxx\t[2.5000, 3.0000, 3.0000]
"""
SENTENCES = """Ses0{n}F_impro01_F000 [006.2901-008.2357]: Excuse me.
Ses0{n}F_impro01_M000 [007.5712-010.4750]: Great: your forms!
Ses0{n}F_impro01_F001 [010.5000-011.0000]: Oh.
Ses0{n}F_impro01_M001 [011.0000-012.0000]: Well.
Ses0{n}F_impro01_MXX0 [012.0000-012.5000]: [LAUGHTER]
M: no window
"""


def write(path: Path, text: str | bytes = b"media") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def brought(path: Path, out: Path, name: str = "auto", **options) -> tuple[list[dict[str, str]], dict, str]:
    """Rows, counts of what was left out, and notes; the table can be read with its first column of labels."""
    imported = import_dataset(path, out, name, **options)
    read_corpus(out, label_column=imported.label_columns[0], labels_optional=True)
    left_out = {reason: len(names) for reason, names in imported.left_out.items()}
    return rows_of(out), left_out, " ".join(imported.notes)


# one tree for each layout


def ch_sims(root: Path, table: str = "label.csv", video: str = "video_0001") -> None:
    write(
        root / table,
        "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode\n"
        f"{video},0001,我不想嫁给李茶,-0.2,-0.2,0,0.2,Negative,train\n"
        f"{video},2,数字,0.4,0,0,1,Positive,test\n"
        f"{video},0003,不见了,1,1,1,1,Positive,valid\n",
    )
    write(root / "Raw" / video / "0001.mp4")
    write(root / "Raw" / video / "0002.mp4")


def crema_d(root: Path) -> None:
    for name in ("1001_DFA_ANG_XX.flv", "1040_ITH_SAD_X.flv", "1064_IEO_DIS_MD.flv", "notes.txt"):
        write(root / "VideoFlash" / name)
    write(root / "VideoFlash" / "1002_TSI_HAP_LO.flv", "version https://git-lfs.github.com/spec/v1\noid x\n")
    write(
        root / "processedResults" / "summaryTable.csv",
        '"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote","MultiModalLevel"\n'
        '"1","1001_DFA_ANG_XX","A","50","A","60","D","70"\n"2","1040_ITH_SAD_X","S","1","S","1","A:S","2"\n',
    )


def ravdess(root: Path) -> None:
    for name in ("01-01-05-02-02-01-01.mp4", "02-01-05-02-02-01-01.mp4", "01-02-03-01-01-01-01.mp4"):
        write(root / "Video_Speech_Actor_01" / "Actor_01" / name)
    write(root / "Actor_02" / "03-01-01-01-01-02-02.wav")


def iemocap(root: Path) -> None:
    for session in range(1, 6):
        dialogs = root / f"Session{session}" / "dialog"
        name = f"Ses0{session}F_impro01"
        write(dialogs / "EmoEvaluation" / f"{name}.txt", RATINGS.format(n=session))
        write(dialogs / "EmoEvaluation" / f"._{name}.txt", b"\x00\x05\x16\x07Mac OS X")
        write(dialogs / "transcriptions" / f"{name}.txt", SENTENCES.format(n=session))
        write(dialogs / "avi" / "DivX" / f"{name}.avi")


def meld(root: Path) -> None:
    header = (
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    )
    folders = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
    for split, folder in folders.items():
        table = root / "train" / "train_sent_emo.csv" if split == "train" else root / f"{split}_sent_emo.csv"
        line = '"It\x92s, ok",Monica,Joy,positive,{},{},1,1,"00:00:01,000","00:00:02,000"'
        write(table, f"{header}\n1,{line.format(0, 0)}\n2,{line.format(0, 1)}\n")
        place = table.parent / folder
        write(place / "dia0_utt0.mp4")
        write(place / "._dia0_utt0.mp4")
    write(root / "output_repeated_splits_test" / "final_videos_testdia0_utt0.mp4")
    write(root / "output_repeated_splits_test" / "final_videos_testdia0_utt1.mp4")


def mosi(root: Path) -> None:
    write(
        root / "Transcript" / "Segmented" / "03bSnISJMiM.annotprocessed",
        "1_DELIM_ANYHOW GOOD\n2_DELIM_SAD\n\n",
    )
    write(root / "Transcript" / "Segmented" / "c7UH_rxdZv4.annotprocessed", "1_DELIM_FINE\n2_DELIM_MORE\n")
    write(
        root / "Labels" / "OpinionLevelSentiment.csv",
        "0.5,3.25,03bSnISJMiM,1,2.4\n3.25,4,03bSnISJMiM,2,-1.2\n1,2,c7UH_rxdZv4,1,0.4\n",
    )
    write(root / "Video" / "Full" / "03bSnISJMiM.mp4")
    write(root / "Video" / "Segmented" / "c7UH_rxdZv4_1.mp4")


def mosei(root: Path) -> None:
    write(
        root / "Transcript" / "Segmented" / "Combined" / "aa_b.txt",
        "aa_b___0___29.7640___35.6330___First ___ one.\naa_b___1___42.146___49.242___second\n"
        "aa_b___2___50___51___not labelled\nbroken line\n",
    )
    write(root / "Videos" / "Full" / "Combined" / "aa_b.mp4")
    write(root / "Transcript" / "Segmented" / "Combined" / "cc.txt", "cc___0___1___2___fine\n")
    write(root / "Videos" / "Full" / "Combined" / "cc.mp4")
    write(
        root / "Transcript" / "Segmented" / "Combined" / "dd.txt",
        "dd___0___1___2___caf\xe9\n".encode("cp1252"),
    )
    write(root / "Videos" / "Segmented" / "Combined" / "dd_0.mp4")
    csd = root / "labels" / "CMU_MOSEI_Labels.csd"
    csd.parent.mkdir()
    scores = {"aa_b": {42.146: 2.0, 29.764: -1 / 3}, "cc": {1.0: 0.0}, "dd": {1.0: 3.0}}
    ends = {29.764: 35.633, 42.146: 49.242, 1.0: 2.0}
    with h5py.File(csd, "w") as file:
        for video, of_start in scores.items():
            entry = file.create_group(f"All Labels/data/{video}")
            entry["intervals"] = np.array([[start, ends[start]] for start in of_start])
            entry["features"] = np.array(
                [[score, 0.5, 0, 0, 0, 0, 0] for score in of_start.values()], np.float32
            )
    write(
        root / "cmu_mosei_std_folds.py",
        "standard_train_fold=['aa_b']\nstandard_valid_fold=['cc']\n"
        "standard_test_fold=['dd']\nraise SystemExit\n",
    )


def mer2023(root: Path) -> None:
    train = root / "mer2023train"
    write(
        train / "train-label.csv",
        "name,discrete,valence\n" + "".join(f"s_{n},angry,-1.5\n" for n in range(10)),
    )
    for number in range(10):
        write(train / "train" / f"s_{number}.avi")
    write(root / "test-labels" / "test1-label.csv", "name,discrete,valence\nt_1,worried,0\nt_2,happy,2\n")
    write(root / "test1" / "t_1.mp4")
    write(root / "transcription.csv", "name,sentence\ns_0,你好\n")


def mustard(root: Path) -> None:
    scene = {"utterance": "Sure, cut it.", "context": ["One?", "Two."], "context_speakers": ["A", "B"]}
    shows = {
        "1_1": ("BBT", "RAJ"),
        "1_2": ("BBT", "PERSON"),
        "1_3": ("BBT", "PERSON"),
        "2_1": ("FRIENDS", "ROSS"),
    }
    table = {
        name: scene | {"speaker": speaker, "show": show, "sarcasm": name == "1_1"}
        for name, (show, speaker) in shows.items()
    }
    write(root / "data" / "sarcasm_data.json", json.dumps(table))
    for name in table:
        write(root / "mmsd_raw_data" / "utterances_final" / f"{name}.mp4")


TREES = {
    "ch-sims": ch_sims,
    "ch-sims-v2": lambda root: ch_sims(root, "meta.csv", "aqgy3_0001"),
    "crema-d": crema_d,
    "iemocap": iemocap,
    "meld": meld,
    "mer2023": mer2023,
    "mosei": mosei,
    "mosi": mosi,
    "mustard": mustard,
    "ravdess": ravdess,
}


@pytest.fixture
def tree(tmp_path):
    """A function that makes the tree of a layout and returns its folder."""

    def make(name: str) -> Path:
        TREES[name](tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", TREES)
def test_every_layout_is_recognised_also_one_folder_above(tree, name):
    root = tree(name)
    assert recognise(root) == {name: root}
    assert recognise(root.parent) == {name: root}


def test_ch_sims_keeps_its_labels_of_each_modality_and_finds_clips_whose_zeros_were_lost(tree, tmp_path):
    rows, left_out, notes = brought(tree("ch-sims"), tmp_path / "out")
    assert [(row["label"], row["label_T"], row["label_V"], row["split"]) for row in rows] == [
        ("-0.2", "-0.2", "0.2", "train"),
        ("0.4", "0", "1", "test"),
    ]
    assert rows[1]["file_name"].endswith("Raw/video_0001/0002.mp4") and rows[0]["text"] == "我不想嫁给李茶"
    assert left_out == {"the clip is not in the download": 1}
    assert "train: 1 clips, and the complete CH-SIMS has 1,368" in notes
    assert "2,722" in brought(tree("ch-sims-v2"), tmp_path / "v2")[2]


def test_the_unsupervised_part_of_ch_sims_v2_is_counted(tree, tmp_path):
    root = tree("ch-sims-v2")
    with open(root / "meta.csv", "a", encoding="utf-8") as file:
        file.write("aqgy3_0001,0009,文本,,,,,,unlabeled\n")
    assert brought(root, tmp_path / "out")[1]["no label (the unsupervised part)"] == 1


def test_crema_d_says_the_sentence_and_which_files_are_no_clips(tree, tmp_path):
    rows, left_out, notes = brought(tree("crema-d"), tmp_path / "out")
    assert [row["emotion"] for row in rows] == ["anger", "sadness", "disgust"]
    assert [row["perceived"] for row in rows] == ["disgust", "", ""]
    assert rows[1]["text"] == "I think I have a doctor's appointment." and rows[1]["speaker"] == "1040"
    assert left_out == {
        "a name that is not ACTOR_SENTENCE_EMOTION_LEVEL": 1,
        "a pointer of Git LFS in place of the clip: run `git lfs pull`": 1,
    }
    assert (
        "1064_IEO_DIS_MD is known to be faulty" in notes
        and "3 clips, and the complete CREMA-D has 7,442" in notes
    )


def test_ravdess_uses_each_recording_once(tree, tmp_path):
    rows, left_out, _ = brought(tree("ravdess"), tmp_path / "out")
    assert [(row["emotion"], row["intensity"], row["speaker"]) for row in rows] == [
        ("anger", "strong", "Actor_01"),
        ("neutral", "normal", "Actor_02"),
    ]
    assert rows[0]["text"] == "Dogs are sitting by the door." and "/01-01-05" in rows[0]["file_name"]
    assert left_out == {"another file of the same recording is used": 1, "song: not in this protocol": 1}
    song, _, _ = brought(tree("ravdess"), tmp_path / "song", protocol="song")
    assert [row["emotion"] for row in song] == ["happiness"]


def test_iemocap_gives_every_utterance_its_window_speaker_and_side(tree, tmp_path):
    rows, left_out, notes = brought(tree("iemocap"), tmp_path / "out")
    woman, man = rows[:2]
    assert (woman["start"], woman["end"], woman["region"]) == ("006.2901", "008.2357", "0 0 0.5 1")
    assert (man["speaker"], man["region"], man["text"]) == ("Ses01M", "0.5 0 0.5 1", "Great: your forms!")
    assert (man["emotion"], man["valence"], man["turn"]) == ("happiness", "4.0000", "2")
    assert (man["dialogue"], woman["turn"]) == ("Ses01F_impro01", "1")
    assert left_out == {
        "a line of a transcript without a window": 5,
        "frustration: no class of this protocol": 5,
        "no emotion has a majority (xxx)": 5,
        "a line of a transcript without a rating": 5,
    }
    assert {row["split"] for row in rows if row["dialogue"].startswith("Ses05")} == {"test"}
    assert "10 clips, and the complete IEMOCAP has 5,531" in notes


def test_iemocap_protocols_differ_in_classes_and_sessions(tree, tmp_path):
    root = tree("iemocap")
    six, _, _ = brought(root, tmp_path / "six", protocol="6-class")
    assert {row["emotion"] for row in six} == {"neutral", "excitement", "frustration"} and len(six) == 15
    first, _, _ = brought(root, tmp_path / "first", protocol="4-class-1")
    assert {row["dialogue"][:5] for row in first if row["split"] == "test"} == {"Ses01"}
    assert len({row["dialogue"] for row in first if row["split"] == "valid"}) == 1
    binary, left_out, notes = brought(root, tmp_path / "binary", protocol="binary")
    assert [(row["happy"], row["neutral"]) for row in binary] == [("no", "yes")] * 5
    assert left_out["excitement: no class of this protocol"] == 5 and "do not compare" in notes
    with pytest.raises(
        CorpusError, match=r"--protocol raven is no protocol of iemocap. There are 4-class-5: "
    ):
        import_dataset(root, tmp_path / "raven", protocol="raven")


def test_the_side_of_an_iemocap_speaker_shows_the_face_of_that_speaker(tmp_path, make_clip, face_image):
    iemocap(tmp_path / "data")
    video = tmp_path / "data" / "Session1" / "dialog" / "avi" / "DivX" / "Ses01F_impro01.avi"
    pair = np.concatenate([face_image, np.zeros_like(face_image)], axis=1)  # the leading actor is on the left
    make_clip(video, seconds=11, fps=5, size=(640, 320), frames=np.broadcast_to(pair, (55, *pair.shape)))
    import_dataset(tmp_path / "data", tmp_path / "out")
    samples = read_corpus(tmp_path / "out", label_column="emotion").samples[:2]
    with FaceExtractor(SETTINGS) as faces:
        features = [extract(sample.clip, SETTINGS, faces) for sample in samples]
    assert [each.has_face for each in features] == [True, False]
    assert [round(each.duration, 1) for each in features] == [1.9, 2.9]


def test_meld_mends_its_apostrophes_and_finds_clips_of_the_test_split_under_both_names(tree, tmp_path):
    rows, left_out, notes = brought(tree("meld"), tmp_path / "out")
    assert [(row["split"], row["dialogue"], row["turn"]) for row in rows] == [
        ("train", "train_0", "0"),
        ("valid", "dev_0", "0"),
        ("test", "test_0", "0"),
        ("test", "test_0", "1"),
    ]
    assert rows[0]["text"] == "It’s, ok" and (rows[0]["emotion"], rows[0]["sentiment"]) == ("joy", "positive")
    assert [Path(row["file_name"]).name for row in rows[2:]] == [
        "dia0_utt0.mp4",
        "final_videos_testdia0_utt1.mp4",
    ]
    assert left_out == {"the clip is not in the download": 2}
    assert "1 clips of the test split exist a second time" in notes


def test_mosi_takes_windows_of_whole_videos_or_else_cut_clips_and_the_official_split(tree, tmp_path):
    rows, left_out, _ = brought(tree("mosi"), tmp_path / "out")
    assert [(row["text"], row["label"], row["start"], row["split"]) for row in rows] == [
        ("ANYHOW GOOD", "2.4", "0.5", "train"),
        ("SAD", "-1.2", "3.25", "train"),
        ("FINE", "0.4", "", "test"),
    ]
    assert rows[2]["file_name"].endswith("Video/Segmented/c7UH_rxdZv4_1.mp4")
    assert left_out == {"a sentence without a label": 1}


def test_the_split_of_mosi_is_the_official_one(shared_data, tmp_path):
    with open(shared_data / "mosi" / "transcripts.csv", newline="", encoding="utf-8") as file:
        sentences = list(csv.DictReader(file))
    lines, opinions = {}, []
    for number, sentence in enumerate(sentences):
        video, _, clip = sentence["id"].rpartition("_")
        lines.setdefault(video, []).append(f"{clip}_DELIM_{sentence['text']}")
        opinions.append(f"{number},{number + 1},{video},{clip},{sentence['label']}")
    for video, of_video in lines.items():
        write(tmp_path / "data" / "Transcript" / "Segmented" / f"{video}.annotprocessed", "\n".join(of_video))
        write(tmp_path / "data" / "Video" / "Full" / f"{video}.mp4")
    write(tmp_path / "data" / "Labels" / "OpinionLevelSentiment.csv", "\n".join(opinions))
    rows, left_out, notes = brought(tmp_path / "data", tmp_path / "out")
    assert [row["split"] for row in rows] == [sentence["split"] for sentence in sentences]
    assert (left_out, notes) == ({}, "") and len(rows) == 2199


def test_mosei_finds_labels_by_time_and_splits_by_video(tree, tmp_path):
    rows, left_out, notes = brought(tree("mosei"), tmp_path / "out")
    assert [(row["text"], row["label"], row["happiness"], row["split"]) for row in rows] == [
        ("First ___ one.", "-0.333333", "0.5", "train"),
        ("second", "2", "0.5", "train"),
        ("fine", "0", "0.5", "valid"),
        ("café", "3", "0.5", "test"),
    ]
    assert left_out == {"a line of a transcript without five parts": 1, "a sentence without a label": 1}
    assert rows[3]["start"] == "" and "Segmented" in rows[3]["file_name"] and "16,326" in notes


def test_mosei_takes_labels_and_splits_from_the_table_of_mmsa(tree, tmp_path):
    root = tree("mosei")
    (root / "cmu_mosei_std_folds.py").unlink()
    assert "--splits FILE" in brought(root, tmp_path / "unsplit")[2]
    table = write(
        tmp_path / "labels.csv",
        "video_id,clip_id,text,label,annotation,mode\naa_b,1,x,1.5,Positive,train\ncc,0,x,-1,Negative,test\n",
    )
    rows, left_out, _ = brought(root, tmp_path / "out", files=Files(labels=table))
    assert [(row["label"], row["split"]) for row in rows] == [("1.5", "train"), ("-1", "test")]
    assert left_out["a sentence without a label"] == 3
    (root / "labels" / "CMU_MOSEI_Labels.csd").unlink()
    with pytest.raises(CorpusError, match=r"has no labels \(CMU_MOSEI_Labels.csd .* --labels FILE"):
        import_dataset(root, tmp_path / "none")


def test_a_table_of_mmsa_beside_the_raw_videos_of_mosei_is_no_second_layout(tree):
    root = tree("mosei")
    write(root / "label.csv", "video_id,clip_id,text,label,mode\naa_b,0,x,1.5,train\n")
    (root / "Raw").mkdir()
    assert recognise(root) == {"mosei": root}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csd", b"no HDF5", "is not a computational sequence"),
        ("labels.csv", b"a,b\n1,2\n", "is no file of labels"),
        ("folds.py", b"standard_train_fold = load()\n", "is no list of folds"),
        ("folds.py", b"x = 1\n", "has no lists standard_train_fold"),
    ],
)
def test_files_of_labels_and_splits_that_are_something_else_are_refused(
    tree, tmp_path, name, content, message
):
    file = write(tmp_path / name, content)
    files = Files(splits=file) if name == "folds.py" else Files(labels=file)
    with pytest.raises(CorpusError, match=message):
        import_dataset(tree("mosei"), tmp_path / "out", files=files)
    with pytest.raises(CorpusError, match="CREMA-D needs no such file"):
        import_dataset(tree("crema-d"), tmp_path / "out", "crema-d", files=files)


def test_mer2023_joins_labels_clips_and_transcripts(tree, tmp_path):
    root = tree("mer2023")
    rows, left_out, notes = brought(root, tmp_path / "out")
    assert [row["split"] for row in rows].count("valid") == 1 and rows[-1]["split"] == "test"
    assert (rows[0]["emotion"], rows[0]["valence"], rows[0]["text"]) == ("anger", "-1.5", "你好")
    assert rows[-1]["emotion"] == "worry" and rows[-1]["file_name"].endswith("test1/t_1.mp4")
    assert left_out == {"the clip is not in the download": 1} and "411" in notes
    with pytest.raises(CorpusError, match=r"has no test3-label.csv \(labels\): download it"):
        import_dataset(root, tmp_path / "semi", protocol="semi")


def test_mustard_keeps_unnamed_people_of_different_scenes_apart(tree, tmp_path):
    root = tree("mustard")
    rows, _, _ = brought(root, tmp_path / "out")
    assert [row["sarcasm"] for row in rows] == ["yes", "no", "no", "no"] and "split" not in rows[0]
    assert [row["speaker"] for row in rows] == ["BBT RAJ", "BBT PERSON 1_2", "BBT PERSON 1_3", "FRIENDS ROSS"]
    assert rows[0]["turn"] == "2"
    independent, _, _ = brought(root, tmp_path / "si", protocol="speaker-independent")
    assert sorted(row["split"] for row in independent) == ["test", "train", "train", "valid"]


# where the table and the clips are


def test_a_table_in_the_data_set_names_clips_relative_to_it_and_others_by_their_whole_path(tree, tmp_path):
    root = tree("crema-d")
    elsewhere, _, _ = brought(root, tmp_path / "out")
    assert elsewhere[0]["file_name"] == str(root / "VideoFlash/1001_DFA_ANG_XX.flv")
    inside, _, _ = brought(root, root)
    assert (
        inside[0]["file_name"] == "VideoFlash/1001_DFA_ANG_XX.flv" and not (root / "imported.json").exists()
    )
    above, _, _ = brought(root, tmp_path)
    assert above[0]["file_name"] == "crema-d/VideoFlash/1001_DFA_ANG_XX.flv"
    both = [read_corpus(folder, label_column="emotion").samples for folder in (tmp_path / "out", root)]
    assert [[sample.id for sample in samples] for samples in both] == [
        [row["file_name"] for row in inside],
    ] * 2
    assert both[0][0].clip.path == both[1][0].clip.path


def test_an_imported_table_reads_no_file_outside_the_data_set_it_names(tree, tmp_path):
    brought(tree("crema-d"), tmp_path / "out")
    secret = write(tmp_path / "secret.mp4")
    table = tmp_path / "out" / "metadata.csv"
    header = table.read_text("utf-8").splitlines()[0]
    for name in (str(secret), str(tmp_path / "crema-d" / ".." / "secret.mp4"), "../secret.mp4"):
        table.write_text(f"{header}\n{name},x,anger,low,a,b\n", "utf-8")
        with pytest.raises(CorpusError, match="is an absolute path|leads out of the corpus"):
            read_corpus(tmp_path / "out", label_column="emotion")


def test_an_imported_table_whose_data_set_has_gone_says_so_once(tree, tmp_path):
    root = tree("crema-d")
    brought(root, tmp_path / "out")
    root.rename(tmp_path / "moved")
    with pytest.raises(
        CorpusError, match=r"imported.json: the clips were imported from .*/crema-d, which is not"
    ):
        read_corpus(tmp_path / "out", label_column="emotion")
    write(tmp_path / "out" / "imported.json", "[]")
    with pytest.raises(CorpusError, match="imported.json is damaged"):
        read_corpus(tmp_path / "out", label_column="emotion")


def test_a_table_is_never_written_over_another(tree, tmp_path):
    root = tree("crema-d")
    write(tmp_path / "out" / "metadata.csv", "mine")
    with pytest.raises(CorpusError, match=r"out/metadata.csv exists already: delete or rename it"):
        import_dataset(root, tmp_path / "out")
    with pytest.raises(CorpusError, match="exists already"):
        start_metadata(tmp_path / "out")
    with pytest.raises(CorpusError, match="is a file: name a folder"):
        import_dataset(root, root / "processedResults" / "summaryTable.csv")


def test_a_folder_that_is_not_the_layout_or_several_says_what_was_seen(tree, tmp_path):
    root = tree("crema-d")
    with pytest.raises(
        CorpusError, match=r"does not look like MELD; it looks like crema-d. Expected .*train_sent"
    ):
        import_dataset(root, tmp_path / "out", "meld")
    ravdess(root)
    with pytest.raises(CorpusError, match="looks like crema-d and like ravdess: name the layout"):
        import_dataset(root, tmp_path / "out")
    assert len(brought(root, tmp_path / "out", "ravdess")[0]) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds none of the layouts that are recognised .*init-data FOLDER"):
        import_dataset(tmp_path / "empty", tmp_path / "other")
    with pytest.raises(CorpusError, match="nowhere is not a folder"):
        import_dataset(tmp_path / "nowhere", tmp_path / "other")


def test_a_download_without_its_clips_is_refused_with_the_reasons(tree, tmp_path):
    root = tree("mosi")
    for clip in [*root.rglob("*.mp4")]:
        clip.write_bytes(b"")
    with pytest.raises(
        CorpusError, match=r"CMU-MOSI, but no clip can be used \(.*the clip has zero bytes: 3"
    ):
        import_dataset(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_metadata_names_the_command_that_writes_it(tree, tmp_path):
    root = tree("crema-d")
    with pytest.raises(CorpusError, match=f"looks like CREMA-D. .*: msa-online import crema-d {root} OUT"):
        read_corpus(root, label_column=None)
    write(tmp_path / "mine" / "a.mp4")
    with pytest.raises(
        CorpusError, match=rf"init-data {tmp_path}/mine` starts one; `msa-online import auto PATH"
    ):
        read_corpus(tmp_path / "mine", label_column=None)


def test_every_protocol_and_count_belongs_to_a_layout():
    for name, layout in LAYOUTS.items():
        assert set(layout.counts) <= set(layout.protocols), name
        assert all(sum(counts.values()) > 0 for counts in layout.counts.values()), name


# a folder of one's own


def test_a_table_is_started_with_the_texts_beside_the_clips(tmp_path):
    folder = tmp_path / "clips"
    for name in (
        "train/a b.mp4",
        "train/a b.wav",
        "test/ü.MOV",
        "._c.mp4",
        ".hidden/d.mp4",
        "test/e.wav",
        "notes.pdf",
    ):
        write(folder / name)
    write(folder / "train" / "a b.txt", "It was,\n great!\n")
    metadata, count, notes = start_metadata(folder)
    assert metadata == folder / "metadata.csv" and count == 3
    rows = {row["file_name"]: row["text"] for row in rows_of(folder)}
    assert rows == {"test/e.wav": "", "test/ü.MOV": "", "train/a b.mp4": "It was, great!"}
    assert list(rows_of(folder)[0]) == ["file_name", "text", "label", "speaker"]
    assert "1 sounds beside a video" in notes[0] and "1 texts" in notes[1] and "give the splits" in notes[2]
    assert len(read_corpus(folder, label_column=None).samples) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode on other systems' disks")
def test_a_clip_with_a_name_that_a_table_cannot_hold_is_named_and_the_others_have_rows(tmp_path):
    (tmp_path / "a 日本;'é 😀.mp4").write_bytes(b"media")
    (tmp_path / os.fsdecode(b"b\xff.mp4")).write_bytes(b"media")
    metadata, count, notes = start_metadata(tmp_path)
    assert count == 1 and "a 日本;'é 😀.mp4" in metadata.read_text("utf-8")
    assert any("is no UTF-8" in note and "1 such files have no row" in note for note in notes)


def test_a_folder_without_clips_starts_nothing(tmp_path):
    with pytest.raises(CorpusError, match="has no clips"):
        start_metadata(tmp_path)
    with pytest.raises(CorpusError, match="is not a folder"):
        start_metadata(tmp_path / "nowhere")


def test_real_clips_of_crema_d_are_imported_as_their_curated_table_has_them(shared_data, tmp_path):
    rows, _, _ = brought(shared_data / "crema_d", tmp_path / "out", "crema-d")
    with open(shared_data / "crema_d" / "metadata.csv", newline="", encoding="utf-8") as file:
        curated = {row["file_name"]: row for row in csv.DictReader(file)}
    assert {Path(row["file_name"]).name: (row["text"], row["emotion"]) for row in rows} == {
        name: (row["text"], row["emotion"]) for name, row in curated.items()
    }
    sample = read_corpus(tmp_path / "out", label_column="emotion").samples[0]
    with FaceExtractor(SETTINGS) as faces:
        assert extract(sample.clip, SETTINGS, faces).has_face
