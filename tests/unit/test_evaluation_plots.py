"""Plots of sweeps: points lie where their values say, in the colour of their adapter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from lib_portrait.request import Guidance
from lib_portrait.routing_picture import colour_of
from trainer.evaluation.metrics import Estimate
from trainer.evaluation.plans import EvaluationPlan, Variant
from trainer.evaluation.plots import PANEL, TICKS, Line, _step, draw_panel, sweep_plot
from trainer.evaluation.report import Column, Table, TableRow

SIMILARITY = Column("similarity", lambda one: one.lowest)


def of_colour(picture: Image.Image, number: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels in the colour of adapter 1, 2, …"""
    y, x = np.nonzero((np.asarray(picture) == colour_of(number)).all(axis=2))
    return x, y


def estimate(value: float, error: float | None = None) -> Estimate:
    return Estimate(value, error, 1)


def test_points_lie_where_their_values_say() -> None:
    rising = Line("a", [estimate(0.2), estimate(0.3), estimate(0.4)], None)
    flat = Line("b", [estimate(0.25), None, estimate(0.25)], None)
    panel = draw_panel(SIMILARITY, ["1", "2", "3"], [rising, flat])
    assert panel.size == PANEL
    x, y = of_colour(panel, 1)
    middles = [y[x == place].mean() for place in (x.min() + 3, (x.min() + x.max()) // 2, x.max() - 3)]
    # The higher the value the higher the point, in even steps.
    assert middles[0] - middles[1] == pytest.approx(middles[1] - middles[2], abs=2.5)
    assert middles[0] - middles[1] > 50
    assert np.ptp(of_colour(panel, 2)[1]) <= 7


def test_what_is_zero_everywhere_is_a_line_on_a_plain_axis() -> None:
    panel = draw_panel(SIMILARITY, ["1", "2"], [Line("a", [estimate(0.0), estimate(0.0)], None)])
    other = draw_panel(SIMILARITY, ["1", "2"], [Line("a", [estimate(0.0), estimate(0.0001)], None)])
    for one in (panel, other):
        assert np.ptp(of_colour(one, 1)[1]) < 25


def test_errors_are_bars_and_what_is_without_guidance_is_dashed() -> None:
    heights = []
    for error in (None, 0.02):
        panel = draw_panel(
            SIMILARITY, ["1"], [Line("a", [estimate(0.3, error)], estimate(0.4)), Line("b", [estimate(0.2)], None)]
        )
        x, y = of_colour(panel, 1)
        heights.append(np.ptp(y[y > y.min() + 5]))
        # Dashes all along the panel, with gaps.
        dashed = np.unique(x[y == y.min()])
        assert np.ptp(dashed) > 0.7 * PANEL[0] and 0.4 < len(dashed) / np.ptp(dashed) < 0.75
    assert heights[0] <= 7 < 20 < heights[1]


@pytest.mark.parametrize("extent", [1e-9, 0.031, 1.0, 7.0, 20.0, 99.0])
def test_ticks_are_round_and_few(extent: float) -> None:
    step = _step(extent)
    assert f"{step:e}"[0] in "125" and f"{step:.1e}"[2] == "0"
    assert extent / step <= TICKS + 1e-6


def test_a_sweep_has_a_panel_for_what_was_measured_and_a_line_for_each_adapter() -> None:
    def row(adapter: str | None, value: float | None, similarity: float) -> TableRow:
        guidance = Guidance() if value is None else Guidance(True, {"begin": value})
        name = str(adapter) if value is None else f"{adapter}, begin = {value:g}"
        numbers = {
            "similarity": estimate(similarity, 0.01),
            "moles kept": None if value else estimate(0.5),
            "FID": None,
        }
        return TableRow(Variant(name, adapter, guidance=guidance), numbers, {})

    rows = [row("a", None, 0.3), row("a", 0.5, 0.4), row("a", 1.0, 0.5), row("alone", 0.5, 0.1), row("alone", 1.0, 0.2)]
    plan = EvaluationPlan("guidance", "Reference guidance: begin", [], [one.variant for one in rows], part="begin")
    moles = Column("moles kept", lambda one: None)
    plot = sweep_plot(Table(plan, [SIMILARITY, moles], rows, [], []))
    # Moles were measured of no guided row, so that they have no panel.
    assert plot.width < 2 * PANEL[0]
    for number in (1, 2):
        assert len(of_colour(plot, number)[0]) > 100
    both = sweep_plot(
        Table(
            plan,
            [SIMILARITY, Column("top-1", lambda one: None)],
            [TableRow(one.variant, {**one.numbers, "top-1": estimate(1.0)}, {}) for one in rows],
            [],
            [],
        )
    )
    assert both.width > 2 * PANEL[0]
