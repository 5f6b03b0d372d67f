"""The window of a sampling in which somebody takes part, in shares of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lib_portrait.errors import PortraitError


def takes_part(start: float, end: float, progress: float) -> bool:
    """Whether who has this window takes part where the share `progress` of the sampling is done; an end of 1 has no
    end."""
    return start <= progress and (progress < end or end >= 1.0)


def check_window(path: str, start: float, end: float, steps: Iterable[float]) -> None:
    """Raises PortraitError, naming the nearest window that would do, unless one of the steps lies in the window.

    path: of the identity. steps: for each step of the sampling the share of it that is done before, 0 to 1.
    """
    reached = sorted(set(steps))
    if not reached or any(takes_part(start, end, step) for step in reached):
        return
    nearest = min(reached, key=lambda step: max(start - step, step - end))
    shown = [f"{round(step, 2):g}" for step in reached]
    listed = ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])
    # Two digits, on the side on which the step is.
    below = math.floor(nearest * 100 + 1e-9) / 100
    remedy = f"Let it start at {below:g} or before" if nearest < start else f"Let it end at {below + 0.01:g} or after"
    raise PortraitError(
        f"{path}.{'start' if nearest < start else 'end'}",
        f"no step of the sampling lies between {start:g} and {end:g}, so this person would not be drawn: the steps are "
        f"at {listed}",
        f"{remedy}, or take more steps.",
    )
