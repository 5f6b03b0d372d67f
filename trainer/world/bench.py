"""How fast the world is rendered."""

from __future__ import annotations

import multiprocessing
import time

import cv2

from .render import render
from .scenes import sample_scene


def render_many(job: tuple[int, int, int]) -> float:
    """Render pictures first … first + number - 1 at a size; returns the seconds of CPU time that took."""
    first, number, size = job
    cv2.setNumThreads(1)
    start = time.process_time()
    for seed in range(first, first + number):
        render(sample_scene(seed), size)
    return time.process_time() - start


def bench(size: int, pictures: int, processes: int) -> dict[str, object]:
    """Pictures a second of the wall clock, over all processes, after each has drawn a few to warm up.

    `cpu_ms` is what one picture costs in CPU time: that hardly changes where other work takes the processor away.
    """
    share = pictures // processes
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(render_many, [(0, 10, size)] * processes, chunksize=1)
        start = time.perf_counter()
        cpu = sum(pool.map(render_many, [(100 + share * k, share, size) for k in range(processes)], chunksize=1))
        seconds = time.perf_counter() - start
    rendered = share * processes
    return {
        "name": "world",
        "size": size,
        "pictures_per_second": round(rendered / seconds, 1),
        "cpu_ms": round(1000 * cpu / rendered, 2),
        "processes": processes,
    }
