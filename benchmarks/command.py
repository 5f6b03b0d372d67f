"""Measure: one JSON object a line on standard output.

portrait.py bench step     cost of a UNet step with 1, 2, 4 and 8 people beside a bare one
portrait.py bench guidance cost of a UNet step with RB-Guidance beside a bare one
portrait.py bench energy   in how many runs of the embedded world RB-Guidance lowers its energy
portrait.py bench train    samples a second of the training loop beside its frozen UNet alone
portrait.py bench start    what the extension adds to the start of a WebUI
"""

from __future__ import annotations

import argparse

import benchmarks

REQUIREMENTS = "dev"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bench", choices=benchmarks.BENCHES, metavar="NAME", help=f"one of: {', '.join(benchmarks.BENCHES)}"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of this bench; --help after its name")


def run(options: argparse.Namespace) -> int:
    return benchmarks.run(options.bench, options.arguments)
