"""The WebUI's installer hook: run at every start, with the WebUI's Python, before the extension is loaded.

It adds what requirements/webui.txt names and the host lacks, each package alone (--no-deps), so that pip has no reason
to touch another one; a plain install of insightface 2 would bring protobuf 6 and numpy 2 into a host made for protobuf
3.20 and numpy 1.26. The list of installed packages is compared before and after. Whatever goes wrong is one line, and
the WebUI starts all the same. Standard library only; next to nothing is done where nothing is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Not resolved: an extension may be a link to a checkout elsewhere, and the WebUI's folders lie around the link.
ROOT = Path(os.path.abspath(__file__)).parent
SCRFD = "det_10g.onnx"
SCRFD_PLACES = ("", "buffalo_l", "models/buffalo_l", "insightface/models/buffalo_l")
LINE = re.compile(r"(?P<pin>[\w.-]+==[\w.]+)\s+#\s+(?P<when>always|photos|scrfd): (?P<module>\w+)")
SECONDS = 600


@dataclass(frozen=True)
class Package:
    """pin: `name==version` for pip; module: what is imported of it; when: see requirements/webui.txt."""

    pin: str
    module: str
    when: str


def main() -> None:
    """Add what is missing. Raises nothing: a start of the WebUI must not fail over this."""
    try:
        wanted = missing(packages(), has_scrfd())
        if wanted:
            add(wanted)
    except Exception as error:
        say(f"the installer gave up ({type(error).__name__}: {error}). The WebUI is not affected.")


def packages() -> list[Package]:
    """The packages of requirements/webui.txt. Raises ValueError for a line that is none."""
    found = []
    for line in (ROOT / "requirements" / "webui.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"requirements/webui.txt has a line that cannot be read: {line!r}")
        found.append(Package(match["pin"], match["module"], match["when"]))
    return found


def missing(wanted: list[Package], scrfd: bool) -> list[Package]:
    """Those whose module is not there, under whatever package name: onnxruntime-gpu brings onnxruntime, too."""
    return [
        package
        for package in wanted
        if (scrfd or package.when != "scrfd") and importlib.util.find_spec(package.module) is None
    ]


def has_scrfd() -> bool:
    """Whether SCRFD's weights lie where the extension looks for them (lib_portrait/webui/settings.py: folders).

    Without them insightface would be of no use. Folders added on the settings page are not known at this point.
    """
    extensions = ROOT.parent
    models = extensions.parent / "models"
    controlnet = extensions / "sd-webui-controlnet" / "annotator" / "downloads"
    folders = [
        ROOT / "models",
        models,
        models / "Portrait",
        models / "insightface",
        controlnet,
        Path.home() / ".insightface",
    ]
    return any((folder / place / SCRFD).is_file() for folder in folders for place in SCRFD_PLACES)


def add(wanted: list[Package]) -> None:
    """Install each package alone; then make sure that nothing but these was changed, and that each can be imported."""
    before = installed()
    added = []
    for package in wanted:
        problem = pip_install(package.pin)
        if problem:
            say(f"{package.pin} could not be installed ({problem}). {consequence(package)}")
        else:
            added.append(package)
    after = installed()
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is not None and old != new:
            say(f"WARNING: {name} was changed from {old} to {new or 'nothing'}. Put it back: pip install {name}=={old}")
    for package in added:
        problem = import_problem(package.module)
        if problem:
            say(f"{package.pin} was installed but does not start here ({problem}). {consequence(package)}")
        else:
            say(f"installed {package.pin}")


def consequence(package: Package) -> str:
    if package.when == "scrfd":
        return "Faces are found with MTCNN instead of SCRFD."
    if package.when == "photos":
        return "Photos of type HEIC cannot be read."
    return f"Without it no face is found. To try by hand: pip install --no-deps {package.pin}"


def pip_install(pin: str) -> str:
    """Why pip could not install it, in one line, or an empty string. Nothing is compiled, nothing else is touched."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", pin]
    # The WebUI's own variable for a mirror of the package index.
    if os.environ.get("INDEX_URL"):
        command += ["--index-url", os.environ["INDEX_URL"]]
    return run(command)


def import_problem(module: str) -> str:
    """Why it cannot be imported, tried in a process of its own, or an empty string."""
    return run([sys.executable, "-c", f"import {module}"])


def run(command: list[str]) -> str:
    """The last line of what a failed command says, or an empty string where it did not fail."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if result.returncode == 0:
        return ""
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1][:300] if errors else f"exit status {result.returncode}"


def installed() -> dict[str, str]:
    """Version by name of every package of this Python, read anew."""
    import importlib.metadata

    found = importlib.metadata.distributions()
    return {str(package.metadata["Name"]).lower(): package.version for package in found if package.metadata["Name"]}


def say(message: str) -> None:
    print(f"Portrait: {message}", flush=True)


if __name__ == "__main__":
    main()
