# SPDX-License-Identifier: Apache-2.0
"""A modulator that does not fit its settings, the model, the schedule or the launch is refused at once."""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from msa_online import MSAConfig, MSAModel
from msa_online.layers.losses import task_loss
from msa_online.layers.modules import masked_mean
from msa_online.methods import HEADS, MODULATORS, BalancingHead, GradientModulator, HeadOutput
from msa_online.modalities import MODALITIES
from msa_online.training.config import TrainingArguments
from msa_online.training.config_reader import parse_arguments
from msa_online.training.modulator import make_modulator
from msa_online.training.run import train as train_run
from msa_online.training.yaml_reader import ConfigurationError

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
REAL = [name for name in MODULATORS if name != "identity"]


def document(modulator: str, **settings) -> dict:
    return {
        "model": {"feature_widths": WIDTHS},
        "data": {"path": "features.npz"},
        "training": {"modulator": modulator, "modulator_kwargs": settings},
    }


IMPOSSIBLE = [
    ({"modalities": ["audio", "video"]}, "modalities name 'video': choose among text, audio, vision"),
    ({"modalities": ["audio"]}, r"modalities=\['audio'\] must name at least two to compare"),
    ({"modalities": []}, r"modalities=\[\] must name at least two to compare"),
    ({"modalities": ["audio", "audio"]}, r"modalities=\['audio', 'audio'\] .*each once"),
    ({"modalities": ["audio", "vision", "audio"]}, "modalities=.*each once"),
    ({"epochs": [5, 3]}, r"epochs=\[5, 3\] is no range: give the first and the last epoch"),
    ({"epochs": [-1, 3]}, r"epochs=\[-1, 3\] is no range"),
    ({"epochs": [3]}, r"epochs=\[3\] is no range"),
    ({"epochs": [1, 2, 3]}, r"epochs=\[1, 2, 3\] is no range"),
    ({"apply": "both"}, "apply='both'.* must be one of gradient, lr"),
    ({"noise": -0.1}, "noise=-0.1 must be at least 0"),
    ({"strength": 0.0}, "strength=0.0 must be above 0"),
    ({"strength": -1.5}, "strength=-1.5 must be above 0"),
]
OF_CONFLICT = [
    ({"penalty": 0.0}, "penalty=0.0 must be above 0 and at most 1"),
    ({"penalty": 1.1}, "penalty=1.1 must be above 0 and at most 1"),
    ({"shift": 0.5}, "shift=0.5 must be 0, as printed, or 1"),
    ({"norm": "max"}, "norm='max' must be one of mean, rms"),
]
OF_REBALANCE = [
    ({"spatial_weight": -0.1}, "spatial_weight=-0.1 must be at least 0"),
    ({"progress": "kld"}, "progress='kld' must be one of kl, mse"),
    ({"guard": "clip"}, "guard='clip' must be one of smooth, none"),
    ({"spatial": "weights"}, "spatial='weights' must be one of latent, off"),
    ({"mod_form": "code"}, "mod_form='code' must be one of cggm, abs"),
]
OF_SHAPLEY = [
    ({"utility": "loss"}, "utility='loss' must be one of task, prototype"),
    ({"switch": "entropy"}, "switch='entropy' must be one of plateau, fixed"),
    ({"warmup": -1}, "warmup=-1 must be at least 0"),
    ({"patience": 0}, "patience=0 must be at least 1"),
    ({"min_delta": -0.1}, "min_delta=-0.1 must be at least 0"),
    ({"latest": -1}, "latest=-1 must be at least 0"),
    ({"interval": 0}, "interval=0 must be at least 1"),
]


def takes(modulator: str, settings: dict) -> bool:
    return set(settings) <= set(inspect.signature(MODULATORS[modulator]).parameters)


CASES = [(modulator, *case) for modulator in REAL for case in IMPOSSIBLE if takes(modulator, case[0])]
OF_ONE = {"conflict": OF_CONFLICT, "rebalance": OF_REBALANCE, "shapley": OF_SHAPLEY}
CASES += [(modulator, *case) for modulator in REAL for case in OF_ONE.get(modulator, [])]
WITH_A_WINDOW = [modulator for modulator in REAL if takes(modulator, {"epochs": None})]


