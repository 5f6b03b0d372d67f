"""In which steps of a sampling somebody takes part, and what is said where it is none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_portrait.attention.windows import check_window, takes_part
from lib_portrait.errors import PortraitError


def steps(count: int) -> list[float]:
    return [step / count for step in range(count)]


@pytest.mark.parametrize(
    ("start", "end", "count", "field", "remedy"),
    [
        (0.99, 1.0, 20, "start", "start at 0.95 or before"),
        (0.97, 1.0, 6, "start", "start at 0.83 or before"),
        (0.51, 0.54, 6, "start", "start at 0.5 or before"),
        (0.61, 0.65, 6, "end", "end at 0.67 or after"),
        (0.8, 1.0, 4, "start", "start at 0.75 or before"),
        (0.01, 0.02, 1, "start", "start at 0 or before"),
    ],
)
def test_a_window_between_two_steps_is_refused_with_the_nearest_that_is_not(start, end, count, field, remedy):
    with pytest.raises(PortraitError, match=f"between {start:g} and {end:g}") as caught:
        check_window("identities[0]", start, end, steps(count))
    assert caught.value.field == f"identities[0].{field}"
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("start", "end", "count"), [(0, 1, 1), (0.95, 1, 20), (0.5, 0.51, 2), (0, 0.01, 9), (0.83, 0.84, 6)]
)
def test_a_window_that_meets_a_step_is_accepted(start, end, count):
    check_window("identities[0]", start, end, steps(count))


def test_where_no_step_is_known_nothing_is_said():
    check_window("identities[0]", 0.99, 1.0, [])


@given(st.integers(1, 60), st.floats(0, 0.999), st.floats(0.001, 1))
def test_the_window_that_is_named_would_do(count, start, width):
    end = min(start + width * 0.1, 1.0)
    try:
        check_window("identities[0]", start, end, steps(count))
    except PortraitError as error:
        number = float(error.remedy.split(" at ")[1].split(" ")[0])
        changed = {"start": start, "end": end, error.field.split(".")[-1]: number}
        assert any(takes_part(changed["start"], changed["end"], step) for step in steps(count))
    else:
        assert any(start <= step and (step < end or math.isclose(end, 1)) for step in steps(count))
