# SPDX-License-Identifier: Apache-2.0
"""What every head promises, checked for each one in `HEADS`, in float64.

docs/adding_a_method.md explains the promises. The messages here are for the author of a new head.
"""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from msa_online import MSAConfig, MSAModel
from msa_online.methods import CALIBRATORS, HEADS, BalancingHead
from msa_online.modalities import MODALITIES, ModalitySequence

WIDTHS = {"text": 12, "audio": 10, "vision": 8}
STEPS = {"text": 7, "audio": 9, "vision": 5}
OUTPUTS = {"regression": 1, "classification": 4}
NEVER_A_GRADIENT: dict[str, set[str]] = {}
"""Parameters a head is known never to train, by head, each with its reason in the head's docstring."""

every_head = pytest.mark.parametrize("name", HEADS)
every_task = pytest.mark.parametrize("task", OUTPUTS)
every_calibrator = pytest.mark.parametrize("calibrator", CALIBRATORS)
PRESENCES = list(itertools.product([True, False], repeat=3))
MIXED = [[True, True, True], [True, False, True], [False, True, False], [True, True, False]]


def make_head(name: str, task: str = "regression", stage: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    head = HEADS[name](WIDTHS, OUTPUTS[task], hidden_size=16).double().eval()
    if stage:
        head.start_stage(stage)
    return head


def make_sequences(
    batch: int = 4, present=(True, True, True), seed: int = 0, steps=STEPS
) -> dict[str, ModalitySequence]:
    """Encoded batches; `present` is `(batch, 3)`, or one row for all."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.as_tensor(present).expand(batch, len(MODALITIES))
    sequences = {}
    for column, name in enumerate(MODALITIES):
        lengths = torch.randint(1, steps[name] + 1, (batch, 1), generator=generator)
        values = torch.randn(batch, steps[name], WIDTHS[name], generator=generator, dtype=torch.float64)
        sequence = ModalitySequence.of(values, torch.arange(steps[name]) < lengths)
        sequences[name] = sequence.only(there[:, column])
    return sequences


def make_labels(task: str, batch: int = 4) -> Tensor:
    return (
        torch.linspace(-2, 2, batch, dtype=torch.float64) if task == "regression" else torch.arange(batch) % 4
    )


def with_gradients(sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
    """The same batch as it comes from encoders that are trained."""
    return {
        name: replace(sequence, values=sequence.values.clone().requires_grad_())
        for name, sequence in sequences.items()
    }


def padded(sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
    return {
        name: ModalitySequence(
            nn.functional.pad(sequence.values, (0, 0, 0, 3)),
            nn.functional.pad(sequence.mask, (0, 3)),
            sequence.present,
        )
        for name, sequence in sequences.items()
    }


def first_sample(sequences: dict[str, ModalitySequence]) -> dict[str, ModalitySequence]:
    return {
        name: ModalitySequence(sequence.values[:1], sequence.mask[:1], sequence.present[:1])
        for name, sequence in sequences.items()
    }


def assert_same(found: Tensor, expected: Tensor, why: str, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{why}\n{text}")


def names_of(head: nn.Module, parameters) -> list[str]:
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    return [names.get(id(parameter), "one that is no parameter of the head") for parameter in parameters]


# how it is made and called


@every_head
def test_settings_are_keywords_with_defaults_and_hidden_size_is_one_of_them(name):
    """They come from `model.head_kwargs`; tests and tools make any head small by `hidden_size`."""
    first, second, *settings = inspect.signature(HEADS[name]).parameters.values()
    assert [first.name, second.name] == ["widths", "num_labels"], (
        f"{HEADS[name].__name__}.__init__ starts with (widths, num_labels), not ({first.name}, {second.name})"
    )
    for setting in settings:
        assert setting.kind is inspect.Parameter.KEYWORD_ONLY, (
            f"put {setting.name} behind a bare * in __init__"
        )
        assert setting.default is not inspect.Parameter.empty, f"give {setting.name} a default in __init__"
    assert "hidden_size" in [setting.name for setting in settings], (
        f"{HEADS[name].__name__}.__init__ has no keyword hidden_size, the width of its states"
    )
    asked = list(inspect.signature(HEADS[name].forward).parameters)
    wanted = ["self", "sequences", "labels", "teacher", *(["index"] if HEADS[name].keeps_samples else [])]
    assert asked == wanted, f"forward takes {asked}, not {wanted}"


@every_head
def test_stages_and_teachers_name_each_other_and_a_new_head_predicts(name):
    head = HEADS[name]
    assert head.stages and len(set(head.stages)) == len(head.stages), f"stages={head.stages}"
    for later, earlier in head.teachers.items():
        assert {later, earlier} <= set(head.stages), f"teachers={dict(head.teachers)}, stages={head.stages}"
        assert head.stages.index(earlier) < head.stages.index(later), f"{earlier} is not before {later}"
        assert head.teach is not BalancingHead.teach, f"{head.__name__} names teachers and defines no teach"
    assert make_head(name)(make_sequences()).fused_valid, (
        f"a new head is in its last stage, {head.stages[-1]!r}, where it predicts: fused_valid has to be True"
    )


@every_head
def test_its_methods_stand_in_the_order_of_the_base_class(name):
    """So that any two heads can be read side by side."""
    order = [key for key in vars(BalancingHead) if callable(getattr(BalancingHead, key))]
    found = [key for key in vars(HEADS[name]) if key in order]
    assert found == sorted(found, key=order.index), f"order the methods {found} as BalancingHead does"


# what it returns


@every_head
@every_task
def test_output_has_the_promised_shapes(name, task):
    outputs = OUTPUTS[task]
    for stage in HEADS[name].stages:
        output = make_head(name, task, stage)(make_sequences(), make_labels(task))

        def check(what: str, value: Tensor, *shape, stage=stage) -> None:
            fits = len(value.shape) == len(shape) and all(
                wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
            )
            assert fits, (
                f"{what} in stage {stage!r}: shape {tuple(value.shape)}, expected {shape} (None: any)"
            )

        check("logits", output.logits, 4, outputs)
        check("fused", output.fused, 4, None)
        assert tuple(output.features) == MODALITIES, f"features of {tuple(output.features)}, not {MODALITIES}"
        for modality, state in output.features.items():
            check(f"features[{modality!r}]", state, 4, None)
        if output.modality_logits:
            found = tuple(output.modality_logits)
            assert found == MODALITIES, f"modality_logits of {found}: of all of {MODALITIES}, or of none"
        for modality, logits in output.modality_logits.items():
            check(f"modality_logits[{modality!r}]", logits, 4, outputs)
        assert "task" in output.losses, f"no loss is called 'task' among {sorted(output.losses)}"
        unknown = set(output.losses) - set(HEADS[name].loss_names)
        assert not unknown, f"loss_names does not list {sorted(unknown)}: loss_weights could not name them"
        for term, loss in output.losses.items():
            check(f"losses[{term!r}]", loss)
        for key, value in output.diagnostics.items():
            assert "/" in key, f"diagnostics[{key!r}]: put a slash into the name, losses have none"
            assert not value.requires_grad, f"diagnostics[{key!r}] is not detached"
            check(f"diagnostics[{key!r}]", value)


@every_head
def test_without_labels_no_loss_is_computed(name):
    losses = make_head(name)(make_sequences()).losses
    assert losses == {}, f"no labels were given, but losses has {sorted(losses)}"


@every_head
@every_task
def test_labels_change_no_prediction(name, task):
    """They are unknown when it counts."""
    head, sequences = make_head(name, task), make_sequences(present=MIXED)
    blind, shown = head(sequences), head(sequences, make_labels(task))
    assert_same(shown.logits, blind.logits, "logits differ with and without labels", 0)
    for modality, logits in blind.modality_logits.items():
        why = f"modality_logits[{modality!r}] differs with and without labels"
        assert_same(shown.modality_logits[modality], logits, why, 0)


# absence, padding, batches


@every_head
@every_task
@pytest.mark.parametrize("present", PRESENCES)
def test_any_modalities_may_be_absent(name, task, present):
    head = make_head(name, task)
    output = head(make_sequences(present=present), make_labels(task))
    there = [modality for modality, is_there in zip(MODALITIES, present, strict=True) if is_there]
    assert torch.isfinite(output.logits).all(), f"logits are not finite when only {there} are there"
    sum(output.losses.values()).backward()
    gradients = {key: value.grad for key, value in head.named_parameters() if value.grad is not None}
    assert gradients, f"no parameter has a gradient when only {there} are there: DDP would stop"
    bad = [key for key, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    assert not bad, f"gradients of {bad} are not finite when only {there} are there"


@every_head
def test_an_absent_modality_looks_the_same_whatever_was_hidden(name):
    head = make_head(name)
    for column, hidden in enumerate(MODALITIES):
        present = tuple(number != column for number in range(3))
        one, other = (make_sequences(present=present, seed=seed) for seed in (0, 1))
        why = f"{hidden} is absent, and yet what was hidden changes the prediction"
        assert_same(head(one | {hidden: other[hidden]}).logits, head(one).logits, why)


@every_head
def test_padding_never_changes_a_result(name):
    head, sequences = make_head(name), make_sequences(present=MIXED)
    plain, longer = head(sequences), head(padded(sequences))
    assert_same(longer.logits, plain.logits, "three more padded steps change the prediction", 1e-10)
    for modality, state in plain.features.items():
        why = f"three more padded steps change features[{modality!r}]: use masked_mean"
        assert_same(longer.features[modality], state, why, 1e-10)


@every_head
def test_a_sample_is_judged_alone(name):
    head, sequences = make_head(name), make_sequences(present=MIXED)
    alone, together = head(first_sample(sequences)).logits, head(sequences).logits
    assert_same(alone, together[:1], "the other samples of its batch change the prediction of a sample")


@every_head
@every_calibrator
def test_behind_any_calibrator_absence_and_padding_stay_what_they_are(name, calibrator):
    torch.manual_seed(0)
    config = MSAConfig(
        feature_widths=WIDTHS, calibrator=calibrator, head=name, head_kwargs={"hidden_size": 8}
    )
    model = MSAModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.calibrator.parameters():  # one that has been trained
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    for present in PRESENCES:
        one, other = (make_sequences(present=present, seed=seed) for seed in (0, 1))
        logits = model.decide(one).logits
        assert torch.isfinite(logits).all(), f"logits are not finite for presence {present}"
        for modality, there in zip(MODALITIES, present, strict=True):
            if not there:
                mixed = model.decide(one | {modality: other[modality]}).logits
                assert_same(mixed, logits, f"what was hidden of {modality} changes the prediction")
        assert_same(model.decide(padded(one)).logits, logits, "padding changes the prediction", 1e-10)
        alone = model.decide(first_sample(one)).logits
        assert_same(alone, logits[:1], "the rest of its batch changes the prediction of a sample")


# each modality alone


@every_head
@every_task
@pytest.mark.parametrize("modality", MODALITIES)
def test_the_prediction_of_a_modality_alone_does_not_move_with_another(name, task, modality):
    """Modulators compare the modalities by these predictions, and tables call them unimodal."""
    changes = {
        "other values": make_sequences(seed=1),
        "other lengths": make_sequences(seed=2, steps={"text": 2, "audio": 3, "vision": 9}),
        "one step each": make_sequences(seed=3, steps=dict.fromkeys(MODALITIES, 1)),
        "absence": make_sequences(present=(False, False, False)),
    }
    for stage in HEADS[name].stages:
        head, sequences = make_head(name, task, stage), make_sequences()
        alone = head(sequences).modality_logits
        for change, others in changes.items():
            for moved in itertools.chain([None], MODALITIES):  # all others, or one of them
                kept = {
                    key: sequences[key] for key in MODALITIES if key == modality or moved not in (None, key)
                }
                found = head(others | kept).modality_logits
                if not alone:
                    assert not found, f"modality_logits come and go with {change} of {moved}"
                    continue
                assert_same(
                    found[modality],
                    alone[modality],
                    f"modality_logits[{modality!r}] in stage {stage!r} is not from {modality} alone: it "
                    f"moves with {change} of {moved or 'the others'}",
                )


# gradients


@every_head
def test_over_all_stages_every_parameter_receives_a_gradient(name):
    head = make_head(name)
    reached: set[str] = set()
    for stage in head.stages:
        head.start_stage(stage)
        for present in PRESENCES:
            head.zero_grad()
            # three samples: the slopes of absolute errors may cancel in an even number
            losses = head(make_sequences(3, present), make_labels("regression", 3)).losses
            sum(losses.values()).backward()
            reached |= {
                key for key, value in head.named_parameters() if value.grad is not None and value.grad.any()
            }
    everything = {key for key, _ in head.named_parameters()}
    assert everything - reached == NEVER_A_GRADIENT.get(name, set()), (
        "no loss of any stage trains these parameters: drop them, or list them in NEVER_A_GRADIENT"
    )


@every_head
@every_task
def test_the_fused_prediction_is_computed_from_the_features_that_are_reported(name, task):
    """Their gradients say where each modality is wanted; what is pooled on the side alone would have none."""
    head = make_head(name, task)
    output = head(with_gradients(make_sequences()), make_labels(task))
    for number in range(4):  # each sample's prediction from its own
        asked = output.logits[number, 0]
        gradients = torch.autograd.grad(asked, output.features.values(), retain_graph=True, allow_unused=True)
        for modality, gradient in zip(MODALITIES, gradients, strict=True):
            if modality not in head.fuses:
                assert gradient is None, (
                    f"fuses={head.fuses}, and yet logits depend on features[{modality!r}]"
                )
                continue
            assert gradient is not None, (
                f"logits have no gradient by features[{modality!r}]: report the tensor that the fusion "
                "reads, not a copy made beside it"
            )
            assert [row.any().item() for row in gradient] == [row == number for row in range(4)], (
                f"the logits of a sample depend on features[{modality!r}] of another, or not on its own"
            )


@every_head
def test_a_modality_that_is_not_fused_changes_no_prediction(name):
    head, sequences = make_head(name), make_sequences(present=MIXED)
    plain = head(sequences).logits
    for modality in set(MODALITIES) - set(head.fuses):
        for others in (make_sequences(present=MIXED, seed=1), make_sequences(present=False)):
            moved = head(sequences | {modality: others[modality]}).logits
            assert_same(moved, plain, f"fuses={head.fuses}, and yet {modality} changes the prediction", 0)


@every_head
def test_features_on_the_way_to_the_prediction_change_no_gradient_of_it(name):
    """Against finite differences: copies and differences of states must not count a step twice."""
    head, sequences = make_head(name), with_gradients(make_sequences())
    output = head(sequences)
    step = 1e-6
    for modality in head.fuses:
        sequence = sequences[modality]
        found = torch.autograd.grad(output.logits.sum(), sequence.values, retain_graph=True)[0]
        place = found.abs().flatten().argmax()
        assert found.flatten()[place], f"the prediction has no gradient by the states of {modality}"
        ends = []
        for shift in (step, -step):
            values = sequence.values.detach().clone()
            values.view(-1)[place] += shift
            moved = {key: replace(each, values=each.values.detach()) for key, each in sequences.items()}
            ends.append(head(moved | {modality: replace(sequence, values=values)}).logits.sum().item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found.flatten()[place].item() == pytest.approx(slope, rel=1e-5), (
            f"the gradient by the states of {modality} is not the slope of the prediction"
        )


@every_head
@every_task
@pytest.mark.parametrize("present", PRESENCES)
def test_the_gradients_by_the_features_can_be_differentiated_again(name, task, present):
    """`rebalance` trains on the direction of these gradients. Checked against finite differences."""
    head, sequences, labels = make_head(name, task), make_sequences(present=present), make_labels(task)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for buffer in head.buffers():  # as after some training
            if buffer.is_floating_point() and buffer.ndim > 1:
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
    states = head(with_gradients(sequences)).features
    wanted = {key: torch.randn(state.shape, generator=generator).double() for key, state in states.items()}

    def alignment(create_graph: bool) -> Tensor:
        """Cosines of the gradients by the features with where they are wanted, summed over samples."""
        output = head(with_gradients(sequences), labels)
        gradients = torch.autograd.grad(
            output.losses["task"],
            output.features.values(),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        cosines = [
            nn.functional.cosine_similarity(gradient, wanted[key], dim=-1) * sequences[key].present
            for key, gradient in zip(MODALITIES, gradients, strict=True)
        ]
        return torch.stack(cosines).sum()

    parameters = list(head.parameters())
    found = torch.autograd.grad(alignment(True), parameters, allow_unused=True, materialize_grads=True)
    bad = names_of(
        head, [p for p, gradient in zip(parameters, found, strict=True) if not gradient.isfinite().all()]
    )
    assert not bad, f"second derivatives by {bad} are not finite: roots and norms of zeros have none"
    if not any(there for key, there in zip(MODALITIES, present, strict=True) if key in head.fuses):
        return  # the prediction depends on no state
    assert any(gradient.any() for gradient in found), (
        "the gradient of the task loss by the features is a constant to autograd: nothing on the way from "
        "features to logits may be detached or computed under no_grad"
    )
    way = [torch.randn(parameter.shape, generator=generator).double() for parameter in parameters]
    step, ends = 1e-6, []
    for shift in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, way, strict=True):
                parameter += shift * direction
        ends.append(alignment(False).item())
    slope = (ends[0] - ends[1]) / (2 * step)
    along = sum((one * other).sum() for one, other in zip(found, way, strict=True)).item()
    assert along == pytest.approx(slope, rel=1e-4, abs=1e-7), (
        "second derivatives of the task loss, by features and parameters, are not those of finite differences"
    )


# what belongs to a modality


@every_head
def test_declared_ownership_is_of_the_heads_own_parameters_and_disjoint(name):
    head = make_head(name)
    owned = head.modality_parameters()
    assert tuple(owned) == MODALITIES, f"modality_parameters of {tuple(owned)}, not {MODALITIES}"
    everything = {id(parameter) for parameter in head.parameters()}
    for modality, parameters in owned.items():
        assert {id(parameter) for parameter in parameters} <= everything, (
            f"modality_parameters()[{modality!r}] has tensors that are no parameters of the head"
        )
    listed = list(itertools.chain(*owned.values()))
    counted = [id(parameter) for parameter in listed]
    twice = names_of(head, [parameter for parameter in listed if counted.count(id(parameter)) > 1])
    assert not twice, f"modality_parameters lists {sorted(set(twice))} more than once"


@every_head
def test_what_a_modality_owns_brings_it_to_the_fusion_and_nothing_else(name):
    """Modulators slow these parameters down: no predictor and no other modality may suffer from it."""
    head = make_head(name).train()
    torch.manual_seed(0)
    output = head(with_gradients(make_sequences(12, MIXED * 3)))
    for modality, parameters in head.modality_parameters().items():
        if not parameters:
            continue

        def unread(value: Tensor, parameters=parameters) -> list[str]:
            gradients = torch.autograd.grad(
                value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            pairs = zip(parameters, gradients, strict=True)
            return [*names_of(head, [parameter for parameter, gradient in pairs if not gradient.any()])]

        idle = unread(output.logits.square().sum())
        assert not idle, (
            f"modality_parameters()[{modality!r}] lists {idle}, which the fused prediction does not depend on"
        )
        for other in set(MODALITIES) - {modality}:
            free = unread(output.features[other].square().sum())
            bound = set(names_of(head, parameters)) - set(free)
            assert not bound, (
                f"modality_parameters()[{modality!r}] lists {sorted(bound)}, which features[{other!r}] "
                "depends on as well: they are shared"
            )


# saving


@every_head
def test_a_saved_head_predicts_the_same_when_it_is_loaded(name, tmp_path):
    """`from_pretrained` builds without weights: raw parameters and buffers start in `reset_parameters`."""
    torch.manual_seed(0)
    model = MSAModel(MSAConfig(feature_widths=WIDTHS, head=name, head_kwargs={"hidden_size": 8})).eval()
    model.save_pretrained(tmp_path)
    loaded = MSAModel.from_pretrained(tmp_path).eval()
    sequences = {
        key: ModalitySequence(sequence.values.float(), sequence.mask, sequence.present)
        for key, sequence in make_sequences(present=MIXED).items()
    }
    with torch.no_grad():
        assert_same(
            loaded.decide(sequences).logits, model.decide(sequences).logits, "loaded weights differ", 0
        )


@every_head
def test_every_module_can_start_again(name):
    for key, module in make_head(name).named_modules():
        raw = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
        if raw and not type(module).__module__.startswith("torch."):
            assert hasattr(module, "reset_parameters"), (
                f"{key or 'the head'} ({type(module).__name__}) has {sorted(raw)} of its own and no "
                "reset_parameters: put raw parameters into a module that has one"
            )
