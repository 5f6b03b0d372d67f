"""`portrait.py bench start`: what the extension adds to the start of the WebUI (WEBUI_DIR, ~/stable-diffusion-webui).

The WebUI is started with and without the extension in turns, each with an empty data folder of its own. Its start-up
profile (`/internal/profile-startup`) tells how long loading scripts and building the interface took; the difference of
a pair is what the extension added.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The parts of the start that an extension takes part in.
PARTS = ("load scripts", "create ui", "scripts before_ui_callback", "app_started_callback")
SECONDS = 240


def start(webui: Path, extension: bool) -> float:
    """Seconds that the parts of one start took. Raises RuntimeError if the WebUI does not come up."""
    with socket.socket() as free, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        extensions = Path(folder) / "extensions"
        extensions.mkdir()
        if extension:
            (extensions / "portrait").symlink_to(ROOT, target_is_directory=True)
        python = webui / ("venv/Scripts/python.exe" if os.name == "nt" else "venv/bin/python")
        command = [str(python), "launch.py", "--skip-prepare-environment", "--skip-torch-cuda-test", "--api"]
        command += ["--no-half", "--use-cpu", "all", "--no-download-sd-model", "--port", str(port)]
        command += ["--data-dir", folder]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        environment["PYTHONUNBUFFERED"] = "1"
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=webui, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                end = time.monotonic() + SECONDS
                # Asking earlier would make the host fail: its web server listens before all its routes are there.
                while "Startup time:" not in log.read_text(errors="replace"):
                    if time.monotonic() > end or process.poll() is not None:
                        raise RuntimeError(f"the WebUI did not start: {log.read_text(errors='replace')[-2000:]}")
                    time.sleep(0.2)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/internal/profile-startup") as answer:
                    records = json.load(answer)["records"]
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return sum(records.get(part, 0.0) for part in PARTS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="portrait.py bench start", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of starts (at least 3)")
    options = parser.parse_args(argv)
    webui = Path(os.environ.get("WEBUI_DIR") or Path.home() / "stable-diffusion-webui")
    if not (webui / "launch.py").is_file():
        parser.error(f"there is no WebUI at {webui}; set WEBUI_DIR")
    for extension in (False, True):
        start(webui, extension)
    pairs = [(start(webui, False), start(webui, True)) for _ in range(max(3, options.pairs))]
    line = {
        "name": "start",
        "added_seconds": round(statistics.median(with_it - without for without, with_it in pairs), 3),
        "pairs": [[round(without, 3), round(with_it, 3)] for without, with_it in pairs],
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
