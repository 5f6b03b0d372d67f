"""The WebUI of these tests. Where there is none they are skipped, each with the same one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.portraits import DRAWN, NAMES, portrait
from tests.webui.browser import chromium
from tests.webui.oracle import Oracle
from tests.webui.server import Client, photo, running, tail
from tests.webui.world import World, make_world

PEOPLE = ("ada", "ben", "cleo")


@pytest.fixture(scope="session")
def webui_dir() -> Path:
    folder = Path(os.environ.get("WEBUI_DIR") or Path.home() / "stable-diffusion-webui")
    if not (folder / "launch.py").is_file() or not webui_python(folder).is_file():
        pytest.skip(
            f"no WebUI with its own Python in {folder}: install AUTOMATIC1111's WebUI v1.10.1 there, or set WEBUI_DIR "
            "(and WEBUI_PYTHON, if its Python is not venv/bin/python)"
        )
    return folder


def webui_python(folder: Path) -> Path:
    default = "venv/Scripts/python.exe" if os.name == "nt" else "venv/bin/python"
    return Path(os.environ.get("WEBUI_PYTHON") or folder / default)


@pytest.fixture(scope="session")
def world(webui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "models", webui_dir, webui_python(webui_dir))


@pytest.fixture(scope="session")
def server(webui_dir: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A WebUI with this extension and the probe."""
    folder = tmp_path_factory.mktemp("webui")
    with running(webui_dir, webui_python(webui_dir), world.models, folder) as client:
        yield client


@pytest.fixture(scope="session")
def server_with_controlnet(webui_dir: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A WebUI that has sd-webui-controlnet as well."""
    places = [webui_dir / place / "sd-webui-controlnet" for place in ("extensions", "extensions-available")]
    extension = next((place for place in places if (place / "scripts" / "controlnet.py").is_file()), None)
    if extension is None:
        pytest.skip(f"no sd-webui-controlnet in {places[0].parent}: install 1.1.455 there")
    folder = tmp_path_factory.mktemp("webui-controlnet")
    with running(webui_dir, webui_python(webui_dir), world.models, folder, [extension]) as client:
        assert client.call("/probe/controlnet", {"channels": world.channels}).status == 200
        yield client


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("PORTRAIT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def people() -> dict[str, str]:
    """A picture of each of three people, by name, as base64: drawn ones, for they travel with the project."""
    return {name: photo(portrait(file)) for name, file in zip(PEOPLE, DRAWN, strict=True)}


@pytest.fixture(scope="session")
def photographed() -> dict[str, str]:
    """A photo of each of three people, by name, as base64; skipped where there are none."""
    return {name: photo(portrait(file)) for name, file in zip(PEOPLE, NAMES[1:], strict=True)}


@pytest.fixture(scope="session")
def oracle(world: World, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(world, tmp_path_factory.mktemp("oracle"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """A failure shows the end of the server's log."""
    outcome = yield
    report = outcome.get_result()
    for name in ("server", "server_with_controlnet"):
        client = getattr(item, "funcargs", {}).get(name)
        if report.failed and isinstance(client, Client):
            report.sections.append((f"{name}'s log", tail(client.scratch / "server.log")))
