# SPDX-License-Identifier: Apache-2.0
"""CP/SL implemented again from docs/methods/cpsl.md: one sample, one token and one time step at a time.

Nothing here is batched, padded or masked: what is absent is left out. Forward, every loss and the gradient of
every parameter and of every input have to agree with the head's.
"""

import math
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa_online import MSAModel
from msa_online.layers.alignment import resample, token_grid
from msa_online.methods.cpsl import RunningMinMax
from msa_online.modalities import MODALITIES, ModalitySequence
from tests.equations import assert_equation

ENCODED = ("audio", "vision")
HIDDEN = 8
SETTINGS = {
    "paper": {},
    "first token": {"pooling": "first", "residual": 0.5},
    "means": {"ame": False, "residual": 2.0},
    "absolute error": {"regression_loss": "l1"},
}
PRESENT = {
    "complete": [[True, True, True]] * 5,
    "mixed": [
        [True, True, True],
        [False, True, True],
        [True, False, False],
        [False, False, False],
        [True, True, False],
    ],
    "no text": [[False, True, True]] * 5,
    "no audio": [[True, False, True]] * 5,
    "nothing": [[False, False, False]] * 5,
}
LOSSES = {"task": "4.6", "recon": "4.6", "unimodal": "4.6", "stat": "4.5", "div": "4.7"}
"""Number of the equation of each loss."""
MODES = ("evaluation", "first batch", "later batch")
MOMENTUM = torch.tensor(0.1).double()  # a number of fp32 whatever the precision of the head


@pytest.fixture(scope="session")
def make_cpsl(make_head):
    """A function that makes a small CP/SL head that drops nothing."""
    small = {"fusion_size": 7, "dropout": 0.0, "classifier_dropout": 0.0}
    return partial(make_head, "cpsl", moved=("norm.", "missing."), **small)


def mean(values: list[Tensor]) -> Tensor:
    """Mean of scalars; zero of none."""
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def average_over_tokens(steps: dict[int, Tensor], tokens: int) -> list[Tensor | None]:
    """Observed steps by time, averaged over the stretch of time of each token; None where there are none."""
    length = max(steps, default=-1) + 1
    averages = []
    for j in range(tokens):
        first, last = math.floor(j * length / tokens), math.ceil((j + 1) * length / tokens)
        inside = [steps[time] for time in range(first, last) if time in steps]
        averages.append(sum(inside) / len(inside) if inside else None)
    return averages


