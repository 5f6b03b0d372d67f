"""How fast the world draws."""

from __future__ import annotations

import multiprocessing
import time

import cv2

from .render import render
from .scenes import sample_scene


def draw_many(job: tuple[int, int, int]) -> int:
    """Render pictures first … first + number - 1 at a size; returns how many."""
    first, number, size = job
    cv2.setNumThreads(1)
    for seed in range(first, first + number):
        render(sample_scene(seed), size)
    return number


def bench(size: int, pictures: int, processes: int) -> dict[str, object]:
    """Pictures a second of the wall clock, over all processes, after each has drawn a few to warm up."""
    share = pictures // processes
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(draw_many, [(0, 10, size)] * processes, chunksize=1)
        start = time.perf_counter()
        drawn = sum(pool.map(draw_many, [(100 + share * k, share, size) for k in range(processes)], chunksize=1))
        seconds = time.perf_counter() - start
    return {"name": "world", "size": size, "pictures_per_second": round(drawn / seconds, 1), "processes": processes}
