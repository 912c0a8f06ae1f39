# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from msa_online.methods import LateFusionHead
from msa_online.modalities import MODALITIES, ModalitySequence
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 4, "vision": 5}


def test_forward_is_the_equation_in_its_docstring():
    torch.manual_seed(0)
    head = LateFusionHead(WIDTHS, 1, hidden_size=8).double().eval()
    state = head.state_dict()
    values = {name: torch.randn(1, 3, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    mask = torch.tensor([[True, True, False]])
    sequences = {name: ModalitySequence.of(value, mask) for name, value in values.items()}
    sequences["audio"] = sequences["audio"].only(torch.tensor([False]))

    def pooled(name: str) -> torch.Tensor:
        if name == "audio":
            return state["missing.tokens"][1]
        mean = (values[name][0, 0] + values[name][0, 1]) / 2
        normal = (mean - mean.mean()) / (
            mean.var(unbiased=False) + 1e-5
        ).sqrt()  # LayerNorm starts as the identity
        return F.gelu(state[f"projections.{name}.1.weight"] @ normal + state[f"projections.{name}.1.bias"])

    joined = torch.cat([pooled(name) for name in MODALITIES])
    hidden = F.gelu(state["fusion.0.weight"] @ joined + state["fusion.0.bias"])
    expected = state["classifier.weight"] @ hidden + state["classifier.bias"]
    assert_equation("5.2", "fused prediction", head(sequences).logits[0], expected, rtol=1e-7, atol=1e-7)


def test_unimodal_loss_counts_only_samples_that_have_the_modality():
    torch.manual_seed(0)
    head = LateFusionHead(WIDTHS, 1, hidden_size=8).double().eval()
    mask = torch.ones(2, 3, dtype=torch.bool)
    sequences = {
        name: ModalitySequence.of(torch.randn(2, 3, width, dtype=torch.float64), mask)
        for name, width in WIDTHS.items()
    }
    sequences["text"] = sequences["text"].only(torch.tensor([True, False]))
    labels = torch.tensor([1.0, -2.0], dtype=torch.float64)
    output = head(sequences, labels)
    errors = {name: (logits.squeeze(-1) - labels) ** 2 for name, logits in output.modality_logits.items()}
    expected = errors["text"][0] + errors["audio"].mean() + errors["vision"].mean()
    assert_equation("5.3", "loss unimodal", output.losses["unimodal"], expected, rtol=1e-7, atol=1e-7)


def test_the_deviation_over_time_is_pooled_beside_the_mean_where_asked():
    torch.manual_seed(0)
    head = LateFusionHead(WIDTHS, 1, hidden_size=8, deviation=["audio"]).double().eval()
    values = {name: torch.randn(1, 4, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    mask = torch.tensor([[True, True, True, False]])
    sequences = {name: ModalitySequence.of(value, mask) for name, value in values.items()}
    seen = values["audio"][0, :3]
    moments = torch.cat([seen.mean(0), seen.std(0, correction=0)])
    for name, pooled in {"audio": moments, "text": values["text"][0, :3].mean(0)}.items():
        expected = head.projections[name](pooled)
        found = head(sequences).features[name][0]
        assert_equation("5.1", f"h of {name}", found, expected, rtol=1e-5, atol=1e-5)


def test_a_single_step_has_no_deviation_and_a_finite_gradient():
    head = LateFusionHead(WIDTHS, 1, hidden_size=8, deviation=MODALITIES)
    values = {name: torch.randn(2, 1, width, requires_grad=True) for name, width in WIDTHS.items()}
    mask = torch.tensor([[True], [False]])
    sequences = {name: ModalitySequence.of(value, mask) for name, value in values.items()}
    head(sequences).logits.sum().backward()
    assert all(value.grad.isfinite().all() for value in values.values())


def test_a_deviation_of_no_modality_is_refused():
    with pytest.raises(ValueError, match="deviation='sound' must be one of text, audio, vision"):
        LateFusionHead(WIDTHS, 1, deviation=["sound"])


def test_without_the_norm_the_size_of_a_sample_counts():
    torch.manual_seed(0)
    head = LateFusionHead(WIDTHS, 1, hidden_size=8, input_norm=False).double().eval()
    normed = LateFusionHead(WIDTHS, 1, hidden_size=8).double().eval()
    values = {name: torch.randn(1, 3, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    mask = torch.tensor([[True, True, False]])

    def features(head: LateFusionHead, scale: float) -> dict[str, torch.Tensor]:
        return head(
            {name: ModalitySequence.of(scale * value, mask) for name, value in values.items()}
        ).features

    for name in MODALITIES:
        linear = head.projections[name][1]
        mean = (values[name][0, 0] + values[name][0, 1]) / 2
        expected = F.gelu(linear.weight @ (3 * mean) + linear.bias)
        assert_equation("5.1", f"h of {name}", features(head, 3.0)[name][0], expected, rtol=1e-7, atol=1e-7)
        # the norm removes the size, up to its small constant
        torch.testing.assert_close(
            features(normed, 300.0)[name], features(normed, 900.0)[name], rtol=1e-6, atol=1e-6
        )


def test_further_layers_of_a_modality_follow_the_first():
    torch.manual_seed(0)
    head = LateFusionHead(WIDTHS, 1, hidden_size=8, depth=3).double().eval()
    values = {name: torch.randn(1, 1, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    mask = torch.ones(1, 1, dtype=torch.bool)
    features = head({name: ModalitySequence.of(value, mask) for name, value in values.items()}).features
    for name in MODALITIES:
        norm, first, second, third = (head.projections[name][place] for place in (0, 1, 4, 7))
        expected = F.gelu(third(F.gelu(second(F.gelu(first(norm(values[name][0, 0])))))))
        assert_equation("5.1", f"h of {name}", features[name][0], expected, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        LateFusionHead(WIDTHS, 1, depth=0)
