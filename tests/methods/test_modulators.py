# SPDX-License-Identifier: Apache-2.0
"""What every modulator promises, whatever its method, and whose parameters a modality's are."""

import copy
import inspect
import itertools

import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.methods import HEADS, MODULATORS, GradientModulator, ModulationContext
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAOutput

every_modulator = pytest.mark.parametrize("name", MODULATORS)


def takes(name: str, setting: str) -> bool:
    return setting in inspect.signature(MODULATORS[name]).parameters


with_a_window = pytest.mark.parametrize("name", [name for name in MODULATORS if takes(name, "epochs")])


NEUTRAL = {"rebalance": {"strength": 1.5}}
"""With what a modulator leaves modalities alone that do equally well, where its default does not."""


def make(name: str, step: "Step | None" = None, **settings) -> GradientModulator:
    """A modulator as it comes, acting in every epoch; settings it does not have are left out.

    It is attached to the model of `step`, which is asked anew.
    """
    settings = {"epochs": None, "latest": 0, **settings}
    modulator = MODULATORS[name](**{key: value for key, value in settings.items() if takes(name, key)})
    if step is not None:
        widths = {name: state.shape[-1] for name, state in step.output.features.items()}
        modulator.attach(step.model, widths, step.output.fused.shape[-1])
        step.output = step.model(**step.batch, output_internals=True)
    return modulator


