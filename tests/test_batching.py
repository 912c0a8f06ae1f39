# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device

from feature_extractors import Clip, FaceExtractor, FeatureCache
from msa_online.batching import (
    BucketBatchSampler,
    ClipDataset,
    in_order,
    make_loader,
    micro_batch_sizes,
    overlap,
)
from msa_online.corpora.corpus import Sample


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    """Lengths as transcripts have them: most short, some long, none empty."""
    return np.random.default_rng(0).gamma(2.0, 9.0, size=1003).astype(int) + 3


def batches(sampler: BucketBatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.start_epoch(epoch)
    return list(sampler)


def padding(batches: list[list[int]], lengths: np.ndarray) -> float:
    """Padded steps to each real one."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    real = sum(lengths[batch].sum() for batch in batches)
    return padded / real - 1


def test_seed_and_epoch_decide_the_order(lengths):
    first = batches(BucketBatchSampler(lengths, 8, seed=5), epoch=2)
    assert batches(BucketBatchSampler(lengths, 8, seed=5), epoch=2) == first
    assert batches(BucketBatchSampler(lengths, 8, seed=5), epoch=3) != first
    assert batches(BucketBatchSampler(lengths, 8, seed=6), epoch=2) != first


def test_an_order_does_not_depend_on_the_epochs_before_it(lengths):
    sampler = BucketBatchSampler(lengths, 8, seed=5)
    went_through = [batches(sampler, epoch) for epoch in range(3)]
    assert batches(BucketBatchSampler(lengths, 8, seed=5), epoch=2) == went_through[2]


def test_a_resumed_run_continues_with_the_order_of_its_epoch(lengths):
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = [{"index": torch.tensor(number)} for number in range(len(lengths))]
    sampler = BucketBatchSampler(lengths, 8, seed=5)
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler)
    prepared = Accelerator(cpu=True).prepare(loader)
    expected = batches(sampler, epoch=3)  # the first epoch this process trains, the fourth of the run
    assert [batch["index"].tolist() for batch in prepared] == expected


def steps_of(sampler: BucketBatchSampler, epoch: int = 0) -> list[list[list[int]]]:
    """Micro-batches of each step of an epoch; placeholders are left out."""
    parts, found = sampler.batches_per_step, batches(sampler, epoch)
    sizes = sum(micro_batch_sizes(len(sampler.lengths), sampler.steps, parts), [])
    assert [len(batch) for batch in found] == [max(size, 1) for size in sizes]
    kept = [batch if size else [] for batch, size in zip(found, sizes, strict=True)]
    return [kept[at : at + parts] for at in range(0, len(kept), parts)]


@pytest.mark.parametrize("samples", [20, 21, 57, 64, 1003])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 4), (8, 2)])
def test_every_sample_is_in_every_epoch_once(samples, batch_size, processes, accumulation, lengths):
    """A step leaves no clip out, fills every micro-batch it can, and takes no more than was asked for."""
    sampler = BucketBatchSampler(lengths[:samples], batch_size, processes * accumulation, 5, processes)
    steps = steps_of(sampler, epoch=3)
    assert len(steps) == -(-samples // (batch_size * processes * accumulation))
    assert sorted(sum(sum(steps, []), [])) == list(range(samples))
    whole = [sum(map(len, step)) for step in steps]
    assert max(whole) - min(whole) <= 1
    for step in steps:
        sizes = [len(batch) for batch in step]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size


@pytest.mark.parametrize("samples", [1003, 250, 17])
@pytest.mark.parametrize(("parts", "processes"), [(2, 1), (2, 2), (4, 2), (16, 8)])
def test_a_step_has_the_same_samples_however_it_is_divided(lengths, samples, parts, processes):
    whole = steps_of(BucketBatchSampler(lengths[:samples], 16, 1, seed=5), epoch=1)
    split = steps_of(BucketBatchSampler(lengths[:samples], 16 // parts, parts, 5, processes), epoch=1)
    assert [sorted(sum(step, [])) for step in split] == [sorted(*step) for step in whole]


def in_tokens(kind: str) -> np.ndarray:
    """Lengths of 1,284 texts: as sentences have them, with a long tail, all alike, or of two kinds."""
    random = np.random.default_rng(1)
    return {
        "sentences": lambda: random.gamma(2.0, 6.0, size=1284).astype(int) + 3,
        "long tail": lambda: random.lognormal(2.5, 1.0, size=1284).astype(int) + 3,
        "alike": lambda: np.full(1284, 12),
        "two kinds": lambda: random.choice([5, 60], size=1284),
    }[kind]()


def in_random_order(samples: int, steps: int, epoch: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng([9, epoch]).permutation(samples), steps)


def mean_overlap(epochs: Sequence[Sequence[Sequence[int]]]) -> float:
    return float(np.mean([overlap(one, other) for one, other in zip(epochs, epochs[5:], strict=False)]))


@pytest.mark.parametrize("kind", ["sentences", "long tail", "alike", "two kinds"])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_samples_that_met_in_a_step_meet_no_more_often_than_at_random(kind, processes):
    """Five epochs later; sorted too well, the same samples are in one step in every epoch."""
    sampler = BucketBatchSampler(in_tokens(kind), 32, processes, seed=3, processes=processes)
    epochs = [[sum(step, []) for step in steps_of(sampler, epoch)] for epoch in range(25)]
    shuffled = [in_random_order(1284, sampler.steps, epoch) for epoch in range(25)]
    assert mean_overlap(epochs) == pytest.approx(mean_overlap(shuffled), abs=0.05)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_have_even_work_and_none_always_has_the_longest_text(accumulation):
    """The processes wait for each other at every step: what the slowest has more than the mean is lost."""
    lengths = in_tokens("sentences")
    sampler = BucketBatchSampler(lengths, 32, 8 * accumulation, seed=3, processes=8)
    epochs = [batches(sampler, epoch) for epoch in range(20)]
    shuffled = [in_random_order(1284, len(sampler), epoch) for epoch in range(20)]

    def unevenness(epochs: Sequence[Sequence[Sequence[int]]]) -> float:
        work = [[len(batch) * lengths[batch].max() for batch in batches] for batches in epochs]
        together = np.array(work).reshape(-1, 8)
        return float(np.mean(together.max(axis=1) / together.mean(axis=1)))

    assert unevenness(epochs) - 1 < 0.4 * (unevenness(shuffled) - 1)
    longest = np.array([[lengths[batch].max() for batch in batches] for batches in epochs]).reshape(-1, 8)
    longest = longest[(longest == longest.max(axis=1, keepdims=True)).sum(axis=1) == 1]  # no ties
    shares = np.bincount(longest.argmax(axis=1), minlength=8) / len(longest)
    assert shares.min() > 0.03 and shares.max() < 0.3


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (8, 1), (1, 8)])
def test_batches_have_less_padding_than_in_a_random_order(processes, accumulation):
    lengths = in_tokens("sentences")
    sampler = BucketBatchSampler(lengths, 32, processes * accumulation, 3, processes)
    parts = in_random_order(1284, len(sampler), 0)
    at_random = 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in parts)
    found = np.mean([sampler.padding() for epoch in range(8) if not sampler.start_epoch(epoch)])
    assert found < at_random - 0.05
    assert 1 - 1 / (1 + padding(batches(sampler, 7), lengths)) == pytest.approx(sampler.padding())


def test_similar_lengths_share_a_batch(lengths):
    shuffled = np.random.default_rng(1).permutation(len(lengths))[:992].reshape(-1, 8).tolist()
    assert padding(batches(BucketBatchSampler(lengths, 8, seed=5)), lengths) < padding(shuffled, lengths) / 4


def test_short_samples_do_not_come_first(lengths):
    means = [lengths[batch].mean() for batch in batches(BucketBatchSampler(lengths, 8, seed=5))]
    halves = len(means) // 2
    assert 0.7 < np.mean(means[:halves]) / np.mean(means[halves:]) < 1.4
    assert means != sorted(means)


def test_evaluation_sees_every_sample_once_in_order_of_length(lengths):
    in_order = batches(BucketBatchSampler(lengths, 8))
    assert sorted(sum(in_order, [])) == list(range(1003))
    assert np.all(np.diff(lengths[sum(in_order, [])]) >= 0)
    assert [len(batch) for batch in in_order] == [8] * 125 + [3]
    assert batches(BucketBatchSampler(lengths, 8), epoch=1) == in_order


@pytest.mark.parametrize("samples", [0, 1, 7, 8, 9, 64, 1003])
@pytest.mark.parametrize("settings", [{}, {"seed": 5}, {"seed": 5, "batches_per_step": 2}])
def test_the_number_of_batches_is_known_beforehand(lengths, samples, settings):
    sampler = BucketBatchSampler(lengths[:samples], 8, **settings)
    assert len(sampler) == len(list(sampler))


# --- windows of dialogues ---


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """The 1,003 samples in windows of 1 to 12, whose samples are spread over the data."""
    random = np.random.default_rng(3)
    cuts = np.cumsum(random.integers(1, 13, size=300))
    parts = np.split(random.permutation(1003), cuts[cuts < 1003])
    return [part.tolist() for part in parts]


@pytest.mark.parametrize(("batch_size", "processes", "accumulation"), [(8, 1, 1), (1, 2, 4), (3, 8, 2)])
def test_a_window_is_in_one_batch_whole_and_in_order(windows, lengths, batch_size, processes, accumulation):
    sampler = BucketBatchSampler(lengths, batch_size, processes * accumulation, 5, processes, windows)
    found = batches(sampler, epoch=2)
    counted = [size for sizes in sampler.step_sizes() for size in sizes]
    assert [len(batch) for batch, size in zip(found, counted, strict=True) if size] == list(
        filter(None, counted)
    )
    taken = [batch for batch, size in zip(found, counted, strict=True) if size]
    assert sorted(sum(taken, [])) == list(range(1003))
    starts = {window[0]: window for window in windows}
    for batch in taken:
        count = 0
        while batch:
            window = starts[batch[0]]
            assert batch[: len(window)] == window
            batch, count = batch[len(window) :], count + 1
        assert count <= batch_size
    assert all(batch in windows for batch, size in zip(found, counted, strict=True) if not size)


@pytest.mark.parametrize(("parts", "processes"), [(2, 1), (2, 2), (4, 2), (16, 8)])
def test_a_step_has_the_same_windows_however_it_is_divided(windows, lengths, parts, processes):
    whole = BucketBatchSampler(lengths, 16, 1, 5, windows=windows)
    split = BucketBatchSampler(lengths, 16 // parts, parts, 5, processes, windows)
    kept = [
        batch if size else []
        for batch, size in zip(batches(split, 1), sum(split.step_sizes(), []), strict=True)
    ]
    steps = [sorted(sum(kept[at : at + parts], [])) for at in range(0, len(kept), parts)]
    assert steps == [sorted(batch) for batch in batches(whole, 1)]
    assert [sum(sizes) for sizes in split.step_sizes()] == [sum(sizes) for sizes in whole.step_sizes()]


def test_evaluation_sees_every_window_once(windows, lengths):
    found = batches(BucketBatchSampler(lengths, 8, windows=windows))
    assert sorted(sum(found, [])) == list(range(1003))
    assert [sum(batch[0] in window for window in windows) for batch in found] == [1] * len(found)
    assert len(found) == len(BucketBatchSampler(lengths, 8, windows=windows)) == -(-len(windows) // 8)


@pytest.mark.parametrize("seed", [None, 5])
def test_processes_share_whole_batches_of_windows(windows, lengths, seed):
    """Accelerate repeats whole batches, never a part of one, so that all processes have the same number."""
    processes = 2
    settings = {} if seed is None else {"batches_per_step": processes, "seed": seed, "processes": processes}
    sampler = BucketBatchSampler(lengths, 7, **settings, windows=windows)
    whole = batches(sampler)
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert len(shards[0]) == len(shards[1]) == -(-len(whole) // 2)
    assert all(batch in whole for shard in shards for batch in shard)
    assert all(batch in shards[0] or batch in shards[1] for batch in whole)


def test_windows_of_one_are_batches_of_samples(lengths):
    alone = [[number] for number in range(len(lengths))]
    for settings in ({}, {"seed": 5, "batches_per_step": 2}):
        with_windows = BucketBatchSampler(lengths, 8, **settings, windows=alone)
        assert batches(with_windows, 3) == batches(BucketBatchSampler(lengths, 8, **settings), 3)


# --- clips through the real cache ---


@pytest.fixture(scope="module")
def clips(make_clip, tmp_path_factory) -> Path:
    """A folder of three clips: whole, without sound, without a face."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "whole.mp4", seconds=0.5, fps=8)
    make_clip(folder / "mute.mp4", seconds=1.0, fps=8, audio=None)
    make_clip(folder / "faceless.mp4", seconds=1.0, frames=np.zeros((8, 160, 160, 3), np.uint8), fps=8)
    return folder


@pytest.fixture
def make_dataset(clips, tiny_processor, tmp_path):
    """A function that extracts the three clips into a new cache and makes a dataset of them."""
    cache = FeatureCache(tmp_path / "features")

    def make(labels=(-1.5, 0.0, 2.0), label2id=None) -> ClipDataset:
        samples, keys = [], {}
        rows = (("whole", "I loved it"), ("mute", ""), ("faceless", "not a very good film at all"))
        with FaceExtractor(tiny_processor.settings) as faces:
            for line, ((name, text), label) in enumerate(zip(rows, labels, strict=True), start=2):
                clip = Clip(clips / f"{name}.mp4")
                keys[name] = cache.key(clip, tiny_processor.settings)
                cache.get(clip, tiny_processor.settings, faces)
                samples.append(Sample(clip, text, label, "train", None, clips / "metadata.csv", line, name))
        return ClipDataset(samples, keys, cache, tiny_processor, label2id)

    return make


@pytest.fixture
def dataset(make_dataset) -> ClipDataset:
    return make_dataset()


def in_one_batch(dataset: ClipDataset, workers: int = 0) -> dict[str, torch.Tensor]:
    loader = make_loader(dataset, BucketBatchSampler([1] * len(dataset), len(dataset)), workers)
    return next(iter(loader))


def test_a_batch_is_what_the_model_takes(dataset, tiny_model):
    output = tiny_model(**in_one_batch(dataset))
    assert output.logits.shape == (3, 1) and torch.isfinite(output.loss)


def test_a_batch_moves_to_a_device_whole(dataset):
    batch = in_one_batch(dataset)
    assert type(batch) is dict and all(isinstance(value, torch.Tensor) for value in batch.values())
    moved = send_to_device(batch, torch.device("meta"))
    assert moved.keys() == batch.keys() and all(value.is_meta for value in moved.values())


def test_labels_and_numbers_stay_with_their_clips(dataset):
    loader = make_loader(dataset, BucketBatchSampler(dataset.lengths, 2))
    labels = {
        int(i): float(label)
        for batch in loader
        for i, label in zip(batch["index"], batch["labels"], strict=True)
    }
    assert labels == {0: -1.5, 1: 0.0, 2: 2.0}


def test_what_a_clip_lacks_is_marked_absent(dataset):
    batch = in_one_batch(dataset)
    # text, audio, vision of: the whole clip, the mute one without transcript, the one without a face
    assert batch["modality_present"].tolist() == [[True] * 3, [False, False, True], [True, True, False]]
    assert batch["vision_mask"].tolist() == [[True] * 4, [True] * 4, [False] * 4]


def test_masks_cover_exactly_what_was_measured(dataset):
    batch = in_one_batch(dataset)
    samples = [len(dataset.cache.load(key).waveform) for key in dataset.keys]
    assert 0 < samples[0] < samples[2] and samples[1] == 0
    steps = [1 + count // 160 for count in samples]
    assert batch["audio_values"].shape == (3, steps[2], 80)
    assert batch["audio_mask"].sum(dim=1).tolist() == [
        steps[0],
        1,
        steps[2],
    ]  # an absent sound is one step of zeros
    assert not batch["audio_values"][0, steps[0] :].any() and not batch["audio_values"][1].any()
    assert batch["text_mask"].sum(dim=1).tolist() == [5, 2, 9]  # words and the two special tokens
    assert not batch["text_input_ids"][~batch["text_mask"]].any()  # [PAD] is number 0
    assert batch["vision_values"].shape == (3, 4, 32, 32, 3) and batch["vision_values"].dtype == torch.uint8


def test_classes_become_their_numbers(make_dataset):
    dataset = make_dataset(labels=("sad", "happy", "sad"), label2id={"happy": 0, "sad": 1})
    batch = in_one_batch(dataset)
    assert batch["labels"].tolist() == [1, 0, 1] and batch["labels"].dtype == torch.int64


def test_worker_processes_make_the_same_batches(dataset):
    here, there = in_one_batch(dataset), in_one_batch(dataset, workers=1)
    assert all(torch.equal(there[name], value) for name, value in here.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_none_of_the_random_numbers_that_training_draws(dataset, workers):
    loader = make_loader(dataset, BucketBatchSampler(dataset.lengths, 2), workers)
    before = torch.get_rng_state()
    assert len(list(loader)) == len(list(in_order(loader))) == len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_emptied_during_training_is_reported_with_the_clip_and_the_remedy(dataset):
    for entry in dataset.cache.folder.rglob(f"{dataset.keys[1]}*"):
        entry.unlink()
    with pytest.raises(OSError, match=r"mute\.mp4 were deleted from the cache .*features: start again"):
        in_one_batch(dataset)
