"""Requests that cannot be honoured, through the API: an error status and words that help, never a picture."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib_portrait.webui.panel_values import IDENTITY_FIELDS
from tests.webui.server import ROOT, Client, plotted
from tests.webui.world import KIT, World

pytestmark = pytest.mark.webui


def image(mode: str = "RGB", size: tuple[int, int] = (256, 256), form: str = "PNG", colour: Any = 0) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, form)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few kilobytes that says it has `side` times `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("L", (64, 64), level) for level in (255, 0)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(*identities: Any, **changes: Any) -> dict[str, Any]:
    return {"checkpoint": KIT, "identities": list(identities), **changes}


def alone(*identities: Any, **changes: Any) -> dict[str, Any]:
    """With reference guidance and nothing else."""
    return {"method": "none", "identities": list(identities), **changes}


def right_half() -> bytes:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


FIGURES = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
TALL = text(image("L", (64, 128), colour=255))

# Each case: what it is, the request made from a good photo, the field that is named, and a word of the message.
Case = tuple[str, Callable[[str], Any], str, str]
CASES: list[Case] = [
    ("no face", lambda ada: ask({"photos": [text(image())]}), "identities[0].photos[0]", "no face"),
    ("no face in the second photo", lambda ada: ask({"photos": [ada, text(image())]}), "photos[1]", "no face"),
    ("face index beyond", lambda ada: ask({"photos": [{"image": ada, "face": 3}]}), "photos[0].face", "0 to 0"),
    ("truncated PNG", lambda ada: ask({"photos": [text(base64.b64decode(ada)[:5000])]}), "photos[0]", "damaged"),
    ("truncated JPEG", lambda ada: ask({"photos": [text(image(form="JPEG")[:300])]}), "photos[0]", "image"),
    ("no image at all", lambda ada: ask({"photos": [text(b"hello, world")]}), "photos[0]", "image"),
    ("a PDF", lambda ada: ask({"photos": [text(b"%PDF-1.4 not a picture")]}), "photos[0]", "image"),
    ("an SVG", lambda ada: ask({"photos": [text(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]}), "photos[0]", "image"),
    ("decompression bomb", lambda ada: ask({"photos": [text(bomb())]}), "photos[0]", "pixels"),
    ("0 bytes", lambda ada: ask({"photos": [""]}), "photos[0]", "0 bytes"),
    ("wrong base64", lambda ada: ask({"photos": ["!!!"]}), "photos[0]", "base64"),
    ("cut base64", lambda ada: ask({"photos": [ada[:1001]]}), "photos[0]", "base64"),
    ("data URL without base64", lambda ada: ask({"photos": ["data:image/png,%89PNG"]}), "photos[0]", "base64"),
    ("a URL", lambda ada: ask({"photos": ["http://127.0.0.1:9/face.png"]}), "photos[0]", "base64"),
    ("a path", lambda ada: ask({"photos": ["/etc/passwd"]}), "photos[0]", ""),
    ("a tiny picture", lambda ada: ask({"photos": [text(image(size=(4, 4)))]}), "photos[0]", ""),
    ("aligned but oblong", lambda ada: ask({"photos": [{"image": text(image(size=(300, 100))), "aligned": True}]}),
     "photos[0]", "square"),
    ("unknown hash", lambda ada: ask({"photos": ["sha256:" + "0" * 64]}), "photos[0]", "not kept"),
    ("unknown hash, its start", lambda ada: ask({"photos": ["sha256:" + "0" * 12]}), "photos[0]", "not kept"),
    ("too few digits of a hash", lambda ada: ask({"photos": ["sha256:" + "0" * 11]}), "photos[0]", "hash"),
    ("malformed hash", lambda ada: ask({"photos": ["sha256:../../x"]}), "photos[0]", "hash"),
    ("photo is a number", lambda ada: ask({"photos": [7]}), "photos[0]", "no image"),
    ("photos is a string", lambda ada: ask({"photos": ada}), "identities[0].photos", "no list"),
    ("no photos", lambda ada: ask({"photos": []}), "identities[0].photos", "no photo"),
    ("too many photos", lambda ada: ask({"photos": [ada] * 9}), "identities[0].photos", "at most 8"),
    ("no identities", lambda ada: ask(), "identities", "empty"),
    ("too many identities", lambda ada: ask(*[{"photos": [ada]}] * 5), "identities", "at most 4"),
    ("identity is a string", lambda ada: ask("ada"), "identities[0]", "no object"),
    ("unknown key", lambda ada: ask({"photos": [ada]}, strenght=1), "strenght", "not known"),
    ("unknown key inside", lambda ada: ask({"photos": [ada], "weight": 1}), "identities[0].weight", "not known"),
    ("scale is NaN", lambda ada: ask({"photos": [ada]}, scale=float("nan")), "scale", "out of range"),
    ("scale is infinite", lambda ada: ask({"photos": [ada]}, scale=float("inf")), "scale", "out of range"),
    ("scale is too large", lambda ada: ask({"photos": [ada], "scale": 2.5}), "identities[0].scale", "0 to 2"),
    ("scale is negative", lambda ada: ask({"photos": [ada]}, lora_scale=-1), "lora_scale", "0 to 2"),
    ("scale is a string", lambda ada: ask({"photos": [ada]}, scale="1"), "scale", "no number"),
    ("scale is enormous", lambda ada: ask({"photos": [ada]}, scale=10**50), "scale", "out of range"),
    ("enabled is a number", lambda ada: ask({"photos": [ada]}, enabled=1), "enabled", "true or false"),
    ("start after end", lambda ada: ask({"photos": [ada], "start": 0.9, "end": 0.1}), "identities[0].start", "below"),
    ("mix weights over 1", lambda ada: ask({"photos": [ada], "mix": [{"photos": [ada], "weight": 0.7}] * 2}),
     "identities[0].mix", "1.4"),
    ("mix without a face", lambda ada: ask({"photos": [ada], "mix": [{"photos": [text(image())]}]}),
     "identities[0].mix[0].photos[0]", "no face"),
    ("unknown method", lambda ada: ask({"photos": [ada]}, method="magic"), "method", "uniportrait"),
    ("unknown checkpoint", lambda ada: {"checkpoint": "nosuch", "identities": [{"photos": [ada]}]}, "checkpoint", ""),
    ("checkpoint leaves its folder", lambda ada: {"checkpoint": "../../x", "identities": [{"photos": [ada]}]},
     "checkpoint", "bare file name"),
    ("checkpoint is absolute", lambda ada: {"checkpoint": "/etc/passwd", "identities": [{"photos": [ada]}]},
     "checkpoint", "bare file name"),
    ("box and mask", lambda ada: ask({"photos": [ada], "region": {"box": [0, 0, 1, 1], "mask": ada}}), "region", "one"),
    ("box outside", lambda ada: ask({"photos": [ada], "region": {"box": [0, 0, 3, 1]}}), "region.box[2]", "0 to 1"),
    ("empty box", lambda ada: ask({"photos": [ada], "region": {"box": [0.5, 0, 0.5, 1]}}), "region.box", "empty"),
    ("mask of another shape", lambda ada: ask({"photos": [ada], "region": {"mask": TALL}}),
     "identities[0].region.mask", "64x128"),
    ("empty mask", lambda ada: ask({"photos": [ada], "region": {"mask": text(image("L", (64, 64)))}}),
     "identities[0].region.mask", "empty"),
    ("mask is no image", lambda ada: ask({"photos": [ada], "region": {"mask": text(b"zzz")}}), "region.mask", "image"),
    ("guidance is a word", lambda ada: ask({"photos": [ada]}, guidance="on"), "guidance", "no object"),
    ("an unknown option of guidance", lambda ada: ask({"photos": [ada]}, guidance={"p": 3}), "guidance.p", "not known"),
    ("guidance enabled by a word", lambda ada: ask({"photos": [ada]}, guidance={"enabled": "yes"}),
     "guidance.enabled", "true or false"),
    ("guidance is NaN", lambda ada: ask({"photos": [ada]}, guidance={"strength": float("nan")}),
     "guidance.strength", "out of range"),
    ("guidance is too strong", lambda ada: ask({"photos": [ada]}, guidance={"strength": 1e6}),
     "guidance.strength", "0 to 1000"),
    ("guidance begins beyond the end", lambda ada: ask({"photos": [ada]}, guidance={"begin": 2}),
     "guidance.begin", "0 to 1"),
    ("guidance begins with a text", lambda ada: ask({"photos": [ada]}, guidance={"begin": "0.5"}),
     "guidance.begin", "no number"),
    ("guidance in half a round", lambda ada: ask({"photos": [ada]}, guidance={"rounds": 0.5}),
     "guidance.rounds", "whole number"),
    ("a reference noisier than the model knows", lambda ada: ask({"photos": [ada]}, guidance={"reference_t": 1000}),
     "guidance.reference_t", "0 to 999"),
    ("guidance in a block that is not there", lambda ada: ask({"photos": [ada]}, guidance={"block": 4}),
     "guidance.block", "0 to 3"),
    ("guidance every 0th step", lambda ada: ask({"photos": [ada]}, guidance={"every": 0}), "guidance.every", "1 to 20"),
    ("guidance everywhere", lambda ada: ask({"photos": [ada]}, guidance={"where": "everywhere"}),
     "guidance.where", "automatic, region"),
    ("guidance that is off, with a bad value", lambda ada: ask({"photos": [ada]}, guidance={"enabled": False,
     "power": -1}), "guidance.power", "0 to 10"),
    ("guided is a number", lambda ada: ask({"photos": [ada], "guided": 1}, guidance={}),
     "identities[0].guided", "true or false"),
    ("guidance of nobody", lambda ada: ask({"photos": [ada], "guided": False}, guidance={}), "guidance", "on nobody"),
    ("guidance alone, switched off", lambda ada: alone({"photos": [ada]}, guidance={"enabled": False}),
     "guidance", "Switch reference guidance on"),
    ("guidance alone, not mentioned", lambda ada: alone({"photos": [ada]}), "guidance", "Switch reference guidance on"),
    ("guidance alone, and not of somebody", lambda ada: alone({"photos": [ada]}, {"photos": [ada], "guided": False},
     guidance={}), "identities[1].guided", "leave them out"),
    ("guidance alone with an adapter", lambda ada: ask({"photos": [ada]}, method="none", guidance={}),
     "checkpoint", "has no adapters"),
    ("guidance alone with a scale", lambda ada: alone({"photos": [ada]}, guidance={}, scale=1), "scale", "not known"),
    ("guidance by a photo without a face", lambda ada: alone({"photos": [text(image())]}, guidance={}),
     "identities[0].photos[0]", "no face"),
    ("a list instead of an object", lambda ada: [ask({"photos": [ada]})], "", ""),
    # Photos that a detector or a decoder must not be believed about.
    ("no face whichever way it is turned", lambda ada: ask({"photos": [text(image())]}), "photos[0]", "all four ways"),
    ("a picture above the limit of pixels", lambda ada: ask({"photos": [text(bomb(20_000))]}),
     "photos[0]", 'raise "Size of a photo, at most, in megapixels" in Settings > Portrait'),
    ("half a HEIC photo", lambda ada: ask({"photos": [text(HEIC_START + bytes(200))]}), "photos[0]", "HEIC|damaged"),
    ("a HEIC file of 12 bytes", lambda ada: ask({"photos": [text(HEIC_START[:12])]}), "photos[0]", "HEIC|damaged"),
    ("half an animation", lambda ada: ask({"photos": [text(image(form="GIF")[:20])]}), "photos[0]", "damaged|image"),
    ("an animation as mask", lambda ada: ask({"photos": [ada], "region": {"mask": text(animation())}}),
     "region.mask", "more than one picture"),
    ("a film", lambda ada: ask({"photos": [text(b"\0\0\0\x18ftypmp42" + bytes(200))]}), "photos[0]", "not an image"),
]  # fmt: skip

LATE = {"steps": 6}
IMAGE = {"init_images": [text(image(size=(128, 128)))]}


def positional(photos: list[str]) -> list[Any]:
    """The panel's values for one person a photo, as a list of the API has them."""
    values = [True, "UniPortrait", KIT, 0.7, 1.0, False]
    for photo in photos:
        values += [None, [photo], *[None] * (len(IDENTITY_FIELDS) - 2)]
    return values


