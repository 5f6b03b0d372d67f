"""What holds for every test: nothing is fetched, two threads at most, one line for all skipped WebUI tests.

At the end it is told how many of those that need a WebUI, or more beside it, or Ray, ran.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

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


# Files that some process starts a WebUI with ControlNet for: one process gets all of them.
BESIDE_CONTROLNET = tuple(
    f"tests/webui/test_{name}.py"
    for name in ("guidance", "fusion", "instantfamily", "controlnet", "omniportrait", "ip_adapter", "lllite")
)
# Those that take longest, in this order: of several processes one that gets a long file last works on alone.
LONGEST = (
    *BESIDE_CONTROLNET,
    "tests/webui/test_panel_browser.py",
    "tests/unit/test_evaluation_run.py",
    "tests/webui/test_matrix.py",
    "tests/quality/test_world_quality.py",
    "tests/unit/test_guidance_reference.py",
    "tests/unit/test_session.py",
    "tests/webui/test_world.py",
    "tests/webui/test_places.py",
    "tests/webui/test_bad_input.py",
    "tests/webui/test_left_behind.py",
    "tests/webui/test_drawn_or_said.py",
    "tests/unit/test_uniportrait_training.py",
    "tests/unit/test_standalone_generation.py",
    "tests/unit/test_world_stages.py",
    "tests/unit/test_world_recipes.py",
    "tests/unit/test_trainer_loop.py",
    "tests/unit/test_faces_detection.py",
    "tests/unit/test_guidance.py",
    "tests/unit/test_instantfamily.py",
    "tests/unit/test_installer.py",
    "tests/unit/test_session_guidance.py",
    "tests/quality/test_guidance_quality.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist=loadfile, but for the order of the files and those that are handed out together."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "beside ControlNet" if file in BESIDE_CONTROLNET else file

    # It would hand out files with many tests first, however short these are.
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        places = {file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.split("::", 1)[0], len(places)))
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
