# SPDX-License-Identifier: Apache-2.0
"""The EBMC head in each of its stages, with each of its settings (docs/methods/ebmc.md)."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from msa_online import MSAConfig, MSAModel
from msa_online.methods import EBMCHead
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.training.config_reader import parse_arguments
from msa_online.training.yaml_reader import ConfigurationError

LABELS = torch.linspace(-2, 2, 4, dtype=torch.float64)
TEACHER = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
PRESENCES = list(itertools.product([True, False], repeat=3))
MIXED = [[True, True, True], [True, False, True], [False, True, False], [True, True, True]]
STAGES = ("enhance", "balance")
SWITCHES = [
    {"enhanced": enhanced, "missing_tokens": tokens, "cce": cce}
    for enhanced, tokens, cce in [
        *itertools.product(("fill", "off"), (False, True), ("paper", "shared")),
        ("replace", False, "paper"),
        ("residual", True, "shared"),
    ]
]
every_stage = pytest.mark.parametrize("stage", STAGES)
every_switch = pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda given: "-".join(map(str, given.values()))
)


@pytest.fixture(scope="session")
def make_ebmc(make_head):
    """A function that makes a small EBMC head, in its second stage if no other is named."""
    return partial(make_head, "ebmc", depth=2)


def gradients(head, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each parameter that `loss` depends on, by name."""
    named = dict(head.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def parts(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def shaken(module: torch.nn.Module) -> None:
    """Move every weight of a module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)


def test_the_first_stage_trains_all_but_what_fuses(make_ebmc, make_sequences):
    head = make_ebmc(stage="enhance", missing_tokens=True, learned_scalars=True)
    output = head(make_sequences(present=MIXED), LABELS, TEACHER)
    assert list(output.losses) == ["task", "msd", "cce"]
    reached = {name for name, value in gradients(head, sum(output.losses.values())).items() if value.any()}
    left_out = {name for name, _ in head.named_parameters()} - reached
    assert parts(left_out) == {"routers", "fusion", "classifier", "gain"}
    assert not parts(left_out) & parts(reached)


@pytest.mark.parametrize(
    "settings",
    [{}, {"cce": "shared", "uncertainty": "disagreement"}, {"missing_tokens": True, "learned_scalars": True}],
    ids=["paper", "reference", "tokens and scalars"],
)
@pytest.mark.parametrize("outputs", [1, 4])
def test_the_second_stage_trains_every_parameter(outputs, settings, make_ebmc, make_sequences):
    head = make_ebmc(outputs, **settings)
    labels = LABELS if outputs == 1 else torch.arange(4)
    output = head(make_sequences(present=MIXED), labels)
    assert list(output.losses) == ["task", "unimodal", "msd", "cce", "emc"]
    reached = gradients(head, sum(output.losses.values()))
    assert reached.keys() == {name for name, _ in head.named_parameters()}
    assert all(value.any() for value in reached.values())


def test_in_the_first_stage_nothing_is_said_of_the_fused_prediction(make_ebmc, make_sequences):
    output = make_ebmc(stage="enhance")(make_sequences())
    assert not output.fused_valid
    assert not output.logits.any() and not output.fused.any()
    assert make_ebmc(stage="balance")(make_sequences()).fused_valid
    assert EBMCHead({"text": 6, "audio": 5, "vision": 4}, 1).balancing  # a loaded model predicts


def test_each_modality_passes_its_own_expert_stack_first_and_all_of_them_later(make_ebmc, make_sequences):
    sequences = make_sequences()
    for number, name in enumerate(MODALITIES):
        for stage in STAGES:
            head = make_ebmc(stage=stage)
            before = head(sequences).features
            with torch.no_grad():
                for parameter in head.stacks.parameters():
                    parameter[number] += 0.1
            after = head(sequences).features
            changed = {m for m in MODALITIES if not torch.equal(before[m], after[m])}
            assert changed == ({name} if stage == "enhance" else set(MODALITIES))


def test_the_second_stage_starts_where_the_first_ended(make_ebmc, make_sequences):
    head = make_ebmc(stage="enhance")
    with torch.no_grad():
        for router in head.routers.values():
            router[-1].weight.zero_()
            router[-1].bias.zero_()
    enhanced = head(make_sequences()).features
    head.start_stage("balance")
    balanced = head(make_sequences()).features
    for name in MODALITIES:
        torch.testing.assert_close(balanced[name], enhanced[name], rtol=1e-12, atol=1e-12)


@every_stage
def test_nothing_is_filled_in_where_nothing_is_absent(stage, make_ebmc, make_sequences):
    outputs = [
        make_ebmc(stage=stage, enhanced=enhanced)(make_sequences(), LABELS, TEACHER)
        for enhanced in ("fill", "off")
    ]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert all(torch.equal(loss, outputs[1].losses[name]) for name, loss in outputs[0].losses.items())


@every_switch
def test_what_is_rebuilt_reaches_a_prediction_only_where_the_setting_says_so(
    switches, make_ebmc, make_sequences
):
    head, sequences = make_ebmc(**switches), make_sequences(present=MIXED)
    before = head(sequences).logits
    shaken(head.generators)
    changed = (head(sequences).logits != before).any(dim=1).tolist()
    where = {"fill": [not all(present) for present in MIXED], "off": [False] * len(MIXED)}
    assert changed == where.get(switches["enhanced"], [True] * len(MIXED))


@every_stage
@every_switch
def test_padding_changes_neither_prediction_nor_loss(stage, switches, make_ebmc, make_sequences):
    head, sequences = make_ebmc(stage=stage, **switches), make_sequences(present=MIXED)
    padded = {
        name: ModalitySequence(
            F.pad(sequence.values, (0, 0, 0, 3)), F.pad(sequence.mask, (0, 3)), sequence.present
        )
        for name, sequence in sequences.items()
    }
    one, other = (head(given, LABELS, TEACHER) for given in (sequences, padded))
    torch.testing.assert_close(other.logits, one.logits, rtol=0, atol=1e-10)
    for name, loss in one.losses.items():
        torch.testing.assert_close(other.losses[name], loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(head.teach(padded), head.teach(sequences), rtol=0, atol=1e-10)


@every_stage
@every_switch
def test_any_modalities_may_be_absent_under_every_switch(stage, switches, make_ebmc, make_sequences):
    head = make_ebmc(stage=stage, **switches)
    for present in PRESENCES:
        output = head(make_sequences(present=present), LABELS, TEACHER)
        assert torch.isfinite(output.logits).all()
        assert all(torch.isfinite(loss) for loss in output.losses.values())
        assert all(value.isfinite().all() for value in gradients(head, sum(output.losses.values())).values())


@every_stage
@every_switch
def test_the_model_is_blind_to_the_content_of_what_it_may_not_see(stage, switches, make_model, make_batch):
    model = make_model(**switches).eval()
    model.head.start_stage(stage)
    for column, hidden in enumerate(MODALITIES):
        present = tuple(number != column for number in range(3))
        batch, other = make_batch(present=present), make_batch(present=present, seed=1)
        swapped = batch | {key: other[key] for key in batch if key.startswith(hidden)}
        one, two = model(**batch), model(**swapped)
        assert torch.equal(one.logits, two.logits)
        assert all(torch.equal(loss, two.losses[name]) for name, loss in one.losses.items())


@pytest.fixture
def make_model(tiny_config):
    """A function that makes a whole tiny model with EBMC, under weights of its losses."""

    def make(weights: dict[str, float] | None = None, **settings) -> MSAModel:
        torch.manual_seed(0)
        head_kwargs = {"hidden_size": 8, "depth": 1, **settings}
        return MSAModel(
            MSAConfig(**{
                **tiny_config.to_dict(), "head": "ebmc", "head_kwargs": head_kwargs, "loss_weights": weights
            })
        )  # fmt: skip

    return make


@every_stage
def test_without_weights_only_the_task_is_left_bit_for_bit(stage, make_model, make_batch):
    model = make_model(dict.fromkeys(("unimodal", "msd", "cce", "emc", "imtd"), 0.0))
    model.head.start_stage(stage)
    output = model(**make_batch(), teacher=TEACHER)
    assert len(output.losses) == {"enhance": 3, "balance": 6}[stage]
    assert torch.equal(output.loss, output.losses["task"])


def test_the_loss_is_the_sum_under_its_weights(make_model, make_batch):
    weights = {"unimodal": 0.1, "msd": 0.5, "cce": 0.2, "emc": 0.3, "imtd": 0.4}
    output = make_model(weights)(**make_batch(), teacher=TEACHER)
    expected = sum({"task": 1.0, **weights}[name] * loss.item() for name, loss in output.losses.items())
    assert output.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("uncertainty", ["probabilistic", "disagreement"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_the_energies_never_train_the_predictors_they_are_read_from(
    outputs, uncertainty, make_ebmc, make_sequences
):
    head = make_ebmc(outputs, uncertainty=uncertainty)
    labels = LABELS if outputs == 1 else torch.arange(4)
    reached = gradients(head, head(make_sequences(), labels).losses["emc"])
    assert parts(reached) == {"projections", "stacks", "routers"}


def test_energies_that_no_state_can_change_move_no_state(make_ebmc, make_sequences):
    """Choice E16: unequal energies stay unequal where every gradient of an energy vanishes."""
    head = make_ebmc()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parts([name]) <= {"projections", "stacks", "routers"}:
                parameter.zero_()  # every z is 0
        for number, predictor in enumerate(head.predictors.values()):
            predictor.weight.zero_()
            predictor.bias[0] = float(number)
    output = head(make_sequences(), LABELS)
    assert not any(state.any() for state in output.features.values())
    assert output.losses["emc"] > 1
    reached = gradients(head, output.losses["emc"])
    assert not any(value.any() for value in reached.values())
    shaken(head.predictors)
    reached = gradients(head, head(make_sequences(), LABELS).losses["emc"])
    assert all(reached[f"projections.{name}.bias"].any() for name in MODALITIES)


def test_a_small_step_of_the_weights_down_the_gap_closes_it(make_ebmc, make_sequences):
    head = make_ebmc(energy_gradient=0.0)
    before = head(make_sequences(), LABELS)
    assert torch.equal(before.losses["emc"], before.diagnostics["emc/gap"])
    found = gradients(head, before.losses["emc"])
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name in found:
                parameter -= 1e-3 * found[name]
    after = head(make_sequences(), LABELS)
    assert after.losses["emc"] < before.losses["emc"]


def test_distillation_changes_what_fuses_and_what_it_is_read_from_only(make_ebmc, make_sequences):
    head = make_ebmc(learned_scalars=True)
    found = gradients(head, head(make_sequences(), LABELS, TEACHER).losses["imtd"])
    reached = {name for name, value in found.items() if value.any()}
    assert parts(reached) == {"projections", "stacks", "routers", "fusion", "classifier", "gain"}


@pytest.mark.parametrize("outputs", [1, 4])
def test_a_student_that_agrees_with_all_its_teachers_learns_nothing_more(outputs, make_ebmc, make_sequences):
    head, sequences = make_ebmc(outputs), make_sequences(present=MIXED)
    labels = LABELS if outputs == 1 else torch.arange(4)
    said = head(sequences).logits.detach().unsqueeze(1).expand(4, 3, outputs)
    sure = torch.zeros(4, 3, 1 if outputs == 1 else 0).double()
    loss = head(sequences, labels, torch.cat([said, sure], dim=-1)).losses["imtd"]
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert all(value.abs().max() < 1e-7 for value in gradients(head, loss).values())


def test_a_head_without_a_teacher_distils_nothing(make_ebmc, make_sequences):
    output = make_ebmc()(make_sequences(), LABELS)
    assert "imtd" not in output.losses and not any("trust" in name for name in output.diagnostics)


def test_energies_and_trust_are_there_to_be_watched_and_carry_no_gradient(make_ebmc, make_sequences):
    watched = make_ebmc()(make_sequences(), LABELS, TEACHER).diagnostics
    assert {f"{kind}/{name}" for kind in ("energy", "trust") for name in MODALITIES} < watched.keys()
    assert not any(value.requires_grad for value in watched.values())
    assert sum(watched[f"trust/{name}"].item() for name in MODALITIES) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("switch", "value", "settings"),
    [
        ("cce", "own", "paper, shared"),
        ("uncertainty", "entropy", "probabilistic, disagreement"),
        ("enhanced", "all", "fill, replace, residual, off"),
        ("teacher", "best", "private, state"),
    ],
)
def test_a_misspelt_switch_is_refused_with_those_there_are(switch, value, settings, make_ebmc):
    with pytest.raises(ValueError, match=f"{switch}='{value}'.*{settings}"):
        make_ebmc(**{switch: value})


def test_heads_that_do_not_divide_the_width_are_refused(make_ebmc):
    with pytest.raises(ValueError, match="hidden_size=8 is not a multiple of heads=3"):
        make_ebmc(heads=3)


def test_the_earlier_name_of_how_enhanced_features_enter_is_read_and_may_not_contradict(
    make_ebmc, make_sequences
):
    sequences = make_sequences(present=MIXED)
    former, named = make_ebmc(cce_in_fusion="off"), make_ebmc(enhanced="off")
    assert torch.equal(former(sequences).logits, named(sequences).logits)
    assert not torch.equal(make_ebmc()(sequences).logits, named(sequences).logits)
    with pytest.raises(ValueError, match="cce_in_fusion=off is an earlier name of enhanced=fill: give one"):
        make_ebmc(cce_in_fusion="off", enhanced="fill")


def test_an_unknown_reading_is_refused_with_those_there_are(make_ebmc):
    with pytest.raises(ValueError, match="readings='gap' must be one of .*gap_one_sided, trust_against"):
        make_ebmc(readings=["gap_one_sided", "gap"])


OFF = {"unimodal": 0.1, "msd": 0.5, "cce": 0.1, "emc": 0.1, "imtd": 0.1}
ABLATIONS = {  # weights, settings, and the parts that then take no part
    "without CCE": ({"cce": 0.0}, {"enhanced": "off"}, {"generators"}),
    "without MSD": ({"msd": 0.0}, {"teacher": "state"}, {"private_predictors"}),
    "without MSD and IMTD": ({"msd": 0.0, "imtd": 0.0}, {}, {"private_predictors"}),
    "without MSD and CCE": (
        {"msd": 0.0, "cce": 0.0},
        {"teacher": "state", "enhanced": "off"},
        {"generators", "private_predictors", "shared", "private", "norms"},
    ),
}


@every_stage
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_part_that_is_switched_off_gets_no_gradient_and_reaches_neither_prediction_nor_teacher(
    ablation, stage, make_ebmc, make_sequences
):
    changed, settings, left_out = ABLATIONS[ablation]
    head, sequences = make_ebmc(stage=stage, **settings), make_sequences(present=MIXED)
    weights = OFF | changed
    assert head.weights_problem(weights) is None
    output = head(sequences, LABELS, TEACHER)
    total = sum(weights.get(name, 1.0) * loss for name, loss in output.losses.items())
    found = gradients(head, total)
    assert left_out <= parts(dict(head.named_parameters()))
    assert not any(value.any() for name, value in found.items() if parts([name]) <= left_out)
    taught = head.teach(sequences)
    for name in left_out:
        shaken(getattr(head, name))
    assert torch.equal(head(sequences).logits, output.logits)
    assert weights["imtd"] == 0 or torch.equal(head.teach(sequences), taught)


@pytest.mark.parametrize(
    ("weights", "settings", "problem"),
    [
        ({"cce": 0}, {}, "cce: 0 .*set model.head_kwargs.enhanced to off"),
        ({"cce": 0}, {"enhanced": "fill"}, None),
        ({"msd": 0}, {}, "msd: 0 .*set imtd: 0 too, or model.head_kwargs.teacher=state"),
        ({"msd": 0}, {"teacher": "state"}, None),
        ({"msd": 0, "imtd": 0}, {}, None),
        ({}, {}, None),
    ],
)
def test_a_run_in_which_a_loss_would_distil_from_random_layers_does_not_start(weights, settings, problem):
    document = {
        "model": {
            "feature_widths": {"text": 6, "audio": 5, "vision": 4},
            "head": "ebmc",
            "head_kwargs": {"hidden_size": 8, "depth": 1, **settings},
            "loss_weights": weights,
        },
        "training": {"stages": [{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 1}]},
    }
    if problem is None:
        assert parse_arguments(document).model["loss_weights"] == weights
    else:
        with pytest.raises(ConfigurationError, match=f"model.loss_weights: {problem}"):
            parse_arguments(document)


def test_the_teacher_is_what_the_setting_says(make_ebmc, make_sequences):
    sequences = make_sequences()
    one, other = make_ebmc(teacher="private"), make_ebmc(teacher="state")
    expected = other(sequences).modality_logits
    for column, name in enumerate(MODALITIES):
        assert torch.equal(other.teach(sequences)[:, column, :1], expected[name])
    assert not torch.allclose(one.teach(sequences)[..., 0], other.teach(sequences)[..., 0])
    assert torch.equal(one.teach(sequences)[..., 1], other.teach(sequences)[..., 1])  # the log-variance


@pytest.mark.parametrize("outputs", [1, 4])
def test_an_explicit_step_of_the_energy_lowers_it_and_none_changes_nothing(
    outputs, make_ebmc, make_sequences
):
    sequences, settings = make_sequences(present=MIXED), {"energy_norm": 0.7, "energy_uncertainty": 1.3}
    head = make_ebmc(outputs, **settings)
    states = torch.stack(list(head(sequences).features.values()))
    present = torch.tensor(MIXED).T
    assert torch.equal(head._descend(states, present), states)

    def energies(states: Tensor) -> Tensor:
        """Of each modality and sample, without the loss."""
        predicted = torch.stack(
            [head.predictors[name](state) for name, state in zip(MODALITIES, states, strict=True)]
        )
        if outputs == 1:
            uncertainty = predicted[..., 1].clamp(-6, 3).exp()
        else:
            uncertainty = -(predicted.softmax(-1) * predicted.log_softmax(-1)).sum(-1)
        return 0.7 * states.square().mean(dim=-1) + 1.3 * uncertainty

    stepping = make_ebmc(outputs, **settings, energy_step=0.01)
    moved = stepping._descend(states, present)
    assert (energies(moved) < energies(states))[present].all()
    assert torch.equal(moved[~present], states[~present])
    nearby = 1e-6
    for width in range(states.shape[-1]):  # the direction, by finite differences
        bump = torch.zeros_like(states)
        bump[..., width] = nearby
        slope = (energies(states + bump) - energies(states - bump)) / (2 * nearby)
        expected = torch.where(present, -0.01 * slope, 0.0)
        torch.testing.assert_close((moved - states)[..., width], expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(stepping(sequences).logits, head(sequences).logits)


def test_energies_on_states_of_fixed_size_cannot_act_by_the_size(make_ebmc, make_sequences):
    for readings, along in ([], True), (["energy_fixed_norm"], False):
        head, sequences = make_ebmc(readings=readings), make_sequences()
        output = head(sequences, LABELS)
        for state in output.features.values():
            (pull,) = torch.autograd.grad(output.losses["emc"], state, retain_graph=True)
            radial = (pull * state).sum(dim=-1)
            assert pull.any()
            assert (radial.abs().max() > 1e-3) if along else (radial.abs().max() < 1e-12)
    values = [make_ebmc(readings=it)(sequences, LABELS).losses["emc"] for it in ([], ["energy_fixed_norm"])]
    torch.testing.assert_close(*values)


def test_msd_fades_over_the_second_stage_only_on_request(make_ebmc, make_sequences):
    for stage, readings, share in (
        ("balance", ["msd_annealed"], 0.25),
        ("balance", [], 1.0),
        ("enhance", ["msd_annealed"], 1.0),
    ):
        head = make_ebmc(stage=stage, readings=readings)
        whole = head(make_sequences(), LABELS).losses["msd"]
        head.start_epoch(0.75)
        torch.testing.assert_close(head(make_sequences(), LABELS).losses["msd"], share * whole)
        head.start_stage(stage)
        assert torch.equal(head(make_sequences(), LABELS).losses["msd"], whole)


def test_what_a_hidden_modality_is_rebuilt_from_is_the_others_alone(make_ebmc, make_sequences):
    head, sequences = make_ebmc(), make_sequences()
    before = head(sequences, LABELS).diagnostics
    shaken(head.shared["audio"])
    shaken(head.private["audio"])
    after = head(sequences, LABELS).diagnostics
    assert after["r2/audio"] == before["r2/audio"]
    assert after["r2/text"] != before["r2/text"] and after["r2/vision"] != before["r2/vision"]
    tokens, sequences = (
        make_ebmc(missing_tokens=True),
        make_sequences(6, [[True] * 3] * 3 + [[False, True, True], [True, False, True], [True, True, False]]),
    )
    before = tokens(sequences, torch.linspace(-2, 2, 6).double()).diagnostics
    shaken(tokens.missing)
    after = tokens(sequences, torch.linspace(-2, 2, 6).double()).diagnostics
    assert all(after[f"r2/{name}"] != before[f"r2/{name}"] for name in MODALITIES)
