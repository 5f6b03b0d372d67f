"""install.py: adds what is missing, moves nothing, never stands in the way of the WebUI's start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import install

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = install.Package("facenet-pytorch==2.6.0", "facenet_pytorch", "always")
HEIC = install.Package("pillow-heif==0.16.0", "pillow_heif", "photos")
SCRFD = install.Package("insightface==2.1", "insightface", "scrfd")


@dataclass
class Host:
    """A pretended host. packages: version by name. asked: what pip was asked for. broken: modules that do not start."""

    packages: dict[str, str] = field(default_factory=lambda: {"numpy": "1.26.2", "protobuf": "3.20.0"})
    asked: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def pip(self, pin: str) -> str:
        self.asked.append(pin)
        name, _, version = pin.partition("==")
        self.packages[name] = version
        return ""


@pytest.fixture
def host(monkeypatch) -> Host:
    here = Host()
    monkeypatch.setattr(install, "installed", lambda: dict(here.packages))
    monkeypatch.setattr(install, "pip_install", lambda pin: here.pip(pin))
    monkeypatch.setattr(install, "import_problem", lambda module: "ImportError: no" if module in here.broken else "")
    return here


def test_the_pinned_list_is_read():
    found = {package.module: package for package in install.packages()}
    assert found["facenet_pytorch"] == ALWAYS
    assert found["insightface"] == SCRFD
    assert found["pillow_heif"] == HEIC
    assert {package.module for package in found.values() if package.when == "scrfd"} == {
        "insightface",
        "onnx",
        "onnxruntime",
    }


def test_only_what_is_missing_is_wanted(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "insightface" else object())
    assert install.missing([ALWAYS, SCRFD], scrfd=True) == [SCRFD]
    assert install.missing([ALWAYS, SCRFD], scrfd=False) == []
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.missing([ALWAYS, HEIC, SCRFD], scrfd=False) == [ALWAYS, HEIC]


def test_insightface_is_added_only_where_its_weights_are(monkeypatch, tmp_path):
    monkeypatch.setattr(install.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(install, "ROOT", tmp_path / "webui" / "extensions" / "portrait")
    assert not install.has_scrfd()
    places = [
        "home/.insightface/models/buffalo_l",
        "webui/models/insightface/models/buffalo_l",
        "webui/models/insightface/buffalo_l",
        "webui/models/Portrait",
        "webui/extensions/portrait/models",
        "webui/extensions/sd-webui-controlnet/annotator/downloads/insightface/models/buffalo_l",
    ]
    for place in places:
        file = tmp_path / place / install.SCRFD
        file.parent.mkdir(parents=True)
        file.touch()
        assert install.has_scrfd(), place
        file.unlink()


def test_every_package_is_installed_alone_and_said(host, capsys):
    install.add([ALWAYS, SCRFD])
    assert host.asked == [ALWAYS.pin, SCRFD.pin]
    assert capsys.readouterr().out.splitlines() == [
        "Portrait: installed facenet-pytorch==2.6.0",
        "Portrait: installed insightface==2.1",
    ]


def test_pip_is_asked_for_one_package_without_dependencies_or_compiling(monkeypatch):
    seen = []
    monkeypatch.setattr(install, "run", lambda command: seen.append(command) or "")
    monkeypatch.setenv("INDEX_URL", "https://mirror.example/simple")
    assert install.pip_install("insightface==2.1") == ""
    (command,) = seen
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", "--only-binary=:all:", "insightface==2.1"} <= set(command)
    assert command[command.index("--index-url") + 1] == "https://mirror.example/simple"


@pytest.mark.parametrize("after", ["2.4.6", None])
def test_a_moved_package_is_reported_loudly_with_the_way_back(host, capsys, after):
    def pip(pin):
        host.packages["numpy"] = after
        if after is None:
            del host.packages["numpy"]
        return ""

    host.pip = pip
    install.add([ALWAYS])
    out = capsys.readouterr().out
    assert f"WARNING: numpy was changed from 1.26.2 to {after or 'nothing'}" in out
    assert "pip install numpy==1.26.2" in out


def test_what_does_not_start_is_said_with_its_consequence(host, capsys):
    host.broken.add("insightface")
    install.add([ALWAYS, SCRFD])
    assert "insightface==2.1 was installed but does not start here (ImportError: no). Faces are found with MTCNN" in (
        capsys.readouterr().out
    )


def test_offline_is_one_line_for_each_package_and_no_failure(host, capsys):
    host.pip = lambda pin: "ERROR: No matching distribution found for " + pin
    install.add([ALWAYS])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "No matching distribution" in lines[0] and "pip install --no-deps" in lines[0]


def test_no_problem_leaves_the_installer(monkeypatch, capsys):
    def broken():
        raise OSError("disk on fire")

    monkeypatch.setattr(install, "packages", broken)
    install.main()
    assert capsys.readouterr().out == (
        "Portrait: the installer gave up (OSError: disk on fire). The WebUI is not affected.\n"
    )


def test_a_failed_command_is_told_by_its_error_line():
    code = "import sys; print('Looking'); print('ERROR: no such thing', file=sys.stderr); print('end'); sys.exit(1)"
    assert install.run([sys.executable, "-c", code]) == "ERROR: no such thing"
    assert install.run([sys.executable, "-c", ""]) == ""
    assert install.run([sys.executable, "-c", "raise SystemExit(3)"]) == "exit status 3"


def test_it_is_quick_and_silent_where_nothing_is_missing(tmp_path):
    """Beside a bare start of the same Python, whose own time is not the installer's."""
    extension = checkout(tmp_path)
    for module in ("facenet_pytorch", "onnx", "onnxruntime", "insightface"):
        (tmp_path / "site" / module).mkdir(parents=True)
        (tmp_path / "site" / module / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}

    def seconds(*command: str) -> float:
        start = time.perf_counter()
        result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        return time.perf_counter() - start

    bare = min(seconds("-c", "") for _ in range(3))
    assert min(seconds(str(extension / "install.py")) for _ in range(3)) - bare < 0.2