@pytest.mark.parametrize(("modulator", "settings", "named"), CASES)
def test_a_setting_that_cannot_work_is_refused_naming_it_and_what_is_allowed(modulator, settings, named):
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: training\.modulator_kwargs.*{named}"):
        parse_arguments(document(modulator, **settings), origin="run.yaml")


NOT_IN_YAML = [
    ({"modalities": "audio"}, "modalities='audio' must be a list, like"),
    ({"epochs": 25}, "epochs=25 is no range"),
    ({"epochs": (float("nan"), 3)}, "epochs=.*is no range"),
    ({"noise": float("nan")}, "noise=nan must be at least 0"),
    ({"noise": float("inf")}, "noise=inf must be at least 0"),
    ({"strength": float("inf")}, "strength=inf must be above 0"),
]


IN_CODE = [
    (modulator, *case) for modulator in REAL for case in IMPOSSIBLE + NOT_IN_YAML if takes(modulator, case[0])
]


@pytest.mark.parametrize(("modulator", "settings", "named"), IN_CODE)
def test_a_modulator_made_in_code_refuses_it_too(modulator, settings, named):
    with pytest.raises(ValueError, match=named):
        MODULATORS[modulator](**settings)


OF_ANOTHER_KIND = [
        ({"noise": "high"}, "'high'.*float"),
        ({"noise": float("nan")}, "nan"),
        ({"noise": float("inf")}, "inf"),
        ({"strength": True}, "True.*float"),
        ({"strength": None}, "None.*float"),
        ({"epochs": ["first", "last"]}, "'first'.*int"),
        ({"epochs": [0.5, 3]}, "0.5.*int"),
        ({"epochs": [float("nan"), 3]}, "nan.*int"),
        ({"epochs": "03"}, "'03'.*list"),
        ({"epochs": 25}, "25.*list"),
        ({"modalities": 3}, "3.*list"),
        ({"modalities": "audio"}, "'audio'.*list"),
        ({"modalities": None}, "None.*list"),
        ({"modalities": [["audio"], ["vision"]]}, "audio.*str"),
        ({"spatial_weight": float("nan")}, "nan.*float"),
        ({"progress": None}, "None.*str"),
        ({"spatial": 0}, "0.*str"),
        ({"interval": 1.5}, "1.5.*int"),
        ({"min_delta": "much"}, "'much'.*float"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("modulator", "settings", "value"),
    [(modulator, *case) for modulator in REAL for case in OF_ANOTHER_KIND if takes(modulator, case[0])],
    ids=str,
)
def test_a_setting_of_the_wrong_kind_is_refused_naming_it_and_its_value(modulator, settings, value):
    (name,) = settings
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: training\.modulator_kwargs\.{name}.*{value}"):
        parse_arguments(document(modulator, **settings), origin="run.yaml")


@pytest.mark.parametrize("modulator", [modulator for modulator in REAL if takes(modulator, {"strength": 1})])
def test_a_keyword_that_no_modulator_has_is_refused_naming_the_nearest(modulator):
    expected = r"run\.yaml: .*'training\.modulator_kwargs.strenth'.*'strength'"
    with pytest.raises(ConfigurationError, match=expected):
        parse_arguments(document(modulator, strenth=1.0), origin="run.yaml")


@pytest.mark.parametrize("modulator", WITH_A_WINDOW)
def test_what_is_allowed_is_taken(modulator):
    noisy = takes(modulator, {"noise": 0})
    for epochs, inside, outside in ((None, 1000, None), ([0, 0], 0, 1), ([2, 4], 4, 5)):
        settings = {"epochs": epochs, "strength": "1e-1"} | ({"noise": 0} if noisy else {})
        arguments = parse_arguments(document(modulator, **settings))
        made = MODULATORS[modulator](**arguments.training.modulator_kwargs)
        assert made.acts_in(inside) and (outside is None or not made.acts_in(outside))
        assert made.strength == 0.1  # YAML takes 1e-1 for a word
        assert not noisy or made.noise == 0.0
    two = MODULATORS[modulator](modalities=["vision", "text"], apply="lr")
    assert (two.modalities, two.apply) == (("vision", "text"), "lr")


class Halving(GradientModulator):
    """A modulator of a user's own, who annotates nothing."""

    def __init__(self, factor=0.5):
        self.factor = factor


def test_a_modulator_of_ones_own_needs_no_annotations(monkeypatch):
    monkeypatch.setitem(MODULATORS, "halving", Halving)
    assert parse_arguments(document("halving", factor=0.25)).training.modulator_kwargs == {"factor": 0.25}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def features_model(head: str) -> MSAModel:
    return MSAModel(MSAConfig(feature_widths=WIDTHS, head=head, head_kwargs={"hidden_size": 8}))


def training(modulator: str, **settings) -> TrainingArguments:
    return TrainingArguments(modulator=modulator, modulator_kwargs=settings)


@pytest.mark.needs("cpsl", "ogm")
def test_a_modality_without_parameters_of_its_own_is_refused_naming_those_that_have_some(accelerator):
    model = features_model("cpsl")  # its text is not encoded, and features have no encoder
    expected = (
        r"training.modulator=ogm acts on text, but model.head=cpsl has no trained parameters of its own for "
        r"text: set training.modulator_kwargs.modalities=\[audio, vision\]"
    )
    with pytest.raises(ConfigurationError, match=expected):
        make_modulator(training("ogm"), model, 10, accelerator)
    assert make_modulator(training("conflict"), model, 10, accelerator).modalities == ("audio", "vision")
    chosen = training("ogm", modalities=["audio", "vision"])  # the remedy
    assert make_modulator(chosen, model, 10, accelerator).modalities == ("audio", "vision")


@pytest.mark.needs("cpsl", "shapley")
def test_a_modulator_of_all_modalities_is_refused_a_head_without_a_remedy_it_does_not_have(accelerator):
    expected = "shapley acts on text, .*: use another head, or training.modulator=identity"
    with pytest.raises(ConfigurationError, match=expected):
        make_modulator(training("shapley"), features_model("cpsl"), 10, accelerator)


@pytest.mark.needs("pase")
def test_a_utility_that_needs_prototypes_is_refused_a_head_without_naming_one_that_works(accelerator):
    expected = (
        "training.modulator=shapley: utility=prototype needs model.head=pase, not late_fusion, .*"
        "set training.modulator_kwargs.utility=task"
    )
    with pytest.raises(ConfigurationError, match=expected):
        make_modulator(
            training("shapley", utility="prototype"), features_model("late_fusion"), 10, accelerator
        )
    for head, utility in (("pase", "prototype"), ("late_fusion", "task")):
        assert make_modulator(training("shapley", utility=utility), features_model(head), 10, accelerator)


@pytest.mark.needs("cpsl", "ogm")
def test_a_frozen_text_encoder_without_a_projection_of_the_head_has_nothing_to_modulate(
    accelerator, tiny_config
):
    clips = {**tiny_config.to_dict(), "head_kwargs": {"hidden_size": 8}}
    models = {head: MSAModel(MSAConfig(**{**clips, "head": head})) for head in ("cpsl", "late_fusion")}
    assert make_modulator(training("ogm"), models["cpsl"], 10, accelerator)
    for model in models.values():
        model.encoders["text"].freeze()
    with pytest.raises(ConfigurationError, match=r"acts on text, .*modalities=\[audio, vision\]"):
        make_modulator(training("ogm"), models["cpsl"], 10, accelerator)
    assert make_modulator(training("ogm"), models["late_fusion"], 10, accelerator)  # has one


class FusedOnlyHead(BalancingHead):
    """A head that predicts from all modalities together alone."""

    def __init__(self, widths, num_labels, *, hidden_size=8):
        super().__init__()
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, hidden_size) for name, width in widths.items()}
        )
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, sequences, labels=None, teacher=None):
        features = {name: self.projections[name](masked_mean(each)) for name, each in sequences.items()}
        fused = sum(features.values())
        output = HeadOutput(self.classifier(fused), {}, features, fused)
        if labels is not None:
            output.losses = {"task": task_loss(output.logits, labels)}
        return output

    def modality_parameters(self):
        return {name: list(self.projections[name].parameters()) for name in MODALITIES}


