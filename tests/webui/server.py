"""A WebUI of its own for the tests: private data folder, this tree as an extension, and a client for its API."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240
REQUEST_SECONDS = 180
NEEDED_BY_HOST = ("facenet-pytorch",)
"""What the installer gives to the host; a server whose host lacks it borrows what the tests run with."""

# The least of which the second has what the first has left behind; where more is to be seen a test asks for more.
STEPS = 2
# A cross-attention each of the down, the up and the middle block: the largest, a middle and the smallest map.
SITES = (1, 13, 31)
SETTINGS = {"live_previews_enable": False, "samples_save": False, "portrait_detector": "mtcnn"}
REQUEST = {
    "prompt": "a photo of a person in a garden",
    "negative_prompt": "blurry",
    "steps": STEPS,
    "width": 128,
    "height": 128,
    "cfg_scale": 4,
    "seed": 7,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "save_images": False,
    "send_images": True,
}


@dataclass(frozen=True)
class Answer:
    """What the server said. body: its JSON."""

    status: int
    body: Any

    @property
    def images(self) -> list[str]:
        return self.body["images"]

    @property
    def info(self) -> dict[str, Any]:
        return json.loads(self.body["info"])

    @property
    def detail(self) -> str:
        return str(self.body.get("detail") if isinstance(self.body, dict) else self.body)


@dataclass(frozen=True)
class Recording:
    """What the probe saw during one request.

    calls: one entry a UNet call (rows, kinds of the rows, context shape, marks, checkpoint, sites seen). tensors:
    "{call}.x", "{call}.context" (marks taken off), "{call}.out", and "{call}.{site}.{time}.in", ".out" and ".context"
    for recorded sites; "latents.{n}" of every finished sampling. foreign: attention outside of the UNet.
    """

    answer: Answer
    calls: list[dict[str, Any]]
    foreign: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    tensors: dict[str, Tensor] = field(repr=False)

    def latents(self) -> Tensor:
        return self.tensors[max(name for name in self.tensors if name.startswith("latents."))]

    def kinds(self) -> set[str]:
        return {kind for call in self.calls for kind in call["kinds"]}


class Client:
    """Talks to one server. at_start: the server's state after its first picture, before anybody else's request."""

    def __init__(self, base: str, scratch: Path):
        self.base = base
        self.scratch = scratch
        self.at_start: dict[str, Any] = {}

    def call(
        self, path: str, data: Any = None, timeout: float = REQUEST_SECONDS, kind: str = "application/json"
    ) -> Answer:
        """GET, or POST of `data` as JSON; `kind` is what it is said to be. Error statuses are answers, too."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return Answer(status, json.loads(text))
        except ValueError:
            return Answer(status, {"detail": text.decode(errors="replace")})

    def generate(self, portrait: Mapping[str, Any] | None = None, **changes: Any) -> Answer:
        """txt2img, or img2img where `init_images` is given: the common request with `changes`."""
        body = {**REQUEST, **changes}
        if portrait is not None:
            scripts = dict(body.get("alwayson_scripts", {}))
            body["alwayson_scripts"] = {**scripts, "Portrait": {"args": [dict(portrait)]}}
        return self.call("/sdapi/v1/img2img" if "init_images" in body else "/sdapi/v1/txt2img", body)

    def record(
        self,
        portrait: Mapping[str, Any] | None = None,
        probe: Mapping[str, Any] | None = None,
        sites: Sequence[int] = SITES,
        **changes: Any,
    ) -> Recording:
        """`generate` under the probe's eyes. probe: what it shall do besides (see probe.py)."""
        self.call("/probe/arm", {"sites": list(sites), **(probe or {})})
        try:
            answer = self.generate(portrait, **changes)
        finally:
            file = self.scratch / "recording.safetensors"
            file.unlink(missing_ok=True)
            seen = self.call("/probe/collect", {"file": str(file)}).body
        tensors = load_file(file) if file.exists() else {}
        return Recording(answer, seen["calls"], seen["foreign"], seen["batches"], tensors)

    def state(self) -> dict[str, Any]:
        answer = self.call("/probe/state")
        assert answer.status == 200, answer.detail
        return answer.body

    @contextlib.contextmanager
    def planted(self, what: str) -> Iterator[None]:
        """While this lasts, something is left behind in the server on purpose."""
        assert self.call("/probe/plant", {"what": what}).status == 200
        try:
            yield
        finally:
            self.call("/probe/plant", {"what": None})

    @contextlib.contextmanager
    def options(self, **changes: Any) -> Iterator[None]:
        """Settings of the host, put back afterwards."""
        before = self.call("/sdapi/v1/options").body
        assert self.call("/sdapi/v1/options", changes).status == 200
        try:
            yield
        finally:
            assert self.call("/sdapi/v1/options", {name: before[name] for name in changes}).status == 200


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between two states of the server, down to single modules; the process's size aside."""
    found: dict[str, Any] = {}
    for name in before:
        if name == "rss" or before[name] == after[name]:
            continue
        if name == "modules":
            for path in sorted({*before[name], *after[name]}):
                old, new = before[name].get(path), after[name].get(path)
                if old != new:
                    found[f"modules.{path}"] = (old, new)
        else:
            found[name] = (before[name], after[name])
    return found


