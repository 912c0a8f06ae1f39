# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from feature_extractors import ClipError
from msa_online import MSAConfig, MSAModel, MSAPipeline
from msa_online.hub import CheckpointError


@pytest.fixture
def pipeline(tiny_model, tiny_processor):
    return MSAPipeline(tiny_model, tiny_processor)


def test_a_clip_with_its_words_uses_all_three(pipeline, make_clip, tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    prediction = pipeline(clip, text="a good movie")
    assert prediction.modalities == ("text", "audio", "vision")
    assert prediction.missing == {} and prediction.label is None and prediction.probabilities == {}
    assert json.loads(json.dumps(prediction.to_dict()))["score"] == prediction.score


def test_without_a_transcript_the_text_is_missing_and_the_output_says_so(pipeline, make_clip, tmp_path):
    prediction = pipeline(make_clip(tmp_path / "a.mp4"))
    assert prediction.modalities == ("audio", "vision")
    assert prediction.missing == {"text": "no transcript given"}


def test_text_alone_is_legal(pipeline):
    prediction = pipeline(text="a good movie")
    assert prediction.modalities == ("text",)
    assert prediction.missing == {"audio": "no clip given", "vision": "no clip given"}


def test_sound_alone_is_legal(pipeline, make_clip, tmp_path):
    prediction = pipeline(make_clip(tmp_path / "a.wav", video=False))
    assert prediction.modalities == ("audio",)
    assert prediction.missing["vision"] == "no video stream"


def test_a_clip_with_nothing_to_see_or_hear_still_gets_a_prediction(pipeline, make_clip, tmp_path):
    import numpy as np

    clip = make_clip(tmp_path / "a.mp4", frames=np.zeros((10, 160, 160, 3), np.uint8), audio="silent")
    prediction = pipeline(clip)
    assert prediction.modalities == ()
    assert prediction.missing == {"text": "no transcript given", "audio": "silent audio", "vision": "no face"}


def test_several_clips_at_once_equal_each_alone(pipeline, make_clip, tmp_path):
    clips = [make_clip(tmp_path / "a.mp4", seconds=0.5), make_clip(tmp_path / "b.mp4", seconds=2.0)]
    together = pipeline(clips, text=["a good movie", None])
    alone = [pipeline(clips[0], text="a good movie"), pipeline(clips[1])]
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-5)


def test_nothing_to_predict_from_and_unequal_lists_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="give a clip, a text, or both"):
        pipeline()
    with pytest.raises(ValueError, match="2 clips but 1 texts"):
        pipeline([None, None], text=["a"])
    with pytest.raises(ClipError, match="nosuch.mp4"):
        pipeline(tmp_path / "nosuch.mp4")


def test_a_model_of_features_is_refused_saying_what_it_takes_and_what_to_do(tmp_path):
    widths = {"text": 4, "audio": 3, "vision": 2}
    MSAModel(MSAConfig(feature_widths=widths, head_kwargs={"hidden_size": 8})).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="text 4, audio 3, vision 2.*not clips.*msa-online evaluate"):
        MSAPipeline.from_pretrained(tmp_path)


def test_real_clips_of_other_corpora_are_understood(pipeline, shared_data):
    clips = (
        sorted((shared_data / "crema_d").glob("*.flv"))[:2] + sorted((shared_data / "grid").glob("*.mpg"))[:2]
    )
    for prediction in pipeline(clips):
        assert {"audio", "vision"} <= set(prediction.modalities)
