"""Weight files: what is read, what is refused, and that converting loses nothing."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib_portrait.checkpoints import (
    convert,
    describe,
    file_sha256,
    formats,
    hashes,
    placeholders,
    read_tensors,
    write_tensors,
)
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "faceid_proj": OrderedDict(latents=torch.arange(12.0).reshape(1, 3, 4)),
    "faceid_adapter": {
        "0.to_q_lora.down.weight": torch.ones(2, 4, dtype=torch.float16),
        "1.to_k_faceid.weight": torch.full((4, 4), 2.5, dtype=torch.bfloat16),
    },
}


class Exploit:
    """Runs a command when unpickled the ordinary way."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def saved(value: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple = (1,), offsets: tuple = (0, 4)) -> dict:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def rezipped(data: bytes, compression: int = zipfile.ZIP_STORED, extra: tuple[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        if extra:
            target.writestr(*extra)
    return out.getvalue()


def tar_bytes(name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def legacy(value: object) -> bytes:
    return saved(value, _use_new_zipfile_serialization=False)


def recursive() -> dict:
    value: dict = {"a": torch.zeros(1)}
    value["again"] = value
    return value


def deep(levels: int) -> dict:
    value: dict = {"leaf": torch.zeros(1)}
    for _ in range(levels):
        value = {"down": value}
    return value


LEGACY_START = legacy({"a": torch.zeros(1)})[:14].decode("latin-1")

# name of the case: (file name, its bytes from the marker's path, words the message must hold)
HOSTILE = {
    "no bytes": ("a.bin", lambda _: b"", "0 bytes"),
    "garbage": ("a.bin", lambda _: bytes(range(1, 200)), "neither"),
    "garbage safetensors": ("a.safetensors", lambda _: b"\x01" * 100, "header"),
    "web page": ("a.bin", lambda _: b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
    "LFS pointer": ("a.bin", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "LFS pointer"),
    "plain pickle": ("a.bin", lambda m: pickle.dumps({"a": Exploit(m)}, 4), "plain Python pickle"),
    "exploit in zip": ("a.bin", lambda m: saved({"a": Exploit(m)}), "more than tensors"),
    "exploit beside tensors": ("a.pt", lambda m: saved({**SMALL, "x": Exploit(m)}), "more than tensors"),
    "exploit in legacy": ("a.pth", lambda m: legacy({"a": Exploit(m)}), "more than tensors"),
    "TorchScript": ("a.bin", lambda _: rezipped(saved(SMALL), extra=("archive/constants.pkl", b"")), "TorchScript"),
    "tar": ("a.bin", lambda _: tar_bytes("pickle"), "neither"),
    "tar with torch's magic": ("a.bin", lambda _: tar_bytes(LEGACY_START), "tar archive"),
    "half a zip": ("a.bin", lambda _: saved(SMALL)[: len(saved(SMALL)) // 2], "damaged"),
    "half a legacy file": ("a.bin", lambda _: legacy(SMALL)[: len(legacy(SMALL)) // 2], "damaged"),
    "legacy magic alone": ("a.bin", lambda _: legacy(SMALL)[:20], "damaged"),
    "plain zip": (
        "a.bin",
        lambda _: rezipped(b"PK\x05\x06" + b"\0" * 18, extra=("a/readme.txt", b"hi")),
        "damaged|zip",
    ),
    "zip bomb": ("a.bin", lambda _: rezipped(saved({"a": torch.zeros(10**6)}), zipfile.ZIP_DEFLATED), "packed"),
    "number": ("a.bin", lambda _: saved({"step": 7, "w": torch.zeros(1)}), "'step' is of type int"),
    "text": ("a.bin", lambda _: saved({"w": torch.zeros(1), "faceid_proj": {"name": "x"}}), "'faceid_proj.name'"),
    "list": ("a.bin", lambda _: saved({"w": [torch.zeros(1)]}), "type list"),
    "bare tensor": ("a.bin", lambda _: saved(torch.zeros(1)), "one object of type Tensor"),
    "nothing": ("a.bin", lambda _: saved(None), "one object of type NoneType"),
    "no tensors": ("a.bin", lambda _: saved({"faceid_proj": {}}), "no tensors"),
    "number as key": ("a.bin", lambda _: saved({1: torch.zeros(1)}), "key 1"),
    "same name twice": ("a.bin", lambda _: saved({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}), "beside"),
    "key inside other's name": ("a.bin", lambda _: saved({"a": {"b": torch.zeros(1)}, "a.c": torch.ones(1)}), "beside"),
    "too deep": ("a.bin", lambda _: saved(deep(30)), "nested"),
    "holds itself": ("a.bin", lambda _: saved(recursive()), "nested|twice"),
    "huge by stride 0": ("a.bin", lambda _: saved({"a": torch.zeros(1).expand(10**13)}), "claim"),
    "sparse": ("a.bin", lambda _: saved({"a": torch.eye(3).to_sparse()}), "no plain tensor|damaged"),
    "header of 2^60 bytes": ("a.safetensors", lambda _: struct.pack("<Q", 2**60) + b"{}", "claims"),
    "header past the end": ("a.safetensors", lambda _: struct.pack("<Q", 500) + b'{"a":1}', "cut off"),
    "header no JSON": ("a.safetensors", lambda _: safetensors_bytes(b'{"a": nonsense}'), "not JSON"),
    "header nested": ("a.safetensors", lambda _: safetensors_bytes(b'{"a":' * 200_000), "not JSON"),
    "header of text": ("a.safetensors", lambda _: safetensors_bytes({"a": "b"}), "malformed at 'a'"),
    "metadata of numbers": ("a.safetensors", lambda _: safetensors_bytes({"__metadata__": {"x": 1}}), "malformed"),
    "only metadata": ("a.safetensors", lambda _: safetensors_bytes({"__metadata__": {"x": "1"}}), "no tensors"),
    "data cut off": ("a.safetensors", lambda _: safetensors_bytes(entry(), b"\0\0"), "cut off"),
    "data too long": ("a.safetensors", lambda _: safetensors_bytes(entry(), b"\0" * 9), "damaged"),
    "shape too large": ("a.safetensors", lambda _: safetensors_bytes(entry(shape=(2**40,)), b"\0" * 4), "does not fit"),
    "negative shape": ("a.safetensors", lambda _: safetensors_bytes(entry(shape=(-1, -1)), b"\0" * 4), "malformed"),
    "unknown type": ("a.safetensors", lambda _: safetensors_bytes(entry("F99"), b"\0" * 4), "malformed"),
    "offsets swapped": ("a.safetensors", lambda _: safetensors_bytes(entry(offsets=(4, 0)), b"\0" * 4), "malformed"),
    "safetensors named .bin": ("a.bin", lambda _: safetensors_bytes(entry(), b"\0" * 4), "ends in .bin"),
    "torch named .safetensors": ("a.safetensors", lambda _: saved(SMALL), "ends in .safetensors"),
    "torch without suffix": ("a", lambda _: saved(SMALL), "ends in nothing"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name_with_a_remedy_and_without_running_it(case: str, tmp_path: Path) -> None:
    name, content, words = HOSTILE[case]
    marker, path = tmp_path / "exploited", tmp_path / name
    path.write_bytes(content(marker))
    with pytest.raises(PortraitError, match=words) as caught:
        read_tensors(path)
    assert not marker.exists()
    assert caught.value.field == name
    assert caught.value.remedy.endswith(".") and 400 <= caught.value.status_code < 500
    if case != "data too long":  # which only shows once the data are looked at
        with pytest.raises(PortraitError):
            describe(path)
    with pytest.raises(PortraitError):
        convert(path, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_exploit_of_the_table_works_on_an_unprotected_reader(tmp_path: Path) -> None:
    marker = tmp_path / "exploited"
    pickle.loads(HOSTILE["plain pickle"][1](marker))
    assert marker.exists()


def store_of(folder: Path) -> Store:
    return Store(Folders([folder]), adapter_files())


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(PortraitError, match=r"no such file.*To have it there, get it anew from where it came from\."):
        read_tensors(tmp_path / "mine.bin")
    with pytest.raises(PortraitError, match="no such file") as caught:
        store_of(tmp_path).read(tmp_path / "uniportrait-faceid_sd15.bin", "faceid")
    assert caught.value.status_code == 404
    assert "portrait.py download uniportrait" in caught.value.remedy and "huggingface.co" in caught.value.remedy
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(PortraitError, match=r"folder\.bin"):
        read_tensors(tmp_path / "folder.bin")


def test_damaged_published_file_is_to_be_fetched_again_and_nothing_to_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "uniportrait-router_sd15.bin"
    path.write_bytes(b"")
    with pytest.raises(PortraitError, match=r"Move .* away, then run: .*portrait\.py download uniportrait"):
        store_of(tmp_path).read(path, "router")


def test_no_message_tells_to_delete_a_file() -> None:
    """What we cannot read may be somebody's only copy, and readable elsewhere."""
    sources = [path for folder in ("lib_portrait", "trainer") for path in (ROOT / folder).rglob("*.py")]
    messages = [
        text.value
        for path in sources
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("PortraitError", "_bad", "unfit")
        for text in ast.walk(call)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    assert len(messages) > 500
    told = re.compile(r"\bdelete\b|\bremove (it|the file|the \.yaml|$)", re.IGNORECASE)
    assert not [text for text in messages if told.search(text)]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_pickle_forms_give_flat_tensors(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(SMALL, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_tensors(path, "faceid")
    assert set(checkpoint.tensors) == {
        "faceid_proj.latents",
        "faceid_adapter.0.to_q_lora.down.weight",
        "faceid_adapter.1.to_k_faceid.weight",
    }
    assert torch.equal(checkpoint.group("faceid_proj")["latents"], SMALL["faceid_proj"]["latents"])
    assert checkpoint.group("faceid_adapter").keys() == SMALL["faceid_adapter"].keys()


# -------------------------------------------------------------------------------------------------- models' checkpoints


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


class Callback:
    def __init__(self, best: object = None):
        self.best = best


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What Lightning keeps beside a model's weights."""
    # In a module that is there when the file is written, and not when it is read.
    module = types.ModuleType(LIGHTNING)
    module.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.setattr(Callback, "__module__", LIGHTNING)
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, LIGHTNING, module)
    return {
        "epoch": 7,
        "callbacks": {Callback: {"best": np.float64(0.5), "mode": {"min"}}},
        "loops": [Callback(best=[np.arange(3), Callback()])],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": np.float32(1)}]}],
        "hyper_parameters": OrderedDict(size=(1, 2), path=Path("model.yaml"), dtype=torch.float16),
    }


WEIGHTS = {
    "model.a.weight": torch.randn(4, 3),
    "model.a.half": torch.randn(3).half(),
    "model.a.brain": torch.randn(3).bfloat16(),
    "model.steps": torch.tensor(7),
    "model.mask": torch.tensor([True, False]),
    "model.parameter": torch.nn.Parameter(torch.randn(2)),
    "model.view": torch.randn(6, 4)[1:3].T,
}


def test_of_a_model_s_checkpoint_tensors_are_read_and_objects_of_others_left_out(
    lightning: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.ckpt"
    inner = {**WEIGHTS, "model.version": np.int64(3), "model.callback": Callback()}
    torch.save({**lightning, "state_dict": OrderedDict(inner)}, path)
    flat = tmp_path / "flat.ckpt"
    torch.save({**inner, **lightning}, flat)
    monkeypatch.delitem(sys.modules, LIGHTNING)
    assert same(read_tensors(path, inside="state_dict").tensors, WEIGHTS)
    # Tensors of the optimizer stand in a list, and are nobody's weights.
    assert same(read_tensors(flat, inside="state_dict").tensors, WEIGHTS)
    assert LIGHTNING not in sys.modules
    for read in (read_tensors, describe):
        with pytest.raises(PortraitError, match="holds more than tensors .*Checkpoint Merger"):
            read(path)


def test_a_model_of_torch_s_older_format_with_objects_names_the_conversion(
    lightning: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(legacy({**lightning, "state_dict": WEIGHTS}))
    with pytest.raises(PortraitError, match="holds more than tensors .*Checkpoint Merger"):
        read_tensors(path, inside="state_dict")


def with_pickle(content: bytes) -> bytes:
    """A torch file with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(SMALL))) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


class Called:
    """Pickles as a call of a named object with arguments."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
# By hand: c module, name; ( mark; t tuple; R call; b state; } dictionary; s item; Q stored elsewhere; . end.
ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "mkdir": lambda m: saved({"x": Exploit(m), "state_dict": {"w": torch.zeros(1)}}),
    "in the weights": lambda m: saved({"state_dict": {"x": Exploit(m), "w": torch.zeros(1)}}),
    "as a key": lambda m: saved({"state_dict": {"w": torch.zeros(1)}, Called(os.mkdir, str(m)): 1}),
    "eval": lambda m: saved({"x": Called(eval, f"__import__('os').mkdir({str(m)!r})"), "w": torch.zeros(1)}),
    "exec": lambda m: saved({"x": Called(exec, f"import os; os.mkdir({str(m)!r})"), "w": torch.zeros(1)}),
    "getattr": lambda m: with_pickle(
        b"}S'x'\ncbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cshutil\nos\nS'mkdir'\ntR(S'%s'\ntRs." % str(m).encode()
    ),
    "partial": lambda m: saved({"x": Called(functools.partial(os.mkdir, str(m))), "w": torch.zeros(1)}),
    "torch.load inside": lambda m: with_pickle(
        b"}S'x'\nctorch.storage\n_load_from_bytes\n(" + pickle.dumps(legacy({"a": Exploit(m)}), 2)[2:-1] + b"tRs."
    ),
    "dotted name": lambda m: with_pickle(
        b"\x80\x04}\x8c\x01x\x8c\x0ctorch._utils\x8c\x0eimport_module.\x93(\x8c\x02ostRs."
    ),
    "old instance": lambda m: with_pickle(b"}S'x'\n(S'%s'\nios\nmkdir\ns." % str(m).encode()),
    "defaults of a function": lambda m: with_pickle(
        b"}S'x'\n" + REBUILD + b"N}S'__defaults__'\n(I1\ntsS'y'\n\x86\x86bs."
    ),
    "function of a function": lambda m: with_pickle(b"}S'x'\n" + REBUILD + b"N}S'_function'\n" + REBUILD + b"s\x86bs."),
    "attributes of a class": lambda m: with_pickle(b"}S'x'\nccollections\nOrderedDict\n}S'pop'\nI1\nsbs."),
    "attributes of the placeholder": lambda m: with_pickle(b"}S'x'\ncos\nmkdir\n}S'append'\nI1\nsbs."),
    "items of the placeholder": lambda m: with_pickle(b"}S'x'\ncos\nmkdir\nS'a'\nI1\nss."),
    "storage of a placeholder": lambda m: with_pickle(
        b"}S'x'\n" + REBUILD + b"(cos\nmkdir\nI0\n(I4\nt(I1\ntI00\nNtRs."
    ),
    "storage without end": lambda m: with_pickle(
        b"}S'x'\n"
        + REBUILD
        + b"((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI12\ntQI0\n(L99999999999L\nt(I1\ntI00\nNtRs."
    ),
    "extension registry": lambda m: with_pickle(b"\x80\x02}\x8c\x01x\x82\x01s."),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ATTACKS)
def test_a_hostile_model_runs_nothing_and_changes_nothing(case: str, tmp_path: Path) -> None:
    from torch import _utils

    marker, path = tmp_path / "exploited", tmp_path / "model.ckpt"
    path.write_bytes(ATTACKS[case](marker))
    functions = (_utils._rebuild_tensor_v2, _utils._rebuild_parameter)
    before = [(function.__defaults__, dict(vars(function))) for function in functions]
    placeholder, known = dict(vars(placeholders.Placeholder)), list(placeholders._KNOWN.values())
    # Whatever is no tensor is left out, so that some of these are read; the others are refused, and nothing else.
    with contextlib.suppress(PortraitError):
        assert set(read_tensors(path, inside="state_dict").tensors) == {"w"}
    assert not marker.exists()
    assert [(function.__defaults__, dict(vars(function))) for function in functions] == before
    assert dict(vars(placeholders.Placeholder)) == placeholder
    assert [known._function for known in known[1:]] == list(functions)


def test_attacks_of_the_table_work_on_an_unprotected_reader(tmp_path: Path) -> None:
    for case in ("mkdir", "in the weights", "as a key", "eval", "exec", "getattr", "partial", "old instance"):
        marker, path = tmp_path / "exploited", tmp_path / "model.ckpt"
        path.write_bytes(ATTACKS[case](marker))
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert marker.exists(), case
        marker.rmdir()


@given(st.binary(max_size=200), st.integers(0, 4000), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickle_with_bytes_changed_is_read_or_refused_and_nothing_else(
    change: bytes, place: int, length: int
) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"state_dict": WEIGHTS}))) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    place %= len(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        path.write_bytes(with_pickle(content[:place] + change + content[place + length :]))
        with contextlib.suppress(PortraitError):
            read_tensors(path, inside="state_dict")


@given(st.text(), st.text())
def test_any_name_but_three_gives_the_placeholder(module: str, name: str) -> None:
    unpickler = placeholders.Unpickler(io.BytesIO())
    assert unpickler.find_class(module, name) is placeholders.Placeholder
    for known in (("os", "system"), ("builtins", "eval"), ("torch._utils", "_rebuild_tensor_v2.__globals__")):
        assert unpickler.find_class(*known) is placeholders.Placeholder


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    # As bytes: NaN equals itself then, and -0 does not equal 0.
    same_form = a.dtype == b.dtype and a.shape == b.shape
    return same_form and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


base = torch.randn(6, 4)
ROUND_TRIPS = {
    "official": SMALL,
    "flat": {"input_layer.0.weight": torch.randn(2, 3), "body.0.x": torch.zeros(1)},
    "flat with official prefix": {"faceid_proj.latents": torch.zeros(1)},
    "three levels": {"state_dict": {"model": {"a.b": torch.zeros(1)}, "c": torch.ones(1)}, "d": torch.ones(2)},
    "dots in dictionary names": {"a.b": {"c.d": torch.zeros(1)}},
    "empty dictionary": {"faceid_proj": {}, "faceid_adapter": {"x": torch.zeros(1)}},
    "dtypes": {str(d): torch.ones(3, dtype=d) for d in (torch.int64, torch.int8, torch.bool, torch.float64)},
    "odd values": {"a": torch.tensor([float("nan"), float("inf"), -0.0])},
    "scalar and empty": {"s": torch.tensor(3.5), "e": torch.zeros(0, 4)},
    "shared, sliced, transposed": {"a": base, "b": base, "c": base[:2], "t": base.T},
    "parameters": {"w": torch.nn.Parameter(torch.randn(2, 2))},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_converting_to_safetensors_and_back_gives_the_same_dictionaries(case: str, tmp_path: Path) -> None:
    original = ROUND_TRIPS[case]
    torch.save(original, tmp_path / "a.bin")
    made = convert(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert made.path == tmp_path / "b.safetensors" and made.format == "safetensors"
    convert(tmp_path / "b.safetensors", tmp_path / "c.bin")
    assert same(torch.load(tmp_path / "c.bin", weights_only=True), original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.safetensors", "c.bin"]


def test_safetensors_of_others_gets_the_official_dictionaries(tmp_path: Path) -> None:
    save_file({"faceid_proj.latents": torch.zeros(1), "faceid_adapter.1.x": torch.ones(1)}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.bin")
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert same(loaded, {"faceid_proj": {"latents": torch.zeros(1)}, "faceid_adapter": {"1.x": torch.ones(1)}})


def test_metadata_is_kept_added_and_never_lost_in_silence(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "b.safetensors", {"backbone": "ir18.safetensors"})
    checkpoint = read_tensors(tmp_path / "b.safetensors")
    assert checkpoint.metadata["backbone"] == "ir18.safetensors"
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert describe(tmp_path / "c.safetensors").metadata == checkpoint.metadata
    with pytest.raises(PortraitError, match="no place for the metadata backbone"):
        convert(tmp_path / "b.safetensors", tmp_path / "d.bin")
    convert(tmp_path / "b.safetensors", tmp_path / "d.bin", {})
    assert same(torch.load(tmp_path / "d.bin", weights_only=True), SMALL)


def test_converting_replaces_nothing_and_needs_a_known_suffix(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(PortraitError, match="exists already"):
        convert(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_text() == "mine"
    with pytest.raises(PortraitError, match=r"\.onnx is no weight file format"):
        convert(tmp_path / "a.bin", tmp_path / "c.onnx")


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(1)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(PortraitError, match="No space left") as caught:
        write_tensors(path, {"a": torch.ones(1)})
    assert caught.value.status_code == 507
    assert load_file(path)["a"].item() == 0 and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is in use")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_file_in_use_can_be_replaced(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_tensors(path, {"a": torch.zeros(1000)})
    used = read_tensors(path)
    write_tensors(path, {"a": torch.ones(1000)})
    assert used.tensors["a"].sum() == 0 and read_tensors(path).tensors["a"].sum() == 1000
    write_tensors(path, read_tensors(path).tensors)
    assert read_tensors(path).tensors["a"].sum() == 1000


def test_malformed_layout_entry_is_refused(tmp_path: Path) -> None:
    for text in ("{", "7", '["faceid_proj"]'):
        with pytest.raises(PortraitError, match="layout is malformed"):
            write_tensors(tmp_path / "a.bin", {"a": torch.zeros(1)}, {formats.LAYOUT: text})


@pytest.mark.parametrize("length", [0x80, 0x3C20, 0x4B50])
def test_safetensors_is_known_whatever_its_first_bytes_look_like(length: int, tmp_path: Path) -> None:
    """The header's length comes first: as bytes it can read as a pickle's, a web page's or a zip's beginning."""
    text = json.dumps({**entry(), "__metadata__": {"x": ""}})
    header = text.replace('""', f'"{"y" * (length - len(text))}"').encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, b"\0" * 4))
    assert read_tensors(path).tensors["a"].item() == 0


@pytest.mark.parametrize(
    ("keys", "role"),
    [
        (["faceid_proj.latents", "faceid_adapter.1.to_k_faceid.weight"], "faceid"),
        (["faceid_adapter.0.to_q_lora.down.weight", "faceid_adapter.1.to_q_router.0.weight"], "router"),
        (["input_layer.0.weight", "body.0.res_layer.0.weight", "output_layer.0.weight"], "backbone"),
        (["vision_model.embeddings.patch_embedding.weight"], "vision"),
        (["embeddings.patch_embedding.weight"], "vision"),
        (["visual.conv1.weight", "text_projection"], "vision"),
        (["image_proj.latents", "ip_adapter.1.to_k_ip.weight"], None),
        (["model.diffusion_model.input_blocks.0.0.weight"], None),
    ],
)
def test_role_is_told_by_the_tensors(keys: list[str], role: str | None, tmp_path: Path) -> None:
    assert formats.role_of(keys) == role
    path = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, path)
    assert describe(path).role == role
    if role is not None:
        with pytest.raises(PortraitError, match="not those of a toy file"):
            read_tensors(path, "toy")
    else:
        # Whose layout is not known here.
        assert read_tensors(path, "toy").tensors.keys() == set(keys)
    if role != "router":
        with pytest.raises(PortraitError, match="not those of a router file"):
            read_tensors(path, "router")


def test_description_of_each_format(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "a.bin")
    seen = describe(tmp_path / "a.bin")
    assert (seen.role, seen.format, seen.tensors) == ("faceid", "torch zip", 3)
    assert seen.dtypes == ("bfloat16", "float16", "float32")
    convert(tmp_path / "a.bin", tmp_path / "a.safetensors")
    seen = describe(tmp_path / "a.safetensors")
    assert (seen.role, seen.tensors, seen.dtypes) == ("faceid", 3, ("BF16", "F16", "F32"))
    assert seen.size == (tmp_path / "a.safetensors").stat().st_size
    (tmp_path / "det_10g.onnx").write_bytes(b"\x08\x07")
    assert describe(tmp_path / "det_10g.onnx").role == "detector"


def test_the_webuis_own_torch_load_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(SMALL, tmp_path / "a.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: None)
    assert read_tensors(tmp_path / "a.bin").role == "faceid"


def test_hash_is_computed_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a.safetensors", tmp_path / "cache"
    save_file({"a": torch.zeros(1)}, path)
    first = read_tensors(path, hash_cache=cache).sha256
    assert json.loads((cache / hashes.CACHE_FILE).read_text()).popitem()[1] == first
    # Results of an evaluation are handed on with theirs.
    assert path.name not in (cache / hashes.CACHE_FILE).read_text()

    def unread(*_: object) -> None:
        raise AssertionError("the file was hashed again")

    with monkeypatch.context() as patched:
        patched.setattr(hashes.hashlib, "sha256", unread)
        assert file_sha256(path, cache) == first
        patched.setattr(hashes, "_memory", {})  # as after a restart
        assert file_sha256(path, cache) == first
        assert file_sha256(path) == first
    save_file({"a": torch.ones(2)}, path)
    assert file_sha256(path, cache) != first
    (cache / hashes.CACHE_FILE).write_text("{ broken")
    monkeypatch.setattr(hashes, "_memory", {})
    assert file_sha256(path, cache) == file_sha256(path)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, lib_portrait.checkpoints as c, lib_portrait.checkpoints.download; print('torch' in sys.modules)"
    root = Path(formats.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"


PARITY = Path(__file__).parents[3] / "shared" / "parity"


@pytest.mark.skipif(not PARITY.is_dir(), reason="official sample files are in shared/parity beside the checkout")
@pytest.mark.parametrize("role", ["faceid", "router"])
def test_official_file_converts_both_ways(role: str, tmp_path: Path) -> None:
    source = PARITY / f"uniportrait-{role}_small.bin"
    checkpoint = read_tensors(source, role)
    convert(source, tmp_path / "a.safetensors")
    assert same(read_tensors(tmp_path / "a.safetensors", role).tensors, checkpoint.tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "a.bin")
    original = torch.load(source, weights_only=True)
    assert same(torch.load(tmp_path / "a.bin", weights_only=True), original)
    groups = {"faceid": {"faceid_proj", "faceid_adapter"}, "router": {"faceid_adapter"}}
    assert set(original) == groups[role]
