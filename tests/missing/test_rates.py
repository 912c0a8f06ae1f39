# SPDX-License-Identifier: Apache-2.0
"""Missing rates: counts against the published table, and who loses what in a run."""

import itertools
import math

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from msa_online.corpora.corpus import CorpusError
from msa_online.missing.rates import ROUNDINGS, SplitMask, pattern_counts, rates_table
from msa_online.modalities import CONDITIONS, MODALITIES, ModalitySequence

PUBLISHED_ORDER = (
    "text+audio+vision", "text+audio", "audio+vision", "text+vision", "audio", "text", "vision"
)  # fmt: skip
PUBLISHED = [  # samples, rates of audio, text, vision; counts; realised rates in the same order
    (1000, (0.5, 0.7, 0.3), (105, 45, 245, 105, 140, 80, 280), (0.465, 0.665, 0.265)),
    (4659, (0.5, 0.7, 0.3), (489, 209, 1141, 489, 653, 373, 1305), (0.465, 0.665, 0.265)),
    (1000, (0.3, 0.5, 0.7), (105, 245, 105, 45, 280, 140, 80), (0.265, 0.465, 0.665)),
    (1000, (0.5, 0.5, 0.5), (125, 125, 125, 125, 166, 168, 166), (0.459, 0.457, 0.459)),
    (686, (0.5, 0.5, 0.5), (85, 85, 85, 85, 115, 116, 115), (0.461, 0.459, 0.461)),
    (1000, (0.7, 0.7, 0.7), (27, 63, 63, 63, 261, 262, 261), (0.586, 0.585, 0.586)),
]
SIZES = (31, 97, 229, 686, 1000)
GRID = list(itertools.product((0.0, 0.1, 0.3, 0.5, 0.7, 0.9), repeat=3))
IMBALANCED = {"text": 0.7, "audio": 0.5, "vision": 0.3}
ALL = torch.ones(1000, 3, dtype=torch.bool)
IDS = [f"clip_{number}" for number in range(1000)]


def by_name(rates: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(MODALITIES, rates, strict=True))


def hidden_of(counts: dict[str, int]) -> dict[str, int]:
    """How many samples lack each modality."""
    return {
        name: sum(count for pattern, count in counts.items() if name not in pattern.split("+"))
        for name in MODALITIES
    }


def mask_of(ids=IDS, rates=IMBALANCED, split="train", **settings) -> SplitMask:
    return SplitMask(ids, ALL[: len(ids)], rates, split=split, **settings)


def batch_of(index: torch.Tensor, present: torch.Tensor = ALL) -> dict[str, torch.Tensor]:
    return {"index": index, "modality_present": present[index]}


# --- how many ---


@pytest.mark.parametrize(("samples", "rates", "counts", "realised"), PUBLISHED)
def test_official_rounding_gives_the_published_counts_and_rates(samples, rates, counts, realised):
    found = pattern_counts(samples, dict(zip(("audio", "text", "vision"), rates, strict=True)), "official")
    assert tuple(found[pattern] for pattern in PUBLISHED_ORDER) == counts
    shares = {name: hidden / samples for name, hidden in hidden_of(found).items()}
    assert [shares[name] for name in ("audio", "text", "vision")] == pytest.approx(realised, abs=5e-4)


def test_counts_are_floored_exactly_where_products_of_floats_fall_short():
    assert math.floor(1000 * (1 - 0.5) * 0.7 * (1 - 0.3)) == 244  # what floats make of 245
    for rounding in ROUNDINGS:
        assert pattern_counts(1000, IMBALANCED, rounding)["audio+vision"] == 245


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("samples", SIZES)
def test_realised_rates_keep_to_the_bound_and_nobody_is_left_out(rounding, samples):
    for rates in GRID:
        counts = pattern_counts(samples, by_name(rates), rounding)
        assert set(counts) == set(CONDITIONS) and min(counts.values()) >= 0
        assert sum(counts.values()) == samples
        bound = math.prod(rates) / 3 + 4 / samples
        for name, hidden in hidden_of(counts).items():
            assert abs(hidden / samples - by_name(rates)[name]) <= bound + 1e-12, (rates, counts)


@pytest.mark.parametrize("samples", SIZES)
def test_a_rate_of_zero_hides_nothing(samples):
    for rates in GRID:
        hidden = hidden_of(pattern_counts(samples, by_name(rates)))
        assert not any(hidden[name] for name, rate in by_name(rates).items() if rate == 0), rates