@pytest.mark.parametrize("modulator", [name for name in REAL if MODULATORS[name].needs_modality_logits])
def test_a_head_without_unimodal_predictions_is_refused_naming_one_that_has_them(
    modulator, accelerator, monkeypatch
):
    monkeypatch.setitem(HEADS, "fused_only", FusedOnlyHead)
    model = features_model("fused_only")
    expected = (
        f"training.modulator={modulator} compares modalities by their own predictions, but "
        "model.head=fused_only predicts nothing from audio, .*like late_fusion, or training.modulator=identi"
    )
    with pytest.raises(ConfigurationError, match=expected):
        make_modulator(training(modulator), model, 10, accelerator)
    assert type(make_modulator(training("identity"), model, 10, accelerator)) is GradientModulator


@pytest.mark.needs("rebalance")
def test_a_head_without_unimodal_predictions_can_be_rebalanced(accelerator, monkeypatch):
    """It has probes of its own."""
    monkeypatch.setitem(HEADS, "fused_only", FusedOnlyHead)
    model = features_model("fused_only")
    assert make_modulator(training("rebalance"), model, 10, accelerator).modalities == MODALITIES
    assert tuple(model.probes) == MODALITIES


@pytest.mark.parametrize("head", HEADS)
def test_asking_what_a_head_predicts_leaves_the_model_as_it_was(head, accelerator):
    model = features_model(head).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_modulator(training("identity"), model, 10, accelerator)
    assert model.training and all(module.training for module in model.modules())
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize("modulator", WITH_A_WINDOW)
def test_a_window_behind_the_last_epoch_is_refused(modulator, accelerator):
    model = features_model("late_fusion")
    for first in (10, 12):
        expected = f"acts from epoch {first} on, but the run has 10 epochs, counted from 0: lower"
        with pytest.raises(ConfigurationError, match=expected):
            make_modulator(training(modulator, epochs=[first, 25]), model, 10, accelerator)
    assert make_modulator(training(modulator, epochs=[9, 25]), model, 10, accelerator).acts_in(9)


