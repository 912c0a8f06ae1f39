# SPDX-License-Identifier: Apache-2.0
"""The task "multimodal-sentiment" of `transformers.pipeline`, on checkpoints that the tests save."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import pipeline

from feature_extractors import ClipError
from msa_online import MSAPipeline, MultimodalSentimentPipeline

TASK = "multimodal-sentiment"
# of transformers, for tiny models saved by the tests
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def classify(checkpoint):
    return pipeline(TASK, model=str(checkpoint), device="cpu")


def scores(predictions) -> list[float]:
    return [prediction["score"] for prediction in predictions]


def test_a_clip_gets_the_prediction_of_our_own_pipeline(classify, checkpoint, make_clip, tmp_path):
    assert type(classify) is MultimodalSentimentPipeline
    clip, own = make_clip(tmp_path / "a.mp4"), MSAPipeline.from_pretrained(checkpoint)
    expected = own(clip, "a good movie").to_dict()
    assert classify(str(clip), text="a good movie") == expected
    assert classify({"clip": clip, "text": "a good movie"}) == expected
    assert classify(clip, text="a good movie", attribute=False)["contributions"] == {}
    assert classify(text="a good movie") == own(text="a good movie").to_dict()
    window = {"start": 0.2, "end": 0.7}
    assert classify(clip.read_bytes(), **window)["score"] == own(clip, **window).score
    sound = {"audio": np.sin(np.arange(9_000)), "sampling_rate": 16_000}
    assert classify(**sound) == own(**sound).to_dict()


class Clips(Dataset):
    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, number):
        return self.clips[number]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 2, "num_workers": 1}], ids=str)
def test_lists_generators_and_datasets_give_the_same_in_any_batches(options, classify, make_clip, tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    inputs = [clip, {"text": "bad"}, {"clip": str(clip), "text": "a good movie"}]
    expected = scores(map(classify, inputs))
    assert len(set(expected)) == 3
    for several in (inputs, tuple(inputs), (each for each in inputs), iter(inputs), Clips(inputs)):
        assert scores(classify(several, **options)) == pytest.approx(expected, abs=1e-6)
    assert classify([]) == []


def test_what_is_wrong_is_named(classify, tmp_path):
    with pytest.raises(ClipError, match=r"nosuch\.mp4"):
        classify(tmp_path / "nosuch.mp4")
    with pytest.raises(ValueError, match="text of several clips: give a dict for each clip"):
        classify(["a.mp4", "b.mp4"], text="good")
    with pytest.raises(ValueError, match="nothing to predict from"):
        classify()
    with pytest.raises(TypeError, match="unknown arguments: words"):
        classify("a.mp4", words="good")


def test_a_saved_pipeline_opens_again_without_remote_code(classify, tmp_path):
    classify.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    again = pipeline(TASK, model=tmp_path / "again", device="cpu")
    assert again(text="a good movie") == classify(text="a good movie")


def test_types_and_devices_are_those_of_transformers(checkpoint, classify):
    expected = classify(text="a good movie")["score"]
    for options in ({"dtype": torch.bfloat16}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        found = pipeline(TASK, model=str(checkpoint), **options)
        assert found(text="a good movie")["score"] == pytest.approx(expected, abs=0.02)


def test_a_model_and_a_processor_need_no_folder(tiny_model, tiny_processor):
    classify = pipeline(TASK, model=tiny_model, processor=tiny_processor, device="cpu")
    assert classify(text="good")["modalities"] == ("text",)


def test_weights_that_do_not_fit_are_refused(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("head.classifier.bias")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not match config\.json in 1 tensors, for example head\.classifier"
    ):
        pipeline(TASK, model=str(checkpoint), device="cpu")
