"""The number of codes of a step, as the original's scheduler computes it."""

import json

import pytest

from tl_codebook.training import k_at_step


@pytest.fixture
def spec(shared):
    return json.loads((shared("golden/config/k_scheduler") / "case.json").read_text())


@pytest.mark.parametrize("index", range(4))
def test_values(spec, index):
    assert len(spec["schedules"]) == 4
    args, expected = spec["schedules"][index]["args"], spec["schedules"][index]["k"]
    fall = {
        "k_start": args["k_max"],
        "k_end": args["k_min"],
        "decay_steps": args["decay_steps"],
        "power": float(args.get("decay_power", 1)),
    }
    assert [k_at_step(step, **fall) for step in range(len(expected))] == expected


def test_one_step_is_the_end_where_the_original_divides_by_zero(spec):
    assert "ZeroDivisionError" in spec["decay_steps=1"]
    assert [k_at_step(step, k_start=9, k_end=2, decay_steps=1) for step in range(3)] == [2, 2, 2]
