# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import pytest
import torch
import yaml

from msa_online.methods import HEADS
from msa_online.modalities import MODALITIES, ModalitySequence


@pytest.fixture
def scripts(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that imports a script by name."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.fixture
def offline_settings(repository: Path) -> dict:
    """The head settings that the benchmark runs, at widths a test can afford."""
    document = yaml.safe_load((repository / "configs" / "ebmc_offline.yaml").read_text(encoding="utf-8"))
    return {**document["model"]["head_kwargs"], "hidden_size": 16, "depth": 2, "dropout": 0.0}


WIDTHS = {"text": 6, "audio": 4, "vision": 5}


def with_weights_of(head, plain):
    """`plain` with the weights of `head`: stacks layer by layer, all else by its name."""
    left_out = plain.load_state_dict(head.state_dict(), strict=False).missing_keys
    assert all(name.startswith("stacks.") for name in left_out)
    with torch.no_grad():
        for number, stack in enumerate(plain.stacks.values()):
            for own, theirs in zip(stack, head.stacks.layers, strict=True):
                query, key = theirs.query_key.weight[number].T.chunk(2)
                own.query.weight.copy_(query)
                own.key.weight.copy_(key)
                query, key = theirs.query_key.bias[number, 0].chunk(2)
                own.query.bias.copy_(query)
                own.key.bias.copy_(key)
                for name in ("value", "widen", "narrow"):
                    own.get_submodule(name).weight.copy_(theirs.get_submodule(name).weight[number].T)
                    own.get_submodule(name).bias.copy_(theirs.get_submodule(name).bias[number, 0])
    return plain


@pytest.mark.parametrize("steps", [1, 3])
def test_the_head_is_measured_against_something_that_computes_the_same(scripts, offline_settings, steps):
    torch.manual_seed(0)
    head = HEADS["ebmc"](WIDTHS, 1, **offline_settings).double()
    head.start_stage("balance")
    plain = scripts("plain_ebmc").PlainEBMC(WIDTHS, **offline_settings).double()
    plain = with_weights_of(head, plain)
    features = {name: torch.randn(7, steps, width).double() for name, width in WIDTHS.items()}
    labels, teacher = torch.randn(7).double(), torch.randn(7, len(MODALITIES), 1).double()
    whole = torch.ones(7, steps, dtype=torch.bool)
    sequences = {name: ModalitySequence.of(values, whole) for name, values in features.items()}
    ours, theirs = head(sequences, labels, teacher).losses, plain(features, labels, teacher)
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    for losses in (ours, theirs):
        sum(losses.values()).backward()
    for name, gradient in head.fusion.named_parameters():
        torch.testing.assert_close(gradient.grad, plain.fusion.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    for name in MODALITIES:  # reached through the energies' gradient too
        ours, theirs = head.projections[name].weight.grad, plain.projections[name].weight.grad
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_bound_holds_every_matrix_product_of_a_step_forward_and_backward(scripts):
    benchmark = scripts("benchmark_ebmc")
    layer = torch.nn.Linear(3, 5)
    inputs = torch.randn(7, 3, requires_grad=True)
    with (products := benchmark.Products()):
        layer(inputs).square().sum().backward()
    shapes = sorted(tuple(tuple(operand[0]) for operand in operands[-2:]) for _, operands in products.calls)
    assert shapes == [((5, 7), (7, 3)), ((7, 3), (3, 5)), ((7, 5), (5, 3))]  # dW, forward, dx
    assert products.replay(torch.device("cpu"))()["step"] > 0


def test_both_comparisons_run_from_the_command_line(scripts, capsys):
    main = scripts("benchmark_ebmc").main
    assert main(["--offline", "--batch", "4", "--rounds", "1", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown
        for name in ("EBMC head", "plain reading", "matrix products of the head", "fp32", "bf16")
    )
    small = ["--text-encoder", "sentence-transformers/all-MiniLM-L6-v2", "--batch", "2", "--tokens", "5"]
    small += ["--mel-steps", "40", "--frames", "2", "--rounds", "1", "--device", "cpu", "--precision", "bf16"]
    assert main(small) == 0
    shown = capsys.readouterr().out
    assert "late fusion" in shown and "EBMC" in shown and "with optimizer" in shown


def test_fp16_on_a_cpu_is_refused(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts("benchmark_ebmc").main(["--precision", "fp16", "--device", "cpu"])
    assert "fp16 needs a GPU" in capsys.readouterr().err