def checkout(tmp_path: Path) -> Path:
    """What the installer needs of this project, as an extension of a WebUI in `tmp_path`."""
    extension = tmp_path / "webui" / "extensions" / "portrait"
    (extension / "requirements").mkdir(parents=True)
    shutil.copy(ROOT / "install.py", extension)
    shutil.copy(ROOT / "requirements" / "webui.txt", extension / "requirements")
    return extension


@pytest.mark.slow
def test_a_host_like_environment_keeps_every_version(tmp_path):
    """numpy 1.26 and protobuf 3.20 as in the WebUI v1.10.1; SCRFD's weights are there, so that all is added."""
    if sys.version_info >= (3, 12):
        pytest.skip("the WebUI's pins have no wheels for Python 3.12")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pins = ["numpy==1.26.2", "protobuf==3.20.0", "scikit-image==0.21.0", "scipy<1.16", "Pillow==9.5.0"]
    pins += ["opencv-python==4.10.0.84", "requests", "tqdm"]
    # Not compiled: of their thousands of modules hardly any is imported.
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:", "--retries", "1", *pins]
    filled = subprocess.run(pip, capture_output=True, text=True)
    if filled.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {filled.stderr.strip().splitlines()[-1][:200]}")

    extension = checkout(tmp_path)
    weights = tmp_path / "webui" / "models" / "insightface" / "models" / "buffalo_l" / install.SCRFD
    weights.parent.mkdir(parents=True)
    weights.touch()

    def packages() -> dict[str, str]:
        code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        return dict(item.split("==") for item in listed)

    before = packages()
    hook = [python, str(extension / "install.py")]
    first = subprocess.run(hook, capture_output=True, text=True)
    after = packages()
    assert first.returncode == 0 and first.stderr == ""
    assert "WARNING" not in first.stdout
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() == {"facenet-pytorch", "pillow_heif", "onnx", "onnxruntime", "insightface"}
    # facenet-pytorch is there, but this host has no torch; insightface must really start beside protobuf 3.20.
    assert "facenet-pytorch==2.6.0 was installed but does not start here" in first.stdout
    assert "installed insightface==2.1" in first.stdout and "installed pillow-heif==0.16.0" in first.stdout
    second = subprocess.run(hook, capture_output=True, text=True)
    assert (second.returncode, second.stdout) == (0, "")
