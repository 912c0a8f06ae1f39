# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import BertModel, ViTImageProcessorPil

import msa_online
from feature_extractors import Clip, ExtractionSettings, FeatureCache
from msa_online import MSAConfig, MSAModel, Prediction
from msa_online.processing_msa import MAX_AUDIO_SECONDS, MAX_TEXT_TOKENS
from msa_online.shipped_configs import description, shipped
from msa_online_cli import EXAMPLES, SHELLS, build_parser, main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
REPOSITORY = Path(__file__).parents[1]
COMMANDS = tuple(EXAMPLES)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No Hub to be asked, and none to be waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path, capsys) -> str:
    folder = tmp_path / "checkpoint"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    capsys.readouterr()
    return str(folder)


@pytest.fixture
def other_checkpoint(tiny_text_config, tmp_path, capsys) -> str:
    """A folder that holds a model, but not one of ours."""
    BertModel(tiny_text_config).save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    return str(tmp_path / "bert")


def refusal(capsys, *words: str) -> str:
    """The one line of a command that ends with exit status 1 and prints nothing else."""
    assert main(list(words)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    return lines[0].removeprefix("error: ")


def usage_error(capsys, *words: str) -> str:
    """What a command says that was called wrongly: it ends with exit status 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_help_comes_at_once_without_loading_torch():
    code = f"""
import sys, msa_online_cli
for words in ([], *([command] for command in {COMMANDS})):
    try: msa_online_cli.main([*words, "--help"])
    except SystemExit as end: assert not end.code
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: msa-online") == 1 + len(COMMANDS)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_help_of_every_command_ends_with_examples_that_it_accepts(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, heading, examples = capsys.readouterr().out.partition("examples:\n")
    assert heading
    for example in examples.splitlines():
        assert len(example) <= 100 and example.startswith("  msa-online ")
        options, rest = build_parser().parse_known_args(shlex.split(example)[1:])
        assert options.command == command and (not rest or command == "launch")
        if command in ("train", "study"):
            assert all("=" in change for change in options.changes)


def test_the_version_is_printed_without_loading_torch():
    command = [sys.executable, "-X", "importtime", "-m", "msa_online_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == f"msa-online {msa_online.__version__}\n"
    assert not re.search(r"\| +(torch|transformers|numpy|shtab)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pre",), ["predict", "prepare"]),
        (("train", "recomm"), ["recommended"]),
        (("train", "mine"), ["mine.yaml"]),
        (("predict", "cl"), ["clip.mp4"]),
        (("predict", "--mo"), ["--model"]),
        (("evaluate", "--split", ""), ["test", "train", "valid"]),
    ],
    ids=str,
)
def test_bash_completes_commands_options_configurations_and_files(words, expected, capsys, tmp_path):
    """In a real bash, with the script that the user installs."""
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "clip.mp4").touch()
    program = f"""
source ./script
COMP_WORDS=(msa-online {shlex.join(words)}) COMP_CWORD={len(words)}
[[ $(complete -p msa-online) =~ -F\\ ([^ ]+) ]]
${{BASH_REMATCH[1]}}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_completion_script(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert not end.value.code and "predict" in capsys.readouterr().out


def run_train(*words: str) -> tuple[int, str, str, set[str]]:
    """Exit status, output and errors of train.py in a new process, and the heavy modules it imported."""
    code = f"""
