"""What fails where a script or an extension would catch it is heard when the job's object is closed."""

from __future__ import annotations

import copy
import types
from contextlib import closing

import pytest

from lib_portrait.errors import PortraitError
from lib_portrait.webui import jobs


class Processing:
    """The little of the host's processing object that a job needs. script: the number of the selected script."""

    def __init__(self, script: int = 0):
        names = ("/x/scripts/loopback.py", "/x/scripts/xyz_grid.py")
        self.scripts = types.SimpleNamespace(
            selectable_scripts=[types.SimpleNamespace(filename=name) for name in names]
        )
        self.script_args = (script,)
        self.extra_generation_params: dict[str, str] = {}
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


PLOT = 2


def fault(problem: str = "it is bad") -> PortraitError:
    return PortraitError("scale", problem, "Make it good.")


def test_a_plot_tells_of_cells_that_failed_and_raises_where_all_did():
    with closing(Processing(PLOT)) as p:
        jobs.begin(p)
        assert jobs.is_cell(copy.copy(p))
        jobs.sampled(p, 1)
        for _ in range(2):
            jobs.sampled(p, 2, fault())
        jobs.sampled(p, 3, fault())
    assert p.extra_generation_params == {jobs.FAULTS_KEY: "2 of 3 cells: scale: it is bad. Make it good."}
    assert p.closed == 1 and "close" not in vars(p)
    with pytest.raises(PortraitError, match="bad"), closing(Processing(PLOT)) as p:
        jobs.begin(p)
        jobs.sampled(p, 4, fault())


@pytest.mark.parametrize("script", [0, 1])
def test_elsewhere_faults_raise_where_they_are_and_are_not_told_twice(script):
    with closing(Processing(script)) as p:
        jobs.begin(p)
        assert not jobs.is_cell(p)
        jobs.sampled(p, 1, fault())
    assert p.extra_generation_params == {}


def test_what_an_extension_swallows_is_raised_at_the_end():
    with pytest.raises(PortraitError, match="inside"), closing(Processing()) as p:
        jobs.begin(p)
        inner = Processing(PLOT)
        jobs.begin(inner)
        assert not jobs.is_cell(inner)
        jobs.sampled(inner, 1, fault("inside"))
        inner.close()
    assert p.closed == inner.closed == 1
    # The next job is one of its own.
    with closing(Processing()) as p:
        jobs.begin(p)


def test_an_error_that_is_under_way_stays_what_it_is():
    with pytest.raises(ValueError, match="the host's"), closing(Processing(PLOT)) as p:
        jobs.begin(p)
        jobs.sampled(p, 1, fault())
        raise ValueError("the host's")


def test_closing_a_copy_does_not_end_the_job():
    with closing(Processing(PLOT)) as p:
        jobs.begin(p)
        cell = copy.copy(p)
        jobs.release_copy(cell)
        jobs.release_copy(p)
        cell.close()
        assert (cell.closed, p.closed) == (1, 0)
        jobs.sampled(p, 1)
        jobs.sampled(p, 2, fault())
    assert jobs.FAULTS_KEY in p.extra_generation_params