def plot(axis: str, values: str) -> dict[str, Any]:
    return {"script_name": "x/y/z plot", "script_args": [axis, values]}


# What was honoured in part, or drawn without somebody: the request, or all of `args`, and what stands beside it.
Asked = tuple[str, Callable[[str], Any], dict[str, Any], str, str]
ASKED: list[Asked] = [
    ("window after the last step", lambda ada: ask({"photos": [ada], "start": 0.99}), {"steps": 20},
     "identities[0].start", "start at 0.95 or before"),
    ("window after the last of few steps", lambda ada: ask({"photos": [ada], "start": 0.8}), {"steps": 4},
     "identities[0].start", "start at 0.75 or before"),
    ("window between two steps", lambda ada: ask({"photos": [ada], "start": 0.51, "end": 0.54}), LATE,
     "identities[0].start", "0.17, 0.33, 0.5"),
    ("the second person's window", lambda ada: ask({"photos": [ada]}, {"photos": [ada], "start": 0.97}), LATE,
     "identities[1].start", "start at 0.83 or before"),
    ("window after the last step that DDIM draws", lambda ada: ask({"photos": [ada], "start": 0.75}),
     {"steps": 5, "sampler_name": "DDIM"}, "identities[0].start", "start at 0.6 or before"),
    ("one step of DDIM", lambda ada: ask({"photos": [ada]}), {"steps": 1, "sampler_name": "DDIM"}, "steps", "no step"),
    ("one step of PLMS", lambda ada: ask({"photos": [ada]}), {"steps": 1, "sampler_name": "PLMS"}, "steps", "no step"),
    ("denoising strength 0", lambda ada: ask({"photos": [ada]}),
     {**IMAGE, "denoising_strength": 0, "sampler_name": "DDIM"}, "steps", "denoising strength 0)"),
    ("denoising strength next to 0", lambda ada: ask({"photos": [ada]}),
     {**IMAGE, "denoising_strength": 0.05, "sampler_name": "DDIM", "steps": 10}, "steps", "denoising strength 0.05)"),
    ("two request objects", lambda ada: [ask({"photos": [ada]}), ask({"photos": [ada]})], {}, "args[1]", "identities"),
    ("an object after the request", lambda ada: [ask({"photos": [ada]}), {"nonsense": 1}], {}, "args[1]", "one"),
    ("a list after the request", lambda ada: [ask({"photos": [ada]}), [ada]], {}, "args[1]", "one"),
    ("more people in a list than tabs", lambda ada: positional([ada] * 5), {}, "args[78]", "4 people"),
    ("a refiner of another family", lambda ada: ask({"photos": [ada]}),
     {"refiner_checkpoint": "sdxl", "refiner_switch_at": 0.5}, "refiner", "sdxl.safetensors"),
    ("a hires checkpoint of another family", lambda ada: ask({"photos": [ada]}),
     {"enable_hr": True, "hr_checkpoint_name": "sdxl", "hr_upscaler": "Latent", "denoising_strength": 0.7},
     "hires checkpoint", "sdxl.safetensors"),
    ("guidance that begins after the last step", lambda ada: ask({"photos": [ada]}, guidance={"begin": 0}),
     {"steps": 3, "sampler_name": "DDIM"}, "guidance.begin", "no step"),
    ("guidance alone of a face that is nowhere", lambda ada: alone({"photos": [ada]}, guidance={}), {"steps": 3},
     "identities[0]", "at no step"),
    ("guidance in a region that nobody gave", lambda ada: alone({"photos": [ada]}, guidance={"where": "region"}), {},
     "identities[0].region", "nothing tells"),
    ("guidance by a routing map that is not made", lambda ada: alone({"photos": [ada]}, guidance={"where": "routing"}),
     {}, "identities[0].region", "no routing map"),
    ("guidance by a word that is not there", lambda ada: alone({"photos": [ada]}, guidance={"where": "attention"}), {},
     "identities[0].region", "no word"),
    ("guidance outside of what is painted", lambda ada: alone({"photos": [ada], "region": {"box": [0, 0, 0.2, 0.2]}},
     guidance={}), {**IMAGE, "mask": text(right_half()), "denoising_strength": 0.9}, "identities[0].region", ""),
    ("a plot over guidance that is switched off", lambda ada: ask({"photos": [ada]}),
     plot("[Portrait] Guidance strength", "1,2"), "guidance.strength", "switched off"),
    ("a plot with a value of guidance out of range", lambda ada: ask({"photos": [ada]}, guidance={}),
     plot("[Portrait] Guidance begin", "0.2,3"), "guidance.begin", "0 to 1"),
    ("a plot over a person who is not there", lambda ada: ask({"photos": [ada]}, {"photos": [ada]}),
     plot("[Portrait] Scale of identity 4", "0.5,1"), "identities[3].scale", "2 identities"),
    ("a plot over a checkpoint that is not there", lambda ada: ask({"photos": [ada]}),
     plot("[Portrait] Checkpoint", "nope"), "checkpoint", "nope"),
    ("a plot with a value out of range", lambda ada: ask({"photos": [ada]}), plot("[Portrait] ID scale", "0.2,3"),
     "scale", "0 to 2"),
    ("a plot of our axis with a faceless photo", lambda ada: ask({"photos": [text(image())]}),
     plot("[Portrait] ID scale", "0.2,1"), "identities[0].photos[0]", "no face"),
    ("a plot of another axis with a faceless photo", lambda ada: ask({"photos": [text(image())]}), plot("Steps", "2,3"),
     "identities[0].photos[0]", "no face"),
    ("a plot in which no cell has a step for the person", lambda ada: ask({"photos": [ada], "start": 0.9}),
     plot("Steps", "2,3"), "identities[0].start", "no step"),
]  # fmt: skip