def left_behind(client: Client, before: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as in an earlier state of the server; of tensors those that have a gradient or a graph, as the host
    keeps more or fewer conditions by what was drawn last."""
    after = client.state()
    found = changes(before, after)
    found.pop("tensors", None)
    if after["tensors"]["with a gradient"] or after["tensors"]["with a graph"]:
        found["tensors"] = after["tensors"]
    return found


# The host's own Lora extension, Hypertile and token merging leave it on layers once they were used.
BOOKKEEPING = ("network_", "__webui_hypertile_", "_tome_info", "applied_token_merged_ratio")


def lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    """What no request may change for good, of a state of the server: without the host's own bookkeeping."""
    kept = {name: state[name] for name in ("classes", "global_hooks", "weights", "callbacks")}
    kept["modules"] = {
        path: {**seen, "attributes": [name for name in seen["attributes"] if not name.startswith(BOOKKEEPING)]}
        for path, seen in state["modules"].items()
    }
    return kept


def unlike_new(client: Client) -> dict[str, Any]:
    """What no request may change for good, as far as it is not what it was when the server started."""
    return changes(lasting(client.at_start), lasting(client.state()))


def plotted(client: Client, body: Mapping[str, Any]) -> dict[str, Any]:
    """A request to the host's X/Y/Z plot: of its arguments, X axis and values are given, by the axis's name."""
    listed = client.call("/sdapi/v1/script-info").body
    plot = next(one for one in listed if one["name"] == "x/y/z plot" and not one["is_img2img"])
    axis, values = body["script_args"]
    nothing, single_pictures, text = [0, "", []], [True, True, False], [False] * 4 + [0, True]
    across = [plot["args"][0]["choices"].index(axis), values, []]
    return {**body, "script_args": [*across, *nothing, *nothing, *single_pictures, *text]}


def photo(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def copy_tree(target: Path) -> None:
    """This project as a user's `git clone` would give it, with what is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in listed:
        source = ROOT / name
        if name and source.is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def borrow_packages(folder: Path, python: Path) -> None:
    """Links into `folder` what the host's Python lacks of the packages that the installer would have brought."""
    code = "import sys, importlib.metadata as m; print(*{d.metadata['Name'].lower() for d in m.distributions()})"
    present = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    folder.mkdir()
    for name in NEEDED_BY_HOST:
        if name in present:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}:
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))


@contextlib.contextmanager
def running(webui: Path, python: Path, models: Path, folder: Path, extensions: Sequence[Path] = ()) -> Iterator[Client]:
    """A server whose data lie in `folder`, with this tree, the probe and `extensions` as its extensions.

    Raises RuntimeError with the end of its log if it does not come up.
    """
    data = folder / "data"
    (data / "extensions").mkdir(parents=True)
    copy_tree(data / "extensions" / "portrait")
    shutil.copytree(Path(__file__).with_name("probe_extension"), data / "extensions" / "probe")
    for extension in extensions:
        shutil.copytree(
            extension, data / "extensions" / extension.name, ignore=shutil.ignore_patterns(".git", "__pycache__")
        )
    borrow_packages(folder / "packages", python)

    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "COMMANDLINE_ARGS"}
    environment.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder / "gradio"),
        PYTHONUNBUFFERED="1",
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONPATH=str(folder / "packages"),
        # Threads that wait for each other by spinning make a busy machine many times slower; the models are tiny.
        OMP_NUM_THREADS="1",
    )
    command = [str(python), "launch.py", "--skip-prepare-environment", "--skip-torch-cuda-test"]
    command += ["--do-not-download-clip", "--no-download-sd-model", "--no-half", "--use-cpu", "all", "--no-hashing"]
    # PyTorch's own attention, which the host takes on a GPU; what it takes on a CPU is half as fast.
    command += ["--opt-sdp-attention", "--api", "--port", str(port), "--data-dir", str(data)]
    command += ["--models-dir", str(models), "--ckpt", str(models / "Stable-diffusion" / "first.safetensors")]
    log = folder / "server.log"
    client = Client(f"http://127.0.0.1:{port}", folder)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=webui, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_up(client, process, log)
            # Of settings that were never saved the host does not restore what `override_settings` changed.
            defaults = client.call("/sdapi/v1/options").body
            kept = {name: value for name, value in defaults.items() if value is not None and "checkpoint" not in name}
            assert client.call("/sdapi/v1/options", {**kept, **SETTINGS}).status == 200
            assert client.generate().status == 200, tail(log)
            client.at_start = client.state()
            yield client
        finally:
            # Asked over its API to end, the host waits seconds for its main thread, and for pages that are still open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(client: Client, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        # A request before the host has added its own routes makes it fail: its web server is already listening then.
        if "Startup time:" in log.read_text(errors="replace"):
            # Waits for the checkpoint, which loads in the background.
            state = client.call("/probe/state")
            if state.status == 200 and state.body["modules"]:
                return
        time.sleep(0.3)
    raise RuntimeError(f"the WebUI did not start ({process.poll()=}); its log ends:\n{tail(log)}")


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
