# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from msa_online.training.config import TrainingArguments
from msa_online.training.precision import choose_precision, cpu_computes_bf16, native_precision


@pytest.fixture(autouse=True)
def a_fresh_start_on_a_cpu(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def test_a_run_chooses_its_precision_unless_one_is_set():
    assert TrainingArguments().mixed_precision == "auto"
    assert choose_precision("auto", "key").name == ("bf16" if cpu_computes_bf16() else "no")


@pytest.mark.slow
def test_a_processor_that_emulates_bf16_trains_in_fp32_and_warns_if_bf16_is_set():
    script = """if True:
        from msa_online.training.precision import choose_precision
        for requested in ("auto", "bf16"):
            chosen = choose_precision(requested, "key")
            print(chosen, "|", chosen.warning)
    """
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ACCELERATE_USE_CPU": "true"}  # as on a machine without AVX-512
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | limits, capture_output=True, text=True
    )
    automatic, explicit = done.stdout.splitlines()
    assert automatic == "fp32 (auto: this processor would emulate bf16) | None"
    assert explicit.startswith("bf16 (key) | this processor emulates bf16") and "auto" in explicit


@pytest.mark.parametrize(("launched", "expected"), [("bf16", "bf16"), ("no", None)])
def test_what_the_launcher_was_given_explicitly_holds(monkeypatch, launched, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    by_itself = "bf16" if cpu_computes_bf16() else "no"
    assert choose_precision("auto", "key").name == (expected or by_itself)
    assert choose_precision("no", "key").name == "no"  # the configuration is asked before the launcher


def test_fp16_on_a_cpu_is_refused_whoever_asks_for_it(monkeypatch):
    with pytest.raises(ValueError, match=r"fp16 needs a GPU \(key requests it\).* key=auto or no"):
        choose_precision("fp16", "key")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="accelerate launch requests it"):
        choose_precision("auto", "key")


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp16(monkeypatch, native, name):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native
    )  # the driver's answer
    assert native_precision(torch.device("cuda")).name == name