def test_official_rounding_may_hide_what_has_a_rate_of_zero():
    assert hidden_of(pattern_counts(31, {"text": 0.3, "audio": 0.3}, "official"))["vision"] > 0


def test_no_pattern_is_off_by_one_sample_or_more():
    counts = pattern_counts(229, {"text": 0.3, "audio": 0.1})
    for pattern, share in (("text+audio+vision", 0.63), ("audio+vision", 0.27), ("text+vision", 0.07)):
        assert abs(counts[pattern] - 229 * share) < 1


@pytest.mark.parametrize(
    ("rates", "rounding", "named"),
    [
        ({"text": 1.0}, "official", "the rate of text is 1.0"),
        ({"text": -0.1}, "official", "the rate of text is -0.1"),
        ({"text": math.nan}, "official", "the rate of text is nan"),
        ({"sound": 0.5}, "official", "rates name 'sound': one of text, audio, vision"),
        ({}, "nearest", "rounding is 'nearest': one of largest_remainder, official"),
    ],
)
def test_rates_that_cannot_be_are_refused_naming_the_value(rates, rounding, named):
    with pytest.raises(ValueError, match=named):
        pattern_counts(100, rates, rounding)


# --- who ---


def test_every_sample_keeps_something_and_the_patterns_are_as_often_as_counted():
    mask = mask_of()
    assert mask.kept.any(dim=1).all()
    for pattern, visible in CONDITIONS.items():
        wanted = torch.tensor([name in visible for name in MODALITIES])
        assert int((mask.kept == wanted).all(dim=1).sum()) == mask.counts[pattern]
    assert mask.realised == pytest.approx({"text": 0.665, "audio": 0.465, "vision": 0.265})


def test_the_seed_decides_who_loses_what_and_not_how_many():
    one, same, other = mask_of(seed=1), mask_of(seed=1), mask_of(seed=2)
    assert torch.equal(one.kept, same.kept)
    assert not torch.equal(one.kept, other.kept) and one.counts == other.counts


def test_splits_are_drawn_independently():
    train, valid = mask_of(split="train"), mask_of(split="valid")
    agree = (train.kept == valid.kept).all(dim=1).double().mean().item()
    expected = sum((count / 1000) ** 2 for count in train.counts.values())
    assert agree == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1000))


def test_patterns_do_not_lie_in_blocks():
    first, second = mask_of().kept.double().split(500)
    assert (first.mean(dim=0) - second.mean(dim=0)).abs().max() < 0.12


def test_a_sample_loses_the_same_whatever_the_order_of_the_rows():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    shuffled = mask_of([IDS[number] for number in order])
    assert torch.equal(shuffled.kept, mask_of().kept[order])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_loses_the_same_in_every_epoch_batch_worker_and_rank(workers):
    mask = mask_of()
    whole = mask.apply(batch_of(torch.arange(1000)))["modality_present"]
    assert torch.equal(whole, mask.kept)
    rows = [{"index": torch.tensor(number), "modality_present": ALL[number]} for number in range(1000)]
    for rank in range(2):  # of two processes, each with a mask of its own and every other sample
        own = mask_of()
        loader = DataLoader(rows[rank::2], batch_size=33, shuffle=True, num_workers=workers)
        for epoch in range(2):
            own.start_epoch(epoch)
            for batch in own.over(loader):
                assert torch.equal(batch["modality_present"], whole[batch["index"]])


def test_what_a_sample_lacks_stays_missing_and_no_sample_loses_everything():
    present = ALL.clone()
    present[:300, 0] = False  # no text
    present[:100, 1] = False  # face alone
    mask = SplitMask(IDS, present, IMBALANCED, split="train")
    seen = mask.apply(batch_of(torch.arange(1000), present))["modality_present"]
    assert not (seen & ~present).any() and seen.any(dim=1).all()
    assert torch.equal(seen, mask.seen)
    alone = ~(present & mask.kept).any(dim=1)
    assert mask.spared == int(alone.sum()) > 0
    assert torch.equal(seen[alone], present[alone])
    assert torch.equal(seen[~alone], (present & mask.kept)[~alone])
    lacking = (~seen).sum(dim=0) / 1000
    assert list(mask.realised.values()) == pytest.approx(lacking.tolist())
    assert mask.record["spared"] == mask.spared and sum(mask.record["patterns"].values()) == 1000