def refused(answer: Any, field: str, word: str) -> None:
    assert 400 <= answer.status < 600, "a picture was given as if nothing were wrong"
    assert "images" not in answer.body
    assert field in answer.detail.split(": ")[0] or not field
    assert re.search(re.escape(word).replace(r"\|", "|"), answer.detail)
    assert len(answer.detail) < 3000
    assert answer.detail.count(". ") >= 1, "the message names a remedy"


def test_the_figures_count_these_cases() -> None:
    """All of the four lists, and the SDXL model."""
    assert len({name for name, *_ in [*CASES, *ASKED]}) == len(CASES) + len(ASKED)
    number = len(CASES) + len(ASKED) + len(FILES) + len(SPOILT) + 1
    assert f"| Requests and weight files that must be refused, through the API | {number} of {number} |" in FIGURES


@pytest.mark.parametrize(("name", "make", "field", "word"), CASES, ids=[case[0] for case in CASES])
def test_a_bad_request_is_refused(
    server: Client, people: dict[str, str], name: str, make: Callable[[str], Any], field: str, word: str
) -> None:
    value = make(people["ada"])
    if isinstance(value, dict):
        refused(server.generate(value), field, word)
    else:
        answer = server.generate(alwayson_scripts={"Portrait": {"args": [value]}})
        refused(answer, field, word)


