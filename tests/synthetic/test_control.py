# SPDX-License-Identifier: Apache-2.0
import csv
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.special import softmax
from scipy.stats import multivariate_normal

import msa_online_cli
from feature_extractors.clip import Clip
from feature_extractors.decoding import decode
from feature_extractors.face import FaceExtractor
from msa_online.corpora.corpus import CorpusError
from msa_online.modalities import CONDITIONS, MODALITIES
from msa_online.precomputed.reading import read_features
from msa_online.synthetic.clip import SyntheticSpeaker
from msa_online.synthetic.control import (
    FACTORS,
    ControlRecipe,
    ControlSamples,
    Mixing,
    posterior,
    solve,
    solve_clips,
)
from msa_online.synthetic.corpus import CorpusRecipe, plan_corpus, render_corpus
from msa_online.synthetic.voice import HIGH_VARIANTS, LOW_VARIANTS

SMALL = ControlRecipe(sizes=(40, 10, 20))
CLEAR = ControlRecipe(noise=dict.fromkeys(MODALITIES, 0.01))
HARD = {"text": 0.0, "audio": 2.0, "vision": 2.0}


def linear_correlation(features: np.ndarray, target: np.ndarray) -> float:
    """Correlation, on the second half, of a linear reader fit on the first half."""
    half = len(target) // 2
    inputs = np.c_[features, np.ones(len(target))]
    weights = np.linalg.lstsq(inputs[:half], target[:half], rcond=None)[0]
    return np.corrcoef(inputs[half:] @ weights, target[half:])[0, 1]


def test_command_writes_a_corpus_that_training_reads_with_its_truth(tmp_path, capsys):
    folder = tmp_path / "control"
    options = ["--kind", "control", "--sizes", "40", "10", "20", "--difficulty", "vision=0.5", "--audio", "2"]
    assert msa_online_cli.main(["synthesize", str(folder), *options]) == 0
    corpus = read_features(folder)
    assert {split: len(corpus.split(split)) for split in ("train", "valid", "test")} == {
        "train": 40,
        "valid": 10,
        "test": 20,
    }
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    assert set(truth["bayes_mae"]) == set(truth["bayes_accuracy"]) == {"nothing", *CONDITIONS}
    of_sign = read_features(folder, label_column="polarity", label_range=None)
    assert {row.label for row in of_sign.split("train")} == {"positive", "negative"}
    assert truth["variance_shares"] == pytest.approx(
        {"text": 1 / 7, "audio": 4 / 7, "vision": 1 / 7, "shared": 1 / 7}
    )
    assert truth["shares"]["audio"] > 0.4 > max(truth["shares"]["text"], truth["shares"]["vision"])
    shown = capsys.readouterr().out
    assert "best possible MAE" in shown and "true shares" in shown


def test_equal_recipes_give_equal_samples_and_another_seed_others():
    one, two, other = (ControlSamples.draw(replace(SMALL, seed=seed), 10, 1) for seed in (1, 1, 2))
    for name in MODALITIES:
        assert np.array_equal(one.features[name], two.features[name])
        assert not np.allclose(one.features[name], other.features[name])


def test_the_own_factor_is_linear_in_an_easy_modality_and_hidden_from_a_linear_reader_in_a_hard_one():
    samples = ControlSamples.draw(ControlRecipe(), 6000, 1)
    seen = {name: linear_correlation(samples.features[name], samples.factors[name]) for name in MODALITIES}
    assert seen["text"] > 0.95
    assert abs(seen["audio"]) < 0.06 and abs(seen["vision"]) < 0.06
    easy = ControlSamples.draw(ControlRecipe(difficulty=dict.fromkeys(MODALITIES, 0.0)), 6000, 1)
    assert linear_correlation(easy.features["audio"], easy.factors["audio"]) > 0.95


def test_each_factor_makes_a_quarter_of_the_label():
    samples = ControlSamples.draw(ControlRecipe(), 20_000, 1)
    assert np.abs(samples.labels).max() == 3
    for name in FACTORS:
        assert np.corrcoef(samples.factors[name], samples.labels)[0, 1] ** 2 == pytest.approx(0.25, abs=0.02)


def test_the_default_corpus_is_that_of_earlier_versions():
    samples = ControlSamples.draw(ControlRecipe(), 2199, 1)
    found = {name: values[7, 5] for name, values in samples.features.items()}
    expected = {"text": 1.104094876321936, "audio": -5.555337421683677, "vision": 1.3310127774026894}
    assert found == pytest.approx(expected, rel=1e-12)
    assert samples.labels[7] == pytest.approx(1.7698350453470166, rel=1e-12)


