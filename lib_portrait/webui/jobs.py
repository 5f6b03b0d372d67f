"""What one press of *Generate*, or one call of the API, draws: one processing object, or many.

A script makes copies of it (the X/Y/Z plot one for each cell), extensions make others and draw with them in between
(ADetailer). What fails in those the host, or the script, prints to the console and goes on: the cell is black, the face
stays as it was. So faults are kept here as well, until the object that the job began with is closed, where nothing is
caught any more (`closing(p)` in `modules/txt2img.py`, `modules/img2img.py` and `modules/api/api.py`).
"""

from __future__ import annotations

import sys
import textwrap
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError

FAULTS_KEY = "Portrait faults"
_ATTRIBUTE = "portrait_job"
_open: weakref.ref[Job] | None = None


@dataclass
class Job:
    """plot: the X/Y/Z plot draws it. cells: of each of its cells, by the number of its session, what failed and was
    shown there, or None. in_extensions: what failed where an extension drew."""

    plot: bool
    cells: dict[int, PortraitError | None] = field(default_factory=dict)
    in_extensions: list[PortraitError] = field(default_factory=list)

    def settle(self, p: Any) -> None:
        """Raises what nobody has heard of. Where a plot has some good cells, the parameters of the whole tell of the
        others: the API gives them, and the page keeps them for *Send to*."""
        if self.in_extensions:
            raise self.in_extensions[0]
        faults = [error for error in self.cells.values() if error is not None]
        if faults and len(faults) == len(self.cells):
            raise faults[0]
        if faults:
            counted = Counter(str(error) for error in faults)
            p.extra_generation_params[FAULTS_KEY] = " ".join(
                f"{count} of {len(self.cells)} cells: {text}" for text, count in counted.items()
            )


def begin(p: Any) -> None:
    """`setup`: the host calls it once for every processing object that it, or an extension, makes; not for copies."""
    global _open
    outer = _open() if _open is not None else None
    if outer is not None:
        setattr(p, _ATTRIBUTE, (outer, True))
        return
    job = Job(_is_plot(p))
    setattr(p, _ATTRIBUTE, (job, False))
    p.close = _Close(p, job)
    _open = weakref.ref(job)


def release_copy(p: Any) -> None:
    """Has a copy of the object that a job began with closed like the host's own."""
    close = p.__dict__.get("close")
    if isinstance(close, _Close) and not close.belongs_to(p):
        del p.close


def is_cell(p: Any) -> bool:
    """Whether `p` is a cell of a plot, in which faults are drawn."""
    job, inner = _job_of(p)
    return job is not None and job.plot and not inner


def sampled(p: Any, session: int, error: PortraitError | None = None) -> None:
    """Keeps that a session has sampled, or failed to, for somebody may catch the fault on its way."""
    job, inner = _job_of(p)
    if job is not None and inner and error is not None:
        job.in_extensions.append(error)
    elif job is not None and job.plot and not inner:
        job.cells[session] = job.cells.get(session) or error


def draw_fault(p: Any, error: PortraitError) -> Any:
    """A cell's pictures with the words of a fault, in place of its samples; its infotext has them, too."""
    import torch
    from modules.processing import DecodedSamples

    p.extra_generation_params[FAULTS_KEY] = str(error)
    p.comment(f"Portrait: {error}")
    width, height = p.width, p.height
    if getattr(p, "enable_hr", False):
        width, height = p.hr_upscale_to_x or width, p.hr_upscale_to_y or height
    picture = torch.from_numpy(_words(str(error), width, height)).permute(2, 0, 1).float() / 127.5 - 1
    return DecodedSamples([picture] * len(p.prompts))


def _words(text: str, width: int, height: int) -> Any:
    """(height, width, 3) uint8: the text, as large as it has room."""
    import numpy as np
    from modules.images import get_font
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), (40, 40, 40))
    draw = ImageDraw.Draw(picture)
    for size in range(max(width // 16, 8), 7, -1):
        font = get_font(size)
        lines = "\n".join(textwrap.wrap(text, max(int(width * 0.95 / (size * 0.55)), 8)))
        box = draw.multiline_textbbox((width // 40, height // 40), lines, font)
        if box[2] <= width and box[3] <= height:
            break
    draw.multiline_text((width // 40, height // 40), lines, (255, 200, 200), font)
    return np.array(picture)


class _Close:
    """Stands before `p.close` of the object that a job began with, on the instance, and takes itself off."""

    def __init__(self, p: Any, job: Job):
        self._p = weakref.ref(p)
        self._job = job

    def belongs_to(self, p: Any) -> bool:
        return self._p() is p

    def __call__(self) -> None:
        global _open
        p: Any = self._p()
        p.__dict__.pop("close", None)
        if _open is not None and _open() is self._job:
            _open = None
        p.close()
        # What is on its way out already is heard there.
        if sys.exc_info()[1] is None:
            self._job.settle(p)


def _job_of(p: Any) -> tuple[Job | None, bool]:
    """The job that `p` belongs to, and whether an extension has made it in between."""
    return getattr(p, _ATTRIBUTE, (None, False))


def chosen_script(p: Any) -> Any | None:
    """The script that was chosen below the panels, or None. The API may put text of an infotext in its number's place,
    and then runs none."""
    number = p.script_args[0] if p.script_args else None
    scripts = p.scripts.selectable_scripts if p.scripts is not None else ()
    return scripts[number - 1] if isinstance(number, int) and 0 < number <= len(scripts) else None


def _is_plot(p: Any) -> bool:
    script = chosen_script(p)
    return script is not None and Path(script.filename).name == "xyz_grid.py"