class Step:
    """The tiny model between backward and step: some samples lack a modality, some parameters a gradient."""

    def __init__(self, config: MSAConfig, batch: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        self.model = MSAModel(config).eval()  # in evaluation nothing is random
        self.labels = batch["labels"]
        batch["modality_present"][0, 1] = batch["modality_present"][1, 2] = False
        self.batch = batch
        self.output = self.model(**batch, output_internals=True)
        self.owned = self.model.modality_parameters()

    def backward(self) -> "Step":
        self.output.loss.backward(retain_graph=True)
        for values in self.owned.values():
            values[-1].grad = None
        return self

    def gradients(self) -> dict[str, torch.Tensor | None]:
        return {
            name: None if value.grad is None else value.grad.clone()
            for name, value in self.model.named_parameters()
        }

    def owners(self) -> dict[str, str]:
        names = {id(value): name for name, value in self.model.named_parameters()}
        return {names[id(value)]: modality for modality, values in self.owned.items() for value in values}

    def modulate(self, modulator: GradientModulator, epoch: int = 0, step: int = 4, output=None):
        """What `modulator` does with the gradients that are there; it says it, and changes them."""
        seen = modulator.observe(output or self.output, self.labels) | modulator.measure(self.owned)
        statistics = {name: value.item() for name, value in seen.items()}
        context = ModulationContext(self.owned, statistics, stage="train", epoch=epoch, step=step, seed=9)
        return modulator.modulate(context)


@pytest.fixture
def step(tiny_config, make_batch) -> Step:
    return Step(tiny_config, make_batch(6))


def same(one: dict[str, torch.Tensor | None], other: dict[str, torch.Tensor | None]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if one[name] is not None else other[name] is None for name in one
    )


@every_modulator
def test_only_gradients_of_its_own_modalities_are_touched(name, step):
    modulator = make(name, step)
    if name == "shapley":  # an epoch says what the coefficients of the next are
        step.modulate(modulator, epoch=-1)
    before = step.backward().gradients()
    modulation = step.modulate(modulator)
    owners, after = step.owners(), step.gradients()
    others = [key for key in before if owners.get(key) not in modulator.modalities]
    assert same({key: before[key] for key in others}, {key: after[key] for key in others})
    shared = [key for key in others if key not in owners]
    assert {"head.classifier.weight", "head.fusion.0.weight", "head.unimodal.text.weight"} <= set(shared)
    changed = {owners[key] for key in before if before[key] is not None and (before[key] != after[key]).any()}
    spared = set()
    if name == "shapley":  # the least contributing, and others that do harm like it
        spared = {each for each in MODALITIES if modulation.log[f"coefficient/{each}"] == 1}
        assert spared and spared != set(MODALITIES)
    assert changed == set(modulator.modalities) - spared


@every_modulator
def test_parameters_without_a_gradient_are_passed_over(name, step):
    modulator = make(name, step)
    before = step.backward().gradients()
    step.modulate(modulator)
    after = step.gradients()
    assert {key for key, value in after.items() if value is None} == {
        key for key, value in before.items() if value is None
    }
    assert all(torch.isfinite(value).all() for value in after.values() if value is not None)


@every_modulator
def test_a_model_without_any_gradient_breaks_nothing(name, step):
    step.modulate(make(name, step))
    assert all(value is None for value in step.gradients().values())


@every_modulator
def test_equally_good_modalities_without_noise_change_nothing_bit_for_bit(name, step):
    modulator = make(name, step, noise=0, **NEUTRAL.get(name, {}))
    everyone = torch.ones(6, dtype=torch.bool)
    alike = dict.fromkeys(MODALITIES, torch.full((6, 1), 0.5))
    nobody = torch.zeros(6, dtype=torch.bool)
    equal = MSAOutput(
        logits=torch.full((6, 1), 0.8),
        modality_logits=alike,
        probe_logits=alike,
        present=dict.fromkeys(MODALITIES, everyone),
        fused_valid=True,
        sequences={name: sequence.only(nobody) for name, sequence in step.output.sequences.items()},
    )
    for number in range(2):
        for parameter in step.model.parameters():
            parameter.grad = None
        before = step.backward().gradients()
        modulation = step.modulate(modulator, output=equal, step=number)
        assert same(step.gradients(), before)
        log = {} if modulation is None else modulation.log
        found = [value for key, value in log.items() if key.startswith("coefficient/")]
        assert found == pytest.approx([1.0] * len(modulator.modalities), abs=1e-12)


@with_a_window
@pytest.mark.parametrize("apply", ["gradient", "lr"])
def test_the_first_and_the_last_epoch_of_its_window_are_in_and_others_are_out(name, apply, step):
    modulator = make(name, step, epochs=(2, 4), apply=apply, noise=0)
    acts = {}
    for epoch in range(7):
        for parameter in step.model.parameters():
            parameter.grad = None
        before = step.backward().gradients()
        modulation = step.modulate(modulator, epoch=epoch)
        acts[epoch] = not same(step.gradients(), before) or any(
            rate != 1 for rate in modulation.rates.values()
        )
        assert modulator.acts_in(epoch) == acts[epoch]
    assert [epoch for epoch, acted in acts.items() if acted] == [2, 3, 4]


@with_a_window
def test_noise_ends_with_the_window_too(name, step):
    modulator = make(name, step, epochs=(0, 1))
    before = step.backward().gradients()
    step.modulate(modulator, epoch=2)
    assert same(step.gradients(), before)


@every_modulator
def test_looking_changes_nothing_and_keeps_no_graph(name, step):
    modulator = make(name, step)
    weights = {key: value.clone() for key, value in step.model.state_dict().items()}
    plain = step.backward().gradients()
    for parameter in step.model.parameters():
        parameter.grad = None
    seen = modulator.observe(step.output, step.labels)
    before = step.backward().gradients()
    measured = modulator.measure(step.owned)
    assert same(before, plain) and same(step.gradients(), before)
    assert same(step.model.state_dict(), weights)
    for key, value in (seen | measured).items():
        assert value.shape == () and not value.requires_grad and value.grad_fn is None, key


@every_modulator
def test_what_it_keeps_survives_an_interruption(name, step):
    whole, stopped, resumed = (make(name, step) for _ in range(3))
    for number in range(2):
        step.modulate(whole, step=number)
        step.modulate(stopped, step=number)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for number in (2, 3):
        ends = []
        for modulator in (whole, resumed):
            for parameter in step.model.parameters():
                parameter.grad = None
            step.backward()
            modulation = step.modulate(modulator, step=number)
            ends.append((step.gradients(), modulation))
        assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


@every_modulator
def test_what_it_says_can_be_recorded(name, step):
    """Names with a slash are diagnostics in the record of an epoch, and numbers have to be finite."""
    modulator = make(name, step)
    step.backward()
    modulation = step.modulate(modulator)
    for key, value in (modulation.log if modulation else {}).items():
        assert "/" in key and type(value) is float and abs(value) < float("inf"), key


def models(tiny_config: MSAConfig) -> dict[str, MSAConfig]:
    """A configuration for each head, on raw clips and on precomputed features."""
    widths = {"text": 6, "audio": 4, "vision": 5}
    clips = tiny_config.to_dict()
    return {
        **{
            f"{head} on clips": MSAConfig(**{**clips, "head": head, "head_kwargs": {"hidden_size": 8}})
            for head in HEADS
        },
        **{
            f"{head} on features": MSAConfig(
                feature_widths=widths, head=head, head_kwargs={"hidden_size": 8}, label_range=[-3, 3]
            )
            for head in HEADS
        },
    }


@pytest.mark.parametrize("kind", [f"{head} on {kind}" for head in HEADS for kind in ("clips", "features")])
def test_a_parameter_belongs_to_one_modality_or_to_all(kind, tiny_config):
    model = MSAModel(models(tiny_config)[kind])
    owned = model.modality_parameters()
    assert tuple(owned) == MODALITIES
    numbers = [id(value) for value in itertools.chain(*owned.values())]
    assert len(numbers) == len(set(numbers))
    names = {id(value): name for name, value in model.named_parameters()}
    assert set(numbers) <= set(names)
    for modality in MODALITIES:
        of_encoder = {id(value) for value in model.encoders[modality].parameters()}
        assert of_encoder <= {id(value) for value in owned[modality]}
    shared = {name for number, name in names.items() if number not in numbers}
    assert shared and all(name.startswith(("head.", "calibrator.")) for name in shared)


@pytest.mark.parametrize("kind", [f"{head} on {kind}" for head in HEADS for kind in ("clips", "features")])
def test_what_belongs_to_a_modality_depends_on_it_alone(kind, tiny_config, make_batch):
    """Parameters that also read another modality would be damped for the wrong reason."""
    config = models(tiny_config)[kind]
    torch.manual_seed(0)
    model = MSAModel(config).eval()
    owned = model.modality_parameters()
    batch = make_batch(3)
    if config.feature_widths:
        generator = torch.Generator().manual_seed(0)
        batch = {"labels": batch["labels"], "modality_present": batch["modality_present"]}
        for name, width in config.feature_widths.items():
            batch[f"{name}_values"] = torch.randn(3, 4, width, generator=generator)
            batch[f"{name}_mask"] = torch.ones(3, 4, dtype=torch.bool)
    for column, hidden in enumerate(MODALITIES):
        model.zero_grad()
        present = batch["modality_present"].clone()
        present[:, column] = False
        model(**{**batch, "modality_present": present}).losses["task"].backward()
        reached = [value for value in owned[hidden] if value.grad is not None and value.grad.any()]
        names = {id(value): name for name, value in model.named_parameters()}
        assert not reached, [names[id(value)] for value in reached]