def test_two_signs_hide_the_own_factor_from_a_reader_of_products_of_two_directions():
    def seen(difficulty: float) -> float:
        """Correlation of the own factor with the best quadratic in three directions that tell everything."""
        recipe = replace(CLEAR, difficulty={**HARD, "audio": difficulty})
        samples = ControlSamples.draw(recipe, 6000, 1)
        known = samples.features["audio"] @ np.linalg.pinv(Mixing.draw(recipe, "audio").signal).T
        products = np.stack([known[:, i] * known[:, j] for i in range(known.shape[1]) for j in range(i)], 1)
        return linear_correlation(np.c_[known, products], samples.factors["audio"])

    assert seen(1.0) > 0.5
    assert abs(seen(2.0)) < 0.06
    assert 0.06 < seen(1.5) < 0.9


@pytest.mark.parametrize("recipe", [CLEAR, replace(CLEAR, difficulty=HARD)], ids=["one sign", "two signs"])
@pytest.mark.parametrize("visible", [("text",), ("audio",), ("text", "vision"), MODALITIES])
def test_without_noise_the_best_prediction_is_made_of_the_factors_that_are_visible(visible, recipe):
    samples = ControlSamples.draw(recipe, 300, 1)
    best = posterior(recipe, samples.features, visible).median()
    known = 0.72 * sum(samples.factors[name] for name in (*visible, "shared"))
    assert np.abs(best - known.clip(-3, 3)).mean() < 0.02


@pytest.mark.parametrize(("audio", "vision"), [(1.0, 0.4), (2.0, 1.3)])
def test_the_stated_error_is_that_of_predicting_and_no_shifted_prediction_is_better(audio, vision):
    recipe = ControlRecipe(
        noise={"text": 2.0, "audio": 4.0 if audio > 1 else 0.5, "vision": 1.0},
        difficulty={"text": 0.0, "audio": audio, "vision": vision},
    )
    samples = ControlSamples.draw(recipe, 8000, 1)
    for visible in ((), ("audio",), ("audio", "vision"), MODALITIES):
        expected = posterior(recipe, samples.features, visible)
        best = expected.median()
        found = np.abs(best - samples.labels)
        margin = 3 * found.std() / np.sqrt(len(found))
        right = ((best > 0) == (samples.labels > 0)).mean()
        assert expected.sign_accuracy().mean() == pytest.approx(right, abs=0.015)
        assert expected.absolute_error(best).mean() == pytest.approx(found.mean(), abs=margin)
        for other in (best + 0.1, best - 0.1, 0.9 * best):
            assert expected.absolute_error(other.clip(-3, 3)).mean() >= expected.absolute_error(best).mean()


def test_the_distribution_of_a_label_is_that_of_joint_gaussians_given_the_signs():
    recipe = replace(ControlRecipe(), difficulty={**HARD, "vision": 0.6}, noise={**CLEAR.noise, "audio": 8.0})
    samples = ControlSamples.draw(recipe, 5, 1)
    visible = ("text", "audio")
    found = posterior(recipe, samples.features, visible)
    seen = np.concatenate([samples.features[name] for name in visible], axis=1)
    weights = np.array([recipe.weights[name] for name in FACTORS])
    logs, means, deviations = [], [], []
    for first, second, vision in itertools.product((1, -1), repeat=3):
        signs = {"text": (1,), "audio": (first, second)}
        loadings, centre, noise = [], [], []  # features are loadings @ factors + centre + noise
        for name in visible:
            mixing = Mixing.draw(recipe, name)
            loading = np.zeros((len(mixing.signal), len(FACTORS)))
            loading[:, MODALITIES.index(name)] = np.prod(signs[name]) * mixing.signal[:, 0]
            loading[:, -1] = mixing.signal[:, 1]
            loadings.append(loading)
            centre.append(mixing.signal[:, 2:] @ signs[name])
            noise.append(mixing.nuisance @ mixing.nuisance.T + mixing.noise**2 * np.eye(len(loading)))
        loading, centre = np.concatenate(loadings), np.concatenate(centre)
        spread = loading @ loading.T + block_diag(*noise)
        gain = weights @ loading.T @ np.linalg.inv(spread)
        logs.append(multivariate_normal(centre, spread).logpdf(seen) + np.log(0.7 if vision > 0 else 0.3))
        means.append((seen - centre) @ gain)
        deviations.append(np.sqrt(weights @ weights - gain @ loading @ weights))
    assert found.weights == pytest.approx(softmax(np.stack(logs, 1), axis=1), rel=1e-6, abs=1e-9)
    assert found.means == pytest.approx(np.stack(means, 1), rel=1e-6, abs=1e-9)
    assert found.deviations[0] == pytest.approx(np.array(deviations), rel=1e-6)
    assert (found.weights > 0.02).sum(axis=1).max() > 2  # the signs are uncertain