@pytest.mark.parametrize(("name", "make", "beside", "field", "word"), ASKED, ids=[case[0] for case in ASKED])
def test_what_would_be_drawn_without_somebody_is_refused(
    server: Client,
    people: dict[str, str],
    name: str,
    make: Callable[[str], Any],
    beside: dict[str, Any],
    field: str,
    word: str,
) -> None:
    value = make(people["ada"])
    beside = plotted(server, beside) if "script_name" in beside else beside
    args = value if isinstance(value, list) else [value]
    before = len(log_of(server))
    answer = server.generate(alwayson_scripts={"Portrait": {"args": args}}, **beside)
    refused(answer, field, word)
    assert answer.status in (404, 422), "the request is at fault, not this installation"
    if "script_name" not in beside:
        said = [line for line in log_of(server)[before:].splitlines() if line.startswith("***")]
        assert said == [f"*** Portrait: {answer.detail}"], "one line in the console"
        assert "Traceback" not in log_of(server)[before:]


def log_of(server: Client) -> str:
    return (server.scratch / "server.log").read_text(errors="replace")


def test_and_a_good_one_is_not(server: Client, people: dict[str, str]) -> None:
    assert server.generate(ask({"photos": [people["ada"]]})).status == 200


def test_a_page_of_another_site_changes_nothing(server: Client, people: dict[str, str]) -> None:
    """A browser sends these for any page without asking; for JSON it asks, and the host allows no foreign origin."""
    kept = server.call("/portrait/photos", {"image": people["ada"]}).body
    paths = server.call("/openapi.json").body["paths"]
    routes = [path for path, methods in paths.items() if path.startswith("/portrait/") and "post" in methods]
    assert {"/portrait/drop-caches", "/portrait/photos", "/portrait/detect"} <= set(routes)
    for route in routes:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = server.call(route, {"image": people["ben"]}, kind=kind)
            assert answer.status == 415, (route, kind)
            assert "Content-Type: application/json" in answer.detail
    assert server.call("/portrait/detect", kept).status == 200, "the photo is still kept"
    assert server.call("/portrait/drop-caches", {}).body == {"dropped": True}
    assert server.call("/portrait/detect", kept).status == 422


