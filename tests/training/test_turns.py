# SPDX-License-Identifier: Apache-2.0
"""The first extraction of a run on two processes: the second waits for longer than a collective may take."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RANK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from rich.console import Console
from torch import distributed
from msa_online.user_errors import run_command
from msa_online import MSAProcessor
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from msa_online.training import data as data_of_run
from msa_online.training.accelerator import start_accelerator
from msa_online.training.config import DataArguments, TrainingArguments


TIMEOUT = 3  # seconds that collectives of training may take here; by default it is half an hour
rank = os.environ.get("RANK")
prepare = data_of_run.prepare

def slow_prepare(*arguments):
    if rank == "0":
        time.sleep(TIMEOUT + 1)
        if kind == "killed":
            os.kill(os.getpid(), 9)
    prepared = prepare(*arguments)
    print("extracted", prepared.extracted)
    return prepared

def command(corpus):
    data = DataArguments(path=corpus, num_frames=2, face_size=32)
    corpus = data_of_run.read_data(data)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    processor = MSAProcessor(words, data.extraction)
    prepared = data_of_run.prepare_data(corpus, data, processor, accelerator, Console(quiet=True))
    accelerator.wait_for_everyone()
    print("ready with", sum(prepared.sizes.values()))

if __name__ == "__main__":
    folder, kind, *corpora = sys.argv[1:]
    (Path(folder) / f"imported{rank}").touch()
    while not (Path(folder) / f"imported{1 - int(rank)}").exists():
        time.sleep(0.01)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    accelerator = start_accelerator(TrainingArguments(output_dir=folder, log_with=None))
    data_of_run.prepare = slow_prepare
    for corpus in corpora:
        status = run_command(lambda: command(corpus))
    sys.exit(status)
"""


@pytest.fixture
def make_corpus(make_clip, tmp_path):
    """A function that makes a corpus of three clips, one of each split, one of them broken if so asked."""

    def make(name: str, broken: bool = False) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = ["file_name,text,label,split"]
        for number, split in enumerate(("train", "valid", "test")):
            make_clip(folder / f"{split}.mp4", seconds=0.5 + number, fps=8)
            rows.append(f"{split}.mp4,a film,{number}.5,{split}")
        if broken:
            (folder / "valid.mp4").write_bytes(b"no clip")
        (folder / "metadata.csv").write_text("\n".join(rows))
        return folder

    return make


def test_processes_wait_for_an_extraction_that_outlasts_their_collectives_and_end_with_a_failed_one(
    make_corpus, cache_dir, on_two_processes, tmp_path
):
    corpora = make_corpus("good"), make_corpus("bad", broken=True)
    statuses, printed = on_two_processes(RANK, tmp_path, tmp_path, "slow", *corpora)
    together = "".join(printed)
    assert "extracted 3" in printed[0] and "extracted 0" in printed[1], together
    assert all("ready with 3" in output for output in printed)
    assert statuses == [1, 1]
    assert together.count("error:") == 1 and "valid.mp4" in printed[0] and "Traceback" not in together


def test_a_process_killed_in_extraction_ends_the_others_with_what_to_do(
    make_corpus, cache_dir, on_two_processes, tmp_path
):
    statuses, printed = on_two_processes(RANK, tmp_path, tmp_path, "killed", make_corpus("good"))
    assert statuses == [-9, 1], "".join(printed)
    assert "start again to continue" in printed[1] and "Traceback" not in printed[1]
