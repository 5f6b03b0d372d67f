"""What holds for every test: nothing is fetched, two threads at most, and a word about tests that did not run."""

from __future__ import annotations

import os

import pytest

# Before torch and transformers are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.getreports("skipped") if "webui" in report.keywords]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} WebUI tests were skipped: install AUTOMATIC1111's WebUI v1.10.1 with its venv at "
            "~/stable-diffusion-webui, or set WEBUI_DIR to where it is."
        )
