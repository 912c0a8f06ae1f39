# SPDX-License-Identifier: Apache-2.0
"""EBMC under half precision: finite on inputs far from ordinary ones, and near fp32 on ordinary ones."""

from functools import partial

import pytest
import torch

from msa_online.modalities import MODALITIES, ModalitySequence

HALVES = [torch.bfloat16, torch.float16]
STAGES = ("enhance", "balance")
every_half = pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
every_stage = pytest.mark.parametrize("stage", STAGES)
every_task = pytest.mark.parametrize("outputs", [1, 4], ids=["regression", "classification"])
ALL, BATCH = (True, True, True), 4
WIDE = {"hidden_size": 64, "depth": 4, "learned_scalars": True}


@pytest.fixture(scope="session")
def make_ebmc(make_head):
    """A function that makes a small EBMC head, in its second stage if no other is named."""
    return partial(make_head, "ebmc", depth=2)


def scaled(sequences: dict[str, ModalitySequence], factor: float) -> dict[str, ModalitySequence]:
    return {
        name: ModalitySequence(sequence.values * factor, sequence.mask, sequence.present)
        for name, sequence in sequences.items()
    }


def labels_of(outputs: int, batch: int) -> torch.Tensor:
    extremes = torch.tensor([-3.0, 3.0, 3.0, -3.0])
    return (extremes if outputs == 1 else torch.tensor([0, 3, 3, 0]))[:batch]


def run(head, sequences, labels, teacher, half: torch.dtype | None, scale: float = 1.0):
    """Output of a head and, by name, the gradients of `scale` times its losses, under autocast to `half`."""
    head.zero_grad()
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        output = head(sequences, labels, teacher)
    (scale * sum(output.losses.values())).backward()
    gradients = {name: value.grad for name, value in head.named_parameters() if value.grad is not None}
    return output, gradients


def assert_finite(output, gradients) -> None:
    assert torch.isfinite(output.logits).all()
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32 and torch.isfinite(loss), name
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name


EXTREMES = {
    "states a hundred times too large": {"factor": 100.0},
    "teachers without any doubt": {"log_variance": -1e4},
    "teachers that know nothing": {"log_variance": 1e4},
    "teachers far apart": {"spread": 1e4},
    "one sample": {"batch": 1},
    "one modality each": {
        "present": [[True, False, False], [False, True, False], [False, False, True], [True, False, False]]
    },
    "nothing at all": {"present": (False, False, False)},
    "no audio in the whole batch": {"present": (True, False, True)},
    "a modality in one sample only": {"present": [[True, True, True]] + [[True, True, False]] * 3},
}


@every_half
@every_stage
@every_task
@pytest.mark.parametrize("extreme", EXTREMES)
def test_losses_and_gradients_stay_finite(extreme, outputs, stage, half, make_ebmc, make_sequences):
    given = {"factor": 1.0, "log_variance": 0.0, "spread": 1.0, "batch": BATCH, "present": ALL}
    given |= EXTREMES[extreme]
    head = make_ebmc(outputs, stage, **WIDE).float()
    sequences = make_sequences(given["batch"], given["present"], dtype=torch.float32)
    answers = torch.randn(given["batch"], 3, outputs + (outputs == 1)) * given["spread"]
    if outputs == 1:
        answers[..., 1] = given["log_variance"]
    labels = labels_of(outputs, given["batch"])
    # EMC is of fourth order in the states: huge ones need the small loss scale that a GradScaler arrives at
    scale = 2.0**-40 if half == torch.float16 and given["factor"] > 1 else 1.0
    assert_finite(*run(head, scaled(sequences, given["factor"]), labels, answers, half, scale))


@every_half
@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_a_log_variance_beyond_its_bounds_does_no_harm(bias, half, make_ebmc, make_sequences):
    head = make_ebmc().float()
    with torch.no_grad():
        for name in MODALITIES:
            head.predictors[name].bias[1] = bias
    teacher = torch.zeros(BATCH, 3, 2)
    sequences = make_sequences(dtype=torch.float32)
    assert_finite(*run(head, sequences, labels_of(1, BATCH), teacher, half))


@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@every_stage
@every_task
def test_on_ordinary_inputs_half_precision_is_near_fp32(
    outputs, stage, half, tolerance, make_ebmc, make_sequences
):
    head = make_ebmc(outputs, stage, **WIDE).float()
    sequences = make_sequences(dtype=torch.float32)
    teacher = torch.randn(BATCH, 3, outputs + (outputs == 1), generator=torch.Generator().manual_seed(1))
    exact, exact_gradients = run(head, sequences, labels_of(outputs, BATCH), teacher, None)
    exact_gradients = {name: value.clone() for name, value in exact_gradients.items()}
    rough, rough_gradients = run(head, sequences, labels_of(outputs, BATCH), teacher, half)
    torch.testing.assert_close(rough.logits.float(), exact.logits, rtol=tolerance, atol=tolerance)
    for name, loss in exact.losses.items():
        assert rough.losses[name].item() == pytest.approx(loss.item(), rel=tolerance), name
    one, other = (
        torch.cat([values[name].flatten() for name in exact_gradients])
        for values in (exact_gradients, rough_gradients)
    )
    assert (other - one).norm() < 2 * tolerance * one.norm()
