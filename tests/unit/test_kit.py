"""Manifests of kits: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib_portrait.checkpoints import Registry
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import (
    BYTES,
    CLIP_L,
    Manifest,
    Sampling,
    StoredFile,
    TextEncoder,
    bare_name,
    dump,
    parse,
    read_manifest,
    write_manifest,
)
from lib_portrait.checkpoints.text_encoder import TARGET
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files


def is_bare(name: str) -> bool:
    try:
        return name.isprintable() and bool(bare_name(name, "name"))
    except PortraitError:
        return False


LINES = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=80)
NAMES = LINES.filter(is_bare)
ROLES = st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True)
SIZES = st.integers(1, 2**16)
FILES = st.builds(
    StoredFile,
    NAMES,
    st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.none() | st.integers(1, 2**40),
)
MANIFESTS = st.builds(
    Manifest,
    name=NAMES,
    method=ROLES,
    adapter=st.dictionaries(ROLES, NAMES, min_size=1, max_size=3),
    encoders=st.dictionaries(ROLES, FILES, max_size=3),
    detector=st.none() | FILES,
    measuring=st.none() | FILES,
    attributes=st.none() | FILES,
    base=st.none() | FILES,
    text_encoder=st.none() | st.builds(TextEncoder, SIZES, SIZES, SIZES, SIZES),
    picture=st.none() | st.tuples(SIZES, SIZES),
    sampling=st.none() | st.builds(Sampling, LINES, SIZES, st.floats(0, 100) | st.integers(0, 100)),
    licence=st.none() | LINES,
    training=st.dictionaries(LINES, LINES, max_size=4),
)


@given(MANIFESTS)
def test_what_is_written_is_what_is_read(manifest: Manifest) -> None:
    text = dump(manifest)
    assert parse(text) == manifest
    assert dump(parse(text)) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_whatever_stands_in_an_entry_is_read_or_refused(value: Any) -> None:
    for name in STORED:
        try:
            parse(json.dumps({**STORED, name: value}).encode())
        except PortraitError as error:
            assert error.status_code == 422


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(PortraitError, match="Get the kit's manifest anew"):
        parse(data)


STORED: dict[str, Any] = {
    "format": 1,
    "name": "mine",
    "method": "uniportrait",
    "adapter": {"faceid": "uniportrait-faceid_mine.safetensors"},
    "encoders": {"backbone": {"name": "eyes.safetensors", "sha256": "0" * 64, "size": 8}},
    "base": {"name": "base.safetensors"},
    "text_encoder": vars(CLIP_L),
    "picture": {"width": 512, "height": 512},
    "sampling": {"sampler": "DDIM", "steps": 20, "cfg": 5},
    "training": {"steps": "1000"},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "kit.json: format: 2 is not known here, only 1. Update this extension"),
        ({"format": True}, "kit.json: format: True is no whole number"),
        ({"name": "../mine"}, "kit.json: name: '../mine' is not a bare file name"),
        ({"name": 7}, "kit.json: name: 7 is no text"),
        ({"name": "\ud800"}, "is no text of one line"),
        ({"method": "Über"}, "kit.json: method: 'Über' is no name of small letters"),
        ({"adapter": {}}, "kit.json: adapter: it names no file"),
        ({"adapter": {"faceid": "/etc/passwd"}}, "kit.json: adapter.faceid: '/etc/passwd' is not a bare file name"),
        ({"adapter": {f"role{n}": "a" for n in range(17)}}, "kit.json: adapter: it has more than 16 entries"),
        ({"encoders": []}, r"kit.json: encoders: \[\] is no JSON object"),
        ({"encoders": {"backbone": {"name": "a", "sha256": "A" * 64}}}, "encoders.backbone.sha256: 'A+' is no SHA-256"),
        (
            {"encoders": {"backbone": {"name": "a", "size": -1}}},
            "encoders.backbone.size: -1 is no whole number of 1 to",
        ),
        ({"encoders": {"backbone": {"sha256": "0" * 64}}}, "encoders.backbone.name: it is missing"),
        ({"base": {"name": "a", "url": "b"}}, "base.'url': no manifest has an entry of this name"),
        ({"picture": {"width": 10**9, "height": 1}}, "picture.width: 1000000000 is no whole number of 1 to 65536"),
        ({"sampling": {"sampler": "DDIM", "steps": 1.5, "cfg": 5}}, "sampling.steps: 1.5 is no whole number"),
        ({"sampling": {"sampler": "DDIM", "steps": 5, "cfg": -1}}, "sampling.cfg: -1 is no number of 0 to 100"),
        ({"licence": "a\nb"}, "licence: .* is no text of one line"),
        ({"training": {"steps": 1000}}, "training.steps: 1000 is no text"),
        ({"training": {str(n): "a" for n in range(65)}}, "training: it has more than 64 entries"),
        ({"novelty": 1}, "'novelty': no manifest has an entry of this name. Take the entry out, or update"),
    ],
)
def test_what_is_wrong_is_named_with_the_entry_and_the_value(changes: dict[str, Any], message: str) -> None:
    parse(json.dumps(STORED).encode())
    with pytest.raises(PortraitError, match=message):
        parse(json.dumps({**STORED, **changes}).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 1}', "an entry stands there twice"),
        ('{"format": NaN}', "NaN is no number"),
        ("[" * 60000, "it is not JSON"),
        ('{"format": ' + "1" * 5000 + "}", "not JSON|not known here|no whole number"),
        (" " * (BYTES + 1), f"it is longer than {BYTES} bytes"),
        ("[]", r"\[\] is no JSON object"),
        ("{}", "format: it is missing"),
    ],
)
def test_texts_that_are_no_manifest_are_refused(text: str, message: str) -> None:
    with pytest.raises(PortraitError, match=message):
        parse(text.encode())


def test_a_file_says_the_name_that_its_manifest_has(tmp_path: Path) -> None:
    manifest = parse(json.dumps(STORED).encode())
    write_manifest(tmp_path / "mine.kit.json", manifest)
    assert read_manifest(tmp_path / "mine.kit.json") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["mine.kit.json"]
    (tmp_path / "mine.kit.json").rename(tmp_path / "other.kit.json")
    with pytest.raises(PortraitError, match=r"other\.kit\.json: it is the manifest of 'mine'. Name the file mine\.kit"):
        read_manifest(tmp_path / "other.kit.json")
    (tmp_path / "other.kit.json").rename(tmp_path / "kit.json")
    assert read_manifest(tmp_path / "kit.json") == manifest
    with pytest.raises(PortraitError, match="cannot be read") as caught:
        read_manifest(tmp_path / "gone.kit.json")
    assert caught.value.status_code == 404
    with pytest.raises(PortraitError, match="cannot be written") as caught:
        write_manifest(tmp_path / "none" / "mine.kit.json", manifest)
    assert caught.value.status_code == 507


def test_published_checkpoints_have_a_manifest() -> None:
    registry = Registry(adapter_files())
    kits = [files.kit for files in adapter_files() if files.kit is not None]
    assert [(kit.name, kit.text_encoder) for kit in kits] == [("sd15", CLIP_L)]
    for kit in kits:
        assert parse(dump(kit)) == kit
        names = [*kit.adapter.values(), *(file.name for file in kit.encoders.values())]
        assert all(registry.select(name) for name in names)


def test_the_embedded_kit_is_what_lies_beside_its_manifest() -> None:
    home = Path(__file__).resolve().parents[2] / "models" / "world"
    kit = read_manifest(home / "kit.json")
    assert (home / "kit.json").read_bytes() == dump(kit)
    assert all((home / name).is_file() for name in kit.adapter.values())
    for file in (*kit.encoders.values(), kit.detector, kit.measuring, kit.attributes, kit.base):
        assert file is not None
        assert (file.sha256, file.size) == (file_sha256(home / file.name), (home / file.name).stat().st_size)
    described = yaml.safe_load((home / "world.yaml").read_text("utf-8"))["model"]["params"]["cond_stage_config"]
    assert described["target"] == TARGET
    assert kit.text_encoder is not None and vars(kit.text_encoder).items() <= described["params"].items()
