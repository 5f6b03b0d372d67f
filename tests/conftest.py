"""What holds for every test: nothing is fetched, two threads at most, one line for all skipped WebUI tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch and transformers are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """WebUI tests skipped for one reason are folded into one line of the summary, which else has one for each place."""
    for report in terminalreporter.getreports("skipped"):
        if "webui" in report.keywords and isinstance(report.longrepr, tuple):
            report.longrepr = (str(Path(__file__).parent / "webui"), None, report.longrepr[2])