def test_a_sample_that_has_nothing_at_all_stays_as_it_is():
    present = ALL.clone()
    present[7] = False
    mask = SplitMask(IDS, present, IMBALANCED, split="train")
    assert not mask.apply(batch_of(torch.tensor([7]), present))["modality_present"].any()
    assert mask.spared == 0


def test_the_batch_handed_in_is_not_changed(make_batch):
    batch = make_batch(8)
    before = {name: value.clone() for name, value in batch.items()}
    seen = mask_of().apply(batch)
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    assert all(seen[name] is batch[name] for name in batch if name != "modality_present")


@pytest.mark.parametrize(
    ("samples", "rates", "named"),
    [
        (8, {"text": 0.05}, "8 samples, too few .*text would be hidden from 0"),
        (1, {"text": 0.5, "audio": 0.5, "vision": 0.5}, "1 samples, too few"),
        (4, {"text": 0.9}, ".*text would be hidden from 4 of them"),
    ],
)
def test_a_split_too_small_for_its_rates_is_refused(samples, rates, named):
    with pytest.raises(CorpusError, match=f"the valid split has {named}"):
        mask_of(IDS[:samples], rates, split="valid")


def test_the_table_shows_nominal_beside_realised_rates():
    present = ALL.clone()
    present[:300, :2] = False
    masks = {"train": mask_of(), "test": SplitMask(IDS, present, IMBALANCED, split="test")}
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as capture:
        console.print(rates_table(masks))
    rows = capture.get().splitlines()
    nominal, train, test = (
        next(row for row in rows if name in row) for name in ("nominal", "train, realised", "test, realised")
    )
    assert all(figure in nominal for figure in ("70.0", "50.0", "30.0"))
    assert all(figure in train for figure in ("1,000", "66.5", "46.5", "26.5", "105"))
    assert f"{100 * masks['test'].realised['text']:.1f}" in test
    assert f"{masks['test'].spared} test" in " ".join(capture.get().split())


# --- what it does to gradients ---


def test_the_mean_gradient_over_all_masks_is_scaled_by_how_often_a_branch_is_seen():
    """(3.12) of docs/methods/balm.md on a linear branch, exactly: all 2^n masks with their probabilities."""
    samples, rate = 5, 0.3
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(samples, 4, 3, dtype=torch.float64, generator=generator)
    target = torch.randn(samples, dtype=torch.float64, generator=generator)
    sequence = ModalitySequence.of(states, torch.ones(samples, 4, dtype=torch.bool))

    def gradient(seen: torch.Tensor) -> torch.Tensor:
        branch = torch.ones(3, dtype=torch.float64, requires_grad=True)
        visible = sequence.only(seen)
        scores = visible.values.mean(dim=1) @ branch
        loss = ((scores - target).square() * visible.present).sum() / samples
        return torch.autograd.grad(loss, branch)[0]

    expected = torch.zeros(3, dtype=torch.float64)
    for bits in itertools.product((True, False), repeat=samples):
        probability = math.prod(1 - rate if bit else rate for bit in bits)
        expected += probability * gradient(torch.tensor(bits))
    torch.testing.assert_close(expected, (1 - rate) * gradient(torch.ones(samples, dtype=torch.bool)))


def test_a_run_on_two_modalities_draws_its_patterns_from_these_alone():
    counts = pattern_counts(1000, {"text": 0.5, "vision": 0.3}, used=("text", "vision"))
    assert counts == {"text": 225, "vision": 425, "text+vision": 350}  # 150 of no modality are shared equally
    official = pattern_counts(11, {"text": 0.5, "vision": 0.3}, "official", used=("text", "vision"))
    assert sum(official.values()) == 11 and official.keys() == counts.keys()


def test_the_other_modality_is_hidden_even_from_samples_that_have_no_other():
    present = torch.ones(100, 3, dtype=torch.bool)
    present[:10] = torch.tensor([False, True, False])
    mask = SplitMask(
        [str(number) for number in range(100)],
        present,
        {"text": 0.4, "vision": 0.2},
        split="train",
        used=("text", "vision"),
    )
    assert mask.realised["audio"] == 1.0 and not mask.seen[:10].any()
    assert mask.seen[10:].any(dim=1).all() and mask.spared == 0
    shown = mask.apply({"index": torch.arange(100), "modality_present": present})["modality_present"]
    assert torch.equal(shown, mask.seen)
