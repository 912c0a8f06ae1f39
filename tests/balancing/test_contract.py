# SPDX-License-Identifier: Apache-2.0
"""What every head promises, whatever its method: run over all of `HEADS`, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from msa_online.balancing import HEADS
from msa_online.modalities import MODALITIES, ModalitySequence

WIDTHS = {"text": 12, "audio": 10, "vision": 8}
STEPS = {"text": 7, "audio": 9, "vision": 5}
OUTPUTS = {"regression": 1, "classification": 4}
NEVER_A_GRADIENT: dict[str, set[str]] = {}
"""Parameters a head is known never to train, by head, each with its reason in the head's docstring."""

every_head = pytest.mark.parametrize("name", HEADS)
every_task = pytest.mark.parametrize("task", OUTPUTS)
PRESENCES = list(itertools.product([True, False], repeat=3))


def make_head(name: str, task: str = "regression") -> torch.nn.Module:
    torch.manual_seed(0)
    return HEADS[name](WIDTHS, OUTPUTS[task], hidden_size=16).double().eval()


def make_sequences(batch: int = 4, present: tuple[bool, ...] = (True, True, True), seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    sequences = {}
    for name, there in zip(MODALITIES, present, strict=True):
        lengths = torch.randint(1, STEPS[name] + 1, (batch, 1), generator=generator)
        values = torch.randn(batch, STEPS[name], WIDTHS[name], generator=generator, dtype=torch.float64)
        sequence = ModalitySequence.of(values, torch.arange(STEPS[name]) < lengths)
        sequences[name] = sequence.only(torch.full((batch,), there))
    return sequences


def make_labels(task: str, batch: int = 4) -> torch.Tensor:
    return (
        torch.linspace(-2, 2, batch, dtype=torch.float64) if task == "regression" else torch.arange(batch) % 4
    )


@every_head
@every_task
def test_output_has_the_promised_shapes(name, task):
    output = make_head(name, task)(make_sequences(), make_labels(task))
    assert output.logits.shape == (4, OUTPUTS[task])
    assert output.fused.shape[0] == 4
    assert all(logits.shape == (4, OUTPUTS[task]) for logits in output.modality_logits.values())
    assert all(features.shape[0] == 4 for features in output.features.values())
    assert "task" in output.losses and set(output.losses) <= set(HEADS[name].loss_names)
    assert all(loss.shape == () for loss in output.losses.values())


@every_head
@every_task
@pytest.mark.parametrize("present", PRESENCES)
def test_any_modalities_may_be_absent(name, task, present):
    head = make_head(name, task)
    output = head(make_sequences(present=present), make_labels(task))
    assert torch.isfinite(output.logits).all()
    sum(output.losses.values()).backward()
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_head
def test_an_absent_modality_looks_the_same_whatever_was_hidden(name):
    head = make_head(name)
    for column in range(3):
        present = tuple(number != column for number in range(3))
        one, other = (make_sequences(present=present, seed=seed) for seed in (0, 1))
        hidden = MODALITIES[column]
        mixed = one | {hidden: other[hidden]}
        torch.testing.assert_close(head(one).logits, head(mixed).logits, atol=1e-12, rtol=0)


@every_head
def test_padding_never_changes_a_result(name):
    head = make_head(name)
    sequences = make_sequences()
    padded = {
        modality: ModalitySequence(
            torch.nn.functional.pad(sequence.values, (0, 0, 0, 3)),
            torch.nn.functional.pad(sequence.mask, (0, 3)),
            sequence.present,
        )
        for modality, sequence in sequences.items()
    }
    torch.testing.assert_close(head(padded).logits, head(sequences).logits, atol=1e-10, rtol=0)


@every_head
def test_a_sample_is_judged_alone(name):
    head = make_head(name)
    sequences = make_sequences()
    first = {
        modality: ModalitySequence(sequence.values[:1], sequence.mask[:1], sequence.present[:1])
        for modality, sequence in sequences.items()
    }
    torch.testing.assert_close(head(first).logits, head(sequences).logits[:1], atol=1e-12, rtol=0)


@every_head
def test_over_all_stages_every_parameter_receives_a_gradient(name):
    head = make_head(name)
    reached: set[str] = set()
    for stage in head.stages:
        head.start_stage(stage)
        for present in PRESENCES:
            head.zero_grad()
            sum(head(make_sequences(present=present), make_labels("regression")).losses.values()).backward()
            reached |= {
                key for key, value in head.named_parameters() if value.grad is not None and value.grad.any()
            }
    everything = {key for key, _ in head.named_parameters()}
    assert everything - reached == NEVER_A_GRADIENT.get(name, set())


@every_head
def test_declared_ownership_is_disjoint(name):
    owned = [id(value) for values in make_head(name).modality_parameters().values() for value in values]
    assert len(owned) == len(set(owned))


@every_head
@every_task
def test_the_fused_prediction_is_computed_from_the_features_that_are_reported(name, task):
    """Their gradients say where each modality is wanted; what is pooled on the side alone would have none."""
    head = make_head(name, task)
    assert head(make_sequences()).fused_valid
    sequences = {
        modality: replace(sequence, values=sequence.values.clone().requires_grad_())
        for modality, sequence in make_sequences().items()
    }
    output = head(sequences, make_labels(task))
    assert tuple(output.features) == MODALITIES
    for number in range(4):  # each sample's prediction from its own
        asked = output.logits[number, 0]
        gradients = torch.autograd.grad(asked, output.features.values(), retain_graph=True, allow_unused=True)
        for gradient in gradients:
            assert gradient is not None
            assert [row.any().item() for row in gradient] == [row == number for row in range(4)]


@every_head
def test_features_on_the_way_to_the_prediction_change_no_gradient_of_it(name):
    """Against finite differences: copies and differences of states must not count a step twice."""
    head = make_head(name)
    sequences = {
        modality: replace(sequence, values=sequence.values.clone().requires_grad_())
        for modality, sequence in make_sequences().items()
    }
    output = head(sequences)
    step = 1e-6
    for modality, sequence in sequences.items():
        found = torch.autograd.grad(output.logits.sum(), sequence.values, retain_graph=True)[0]
        place = found.abs().flatten().argmax()
        assert found.flatten()[place]
        ends = []
        for shift in (step, -step):
            values = sequence.values.detach().clone()
            values.view(-1)[place] += shift
            moved = {key: replace(each, values=each.values.detach()) for key, each in sequences.items()}
            ends.append(head(moved | {modality: replace(sequence, values=values)}).logits.sum().item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found.flatten()[place].item() == pytest.approx(slope, rel=1e-5), modality


@every_head
def test_without_labels_no_loss_is_computed(name):
    assert make_head(name)(make_sequences()).losses == {}
