"""What holds for every test: nothing is fetched, two threads at most, one line for all skipped WebUI tests.

At the end it is told how many of those that need a WebUI, or more beside it, or Ray, ran.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

# Before torch and transformers are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def ray() -> str | None:
    """PORTRAIT_RAY_ADDRESS, HOST:PORT of a cluster on this machine, or None: then each test starts one of its own."""
    pytest.importorskip("ray", reason="Ray is not installed (requirements/ray.txt)")
    return os.environ.get("PORTRAIT_RAY_ADDRESS")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """WebUI tests skipped for one reason are folded into one line of the summary, which else has one for each place."""
    for report in terminalreporter.getreports("skipped"):
        if "webui" in report.keywords and isinstance(report.longrepr, (tuple, list)):
            report.longrepr = (str(Path(__file__).parent / "webui"), None, report.longrepr[2])


# What a test needs that not every machine has, by the fixture that brings it; the first that it has counts.
NEEDS = {
    "driver": "browser",
    "with_adetailer": "ADetailer",
    "server_with_controlnet": "ControlNet",
    "webui_dir": "WebUI",
    "ray": "Ray",
}
# Its key among what a report says of its test.
NEED = "need"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        need = next((name for fixture, name in NEEDS.items() if fixture in fixtures), None)
        if need is not None:
            item.user_properties.append((NEED, need))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Below pytest's own closing line: of each kind of test how many ran, and how many did not for want of what."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    ran: Counter[str] = Counter()
    wanting: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.getreports(outcome):
            # A file that cannot be collected has none.
            need = dict(getattr(report, "user_properties", ())).get(NEED)
            if need is not None and outcome == "skipped":
                wanting[need][report.longrepr[2].removeprefix("Skipped: ")] += 1
            elif need is not None:
                ran[need] += 1
    for need in NEEDS.values():
        skipped = "".join(f", {count} skipped: {reason}" for reason, count in wanting[need].items())
        if ran[need] or skipped:
            reporter.write_line(f"{need} tests: {ran[need]} ran{skipped}")