import runpy, sys
sys.argv = ["train.py", *{list(words)}]
try: runpy.run_path("train.py", run_name="__main__")
finally: print(*{{"torch", "transformers", "numpy"}} & set(sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    *errors, imported = done.stderr.split("\n")[:-1]
    return done.returncode, done.stdout, "\n".join(errors), set(imported.split())


def test_help_of_training_lists_the_keys_without_loading_torch():
    from msa_online.context import CONTEXTS
    from msa_online.methods import CALIBRATORS, HEADS, MODULATORS

    status, printed, errors, imported = run_train("--help")
    assert (status, errors, imported) == (0, "", set())
    assert "training.learning_rates  dict[str, float] = {}" in printed
    text = " ".join(printed.split())
    assert all(f"One of {', '.join(table)}." in text for table in (HEADS, MODULATORS, CALIBRATORS, CONTEXTS))
    assert max(map(len, printed.splitlines())) <= 100
    status, printed, errors, imported = run_train()
    assert status == 2 and printed == "" and imported == set()
    assert errors.startswith("usage: ") and "lists the keys" in errors


def test_every_key_of_training_is_listed_with_its_default_and_a_meaning():
    from msa_online.methods import HEADS
    from msa_online.training.config import NOT_SET_IN_YAML, DataArguments, TrainingArguments
    from msa_online_cli import training_keys

    listed = {key.name: key for key in training_keys()}
    assert all(len(key.meaning) > 5 and key.kind for key in listed.values())
    defaults = {"model.head": "late_fusion", "plugins": []}
    model = {f"model.{name}" for name in MSAConfig.__annotations__ if name not in NOT_SET_IN_YAML}
    for section, kind in (("data", DataArguments), ("training", TrainingArguments)):
        for name, value in asdict(kind()).items():
            nested = value.items() if section == "data" and name == "missing" else ()
            values = {f"{name}.{key}": each for key, each in nested} or {name: value}
            defaults |= {f"{section}.{key}": each for key, each in values.items()}
    stages = {f"training.stages[].{name}" for name in ("name", "epochs", "patience")}
    assert set(listed) == defaults.keys() | model | stages
    assert {name: json.loads(listed[name].default) for name in defaults} == json.loads(json.dumps(defaults))
    assert listed["training.stages[].name"].default is None
    assert all(head in listed["model.head"].meaning for head in HEADS)


def test_every_command_of_the_parser_has_a_module():
    choices = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert set(choices) == set(COMMANDS)
    for command in COMMANDS:
        assert callable(importlib.import_module(f"msa_online.commands.{command.replace('-', '_')}").run)


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["evaluate", "x"], ["predict", "a.mp4"], ["prepare", "x", "--workers", "y"]]
)
def test_a_wrong_call_is_answered_with_the_usage(capsys, words):
    assert usage_error(capsys, *words).startswith("msa-online")


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "x", "--workers", "y"],
        ["serve", "x", "--port", "y"],
        ["synthesize", "x", "--noise", "audio=y"],
        ["convert-features", "x", "y", "--valid-share", "y"],
    ],
)
def test_a_word_in_place_of_a_number_is_answered_in_words(capsys, words):
    assert "'y' is no " in usage_error(capsys, *words)


@pytest.mark.parametrize("command", [["describe"], ["predict", "--text", "good", "--model"], ["evaluate"]])
def test_a_checkpoint_of_another_kind_is_refused_in_one_line(capsys, other_checkpoint, command):
    words = [*command, other_checkpoint, *(["clips"] if command == ["evaluate"] else [])]
    assert "a checkpoint of type 'bert', not 'msa_online'" in refusal(capsys, *words)


@pytest.mark.parametrize("command", [["describe"], ["predict", "--text", "good", "--model"], ["evaluate"]])
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(capsys, tmp_path, command):
    words = [*command, str(tmp_path), *(["clips"] if command == ["evaluate"] else [])]
    assert "config.json is missing" in refusal(capsys, *words)


# --- describe ---


