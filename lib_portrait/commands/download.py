"""Fetch published weights; what was broken off goes on where it stopped, and every file is checked by its SHA-256.

portrait.py download                       all that the first method needs for Stable Diffusion 1.5
portrait.py download backbone vision       only these roles; also: another method, detector, a file's name, or all
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lib_portrait.methods.declarations import NAMES, adapter_files

REQUIREMENTS = "standalone"
MODELS = Path(__file__).resolve().parents[2] / "models"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", default=[NAMES[0]], metavar="WHAT", help=f"default: {NAMES[0]}")
    parser.add_argument("--into", type=Path, default=MODELS, metavar="FOLDER", help="default: models/ of this project")
    parser.add_argument("--sha256", metavar="HEX", help="check a single file whose publisher announces no hash by this")


def run(options: argparse.Namespace) -> int:
    from lib_portrait.checkpoints import Registry
    from lib_portrait.checkpoints.download import fetch_known

    registry = Registry(adapter_files())
    for what in registry.groups if "all" in options.what else options.what:
        for path in fetch_known(what, options.into, registry, Meter(), options.sha256):
            print(f"{path} is there ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0


class Meter:
    """Shows how far a download is: one line rewritten on a terminal, now and then a line in a log."""

    def __init__(self) -> None:
        self._due = 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, name: str, done: int, total: int) -> None:
        """done, total: bytes; total is 0 where it is not known."""
        now = time.monotonic()
        finished = done == total
        if now < self._due and not finished:
            return
        self._due = now + (0.2 if self._terminal else 10.0)
        share = f" of {total / 2**20:.1f} MiB, {100 * done / total:.0f} %" if total else " MiB"
        end = "\n" if finished or not self._terminal else ""
        start = "\r" if self._terminal else ""
        print(f"{start}{name}: {done / 2**20:.1f}{share}", end=end, file=sys.stderr, flush=True)
