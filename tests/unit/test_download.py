"""Downloads against a server on this machine: resumed, checked, and loud when something is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lib_portrait.checkpoints import AdapterFile, AdapterFiles, Folders, KnownWeight, Member, Registry, Store, download
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several blocks
SHA = hashlib.sha256(CONTENT).hexdigest()


class Publisher:
    """What the server does, and what it was asked for."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.cuts: list[int] = []  # bytes after which each of the next answers breaks off
        self.ranges = True
        self.status: int | None = None
        self.location: str | None = None
        self.headers: dict[str, str] = {}
        self.length = True
        self.stall: threading.Event | None = None  # set to let an answer that has stopped sending end
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    state = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if state.location and self.path == "/weights.bin":
                self.send_response(302)
                self.send_header("Location", state.location)
                for name, value in state.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            if state.status:
                self.send_error(state.status)
                return
            body, start = state.content, 0
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if not state.location:
                for name, value in state.headers.items():
                    self.send_header(name, value)
            if state.length:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            with contextlib.suppress(ConnectionError):  # the client may have had enough
                self.wfile.write(rest[: state.cuts.pop(0)] if state.cuts else rest)
            if state.stall is not None:
                state.stall.wait(5)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def known(publisher: Publisher) -> KnownWeight:
    url = publisher.url + "/weights.bin"
    return KnownWeight("faceid", "weights.bin", url, len(CONTENT), SHA, "free", "a test", "test")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_arrives_whole_with_progress_and_leaves_no_part(known: KnownWeight, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = download.download(known, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT and names(tmp_path / "new") == ["weights.bin"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) > 2


def test_cut_connection_is_resumed_where_it_broke(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.cuts = [1_000_000, 700_000]
    assert download.download(known, tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in publisher.asked] == [None, "bytes=1000000-", "bytes=1700000-"]


def test_a_later_call_goes_on_from_what_an_earlier_left(
    known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(PortraitError, match="try again") as caught:
        download.download(known, tmp_path)
    assert caught.value.status_code == 503 and names(tmp_path) == ["weights.bin.part"]
    assert (tmp_path / "weights.bin.part").stat().st_size == 1_000_000
    publisher.cuts = []
    assert download.download(known, tmp_path).read_bytes() == CONTENT
    assert publisher.asked[-1][1] == "bytes=1000000-"


def test_server_without_ranges_starts_over(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.ranges = False
    (tmp_path / "weights.bin.part").write_bytes(CONTENT[:5000])
    assert download.download(known, tmp_path).read_bytes() == CONTENT


def test_complete_part_is_only_checked(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "weights.bin.part").write_bytes(CONTENT)
    assert download.download(known, tmp_path).read_bytes() == CONTENT
    assert len(publisher.asked) == 1


@pytest.mark.parametrize("rest", [b"of another version", CONTENT + b"too long", b"x" * len(CONTENT)])
def test_part_of_another_file_costs_one_more_try(rest: bytes, known: KnownWeight, tmp_path: Path) -> None:
    (tmp_path / "weights.bin.part").write_bytes(rest)
    assert download.download(known, tmp_path).read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.content = CONTENT[:-1] + b"!"
    with pytest.raises(PortraitError, match=f"not {SHA}") as caught:
        download.download(known, tmp_path)
    assert caught.value.status_code == 502 and names(tmp_path) == []
    assert len(publisher.asked) == 1


def test_other_size_is_refused_before_it_is_fetched(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.content = CONTENT + b"more"
    with pytest.raises(PortraitError, match=f"now has {len(CONTENT) + 4} bytes instead of {len(CONTENT)}"):
        download.download(known, tmp_path)
    assert names(tmp_path) == []


def test_more_than_announced_is_stopped(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.length, publisher.content = False, CONTENT * 4
    with pytest.raises(PortraitError, match="sends more than"):
        download.download(known, tmp_path)
    assert "weights.bin" not in names(tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_of_the_publisher_is_told(
    status: int, known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.status = status
    with pytest.raises(PortraitError, match=f"answered {status}") as caught:
        download.download(known, tmp_path)
    assert caught.value.status_code == 502 and known.url in caught.value.problem


def test_offline_names_file_folder_and_source_at_once(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    away = dataclasses.replace(known, url="http://127.0.0.1:9/weights.bin")
    with pytest.raises(PortraitError) as caught:
        download.download(away, tmp_path)
    error = caught.value
    assert error.status_code == 503 and error.field == "weights.bin"
    assert away.url in error.remedy and str(tmp_path) in error.remedy


def test_server_that_falls_silent_is_given_up(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.stall = threading.Event()
    publisher.cuts = [1_000_000, 0, 0, 0]
    try:
        with pytest.raises(PortraitError, match="timed out") as caught:
            download.download(known, tmp_path, timeout=0.1)
    finally:
        publisher.stall.set()
    assert caught.value.status_code == 503
    assert (tmp_path / "weights.bin.part").stat().st_size == 1_000_000


def test_publishers_announced_hash_is_used_where_none_is_known(
    known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    unknown = dataclasses.replace(known, size=None, sha256=None)
    publisher.location = "/elsewhere/blob"
    publisher.headers = {"X-Linked-Etag": f'"{SHA}"', "X-Linked-Size": str(len(CONTENT))}
    assert download.download(unknown, tmp_path / "a").read_bytes() == CONTENT
    publisher.headers["X-Linked-Etag"] = f'"{"0" * 64}"'
    with pytest.raises(PortraitError, match="not 0000"):
        download.download(unknown, tmp_path / "b")
    with pytest.raises(PortraitError, match="now has SHA-256 0000"):
        download.download(known, tmp_path / "b")
    assert names(tmp_path / "b") == []


def test_announcement_of_another_size_than_sent_is_refused(
    known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.location = "/elsewhere/blob"
    publisher.headers = {"X-Linked-Etag": SHA, "X-Linked-Size": "12"}
    with pytest.raises(PortraitError, match="announces 12 bytes"):
        download.download(dataclasses.replace(known, size=None, sha256=None), tmp_path)


def test_what_a_redirects_target_says_of_itself_is_not_believed(
    known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    port = publisher.url.rpartition(":")[2]
    publisher.location = f"http://localhost:{port}/blob"
    publisher.headers = {}
    unknown = dataclasses.replace(known, size=None, sha256=None)

    original = download._listen
    answers: list[str] = []

    def listen(announced: dict[str, str], headers: Any, url: str, source: str) -> None:
        answers.append(url)
        original(announced, {"X-Linked-Etag": SHA} if "localhost" in url else headers, url, source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "_listen", listen)
        patched.setenv("no_proxy", "127.0.0.1,localhost")
        with pytest.raises(PortraitError, match="cannot be checked"):
            download.download(unknown, tmp_path)
    assert any("localhost" in url for url in answers)


def test_without_any_hash_the_user_must_give_one(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    unknown = dataclasses.replace(known, size=None, sha256=None)
    publisher.headers = {"X-Linked-Etag": '"' + "a" * 40 + '"'}  # a git hash, not a SHA-256
    with pytest.raises(PortraitError, match="Give its SHA-256"):
        download.download(unknown, tmp_path)
    assert download.download(unknown, tmp_path, sha256=SHA.upper()).read_bytes() == CONTENT
    with pytest.raises(PortraitError, match="64 hexadecimal digits"):
        download.download(unknown, tmp_path, sha256="abc")
    with pytest.raises(PortraitError, match="known to have another"):
        download.download(known, tmp_path, sha256="0" * 64)


def test_redirects_stay_on_https(known: KnownWeight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import email.message
    import urllib.error
    import urllib.request

    seen: list[str] = []

    def opened(_: object, request: urllib.request.Request, timeout: float = 0) -> None:
        seen.append(request.full_url)
        headers = email.message.Message()
        headers["Location"] = "http://mirror.example/weights.bin"
        raise urllib.error.HTTPError(request.full_url, 302, "Found", headers, io.BytesIO())

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)
    with pytest.raises(PortraitError, match="from https to an unprotected address"):
        download.download(dataclasses.replace(known, url="https://publisher.example/weights.bin"), tmp_path)
    assert seen == ["https://publisher.example/weights.bin"]


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_redirects_to_other_schemes_are_refused(
    location: str, known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.location = location
    with pytest.raises(PortraitError, match="points to"):
        download.download(known, tmp_path)


def test_endless_redirects_end(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    publisher.location = "/weights.bin"
    with pytest.raises(PortraitError, match="redirects more than"):
        download.download(known, tmp_path)
    assert len(publisher.asked) == download.REDIRECTS + 1


def test_full_disk_is_told_before_the_first_byte(
    known: KnownWeight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SPARE_DISK", 2**60)
    with pytest.raises(PortraitError, match="MiB are to come") as caught:
        download.download(known, tmp_path)
    assert caught.value.status_code == 507 and names(tmp_path) == []


def test_folder_that_cannot_be_made_is_told(known: KnownWeight, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PortraitError, match="cannot be kept in"):
        download.download(known, tmp_path / "file" / "folder")


def test_file_that_is_there_is_checked_and_kept(known: KnownWeight, publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    assert download.download(known, tmp_path) == tmp_path / "weights.bin"
    (tmp_path / "weights.bin").write_bytes(b"mine")
    with pytest.raises(PortraitError, match="another file of this name") as caught:
        download.download(known, tmp_path)
    assert caught.value.status_code == 409
    assert (tmp_path / "weights.bin").read_bytes() == b"mine" and publisher.asked == []


def test_second_download_of_a_file_under_way_is_refused(known: KnownWeight, tmp_path: Path) -> None:
    problems: list[str] = []

    def again(done: int, total: int) -> None:
        if not problems:
            with pytest.raises(PortraitError, match="already") as caught:
                download.download(known, tmp_path)
            problems.append(caught.value.problem)

    download.download(known, tmp_path, again)
    assert problems and download.download(known, tmp_path).read_bytes() == CONTENT


def packed(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("folder", ["", "buffalo_l/"])
def test_file_inside_an_archive_is_taken_out_and_checked(folder: str, publisher: Publisher, tmp_path: Path) -> None:
    model = b"onnx" * 1000
    publisher.content = packed(**{folder + "other.onnx": b"x", folder + "det_10g.onnx": model})
    member = Member("det_10g.onnx", len(model), hashlib.sha256(model).hexdigest())
    sha = hashlib.sha256(publisher.content).hexdigest()
    url, size = publisher.url + "/weights.bin", len(publisher.content)
    known = KnownWeight("detector", "det_10g.onnx", url, size, sha, "free", "a test", "test", member=member)
    for wrong in (Member("none.onnx", 1, "0" * 64), Member("det_10g.onnx", len(model), "0" * 64)):
        with pytest.raises(PortraitError, match="does not hold it"):
            download.download(dataclasses.replace(known, member=wrong), tmp_path / "wrong")
        assert "det_10g.onnx" not in names(tmp_path / "wrong")
    assert download.download(known, tmp_path / "right").read_bytes() == model
    assert names(tmp_path / "right") == ["det_10g.onnx"]


def test_group_is_fetched_by_name_and_what_is_there_is_left(
    known: KnownWeight, publisher: Publisher, tmp_path: Path
) -> None:
    roles = ("faceid", "router", "backbone", "vision")
    weights = tuple(dataclasses.replace(known, role=role, filename=f"{role}.bin", group="toy") for role in roles)
    files = AdapterFiles("toy", "Toy", (AdapterFile("faceid", "toy_{name}", ""),), ("vision",), weights)
    (tmp_path / "clip_vision").mkdir()
    (tmp_path / "clip_vision" / "vision.bin").write_bytes(b"of another extension")
    store = Store(Folders([tmp_path / "own"], {"vision": [tmp_path / "clip_vision"]}), [files])
    seen: set[str] = set()
    paths = download.fetch_known(
        "toy", store.home, store.registry, lambda name, done, total: seen.add(name), store=store
    )
    assert [path.name for path in paths] == ["faceid.bin", "router.bin", "backbone.bin", "vision.bin"]
    assert paths[3] == tmp_path / "clip_vision" / "vision.bin"
    assert seen == {"faceid.bin", "router.bin", "backbone.bin"}
    assert len(publisher.asked) == 3
    assert download.fetch_known("router.bin", store.home, store.registry) == [tmp_path / "own" / "router.bin"]


def test_unknown_names_and_one_hash_for_many_are_refused(tmp_path: Path) -> None:
    registry = Registry(adapter_files())
    groups = "uniportrait, omniportrait, insightface, facexlib, uniportrait-faceid_sd15"
    with pytest.raises(PortraitError, match=f"Use one of: {groups}"):
        download.fetch_known("../etc", tmp_path, registry)
    with pytest.raises(PortraitError, match="one hash cannot be that of 4 files"):
        download.fetch_known("uniportrait", tmp_path, registry, sha256=SHA)