def test_standard_error_of_the_truth_covers_another_draw():
    test = ControlSamples.draw(ControlRecipe(), 100, 1)
    one, other = (solve(ControlRecipe(), test, fresh=fresh)["bayes_mae"]["audio"] for fresh in (2000, 4000))
    assert abs(one["mean"] - other["mean"]) < 4 * one["standard_error"]


def test_only_the_ratios_of_the_strengths_matter():
    tiny = replace(ControlRecipe(), strengths=dict.fromkeys(FACTORS, 1e-200))
    assert tiny.weights == pytest.approx(ControlRecipe().weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (10, 1, 10)}, "at least 2 samples"),
        ({"seed": -1}, "seed is -1"),
        ({"strengths": dict.fromkeys(FACTORS, 1e300)}, "strength of text is 1e.300: .* to 1,000,000"),
        ({"noise": {"text": 1.0, "audio": 1e30, "vision": 1.0}}, "noise of audio is 1e.30: .* to 1,000,000"),
        ({"strengths": {**dict.fromkeys(FACTORS, 1.0), "text": -1.0}}, "strength of text is -1.0"),
        ({"strengths": dict.fromkeys(FACTORS, 0.0)}, "all strengths are 0"),
        ({"difficulty": {"text": 0.0, "audio": 2.5, "vision": 1.0}}, "difficulty of audio is 2.5"),
        ({"noise": {"text": 0.5, "audio": 0.5, "vision": 0.0}}, "noise of vision is 0.0"),
        ({"noise": {"text": 0.5}}, "give one for each"),
    ],
)
def test_recipes_that_cannot_be_drawn_are_refused_with_the_value(changes, message):
    with pytest.raises(CorpusError, match=message):
        replace(ControlRecipe(), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "control", "--clips", "10"], "--clips is for --kind clips and control-clips"),
        (["--kind", "control-clips", "--text", "1"], "--text is for --kind clips and control"),
        (["--noise", "text=1"], "--noise is for --kind control"),
        (["--kind", "control", "--difficulty", "smell=1"], "give text=, audio= or vision="),
    ],
)
def test_options_of_the_other_kind_and_unknown_modalities_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        msa_online_cli.main(["synthesize", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err


CLIPS = CorpusRecipe(clips=8, speakers=4, contradicting=0, missing=0, seconds=(0.8, 1.0), hidden_signs=True)


def test_cues_of_voice_and_face_tell_nothing_of_the_label_without_their_signs():
    plan = plan_corpus(replace(CLIPS, clips=4000))
    labels = np.array([planned.label for planned in plan])
    for name in ("audio", "vision"):
        cues = np.array([planned.cues[name] for planned in plan])
        signs = np.array([planned.signs[name] for planned in plan])
        assert abs(np.corrcoef(cues, labels)[0, 1]) < 0.06
        assert np.corrcoef(cues * signs, labels)[0, 1] == pytest.approx(1.3 / 2 / 1.09**0.5, abs=0.04)
    text = np.array([planned.cues["text"] for planned in plan])
    assert np.corrcoef(text, labels)[0, 1] == pytest.approx(2 / 2 / 2**0.5, abs=0.04)


def test_the_stated_error_of_control_clips_is_that_of_the_best_linear_reader_of_corrected_cues():
    plan = plan_corpus(replace(CLIPS, clips=6000))
    labels = np.array([planned.label for planned in plan])
    truth = solve_clips(seed=1, fresh=5000)["bayes_mae"]
    for name, visible in CONDITIONS.items():
        cues = np.array([[each.cues[m] * each.signs.get(m, 1) for m in visible] for each in plan])
        weights = np.linalg.lstsq(cues, labels, rcond=None)[0]
        found = np.abs((cues @ weights).clip(-3, 3) - labels).mean()
        assert found == pytest.approx(truth[name]["mean"], abs=0.03)


def test_a_rendered_control_shows_the_signs_in_voice_and_light(tmp_path):
    folder = render_corpus(tmp_path / "clips", CLIPS, workers=2)
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    brightness: dict[int, list[float]] = {1: [], -1: []}
    with FaceExtractor() as extractor:
        for row, planned in zip(rows, plan_corpus(CLIPS), strict=True):
            assert int(row["vision_sign"]) == planned.signs["vision"]
            frames = decode(Clip(folder / row["file_name"])).frames
            assert extractor.extract(frames).found.all()
            brightness[planned.signs["vision"]].append(frames.mean())
    assert max(brightness[-1]) < min(brightness[1])
    speaker = SyntheticSpeaker.of(CLIPS, 0)
    voices = {sign: speaker.showing({"audio": sign, "vision": 1}).voice.split("+")[1] for sign in (1, -1)}
    assert voices[-1] in LOW_VARIANTS and voices[1] in HIGH_VARIANTS


def test_a_control_has_no_contradictions():
    with pytest.raises(CorpusError, match="set both shares to 0"):
        CorpusRecipe(hidden_signs=True)
