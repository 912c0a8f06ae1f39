# SPDX-License-Identifier: Apache-2.0
import importlib

import pytest


def test_medians_are_taken_over_rounds_and_each_step_leads_in_turn(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    timing = importlib.import_module("timing")
    order, seconds = [], iter([9, 9, 0.001, 0.005, 0.003])

    def one() -> dict[str, float]:
        order.append("one")
        return {"step": next(seconds)}

    def two() -> dict[str, float]:
        order.append("two")
        return {"step": 0.002}

    medians = timing.time_in_turns({"one": one, "two": two}, rounds=3)
    assert medians == {"one": {"step": pytest.approx(3)}, "two": {"step": pytest.approx(2)}}
    assert order[4:] == ["one", "two", "two", "one", "one", "two"]
