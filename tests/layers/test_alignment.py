# SPDX-License-Identifier: Apache-2.0
"""Steps of audio and vision reach the token during whose word they happen."""

import pytest
import torch
from torch.nn import functional as F

from feature_extractors import ClipExtent
from feature_extractors.transcript import Transcript, Word
from msa_online import MSAConfig, MSAModel
from msa_online.layers.alignment import resample, token_grid, word_steps
from msa_online.modalities import ModalitySequence


def sequence_of(*lengths: int, time: int, width: int = 3) -> ModalitySequence:
    """Random states; each sample has so many observed steps."""
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), time, width, generator=torch.Generator().manual_seed(0))
    return ModalitySequence.of(values, mask)


def grid_of(*tokens: int) -> torch.Tensor:
    return torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]


def random_spans(batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Words in order, in steps from 0 to 10; about a third of the tokens have no time."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.rand(batch, 2 * tokens, generator=generator).sort(dim=1).values * 10
    spans = bounds.reshape(batch, tokens, 2)
    unknown = torch.rand(batch, tokens, 1, generator=generator) < 0.3
    return torch.where(unknown, torch.nan, spans)


@pytest.mark.parametrize("seed", range(20))
def test_a_token_is_the_mean_of_all_steps_that_its_word_touches(seed):
    sequence, grid = sequence_of(10, 7, time=12), grid_of(5, 4)
    spans = random_spans(2, 5, seed)
    found, even = resample(sequence, grid, spans), resample(sequence, grid)
    for row, tokens, length in ((0, 5, 10), (1, 4, 7)):
        for token in range(tokens):
            start, end = spans[row, token].tolist()
            if start != start:  # no time: as on the even grid
                expected = even.values[row, token]
            else:
                touched = [step for step in range(length) if step + 1 > start and step < end]
                expected = sequence.values[row, touched].mean(dim=0) if touched else torch.zeros(3)
                assert bool(found.mask[row, token]) == bool(touched)
            torch.testing.assert_close(found.values[row, token], expected)


def test_without_any_time_the_result_is_that_of_the_even_grid():
    sequence, grid = sequence_of(10, 7, time=12), grid_of(5, 4)
    nothing = torch.full((2, 5, 2), torch.nan)
    even, found = resample(sequence, grid), resample(sequence, grid, nothing)
    assert torch.equal(found.values, even.values) and torch.equal(found.mask, even.mask)


@pytest.mark.parametrize("seed", range(5))
def test_padding_of_text_and_sound_changes_nothing(seed):
    sequence, grid, spans = sequence_of(10, 7, time=12), grid_of(5, 4), random_spans(2, 5, seed)
    longer = ModalitySequence.of(F.pad(sequence.values, (0, 0, 0, 4)), F.pad(sequence.mask, (0, 4)))
    padded = resample(longer, F.pad(grid, (0, 3)), F.pad(spans, (0, 0, 0, 3), value=torch.nan))
    found = resample(sequence, grid, spans)
    torch.testing.assert_close(padded.values[:, :5], found.values)
    assert torch.equal(padded.mask, F.pad(found.mask, (0, 3)))


def test_steps_that_are_not_observed_and_words_beyond_the_sound_give_nothing():
    sequence = sequence_of(6, time=6)
    mask = torch.tensor([[True, True, False, False, True, True]])
    gap = ModalitySequence.of(sequence.values, mask)
    spans = torch.tensor([[[1.0, 3.0], [2.2, 3.9], [8.0, 9.0], [4.3, 4.3]]])
    found = resample(gap, grid_of(4), spans)
    assert found.mask.tolist() == [[True, False, False, True]]
    assert torch.equal(found.values[0, 0], gap.values[0, 1])
    assert torch.equal(found.values[0, 3], gap.values[0, 4])
    assert not found.values[0, 1:3].any()


def test_shares_of_the_sound_become_steps_and_frames_stay_frames():
    spans = torch.tensor([[[[0.5, 1.0], [2.0, 3.0]]]])
    text = ModalitySequence.of(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    heard = ModalitySequence(text.values, text.mask, text.present, spans)
    audio = sequence_of(8, time=10)
    assert word_steps(heard, "audio", audio).tolist() == [[[4.0, 8.0]]]
    assert word_steps(heard, "vision", audio).tolist() == [[[2.0, 3.0]]]
    assert word_steps(text, "audio", audio) is None


def test_a_hidden_text_hides_its_times_too():
    spans = torch.zeros(2, 3, 2, 2)
    text = ModalitySequence(*vars(sequence_of(3, 3, time=3)).values()).only(torch.tensor([True, True]))
    text = ModalitySequence(text.values, text.mask, text.present, spans)
    hidden = text.only(torch.tensor([True, False]))
    assert hidden.spans[0].isfinite().all() and hidden.spans[1].isnan().all()
    assert token_grid(hidden).tolist() == [[True] * 3, [True, False, False]]


def test_tokens_have_the_time_of_their_word_and_special_tokens_none(tiny_processor):
    words = (Word("it", 0.5, 1.0, 0.9), Word("is", 1.0, 1.5, 0.9), Word("good.", 2.0, 3.5, 0.9))
    heard = Transcript("it is good.", words, "en", "m")
    extent = ClipExtent(4.0, 2.0, 8)
    spans = tiny_processor.word_spans("it is good.", heard, extent)
    assert len(spans) == len(tiny_processor.tokenize("it is good."))  # [CLS] it is good . [SEP]
    assert spans[0].isnan().all() and spans[-1].isnan().all()
    assert spans[1].tolist() == [[0.25, 0.5], [1.0, 2.0]]
    assert torch.equal(spans[3], spans[4]) and spans[4, 1].tolist() == [4.0, 7.0]
    assert tiny_processor.word_spans("it was good.", heard, extent).isnan().all()
    silent = tiny_processor.word_spans("it is good.", heard, ClipExtent(4.0, 0.0, 8))
    assert silent[1, 0].isnan().all() and silent[1, 1].isfinite().all()


@pytest.mark.needs("cpsl")
def test_a_head_that_aligns_by_words_reads_them_and_the_default_does_not(tiny_config, make_batch):
    batch = make_batch()
    spans = torch.full((4, 9, 2, 2), torch.nan)
    spans[:, 1:3] = torch.tensor([[0.0, 0.1], [0.0, 1.0]])
    outputs = {}
    for alignment in ("even", "words"):
        kwargs = {"hidden_size": 16, "fusion_size": 16, "alignment": alignment}
        config = MSAConfig(**tiny_config.to_dict() | {"head": "cpsl", "head_kwargs": kwargs})
        torch.manual_seed(0)
        model = MSAModel(config).eval()
        with torch.no_grad():
            outputs[alignment] = [
                model(**batch).logits,
                model(**batch, text_spans=spans).logits,
                model(**batch, text_spans=torch.full_like(spans, torch.nan)).logits,
            ]
    even, words = outputs["even"], outputs["words"]
    assert all(torch.equal(even[0], same) for same in (even[1], words[0], words[2]))
    assert not torch.equal(words[0], words[1])
