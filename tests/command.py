"""Run the checks: lint, format, types and all tests; with arguments only pytest, with these arguments.

portrait.py test                 everything, the tests in two processes of one thread each
portrait.py test -k parity       the comparison with the official code
portrait.py test tests/unit -x   any arguments of pytest; paths count from the project's folder
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

REQUIREMENTS = "dev"
ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    # A file's tests stay together; each process that has some of the WebUI's starts one of its own.
    "pytest": ["pytest", "--numprocesses=2", "--dist=loadfile"],
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "portrait.py test [pytest arguments]"
    parser.set_defaults(others=[])


def run(options: argparse.Namespace) -> int:
    """Every check runs, also after one that failed; the last line sums up. 1 when any failed."""
    checks = {"pytest": ["pytest", *options.others]} if options.others else CHECKS
    environment = os.environ if options.others else {"OMP_NUM_THREADS": "1", **os.environ}
    start = time.monotonic()
    results = {}
    for name, command in checks.items():
        print(f"== {' '.join(command)}", flush=True)
        results[name] = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode
    verdicts = ", ".join(f"{name} {'passed' if code == 0 else 'FAILED'}" for name, code in results.items())
    print(f"portrait.py test: {verdicts} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if any(results.values()) else 0