@pytest.mark.needs("rebalance")
def test_a_modulator_that_a_compiled_model_gives_no_gradients_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    compiling = Accelerator(cpu=True)
    model = features_model("late_fusion")
    with pytest.raises(ConfigurationError, match=r"rebalance takes gradients.*--dynamo_backend no"):
        make_modulator(training("rebalance"), model, 10, compiling)
    make_modulator(training("rebalance", spatial="off"), model, 10, compiling)
    for modulator in REAL:
        if not MODULATORS[modulator]().differentiates_features:
            make_modulator(training(modulator), model, 10, compiling)


def write_features(path: Path, *absent: str) -> Path:
    """Features of twelve samples of which no training sample has the modalities `absent`."""
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=12).round(3)
    values = {
        name: random.normal(size=(12, 3, width)) + labels[:, None, None] for name, width in WIDTHS.items()
    }
    for name in absent:
        values[name][:8] = 0  # validation and test have it
    np.savez(
        path,
        id=np.array([f"s{number}" for number in range(12)]),
        label=labels,
        split=np.array(["train"] * 8 + ["valid"] * 2 + ["test"] * 2),
        **values,
    )
    return path


@pytest.fixture
def archive(tmp_path) -> Path:
    return write_features(tmp_path / "features.npz")


def run_on(train, folder: Path, absent: list[str], modulator: str, head="late_fusion", **training) -> dict:
    """What the first epoch records when no training sample has the modalities `absent`."""
    path = write_features(folder / "features.npz", *absent)
    settings = document(modulator, **training.pop("modulator_kwargs", {}))
    settings["model"] |= {"head": head, "head_kwargs": {"hidden_size": 8}}
    settings["data"] |= {"path": str(path), **training.pop("data", {})}
    settings["training"] |= {
        "output_dir": str(folder / "run"), "epochs": 4, "batch_size": 4, "log_with": None, **training
    }  # fmt: skip
    run = train(settings)
    return json.loads((run / "history.json").read_text())[-1]["losses"]


LEFT_OUT = [
    (modulator, settings)
    for modulator, settings in [
        ("rebalance", {}),
        ("rebalance", {"guard": "none"}),
        ("ogm", {}),
        ("shapley", {"latest": 1, "interval": 1}),
    ]
    if modulator in MODULATORS
]