# --------------------------------------------------------------------------------------------------- bad weight files


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint ran",))


def swapped(tensors: dict[str, torch.Tensor], part: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) if part in key else value for key, value in tensors.items()}


FILES: list[tuple[str, str, Callable[[bytes, dict[str, torch.Tensor]], Any]]] = [
    ("empty file", "safetensors", lambda data, tensors: b""),
    ("truncated file", "safetensors", lambda data, tensors: data[: len(data) // 2]),
    ("absurd header", "safetensors", lambda data, tensors: struct.pack("<Q", 2**62) + data[8:]),
    ("text", "safetensors", lambda data, tensors: b"version https://git-lfs.github.com/spec/v1\n"),
    ("malicious pickle", "bin", lambda data, tensors: pickle.dumps({"faceid_proj": Malicious()})),
    ("pickle that is no file of tensors", "bin", lambda data, tensors: pickle.dumps({"faceid_proj": {"latents": 1}})),
    ("safetensors named .bin", "bin", lambda data, tensors: data),
    ("foreign tensors", "safetensors", lambda data, tensors: {"model.weight": torch.zeros(3, 3)}),
    ("no ID attention", "safetensors", lambda data, tensors: {k: v for k, v in tensors.items() if "faceid.w" not in k}),
    ("no ID embedding", "safetensors", lambda data, tensors: {k: v for k, v in tensors.items() if "proj" not in k}),
    ("another model's widths", "safetensors", lambda data, tensors: swapped(tensors, "to_k_faceid", (640, 2048))),
]


@pytest.mark.parametrize(("name", "suffix", "make"), FILES, ids=[case[0] for case in FILES])
def test_a_bad_weight_file_is_refused(
    server: Client,
    world: World,
    people: dict[str, str],
    name: str,
    suffix: str,
    make: Callable[[bytes, dict[str, torch.Tensor]], Any],
) -> None:
    folder = world.models / "Portrait"
    good = folder / f"uniportrait-faceid_{KIT}.safetensors"
    bad = folder / f"uniportrait-faceid_bad.{suffix}"
    content = make(good.read_bytes(), load_file(good))
    # A pickle cannot name its networks: the published ones must be there for it to be opened at all.
    published = {
        "glint360k_curricular_face_r101_backbone.safetensors": f"{KIT}_backbone.safetensors",
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": f"{KIT}_vision.safetensors",
    }
    try:
        for link, target in published.items():
            (folder / link).symlink_to(target)
        if isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            metadata = {"backbone": f"{KIT}_backbone.safetensors", "vision": f"{KIT}_vision.safetensors"}
            save_file(content, bad, metadata)
        answer = server.generate({"checkpoint": "bad", "identities": [{"photos": [people["ada"]]}]})
        refused(answer, "", "")
        assert bad.name in answer.detail or "another kind of model" in answer.detail
        listed = server.call("/portrait/models")
        assert listed.status == 200, "one bad file does not hide the others"
        assert KIT in json.dumps(listed.body)
    finally:
        for file in (bad, *(folder / link for link in published)):
            file.unlink(missing_ok=True)
    log = (server.scratch / "server.log").read_text(errors="replace")
    assert "code from a checkpoint ran" not in log


# Files whose tensors do not fit each other or the UNet, or hold no numbers: what is done to which file of the adapter
# (0: faceid, 1: router) at one site that attends to the text, and a word of the message.
Tensors = dict[str, torch.Tensor]


def cut(tensors: Tensors, *parts: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not all(part in key for part in parts)}


def undefined(tensors: Tensors, part: str) -> Tensors:
    return {key: value * torch.nan if part in key else value for key, value in tensors.items()}


SPOILT: list[tuple[str, int, Callable[[Tensors], Tensors], str]] = [
    ("no value at one site", 0, lambda t: cut(t, ".1.to_v_faceid"), "1.to_v_faceid.weight is missing"),
    ("half a LoRA pair", 0, lambda t: cut(t, ".1.to_q_lora.down"), "1.to_q_lora.down.weight is missing"),
    ("a LoRA for another layer", 0, lambda t: swapped(t, ".1.to_q_lora.up", (7, 8)), "1.to_q_lora"),
    ("NaN in the embedding", 0, lambda t: undefined(t, "latents"), "latents holds infinities or NaN"),
    ("a router for other tokens", 1, lambda t: swapped(t, ".1.aggr_router.weight", (1, 99)), "(1, 99) instead of (1, "),
    ("a router that lacks a site", 1, lambda t: cut(t, "_adapter.1.", "router"), "is missing"),
    ("NaN in the router", 1, lambda t: undefined(t, ".1.to_q_router.0.weight"), "holds infinities or NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "which", "spoil", "word"), SPOILT, ids=[case[0] for case in SPOILT])
def test_an_adapter_that_does_not_fit_itself_is_refused(
    server: Client,
    world: World,
    people: dict[str, str],
    name: str,
    which: int,
    spoil: Callable[[Tensors], Tensors],
    word: str,
) -> None:
    folder = world.models / "Portrait"
    metadata = {"backbone": f"{KIT}_backbone.safetensors", "vision": f"{KIT}_vision.safetensors"}
    written = [folder / f"uniportrait-{role}_bad.safetensors" for role in ("faceid", "router")]
    both = [{"photos": [people["ada"]]}, {"photos": [people["ada"]]}]
    try:
        for place, file in enumerate(written):
            tensors = load_file(folder / file.name.replace("_bad", f"_{KIT}"))
            save_file(spoil(tensors) if place == which else tensors, file, metadata)
        refused(server.generate({"checkpoint": "bad", "identities": both}), "", word)
        assert written[which].name in server.generate({"checkpoint": "bad", "identities": both}).detail
    finally:
        for file in written:
            file.unlink(missing_ok=True)
    assert server.generate(ask({"photos": [people["ada"]]})).status == 200


def test_an_sdxl_model_is_refused(server: Client, people: dict[str, str]) -> None:
    answer = server.generate(
        ask({"photos": [people["ada"]]}), override_settings={"sd_model_checkpoint": "sdxl.safetensors"}
    )
    refused(answer, "checkpoint", "another kind of model")
    assert server.generate(ask({"photos": [people["ada"]]})).status == 200
