# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from rich.console import Console

from msa_online.modalities import CONDITIONS
from msa_online.studies.comparison import (
    RunScore,
    clip_errors,
    compare,
    comparison_page,
    comparison_table,
    differences,
    differences_table,
)


def score(variant: str, seed: int, mae: float, shares: tuple[float, ...] = (0.5, 0.2, 0.3)) -> RunScore:
    """A run of MAE `mae` with all modalities, growing by 0.1 from one incomplete condition to the next."""
    conditions = {
        name: {"mae": mae + 0.1 * (6 - number), "corr": 0.5, "acc2_non0": 0.8, "f1_non0": 0.7}
        for number, name in enumerate(CONDITIONS)
    }
    return RunScore(variant, seed, conditions, dict(zip(("text", "audio", "vision"), shares, strict=True)))


SCORES = [score("full", 1, 0.70), score("without", 1, 0.90), score("full", 2, 0.74), score("full", 3, 0.72)]


def cells(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def test_a_variant_is_its_mean_over_seeds_with_the_sample_deviation():
    full = compare(SCORES)["full"]
    assert full["seeds"] == [1, 2, 3]
    assert full["all"]["mae"] == pytest.approx({"mean": 0.72, "std": 0.02})


def test_incomplete_is_the_mean_over_the_six_conditions_that_lack_something():
    full = compare(SCORES)["full"]
    assert full["incomplete"]["mae"]["mean"] == pytest.approx(0.72 + 0.35)  # 0.1 to 0.6 more


def test_one_seed_has_no_deviation_and_none_is_claimed():
    compared = compare(SCORES)
    assert compared["without"]["all"]["mae"] == {"mean": pytest.approx(0.9), "std": None}
    *_, row = cells(comparison_page(compared, "title", []))
    assert row[:3] == ["without", "1", "0.900"]


def test_the_page_shows_metrics_and_shares_of_every_variant():
    header, _, full, without = cells(comparison_page(compare(SCORES), "title", ["a note"]))
    shown = dict(zip(header, full, strict=True))
    assert shown["variant"] == "full" and shown["seeds"] == "3"
    assert shown["MAE"] == "0.720 ±0.020" and shown["MAE incomplete"] == "1.070 ±0.020"
    assert shown["Acc-2 Non0"] == "80.00 ±0.00" and shown["text %"] == "50.0 ±0.0"
    assert "F1 Non0" not in shown and without[0] == "without"


def test_runs_without_shares_and_classifications_are_compared_too():
    conditions = {name: {"accuracy": 0.5, "f1_weighted": 0.25, "f1_macro": 0.1} for name in CONDITIONS}
    header, _, row = cells(comparison_page(compare([RunScore("a", 1, conditions)]), "title", []))
    assert dict(zip(header, row, strict=True)) == {
        "variant": "a", "seeds": "1", "Accuracy": "50.00", "F1 weighted": "25.00",
        "Accuracy incomplete": "50.00", "F1 weighted incomplete": "25.00",
    }  # fmt: skip


def test_a_model_for_one_condition_is_compared_under_that_condition():
    alone = RunScore("for audio", 1, {"audio": {"mae": 0.8}})
    header, _, full, only = cells(comparison_page(compare([SCORES[0], alone]), "title", []))
    shown = dict(zip(header, only, strict=True))
    assert shown["MAE in its condition"] == "0.800"
    assert shown["MAE"] == shown["MAE incomplete"] == shown["text %"] == "-"
    assert dict(zip(header, full, strict=True))["MAE in its condition"] == "-"


def test_missing_rates_are_compared_apart_from_the_conditions():
    plain = score("full", 1, 0.70)
    at_rates = RunScore("at rates", 1, {"imr": {"mae": 0.95, "corr": 0.1}, **plain.conditions})
    header, _, full, rated = cells(comparison_page(compare([plain, at_rates]), "title", []))
    shown = dict(zip(header, rated, strict=True))
    assert shown["MAE at its missing rates"] == "0.950" and shown["MAE incomplete"] == "1.050"
    assert dict(zip(header, full, strict=True))["MAE at its missing rates"] == "-"


def test_the_terminal_shows_what_the_page_shows_and_prints_names_as_they_are():
    compared = compare([score("[red] one", 1, 0.7)])
    console = Console(width=250, force_terminal=False)
    with console.capture() as capture:
        console.print(comparison_table(compared, "runs/[old]"))
    assert "[red] one" in capture.get() and "runs/[old]" in capture.get()
    assert all(cell in capture.get() for cell in cells(comparison_page(compared, "", []))[-1])


def predictions(labels: np.ndarray, shift: float) -> dict[str, np.ndarray]:
    """Predictions that are off by `shift` with everything visible and by 1 otherwise."""
    off = {name: shift if name == "text+audio+vision" else 1.0 for name in CONDITIONS}
    return {"labels": labels, **{name: labels[:, None] + by for name, by in off.items()}}


def test_errors_of_clips_are_absolute_errors_or_wrong_classes():
    errors = clip_errors(predictions(np.array([0.5, -1.0, 2.0]), -0.25))
    assert errors["all"] == pytest.approx([0.25] * 3) and errors["incomplete"] == pytest.approx([1.0] * 3)
    classes = {"labels": np.array([0, 1]), "text": np.array([[2.0, 1.0], [2.0, 1.0]])}
    assert clip_errors(classes)["only"].tolist() == [0.0, 1.0]


def test_each_variant_is_tested_against_the_reference_and_not_against_itself():
    labels = np.random.default_rng(0).normal(0, 1, 60)
    errors = {name: [clip_errors(predictions(labels, shift))] for name, shift in (("a", 0.5), ("b", 0.2))}
    found = differences(errors, {"a": "a", "b": "a"})
    assert list(found) == ["b"] and found["b"]["all"].mean == pytest.approx(-0.3)
    header, (row,) = differences_table(found, "mae")
    shown = dict(zip(header[:5], row[:5], strict=True))
    assert (
        shown["variant"] == "b" and shown["MAE"] == "-0.300*" and shown["95 % interval"] == "-0.300 to -0.300"
    )
    assert differences(errors, {"b": "a stranger"}) == {}