@pytest.mark.parametrize("absent", MODALITIES)
@pytest.mark.parametrize(("modulator", "kwargs"), LEFT_OUT, ids=str)
def test_a_modality_that_never_occurs_is_left_out_with_one_line_and_the_others_are_modulated(
    modulator, kwargs, absent, train, tmp_path, capsys
):
    losses = run_on(train, tmp_path, [absent], modulator, modulator_kwargs=kwargs)
    left = [name for name in MODALITIES if name != absent]
    expected = (
        f"training.modulator={modulator} acts on {left[0]} and {left[1]}: no training sample has {absent}"
    )
    assert [line for line in capsys.readouterr().out.splitlines() if "acts on" in line] == [expected]
    assert f"coefficient/{absent}" not in losses
    coefficients = [losses[f"coefficient/{name}"] for name in left]
    assert all(math.isfinite(value) for value in losses.values())
    assert coefficients[0] != coefficients[1]


@pytest.mark.needs("rebalance")
def test_a_corpus_that_has_everything_prints_no_such_line(train, tmp_path, capsys):
    losses = run_on(train, tmp_path, [], "rebalance")
    assert "acts on" not in capsys.readouterr().out
    assert all(f"coefficient/{name}" in losses for name in MODALITIES)


@pytest.mark.needs("rebalance")
def test_under_one_condition_and_under_missing_rates_what_never_occurs_is_left_out_too(
    train, tmp_path, capsys
):
    losses = run_on(train, tmp_path, [], "rebalance", condition="audio+vision")
    assert "no training sample has text under training.condition=audio+vision" in capsys.readouterr().out
    assert "coefficient/text" not in losses and losses["coefficient/audio"] != losses["coefficient/vision"]
    rates = {"missing": {"rates": {"audio": 0.5, "text": 0.0}}}
    losses = run_on(train, tmp_path, ["vision"], "rebalance", data=rates, overwrite=True)
    assert "acts on text and audio: no training sample has vision" in capsys.readouterr().out
    assert losses["coefficient/text"] != losses["coefficient/audio"]


@pytest.mark.parametrize("modulator", [name for name in REAL if takes(name, {"modalities": []})])
def test_a_modality_that_is_named_and_never_occurs_is_refused_before_training(modulator, train, tmp_path):
    expected = (
        "training.modulator_kwargs.modalities names text, but no training sample has text: set "
        r"training.modulator_kwargs.modalities=\[audio, vision\]"
    )
    named = {"modalities": list(MODALITIES)}
    with pytest.raises(ConfigurationError, match=expected):
        run_on(train, tmp_path, ["text"], modulator, modulator_kwargs=named)
    assert not (tmp_path / "run").exists()
    chosen = {"modalities": ["audio", "vision"]}  # the remedy
    assert run_on(train, tmp_path, ["text"], modulator, modulator_kwargs=chosen)["loss"] > 0


@pytest.mark.parametrize(
    ("modulator", "absent", "compared"),
    [
        pytest.param("conflict", ["audio"], "audio, vision", marks=pytest.mark.needs("conflict")),
        pytest.param("conflict", ["vision"], "audio, vision", marks=pytest.mark.needs("conflict")),
        pytest.param(
            "rebalance", ["text", "vision"], "text, audio, vision", marks=pytest.mark.needs("rebalance")
        ),
        pytest.param("shapley", ["text", "audio"], "text, audio, vision", marks=pytest.mark.needs("shapley")),
    ],
)
def test_a_modulator_left_with_one_modality_is_refused_and_not_silent(
    modulator, absent, compared, train, tmp_path
):
    """Alone, BALM would stop it from learning and the others would do nothing."""
    expected = (
        f"training.modulator={modulator} compares {compared}, but no training sample has "
        f"{' or '.join(absent)}, which leaves fewer than two to compare: set training.modulator=identity"
    )
    with pytest.raises(ConfigurationError, match=expected):
        run_on(train, tmp_path, absent, modulator, head="cpsl" if modulator == "conflict" else "late_fusion")
    assert not (tmp_path / "run").exists()


@pytest.mark.needs("conflict")
def test_nothing_is_written_before_a_modulator_that_does_not_fit_is_refused(archive, repository, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = document("conflict", epochs=[4, 9])
    settings["data"]["path"] = str(archive)
    settings["training"] |= {"output_dir": str(tmp_path / "run"), "epochs": 4, "log_with": None}
    with pytest.raises(ConfigurationError, match="acts from epoch 4 on, but the run has 4 epochs"):
        train_run(parse_arguments(settings), "a test")
    assert not (tmp_path / "run").exists()
