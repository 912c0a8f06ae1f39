# SPDX-License-Identifier: Apache-2.0
"""A process that works with the Hub at HF_ENDPOINT, which the Hub's client reads when it is imported.

Each line on its standard input is a request in JSON, each line on its standard output the answer.
"""

import contextlib
import io
import json
import os
import sys

import torch
from safetensors.torch import load_file

from msa_online.hub import load_checkpoint
from msa_online.user_errors import INPUT_ERRORS
from msa_online_cli import main


def command(*words: str) -> dict:
    """Run `msa-online`; returns its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def logits(source: str, batch: str, **options: str) -> list | dict:
    """Logits of a checkpoint for a batch in a safetensors file, or the error."""
    try:
        model, processor = load_checkpoint(source, **options)
    except INPUT_ERRORS as error:
        return {"error": str(error)}
    assert processor is not None
    with torch.no_grad():
        return model(**load_file(batch)).logits.tolist()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(request["environment"])
        call = {"command": command, "logits": logits}[request["call"]]
        print(json.dumps(call(*request["arguments"], **request["options"])), file=answers, flush=True)