class Oracle:
    """What the equations say of a batch, from a head's weights and extremes.

    `noise` are the draws of eps, `(batch, tokens, hidden)` by modality, and `own_noise` those of what each
    modality predicts alone, `(batch, time, hidden)`; None is no noise. Tables are lists over samples, then
    over the tokens of the sample.
    """

    def __init__(
        self, head, outputs: int, settings: dict, sequences: dict, mode: str, noise, own_noise
    ) -> None:
        self.weights = dict(head.named_parameters())
        self.buffers = {name: value.clone() for name, value in head.named_buffers()}
        self.outputs, self.settings, self.mode = outputs, settings, mode
        self.batch = range(len(sequences["text"].present))
        self.present = [{m: bool(sequences[m].present[i]) for m in MODALITIES} for i in self.batch]
        self.places, self.text = [], []
        for i in self.batch:
            steps = self.observed(sequences["text"], i)
            self.places.append(list(steps) or [0])
            self.text.append(list(steps.values()) or [torch.zeros_like(sequences["text"].values[i, 0])])
        self.inputs = {m: self.scaled(m, sequences[m]) for m in ENCODED}
        self.mu, self.sigma2, self.z = {}, {}, {}
        for m in ENCODED:
            encoded = [[self.gaussian(m, x) for x in sample] for sample in self.inputs[m]]
            self.mu[m] = [[mu for mu, _ in sample] for sample in encoded]
            self.sigma2[m] = [[sigma2 for _, sigma2 in sample] for sample in encoded]
            self.z[m] = [[self.latent(m, i, j, noise) for j in self.tokens(i)] for i in self.batch]
        self.features = [self.pooled(i) for i in self.batch]
        self.alone = [
            {"text": self.linear("predictors.text", row["text"])}
            | {
                m: self.linear(f"predictors.{m}", self.own_state(m, sequences[m], i, own_noise))
                for m in ENCODED
            }
            for i, row in enumerate(self.features)
        ]
        self.fused = [self.fuse(i) for i in self.batch]
        self.logits = [self.linear("classifier", state) for state in self.fused]

    def tokens(self, i: int) -> range:
        return range(len(self.text[i]))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    @staticmethod
    def observed(sequence, sample: int) -> dict[int, Tensor]:
        """States by time."""
        pairs = zip(sequence.values[sample], sequence.mask[sample], strict=True)
        return {time: value for time, (value, seen) in enumerate(pairs) if seen}

    def scaled(self, m: str, sequence) -> list[list[Tensor | None]]:
        """X_m on the token grid, in the units of the running extremes (Q7); None where unobserved."""
        raw = [average_over_tokens(self.observed(sequence, i), len(self.text[i])) for i in self.batch]
        low, high, batches = (self.buffers[f"scaling.{m}.{key}"] for key in ("low", "high", "batches"))
        seen = [x.detach() for sample in raw for x in sample if x is not None]
        if self.mode != "evaluation" and seen:
            share = 1.0 if batches == 0 else MOMENTUM
            low = low + share * (torch.stack(seen).min(dim=0).values - low)
            high = high + share * (torch.stack(seen).max(dim=0).values - high)
        self.buffers[f"scaling.{m}.low"], self.buffers[f"scaling.{m}.high"] = low, high
        return [[None if x is None else (x - low) / (high - low) for x in sample] for sample in raw]

    def gaussian(self, m: str, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(4.1) without the draw."""
        if x is None:
            return None, None
        trunk = torch.relu(self.linear(f"encoders.{m}.trunk.0", x))
        raw = self.linear(f"encoders.{m}.variance", trunk)
        return self.linear(f"encoders.{m}.mean", trunk), torch.log(1 + torch.exp(raw)) + 1e-6

    def latent(self, m: str, i: int, j: int, noise) -> Tensor:
        """Z_m (4.1); a learned state where nothing was observed."""
        if self.mu[m][i][j] is None:
            return self.weights["missing.tokens"][ENCODED.index(m)]
        if noise is None:
            return self.mu[m][i][j]
        eps = noise[m][i, self.places[i][j]]
        return self.mu[m][i][j] + eps * torch.sqrt(self.sigma2[m][i][j] + 1e-6)

    def own_state(self, m: str, sequence, i: int, noise) -> Tensor:
        """Mean of Z_m over the steps of m itself (Q11); the learned state where m is absent."""
        low, high = (self.buffers[f"scaling.{m}.{key}"] for key in ("low", "high"))
        latents = []
        for time, x in self.observed(sequence, i).items():
            mu, sigma2 = self.gaussian(m, (x - low) / (high - low))
            latents.append(mu if noise is None else mu + noise[m][i, time] * torch.sqrt(sigma2 + 1e-6))
        if not latents:
            return self.weights["missing.tokens"][ENCODED.index(m)]
        return sum(latents) / len(latents)

    def pooled(self, i: int) -> dict[str, Tensor]:
        text = torch.stack(self.text[i])
        text = text[0] if self.settings.get("pooling") == "first" else text.mean(dim=0)
        return {"text": text, **{m: torch.stack(self.z[m][i]).mean(dim=0) for m in ENCODED}}

    def fuse(self, i: int) -> Tensor:
        """(4.2) and (4.3)."""
        normed = []
        for j in self.tokens(i):
            audio, vision = self.z["audio"][i][j], self.z["vision"][i][j]
            g = torch.sigmoid(self.linear("fusion.gate", torch.cat([audio, vision])))
            mixed = g * torch.tanh(self.linear("fusion.audio", audio))
            mixed = mixed + (1 - g) * torch.tanh(self.linear("fusion.vision", vision))
            shift = torch.tanh(self.linear("fusion.project", mixed))
            h = self.text[i][j] + self.settings.get("residual", 1.0) * shift
            h = (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + 1e-5)
            normed.append(h * self.weights["norm.weight"] + self.weights["norm.bias"])
        first = self.settings.get("pooling") == "first"
        return torch.tanh(self.linear("pooler", normed[0] if first else sum(normed) / len(normed)))

    def task(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.outputs > 1:
            return -torch.log(torch.exp(logits[label]) / torch.exp(logits).sum())
        error = logits[0] - label
        return error.abs() if self.settings.get("regression_loss") == "l1" else error**2

    def over_steps(self, m: str, term) -> Tensor:
        """Mean of `term(i, j)` over the observed tokens of a modality."""
        observed = [(i, j) for i in self.batch for j in self.tokens(i) if self.inputs[m][i][j] is not None]
        return mean([term(i, j) for i, j in observed])

    def losses(self, labels: Tensor) -> dict[str, Tensor]:
        """All losses, unweighted, (4.5) to (4.7)."""

        def rebuilding(m: str, i: int, j: int) -> Tensor:
            inner = torch.relu(self.linear(f"decoders.{m}.0", self.z[m][i][j]))
            return ((self.linear(f"decoders.{m}.3", inner) - self.inputs[m][i][j].detach()) ** 2).mean()

        def statistics(m: str, i: int, j: int) -> Tensor:
            x = self.inputs[m][i][j].detach()
            spread = ((x - x.mean()) ** 2).mean()
            means = (self.mu[m][i][j].mean() - x.mean()) ** 2
            return means + (self.sigma2[m][i][j].mean() - spread) ** 2

        def log_variance(m: str, i: int, j: int) -> Tensor:
            return torch.log(self.sigma2[m][i][j]).clamp(-6, 2).mean()

        def of(term) -> list[Tensor]:
            return [self.over_steps(m, lambda i, j, m=m: term(m, i, j)) for m in ENCODED]

        alone = [
            mean([self.task(self.alone[i][m], labels[i]) for i in self.batch if self.present[i][m]])
            for m in MODALITIES
        ]
        losses = {
            "task": mean([self.task(self.logits[i], labels[i]) for i in self.batch]),
            "recon": sum(of(rebuilding)) / 2,
            "unimodal": sum(alone),
            "stat": sum(of(statistics)) / 4,
        }
        if self.settings.get("ame", True):
            losses["div"] = -0.5 * (math.log(2 * math.pi * math.e) + sum(of(log_variance)) / 2)
        return losses


CASES = [
    (mode, outputs, setting, present)
    for mode in MODES
    for outputs in (1, 4)
    for setting in SETTINGS
    for present in PRESENT
    if present == "mixed" or (setting in ("paper", "first token") and outputs == 1)
    if (setting, outputs) != ("absolute error", 4)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_the_equations_taken_step_by_step_give_what_the_head_gives(case, make_cpsl, make_gappy):
    mode, outputs, setting, present = case
    head = make_cpsl(outputs, hidden_size=HIDDEN, **SETTINGS[setting])
    if mode != "first batch":
        head.train()(make_gappy(6, seed=3))
    head.train(mode != "evaluation")
    leaves = {m: (s.values.clone().requires_grad_(), s) for m, s in make_gappy(5).items()}
    sequences = {
        m: ModalitySequence(leaf, given.mask, given.present).only(torch.tensor(PRESENT[present])[:, column])
        for column, (m, (leaf, given)) in enumerate(leaves.items())
    }
    draws = mode != "evaluation" and head.ame
    torch.manual_seed(7)
    tokens = sequences["text"].mask.shape
    noise = {m: torch.randn(*tokens, HIDDEN, dtype=torch.float64) for m in ENCODED} if draws else None
    own = {m: torch.randn(*sequences[m].mask.shape, HIDDEN, dtype=torch.float64) for m in ENCODED}
    oracle = Oracle(head, outputs, SETTINGS[setting], sequences, mode, noise, own if draws else None)
    labels = torch.arange(5) % outputs if outputs > 1 else torch.tensor([-3.0, -0.4, 0.0, 1.5, 3.0]).double()
    torch.manual_seed(7)
    output = head(sequences, labels)

    for i in oracle.batch:
        for m in MODALITIES:
            assert_equation(
                "4.2", f"pooled state of {m}, sample {i}", output.features[m][i], oracle.features[i][m]
            )
            assert_equation(
                "4.6",
                f"prediction from {m} alone, sample {i}",
                output.modality_logits[m][i],
                oracle.alone[i][m],
            )
        assert_equation("4.3", f"state of sample {i} after (4.2)", output.fused[i], oracle.fused[i])
        assert_equation("4.3", f"prediction of sample {i}", output.logits[i], oracle.logits[i])
    for name, value in head.named_buffers():
        if not name.endswith("batches"):
            assert_equation("Equations", f"running extremes, {name}", value, oracle.buffers[name])
    for m in ENCODED:
        variance = oracle.over_steps(m, lambda i, j, m=m: oracle.sigma2[m][i][j].mean())
        assert_equation("4.1", f"variance of {m}", output.diagnostics[f"variance/{m}"], variance)

    expected = oracle.losses(labels)
    assert output.losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert_equation(LOSSES[name], f"loss {name}", output.losses[name], loss)
    assert_same_gradients(head, leaves, output.losses, expected)


def assert_same_gradients(head, leaves: dict, losses: dict, expected: dict) -> None:
    # each loss with a weight of its own, so that no two errors cancel
    one, other = (
        sum(weight * given[name] for weight, name in enumerate(expected, 1)) for given in (losses, expected)
    )
    wanted_of = dict(head.named_parameters()) | {f"input of {m}": leaf for m, (leaf, _) in leaves.items()}
    found, wanted = (
        torch.autograd.grad(
            total, list(wanted_of.values()), allow_unused=True, materialize_grads=True, retain_graph=True
        )
        for total in (one, other)
    )
    for name, gradient, by_hand in zip(wanted_of, found, wanted, strict=True):
        assert_equation("4.6", f"gradient of the weighted losses by {name}", gradient, by_hand)


def sequence_of(mask: Tensor, width: int = 3, seed: int = 0) -> ModalitySequence:
    generator = torch.Generator().manual_seed(seed)
    return ModalitySequence.of(torch.randn(*mask.shape, width, generator=generator).double(), mask)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 12])
def test_a_fully_observed_sequence_is_pooled_as_torch_pools_it(steps, tokens):
    sequence = sequence_of(torch.ones(2, steps, dtype=torch.bool))
    found = resample(sequence, torch.ones(2, tokens, dtype=torch.bool))
    pooled = torch.nn.functional.adaptive_avg_pool1d(sequence.values.mT, tokens).mT
    torch.testing.assert_close(found.values, pooled, rtol=1e-12, atol=1e-12)
    assert found.mask.all() and found.present.all()


@pytest.mark.parametrize(("steps", "tokens"), [(9, 4), (3, 6), (1, 5), (7, 1), (6, 6), (11, 7)])
def test_gaps_and_padding_on_either_side_are_left_out_of_each_tokens_average(steps, tokens):
    generator = torch.Generator().manual_seed(steps)
    mask = torch.rand(40, steps, generator=generator) < 0.5
    grid = torch.rand(40, tokens, generator=generator) < 0.5
    grid[:, -1] |= ~grid.any(dim=1)
    sequence = sequence_of(mask)
    found = resample(sequence, grid)
    assert torch.equal(found.present, sequence.present)
    for i in range(40):
        averages = average_over_tokens(Oracle.observed(sequence, i), int(grid[i].sum()))
        places = grid[i].nonzero().flatten().tolist()
        expected = dict(zip(places, averages, strict=True))
        for place in range(tokens):
            average = expected.get(place)
            assert found.mask[i, place] == (average is not None)
            state = found.values[i, place]
            torch.testing.assert_close(state, torch.zeros_like(state) if average is None else average)


def test_no_observed_step_is_lost_between_the_tokens():
    generator = torch.Generator().manual_seed(0)
    for steps, tokens in ((9, 4), (3, 6), (50, 7), (10, 1)):
        mask = torch.rand(20, steps, generator=generator) < 0.6
        grid = torch.arange(tokens) < torch.randint(1, tokens + 1, (20, 1), generator=generator)
        values = torch.zeros(20, steps, 1, requires_grad=True)
        resample(ModalitySequence(values, mask, mask.any(dim=1)), grid).values.sum().backward()
        assert torch.equal(values.grad.squeeze(-1) > 0, mask)  # every one counts, and nothing else does


def test_fusion_takes_place_on_the_texts_tokens_or_on_a_single_one_without_text():
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert token_grid(sequence_of(mask)).tolist() == [*mask[:2].tolist(), [True, False, False]]


# running extremes (Q7)

BATCHES = [
    ModalitySequence.of(
        torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed)).double() * 3, mask
    )
    for seed, mask in enumerate(
        [
            torch.arange(4) < torch.tensor([[4], [1], [0], [2], [3], [4]]),
            torch.arange(4) < torch.tensor([[0], [0], [0], [4], [2], [0]]),  # all of it in the second half
            torch.zeros(6, 4, dtype=torch.bool),
            torch.arange(4) < torch.tensor([[3], [3], [1], [1], [4], [2]]),
        ]
    )
]


def state_of(scaling: RunningMinMax) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in scaling.state_dict().items()}


def after(batches: list[ModalitySequence]) -> RunningMinMax:
    """What training on these batches leaves, in evaluation."""
    scaling = RunningMinMax(3).double().train()
    for batch in batches:
        scaling(batch)
    return scaling.eval()


def test_before_training_features_stay_as_they_are():
    assert torch.equal(RunningMinMax(3).double().eval()(BATCHES[0]).values, BATCHES[0].values)


def test_the_first_batch_fills_zero_to_one_in_each_feature_by_itself():
    scaled = RunningMinMax(3).double().train()(BATCHES[0])
    observed = scaled.values[scaled.mask]
    assert torch.equal(observed.amin(dim=0), torch.zeros(3).double())
    torch.testing.assert_close(observed.amax(dim=0), torch.ones(3).double(), rtol=0, atol=1e-15)
    assert not scaled.values[~scaled.mask].any()


def test_extremes_follow_those_of_the_batches_and_wait_where_nothing_is_observed():
    low = high = None
    for number, batch in enumerate(BATCHES, 1):
        rows = [
            row for row, seen in zip(batch.values.flatten(0, 1), batch.mask.flatten(), strict=True) if seen
        ]
        for feature in range(3) if rows else ():
            column = [row[feature].item() for row in rows]
            if low is None or len(low) < 3:
                low, high = [*(low or []), min(column)], [*(high or []), max(column)]
            else:
                low[feature] += MOMENTUM.item() * (min(column) - low[feature])
                high[feature] += MOMENTUM.item() * (max(column) - high[feature])
        scaling = after(BATCHES[:number])
        assert_equation("Equations", "lowest values", scaling.low, low)
        assert_equation("Equations", "highest values", scaling.high, high)
    assert scaling.batches == 3


def test_the_first_batch_with_anything_observed_sets_the_extremes():
    nothing = BATCHES[2]
    assert after([nothing]).batches == 0
    waited, at_once = after([nothing, nothing, BATCHES[0]]), after([BATCHES[0]])
    assert torch.equal(waited.low, at_once.low) and torch.equal(waited.high, at_once.high)


def test_evaluation_judges_a_sample_alone_and_moves_no_extreme():
    scaling = after(BATCHES[:2])
    before, batch = state_of(scaling), BATCHES[3]
    together = scaling(batch).values
    for i in range(6):
        alone = ModalitySequence(batch.values[i : i + 1], batch.mask[i : i + 1], batch.present[i : i + 1])
        assert torch.equal(scaling(alone).values[0], together[i])
    assert all(torch.equal(value, before[name]) for name, value in state_of(scaling).items())


def test_padding_has_no_part_in_the_extremes():
    batch = BATCHES[0]
    for garbage in (1e9, -1e9):
        values = torch.where(batch.mask.unsqueeze(-1), batch.values, garbage)
        scaling = after([ModalitySequence(values, batch.mask, batch.present)])
        assert torch.equal(scaling.low, after([batch]).low) and torch.equal(scaling.high, after([batch]).high)


def test_a_feature_that_never_moves_is_shifted_and_nothing_else():
    values = BATCHES[0].values.clone()
    values[..., 1] = 7.0
    scaling = after([ModalitySequence.of(values, BATCHES[0].mask)])
    moved = torch.tensor([[[0.0, 9.5, 0.0]]]).double().requires_grad_()
    scaled = scaling(ModalitySequence.of(moved, torch.ones(1, 1, dtype=torch.bool))).values
    assert scaled[0, 0, 1].item() == 2.5
    scaled.sum().backward()
    spread = (scaling.high - scaling.low)[[0, 2]]
    torch.testing.assert_close(moved.grad[0, 0, [0, 2]], 1 / spread, rtol=1e-12, atol=0)
    assert moved.grad[0, 0, 1] == 1


def test_several_micro_batches_may_pass_before_the_gradients_are_taken():
    scaling = RunningMinMax(3).double().train()
    leaves = [batch.values.clone().requires_grad_() for batch in BATCHES[:2]]
    passed = [scaling(ModalitySequence.of(leaf, b.mask)) for leaf, b in zip(leaves, BATCHES, strict=False)]
    sum(sequence.values.square().sum() for sequence in passed).backward()
    assert all(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_batch_that_overflowed_leaves_no_trace_in_the_extremes(bad):
    values = BATCHES[3].values.clone()
    values[0, 0, 1] = bad  # as half precision may give; such a step is skipped
    scaling = after([BATCHES[0], ModalitySequence(values, BATCHES[3].mask, BATCHES[3].present)])
    assert torch.isfinite(scaling.low).all() and torch.isfinite(scaling.high).all()
    assert torch.isfinite(scaling(BATCHES[1]).values).all()


def hold_extremes(rank: int, folder: Path) -> None:
    """One of two processes: train on its half of each batch and write down what it holds."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    half = slice(3 * rank, 3 * rank + 3)
    scaling = after([ModalitySequence(b.values[half], b.mask[half], b.present[half]) for b in BATCHES])
    held = state_of(scaling) | {"processes": torch.tensor(torch.distributed.get_world_size())}
    save_file(held, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_the_extremes_that_one_holds_with_both_batches(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["msa_online.methods.cpsl"])  # imported once, not by either process
    processes = [context.Process(target=hold_extremes, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = state_of(after(BATCHES)) | {"processes": torch.tensor(2)}
    for rank in range(2):
        held = load_file(tmp_path / f"{rank}.safetensors")
        assert held.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(held[name], value), (rank, name)


@pytest.fixture
def trained_model(tiny_config, make_batch) -> MSAModel:
    """A model with a CP/SL head whose extremes two batches have moved."""
    tiny_config.head, tiny_config.head_kwargs = "cpsl", {"hidden_size": 16, "fusion_size": 16}
    torch.manual_seed(0)
    model = MSAModel(tiny_config).train()
    with torch.no_grad():
        for seed in range(2):
            model(**make_batch(seed=seed))
    return model.eval()


def test_the_extremes_travel_with_a_checkpoint(trained_model, make_batch, tmp_path):
    trained_model.save_pretrained(tmp_path)
    again = MSAModel.from_pretrained(tmp_path)
    for name, scaling in trained_model.head.scaling.items():
        assert scaling.batches == 2 and scaling.low.any()
        for key, value in state_of(scaling).items():
            assert torch.equal(again.head.scaling[name].state_dict()[key], value)
    batch = make_batch(seed=5)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trained_model(**batch).logits, atol=1e-6, rtol=0)


def test_extremes_missing_from_a_checkpoint_start_anew_and_not_as_garbage(
    trained_model, make_batch, tmp_path
):
    trained_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if ".scaling." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    model, _ = MSAModel.from_pretrained(tmp_path, output_loading_info=True)  # else it is refused
    for scaling in model.head.scaling.values():
        assert not scaling.low.any() and (scaling.high == 1).all() and scaling.batches == 0
    model.train()(**make_batch())
    assert all(scaling.batches == 1 and scaling.low.any() for scaling in model.head.scaling.values())