def test_describe_prints_json_a_script_can_read(capsys):
    assert main(["describe", str(REPOSITORY / "configs" / "late_fusion_mpnet.yaml"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(["describe", "late_fusion_mpnet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    parameters = document["parameters"]
    assert parameters["total"] == sum(count for part, count in parameters.items() if part != "total")


def test_prepare_reports_what_a_model_with_the_default_limits_would_cut():
    """The command line cannot import these numbers without importing torch."""
    options = build_parser().parse_args(["prepare", "clips"])
    assert (options.max_text_tokens, options.max_audio_seconds) == (MAX_TEXT_TOKENS, MAX_AUDIO_SECONDS)


def test_describe_shows_tables_and_the_scores_of_a_checkpoint(capsys, tiny_config, tmp_path, monkeypatch):
    from msa_online import MSAConfig

    metrics = {"mae": 0.704, "corr": 0.5}
    line = "test: MAE 0.704; always predicting the mean training label (0.1) gives 1.310"
    record = {
        "data": "me/clips",
        "results": {"test": {"text": metrics, "text+audio+vision": metrics}},
        "constant": {"test": {"mae": 1.31, "acc7": 0.123}},
        "comparison": [line],
    }
    MSAConfig(
        **{**tiny_config.to_dict(), "architectures": ["MSAModel"], "trained_on": record}
    ).save_pretrained(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["describe", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("text_encoder", "total", "log-mel", "me/clips", "scores on test", "0.704"):
        assert expected in printed
    assert printed.count(line) == 1 and "0.123" not in printed


def test_a_message_names_the_file_as_it_is_called(capsys, tmp_path):
    for name in ("demo [old].yaml", "demo [/old].yaml", "demo:smile:.yaml"):
        message = refusal(capsys, "describe", str(tmp_path / name))
        assert message == f"{tmp_path / name}: cannot read the configuration (No such file or directory)"


def test_a_configuration_with_a_mistake_is_refused_in_one_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {text_encoder: bert-base-uncased, head_kwargs: {hiden_size: 8}}")
    assert "hiden_size" in refusal(capsys, "describe", str(path))


# --- predict ---


def test_predict_without_anything_to_predict_says_what_to_give(capsys):
    message = usage_error(capsys, "predict", "--model", "runs/none")
    assert "clip" in message and "--text" in message


def test_predict_wants_a_transcript_for_each_clip_or_none(capsys):
    message = usage_error(capsys, "predict", "a.mp4", "b.mp4", "--text", "good", "--model", "runs/none")
    assert "2 clips" in message and "1 --text" in message


def test_predict_from_text_alone_as_json(capsys, checkpoint):
    assert (
        main(["predict", "--model", checkpoint, "--text", "I loved it", "--text", "very bad", "--json"]) == 0
    )
    first, second = json.loads(capsys.readouterr().out)
    assert first["clip"] is None and isinstance(first["score"], float)
    assert first["modalities"] == ["text"] and set(first["missing"]) == {"audio", "vision"}
    assert first["score"] != second["score"]
    for one in (first, second):
        assert set(one["contributions"]) == {"text", "audio", "vision"}
        assert one["baseline"] + sum(one["contributions"].values()) == pytest.approx(one["score"], abs=1e-5)
        assert one["contributions"]["audio"] == 0 and one["contributions"]["vision"] == 0


def test_predict_takes_a_track_and_a_region(capsys, checkpoint, make_clip, tmp_path):
    path = str(make_clip(tmp_path / "a.wav", video=False))
    assert main(["predict", path, "--model", checkpoint, "--audio-track", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["modalities"] == ["audio"]
    assert main(["predict", path, "--model", checkpoint, "--region", "0", "0", "1", "2"]) == 1
    assert "the region is (0.0, 0.0, 1.0, 2.0)" in capsys.readouterr().err.replace("\n", " ")
    assert main(["predict", path, "--model", checkpoint, "--audio-track", "2"]) == 1
    assert "has 1 audio track, none that can be decoded is number 2" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_predict_shows_a_table(capsys, checkpoint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["predict", "--model", checkpoint, "--text", "I loved it"]) == 0
    printed = capsys.readouterr().out
    assert "(text only)" in printed and "no clip given" in printed


def lines_of(predictions: list[Prediction]) -> list[str]:
    from msa_online.commands.predict import prediction_lines

    return prediction_lines(predictions)


def test_a_reader_can_add_the_contributions_up_to_the_score():
    parts = {"text": 1.25, "audio": -0.5, "vision": 0.0}
    seen = ("text", "audio")
    one = Prediction("a.mp4", 0.85, None, {}, seen, {"vision": "no face"}, 0.1, parts)
    lines = lines_of([one])
    nothing, text, audio, vision = (
        next(line for line in lines if name in line) for name in ("nothing seen", *parts)
    )
    assert lines[0] == "a.mp4: +0.850" and nothing.endswith("+0.100")
    assert "+1.250" in text and "++++++++" in text and "-0.500" in audio and "------" in audio
    assert text.count("+") > 2 * audio.count("-") > 0
    assert vision.split() == ["vision", "0", "no", "face"]
    assert "score with nothing seen" in lines[-1] and max(map(len, lines)) <= 80


def test_contributions_to_a_class_are_shown_in_points_of_its_probability():
    parts = {"text": 0.5, "audio": -0.25, "vision": 0.0625}
    probabilities = {"calm": 0.5625, "[angry]": 0.4375}
    one = Prediction("a.mp4", None, "calm", probabilities, tuple(parts), {}, 0.25, parts)
    printed = "\n".join(lines_of([one]))
    for expected in (
        "calm (56.2%)",
        "+25.0%",
        "+50.0%",
        "-25.0%",
        "+6.2%",
        "its probability with nothing seen",
    ):
        assert expected in printed


def test_a_prediction_that_nothing_moved_has_no_bars():
    absent = dict.fromkeys(("text", "audio", "vision"), "no clip given")
    one = Prediction("a.mp4", 0.1, None, {}, (), absent, 0.1, dict.fromkeys(absent, 0.0))
    assert not any("++" in line or "--" in line for line in lines_of([one]))


def test_a_line_break_in_the_name_of_a_clip_does_not_break_the_output():
    parts = dict.fromkeys(("text", "audio", "vision"), 0.0)
    assert lines_of([Prediction("a\nb.mp4", 0.5, None, {}, (), {}, 0.5, parts)])[0] == r"a\nb.mp4: +0.500"


@pytest.fixture
def three_clips(make_clip, tmp_path) -> list[str]:
    """Two sounds, and between them a file that is none."""
    for name in ("first.wav", "third.wav"):
        make_clip(tmp_path / name, video=False)
    (tmp_path / "second.mp4").write_text("Dear reader, this is no video.")
    return [str(tmp_path / name) for name in ("first.wav", "second.mp4", "third.wav")]


def test_a_broken_clip_among_several_is_passed_over_on_request_and_reported(capsys, checkpoint, three_clips):
    assert main(["predict", *three_clips, "--model", checkpoint, "--skip-broken", "--json"]) == 1
    printed = capsys.readouterr()
    first, second, third = json.loads(printed.out)
    assert isinstance(first["score"], float) and isinstance(third["score"], float)
    assert second["clip"] == three_clips[1] and second["error"].startswith("cannot be decoded")
    assert printed.err == "error: 1 of 3 clips cannot be used, as listed\n"
    assert main(["predict", *three_clips, "--model", checkpoint, "--skip-broken"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(three_clips[0] + ": ") for line in lines) == 1
    where = lines.index(f"{three_clips[1]}: error")
    assert "cannot be decoded" in lines[where + 1]


def test_without_the_flag_a_broken_clip_ends_predict_but_what_was_computed_is_printed(
    capsys, checkpoint, three_clips
):
    assert main(["predict", *three_clips, "--model", checkpoint, "--json"]) == 1
    printed = capsys.readouterr()
    (first,) = json.loads(printed.out)
    assert first["clip"] == three_clips[0] and isinstance(first["score"], float)
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {three_clips[1]}: cannot be decoded")
    assert "1 of 3 predicted" in line and "--skip-broken" in line


def test_the_name_of_a_clip_is_whole_however_narrow_the_terminal(
    capsys, checkpoint, make_clip, tmp_path, monkeypatch
):
    folder = tmp_path / "a folder of recordings" / "with a name that is longer than a narrow terminal"
    folder.mkdir(parents=True)
    clip = make_clip(folder / "take 1.wav", video=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["predict", str(clip), "--model", checkpoint]) == 0
    assert capsys.readouterr().out.startswith(f"{clip}: ")


def test_predict_from_a_clip_that_is_not_there_is_refused_in_one_line(capsys, checkpoint, tmp_path):
    message = refusal(capsys, "predict", str(tmp_path / "none.mp4"), "--model", checkpoint)
    assert message.startswith(f"{tmp_path / 'none.mp4'}: ") and "check the path" in message


def test_a_clip_is_shown_under_the_name_it_has(capsys, checkpoint, make_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    clip = make_clip(tmp_path / "take [2].wav", video=False)
    assert main(["predict", str(clip), "--model", checkpoint]) == 0
    assert "take [2].wav" in capsys.readouterr().out


# --- prepare and evaluate ---


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "{data}", "--num-frames", "0"],
        ["prepare", "{data}", "--face-size", "4"],
        ["evaluate", "{checkpoint}", "{data}", "--batch-size", "0"],
        ["evaluate", "{checkpoint}", "{data}", "--mixed-precision", "fp16"],
        ["evaluate", "{checkpoint}", "{data}", "--json", "{data}/clip.mp4/report.json"],
        ["evaluate", "{checkpoint}", "{data}", "--json", "{data}"],
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_an_option_that_cannot_work_is_refused_before_the_work_begins(
    capsys, words, checkpoint, tmp_path, cache_dir, monkeypatch
):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # fp16 cannot work without a GPU
    (tmp_path / "clip.mp4").write_bytes(b"would be decoded if work began")
    (tmp_path / "metadata.csv").write_text("file_name,text,label,split\nclip.mp4,good,1,test\n")
    filled = [word.format(data=tmp_path, checkpoint=checkpoint) for word in words]
    try:
        status = main(filled)
    except SystemExit as end:
        status = end.code
    message = capsys.readouterr().err.splitlines()[-1]
    assert status in (1, 2) and words[-2].strip("-").replace("-", "_") in message.replace("-", "_")


def test_prepare_names_a_folder_that_is_not_there(capsys, tmp_path):
    assert str(tmp_path / "none") in refusal(capsys, "prepare", str(tmp_path / "none"))


def test_a_cache_that_cannot_be_written_is_a_message_and_no_traceback(
    capsys, tmp_path, make_clip, monkeypatch
):
    clip = make_clip(tmp_path / "clip.wav", video=False)
    (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n{clip.name},good,1\n")
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("MSA_CACHE", str(tmp_path / "cache"))
    assert main(["prepare", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_prepare_makes_crops_for_the_vision_encoder_that_it_is_given(capsys, tmp_path, make_clip, cache_dir):
    """Clips prepared with another size are extracted again when training starts."""
    clip = make_clip(tmp_path / "clip.wav", video=False)
    (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n{clip.name},good,1\n")
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "encoder")
    cache = FeatureCache()

    def prepared(size: int) -> bool:
        return cache.load(cache.key(Clip(clip), ExtractionSettings(face_size=size))) is not None

    words = ("--vision-encoder", str(tmp_path / "encoder"), "--workers", "1")
    assert main(["prepare", str(tmp_path), *words]) == 0
    assert prepared(48) and not prepared(96)


# --- features ---


@pytest.fixture
def archive(tmp_path) -> str:
    """Features of twelve samples in an .npz file, with numbers and with names for labels."""
    random = np.random.default_rng(0)
    path = tmp_path / "features.npz"
    np.savez(
        path,
        id=np.array([f"s{number}" for number in range(12)]),
        label=np.linspace(-3, 3, 12).astype(np.float32),
        emotion=np.array(["calm", "angry", "sad"] * 4),
        split=np.array(["train", "valid", "test"] * 4),
        text=random.normal(size=(12, 4)),
        audio=random.normal(size=(12, 5, 3)),
        vision=random.normal(size=(12, 2)),
    )
    return str(path)


@pytest.fixture
def feature_checkpoint(tmp_path, capsys) -> str:
    widths = {"text": 4, "audio": 3, "vision": 2}
    config = MSAConfig(feature_widths=widths, head_kwargs={"hidden_size": 8}, label_range=[-3, 3])
    MSAModel(config).save_pretrained(tmp_path / "of_features")
    capsys.readouterr()
    return str(tmp_path / "of_features")


def test_converted_features_are_shown_with_the_words_that_train_on_them(capsys, archive, tmp_path):
    folder = str(tmp_path / "corpus")
    assert main(["convert-features", archive, folder, "--level", "utterance"]) == 0
    printed = capsys.readouterr().out
    assert "12 samples (4 train, 4 valid, 4 test)" in printed
    assert f"'model.feature_widths={{text: 4, audio: 6, vision: 2}}' data.path={folder}" in printed
    assert "exists already" in refusal(capsys, "convert-features", archive, folder)


def test_what_cannot_be_converted_is_refused_in_one_line(capsys, archive, tmp_path):
    message = refusal(capsys, "convert-features", archive, str(tmp_path / "x"), "--label-column", "mood")
    assert "no column 'mood'" in message
    assert "between 0 and 1" in usage_error(
        capsys, "convert-features", archive, str(tmp_path / "x"), "--valid-share", "1.5"
    )


def test_features_are_extracted_from_clips(capsys, tiny_corpus, tiny_text_encoder, cache_dir, tmp_path):
    words = ["--text-encoder", str(tiny_text_encoder), "--level", "utterance", "--num-frames", "2"]
    folder = str(tmp_path / "corpus")
    assert main(["extract-features", str(tiny_corpus), folder, *words, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "no audio stream" in printed and "text: 32, audio: 90, vision: 104" in printed
    assert "CPU seconds without the extraction of clips: text " in printed


def test_options_of_an_audio_encoder_are_checked(capsys, tmp_path):
    words = ["extract-features", "clips", str(tmp_path / "x"), "--text-encoder", "any"]
    assert "applies to the states of an --audio-encoder" in usage_error(capsys, *words, "--audio-layer", "3")
    words += ["--audio-encoder", "any"]
    assert "weighted is learned in training" in usage_error(capsys, *words, "--audio-layer", "weighted")
    assert "'third' is no layer: give last, or a number" in usage_error(
        capsys, *words, "--audio-layer", "third"
    )


def test_an_unknown_text_encoder_is_refused_before_clips_are_decoded(
    capsys, tiny_corpus, cache_dir, tmp_path
):
    words = ["extract-features", str(tiny_corpus), str(tmp_path / "x"), "--text-encoder", "nobody/nothing"]
    assert "encoder 'nobody/nothing'" in refusal(capsys, *words)
    assert not (cache_dir / "features").exists() and not (tmp_path / "x").exists()


def test_a_model_of_features_is_scored_on_features(capsys, archive, feature_checkpoint, tmp_path):
    assert main(["evaluate", feature_checkpoint, archive, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    written = tmp_path / "reports" / "today" / "features.json"  # folders that are not there yet
    assert main(["evaluate", feature_checkpoint, archive, "--json", str(written)]) == 0
    assert json.loads(written.read_text()) == report
    capsys.readouterr()
    assert report["samples"] == 4 and set(report["conditions"]["text+audio+vision"]) >= {"mae", "corr"}
    assert main(["evaluate", feature_checkpoint, archive]) == 0
    assert "test (4 samples)" in capsys.readouterr().out


def test_scores_are_scored_without_zero_labels_on_request(capsys, archive, feature_checkpoint):
    words = ["evaluate", feature_checkpoint, archive, "--scoring", "nonzero"]
    assert main([*words, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scoring"] == "nonzero" and "acc2_has0" not in report["conditions"]["text"]
    assert main(words) == 0
    assert "samples with label 0 left out" in capsys.readouterr().out
    words[-1] = "per_class"
    assert "per_class is for classes" in usage_error(capsys, *words)


def test_a_classifier_shows_the_f1_of_each_class_on_request(capsys, archive, tmp_path):
    config = MSAConfig(
        feature_widths={"text": 4, "audio": 3, "vision": 2},
        head_kwargs={"hidden_size": 8},
        id2label={0: "angry", 1: "calm", 2: "sad"},
        label2id={"angry": 0, "calm": 1, "sad": 2},
    )
    MSAModel(config).save_pretrained(tmp_path / "classes")
    words = ["evaluate", str(tmp_path / "classes"), archive, "--label-column", "emotion"]
    capsys.readouterr()
    assert main([*words, "--scoring", "per_class", "--json", "-"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]["text+audio+vision"]
    assert list(classes) == ["angry", "calm", "sad"] and classes["sad"]["samples"] == 4
    assert main([*words, "--scoring", "per_class"]) == 0
    printed = capsys.readouterr().out
    assert "F1 of each class against the rest" in printed and "calm" in printed
    assert "nonzero is for scores" in usage_error(capsys, *words, "--scoring", "nonzero")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is part of Linux")
def test_scores_are_shown_even_if_the_disk_is_full_when_they_are_written(capsys, archive, feature_checkpoint):
    assert main(["evaluate", feature_checkpoint, archive, "--json", "/dev/full"]) == 1
    printed = capsys.readouterr()
    assert "test (4 samples)" in printed.out
    assert "error: /dev/full cannot be written (No space left on device): free disk space" in printed.err


@pytest.mark.parametrize("level", ["input", "feature"])
def test_a_model_is_scored_at_rates_of_missing_frames(capsys, archive, feature_checkpoint, level):
    words = ["evaluate", feature_checkpoint, archive, "--frame-rates", level]
    assert main([*words, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["level"] == level and "conditions" not in report
    assert list(report["frame_rates"])[-1] == "mean" and len(report["frame_rates"]) == 11
    assert main([*words, "--frame-seed", "2", "--nested"]) == 0
    printed = capsys.readouterr().out
    assert "0.9" in printed and "mean" in printed and "4 samples" in printed


def test_states_of_a_checkpoint_are_drawn(capsys, feature_checkpoint, tmp_path):
    random = np.random.default_rng(0)
    columns = {
        "id": np.array([f"s{number}" for number in range(6)]),
        "label": np.linspace(-3, 3, 6),
        "split": np.array(["test"] * 6),
        **{
            name: random.normal(size=(6, width)) for name, width in (("text", 4), ("audio", 3), ("vision", 2))
        },
    }
    np.savez(tmp_path / "tests.npz", **columns)
    words = [
        "plot-states",
        feature_checkpoint,
        str(tmp_path / "tests.npz"),
        "--out",
        str(tmp_path / "new" / "x.png"),
    ]
    assert main([*words, "--conditions", "text", "audio+vision"]) == 0
    assert "6 states in" in capsys.readouterr().out and (tmp_path / "new" / "x.png").stat().st_size > 5000


def test_states_that_cannot_be_drawn_are_refused_in_one_line(capsys, archive, feature_checkpoint, tmp_path):
    words = ["plot-states", feature_checkpoint, archive, "--out"]
    target = str(tmp_path / "x.png")
    assert "end its name with .png" in usage_error(capsys, *words, str(tmp_path / "x.gif"))
    assert "--conditions 'smell'" in usage_error(capsys, *words, target, "--conditions", "smell")
    for seed in ("-1", "4294967296"):
        message = usage_error(capsys, *words, target, f"--seed={seed}")
        assert f"{seed} is no seed: give a number from 0 to 4294967295" in message
    assert "test has 4 samples: t-SNE needs 5 or more" in usage_error(capsys, *words, target)


def test_evaluate_hears_the_audio_track_of_training(capsys, checkpoint, tiny_corpus):
    path = Path(checkpoint, "config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "trained_on": {"audio_track": 2}}))
    assert main(["evaluate", checkpoint, str(tiny_corpus)]) == 1
    assert "none that can be decoded is number 2" in capsys.readouterr().err.replace("\n", " ")


def test_features_and_clips_are_not_mistaken_for_each_other(
    capsys, archive, checkpoint, feature_checkpoint, tiny_corpus
):
    assert "means precomputed features" in refusal(capsys, "evaluate", checkpoint, archive)
    message = refusal(capsys, "evaluate", feature_checkpoint, str(tiny_corpus))
    assert "neither an .npz file" in message and "extract-features" in message
    message = refusal(capsys, "predict", "--model", feature_checkpoint, "--text", "good")
    assert "takes precomputed features" in message and "model.text_encoder" in message


def test_features_of_other_widths_than_the_checkpoint_are_refused(
    capsys, archive, feature_checkpoint, tmp_path
):
    main(["convert-features", archive, str(tmp_path / "corpus"), "--level", "utterance"])
    capsys.readouterr()
    message = refusal(capsys, "evaluate", feature_checkpoint, str(tmp_path / "corpus"))
    assert "audio is 6 wide in the data and 3 in the model" in message


def test_a_checkpoint_of_features_is_described(capsys, feature_checkpoint):
    assert main(["describe", feature_checkpoint]) == 0
    assert "audio features" in capsys.readouterr().out


# --- get-models ---


def test_an_unknown_model_is_refused_listing_the_known_ones(capsys):
    message = refusal(capsys, "get-models", "gpt-9")
    assert "gpt-9" in message and "face_landmarker" in message and "all-MiniLM-L6-v2" in message


def test_an_unknown_model_is_refused_before_the_known_ones_are_fetched(capsys):
    refusal(capsys, "get-models", "face_landmarker", "gpt-9")  # and not one line on standard output


def test_get_models_says_where_a_model_is(capsys, tmp_path, monkeypatch):
    mine = tmp_path / "face [mine].task"
    mine.touch()
    monkeypatch.setenv("MSA_MODEL_FACE_LANDMARKER", str(mine))
    assert main(["get-models", "face_landmarker"]) == 0
    assert str(mine) in capsys.readouterr().out


# --- configs, train and study ---


def test_configs_lists_what_is_shipped_and_prints_one(capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and description(path) in printed for name, path in shipped().items())
    assert main(["configs", "late_fusion"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "configs" / "late_fusion.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train late_fusoin", "did you mean 'late_fusion'? `msa-online configs` lists them"),
        ("study late_fusoin", "`msa-online configs` lists them"),
        ("train late_fusion training.epochs=abc", "training.epochs is 'abc', but must be int"),
        ("train late_fusion training=3", "training must be a section of keys, not 3"),
        ("train late_fusion model.head=foo", "or import your own with plugins: [package]"),
        (
            "train late_fusion data.missing.rates={text:~x}",
            "data.missing.rates.text is 'x', but must be float",
        ),
        ("train late_fusion training.stages=[{nam:~a}]", "'training.stages[0].nam'; did you mean 'name'"),
        ("train late_fusion training.learning_rate=.nan", "is nan, but must be float and finite"),
        ("train late_fusion epochs=3", "unknown key 'epochs'; did you mean 'training.epochs'?"),
        ("train late_fusion foo=1", "unknown key 'foo'; known are model, data, training, plugins"),
        ("train late_fusion data.path=", "'data.path=' has no value: write data.path=VALUE"),
        ("train late_fusion data.path=${HOME}", "${...} is not supported"),
        ("train late_fusion plugins=[no_such_package]", "cannot import 'no_such_package'"),
        ("train late_fusion plugins=mine", "plugins is 'mine', but must be list[str]"),
        ("study STUDY plugins=[no_such_package]", "cannot import 'no_such_package'"),
        ("study STUDY --only absent data.path=x", "'absent' is no variant of the study: one of"),
        (
            "tune STUDY --variant absent --space ebmc_offline --trials 1 data.path=x",
            "'absent' is no variant of the study: one of",
        ),
        ("predict --text a --model x --plugin no_such_package", "--plugin: cannot import"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_one_line_with_the_remedy(capsys, words, named):
    study = next(name for name in shipped() if name.startswith("ablations/"))
    words = words.replace("STUDY", study)
    assert named in refusal(capsys, *(word.replace("~", " ") for word in words.split()))


@pytest.mark.parametrize("words", [["train", "--help"], ["configs"]], ids=" ".join)
def test_a_reader_that_ends_early_is_no_error(words):
    command = [sys.executable, "-m", "msa_online_cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is part of Linux")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "msa_online_cli", "train", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written (No space left on device): free disk space\n"


# importing data sets, starting a table


def test_a_data_set_is_imported_with_one_command(capsys, tmp_path):
    videos = tmp_path / "CREMA D" / "VideoFlash"
    videos.mkdir(parents=True)
    (videos / "1001_DFA_ANG_XX.flv").write_bytes(b"media")
    (videos / "1002_DFA_SAD_XX.flv").touch()
    (videos / "readme.txt").write_text("x")
    assert main(["import", "auto", str(videos.parent), str(tmp_path / "my data")]) == 0
    printed = capsys.readouterr().out
    assert "CREMA D was recognised as CREMA-D (crema-d)" in printed
    assert "the clip has zero bytes" in printed and "VideoFlash/1002_DFA_SAD_XX.flv" in printed
    assert (
        "metadata.csv: 1 clips of 1 speakers" in printed
        and "all: 1 clips, and the complete CREMA-D has 7,442" in printed
    )
    assert f"next: msa-online prepare '{tmp_path}/my data' --label-column emotion" in printed
    assert "exists already" in refusal(capsys, "import", "auto", str(videos), str(tmp_path / "my data"))
    assert "There are speakers: " in refusal(
        capsys, "import", "crema-d", str(videos.parent), str(tmp_path / "new"), "--protocol", "x"
    )
    assert "invalid choice: 'imdb' (choose from auto, ch-sims" in usage_error(
        capsys, "import", "imdb", "x", "y"
    ).replace("'auto', 'ch-sims'", "auto, ch-sims")


def test_the_table_of_ones_own_clips_is_started(capsys, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"media")
    (tmp_path / "a.txt").write_text("hello")
    assert main(["init-data", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"wrote {tmp_path}/metadata.csv: 1 clips" in printed and f"msa-online prepare {tmp_path}" in printed
    )
    assert (tmp_path / "metadata.csv").read_text("utf-8") == "file_name,text,label,speaker\na.mp4,hello,,\n"


# several processes


def failures(*codes: int) -> dict[int, ProcessFailure]:
    return {rank: ProcessFailure(rank, 100 + rank, code, "no file") for rank, code in enumerate(codes)}


@pytest.mark.parametrize(
    ("codes", "printed"),
    [((1, -15), ""), ((1, 1), ""), ((-15, -9), "process 1 was ended by SIGKILL; SIGKILL often means that")],
)
def test_the_launcher_reports_only_what_no_process_could_print(codes, printed, capsys, monkeypatch):
    """A process prints its own error; of one that the system has killed nothing is known otherwise."""
    from msa_online.commands import launch

    def fail(arguments) -> None:
        assert arguments.training_script_args == ["train", "late_fusion", "data.path=x"]
        raise ChildFailedError("msa_online_cli", failures(*codes))

    monkeypatch.setattr(launch, "launch_command", fail)
    words = ["launch", "--num_processes", "2", "late_fusion", "data.path=x"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # set by the command; removed afterwards
    if printed:
        assert printed in refusal(capsys, *words)
        return
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1 and capsys.readouterr() == ("", "")


def test_options_that_the_launcher_does_not_know_are_named_below_a_short_usage(capsys):
    assert "unrecognized arguments: --processes" in usage_error(capsys, "launch", "--processes", "2")
