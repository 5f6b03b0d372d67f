"""Figures: each bench is a module here with `main(arguments) -> exit status` that prints one JSON object a line."""

from __future__ import annotations

import importlib

BENCHES = ("step", "guidance", "energy", "start", "train")


def run(name: str, arguments: list[str]) -> int:
    """Run one of BENCHES with the arguments that follow its name on the command line."""
    return int(importlib.import_module(f"benchmarks.{name}").main(arguments))
