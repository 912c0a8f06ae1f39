# SPDX-License-Identifier: Apache-2.0
"""The person that speaks is told by the mouth and the sound; people are told apart by where they are."""

import numpy as np

from feature_extractors.following import Face, most_speaking, people, shows_several

RANDOM = np.random.default_rng(0)
SHAPE = RANDOM.uniform(-50, 50, (478, 2))


def face(x: float, opening: float = 0.0, size: float = 1.0, y: float = 100.0) -> Face:
    """A face around (x, y), its lips apart by a share of the distance between the eyes."""
    landmarks = SHAPE.copy()
    landmarks[[33, 133]], landmarks[[362, 263]] = (-20, -15), (20, -15)
    landmarks[13], landmarks[14] = (0, 20 - 20 * opening), (0, 20 + 20 * opening)
    return Face(landmarks * size + (x, y), np.zeros(52, np.float32))


def test_the_mouth_opening_does_not_depend_on_size():
    assert np.isclose(face(0, 0.3).mouth_opening, 0.3) and np.isclose(face(0, 0.3, size=3).mouth_opening, 0.3)


def test_the_person_whose_mouth_moves_is_followed_though_another_is_larger():
    talk = [0.0, 0.3, 0.1, 0.4, 0.0, 0.3]
    frames = [[face(100, 0.1, size=1.5), face(500, opening)] for opening in talk]
    chosen = most_speaking(frames, np.zeros(6))
    assert list(chosen) == list(range(6)) and all(each.center[0] > 400 for each in chosen.values())


def test_of_two_moving_mouths_the_one_in_time_with_the_sound_is_followed():
    loud = np.array([0.0, 0.5, 0.1, 0.5, 0.0, 0.4])
    frames = [[face(100, 0.35 - level * 0.6), face(500, level * 0.6)] for level in loud]
    assert most_speaking(frames, loud)[0].center[0] > 400


def test_where_no_mouth_moves_the_largest_person_is_followed():
    frames = [[face(100, 0.1), face(500, 0.1, size=1.4)]] * 4
    assert most_speaking(frames, np.ones(4))[0].center[0] > 400


def test_a_person_is_followed_while_moving_and_after_a_gap():
    frames = [[face(100 + 30 * step, 0.2 * (step % 2)), face(600)] for step in range(6)]
    frames[3] = []
    chosen = most_speaking(frames, np.zeros(6))
    assert list(chosen) == [0, 1, 2, 4, 5] and [round(each.center[0]) for each in chosen.values()][-1] < 400


def test_nobody_is_followed_where_nobody_is():
    assert most_speaking([[], []], np.zeros(2)) == {} and most_speaking([], np.zeros(0)) == {}
    assert not shows_several([[], []], {})


def test_a_face_seen_in_two_views_is_one_person():
    assert len(people([face(100), face(104, size=1.1), face(300)])) == 2
