"""Portrait in everything the host can do with a prompt: each cell looks at who is in the UNet's attention."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_portrait.request import HASH_DIGITS, Photo, parse_request, to_json
from tests.webui.oracle import NOBODY, Oracle, assert_nobody_is_seen, assert_people_are_seen
from tests.webui.server import STEPS, Client, Recording
from tests.webui.world import KIT

pytestmark = pytest.mark.webui

LONG = "a photo of a person in a garden, " + ", ".join(f"flower number {i} of the bed" for i in range(16))
"""More than 75 tokens, so that it takes two of the text encoder's chunks where a short negative takes one."""


def one(people: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"checkpoint": KIT, "identities": [{"photos": [people["ada"]]}], **more}


def two(people: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"checkpoint": KIT, "identities": [{"photos": [people["ada"]]}, {"photos": [people["ben"]]}], **more}


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def drawing(size: int = 128) -> str:
    image = Image.linear_gradient("L").resize((size, size)).convert("RGB")
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, size // 2, size // 2), fill=(200, 80, 40))
    return encoded(image)


def half_mask(size: int = 128) -> str:
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).rectangle((0, 0, size // 2, size), fill=255)
    return encoded(image)


@dataclass
class Cell:
    """One way of generating. changes: to the request; settings: the host's, for this request only.

    rows: the kinds of each UNet call's rows where the cell is about them: "p" positive, "n" negative.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[str] | None = None
    contexts: set[int] | None = None

    def request(self) -> dict[str, Any]:
        return {**self.changes, "override_settings": self.settings}


SAMPLERS = [
    ("Euler a", "Automatic"),
    ("DPM++ 2M", "Karras"),
    ("DPM++ SDE", "Automatic"),
    ("DDIM", "Automatic"),
    ("UniPC", "Automatic"),
    ("PLMS", "Automatic"),
    ("LCM", "Automatic"),
]
CELLS = [
    Cell("txt2img", rows=["pn"] * STEPS),
    Cell("img2img", {"init_images": [drawing()], "denoising_strength": 0.9}),
    Cell("inpaint", {"init_images": [drawing()], "mask": half_mask(), "denoising_strength": 0.9, "inpainting_fill": 1}),
    Cell("batch size x count", {"batch_size": 2, "n_iter": 2}, rows=["ppnn"] * 2 * STEPS),
    Cell("AND", {"prompt": "a person in a garden AND a red hat :0.6"}, rows=["ppn"] * STEPS),
    Cell("AND in a batch", {"prompt": "a person AND a hat", "batch_size": 2}, rows=["ppppnn"] * STEPS),
    Cell(
        "prompt editing", {"prompt": "a person in a [garden:city:0.4] with [a hat|a cat]", "steps": 3}, rows=["pn"] * 3
    ),
    Cell("long prompt", {"prompt": LONG}, {"pad_cond_uncond": False}, rows=["p", "n"] * STEPS, contexts={77, 154}),
    Cell("long prompt, padded", {"prompt": LONG}, {"pad_cond_uncond": True}, rows=["pn"] * STEPS, contexts={154}),
    Cell(
        "long prompt, padded as v0", {"prompt": LONG}, {"pad_cond_uncond_v0": True}, rows=["pn"] * STEPS, contexts={154}
    ),
    Cell("long negative, cut as v0", {"negative_prompt": LONG}, {"pad_cond_uncond_v0": True}, ["pn"] * STEPS, {77}),
    Cell("long negative, padded", {"negative_prompt": LONG}, {"pad_cond_uncond": True}, ["pn"] * STEPS, {154}),
    Cell("cond and uncond apart", {"batch_size": 2}, {"batch_cond_uncond": False}, rows=["pp", "nn"] * STEPS),
    Cell("NGMS", {"s_min_uncond": 4.0, "steps": 5}, {}, rows=None),
    Cell("NGMS on all steps", {"s_min_uncond": 4.0, "steps": 5}, {"s_min_uncond_all": True}, rows=None),
    Cell("skip early CFG", {"steps": 4}, {"skip_early_cond": 0.3}, rows=["p", "p", "pn", "pn"]),
    Cell("CLIP skip", {}, {"CLIP_stop_at_last_layers": 2}),
    # As many as the orders of those that look back at earlier steps.
    *(Cell(f"{name} {of}", {"sampler_name": name, "scheduler": of, "steps": 3}) for name, of in SAMPLERS),
]


def rows(recording: Recording) -> list[str]:
    return ["".join(kind[0] for kind in call["kinds"]) for call in recording.calls]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("count", [1, 2])
def test_every_row_gets_what_its_kind_wants(
    server: Client, oracle: Oracle, people: dict[str, str], cell: Cell, count: int
) -> None:
    portrait = one(people) if count == 1 else two(people)
    recording = server.record(portrait, **cell.request())

    assert_people_are_seen(recording, oracle, portrait)
    if cell.rows is not None:
        assert rows(recording) == cell.rows
    if cell.contexts is not None:
        assert {call["context"][1] - call["marks"] for call in recording.calls} == cell.contexts
    if cell.name.startswith("NGMS"):
        assert {"p", "pn"} == set(rows(recording))
    if "sampler_name" in cell.changes:
        assert f"Sampler: {cell.changes['sampler_name']}" in recording.answer.info["infotexts"][0]


@pytest.mark.parametrize("count", [1, 2])
def test_hires_fix_keeps_the_people_in_both_passes(
    server: Client, oracle: Oracle, people: dict[str, str], count: int
) -> None:
    portrait = one(people) if count == 1 else two(people)
    recording = server.record(
        portrait, enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.8, hr_second_pass_steps=2
    )
    assert_people_are_seen(recording, oracle, portrait)
    assert {call["shape"][-1] for call in recording.calls} == {16, 32}


def test_the_refiner_gets_the_people_too(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    vanilla = server.generate().images
    portrait = two(people)
    recording = server.record(portrait, refiner_checkpoint="second", refiner_switch_at=0.5, steps=4)

    assert_people_are_seen(recording, oracle, portrait)
    assert [call["checkpoint"] for call in recording.calls] == ["first"] * 2 + ["second"] * 2
    assert server.generate().images == vanilla


def test_a_lora_is_kept_and_may_change_between_requests(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = two(people)
    for prompt, loras in (
        ("a person <lora:soft:0.8>", {"soft": 0.8}),
        ("a person <lora:hard:0.5>", {"hard": 0.5}),
        ("a person <lora:soft:0.3> <lora:hard:0.4>", {"soft": 0.3, "hard": 0.4}),
        ("a person", {}),
    ):
        assert_people_are_seen(server.record(portrait, prompt=prompt), oracle, portrait, loras)


def test_a_lora_in_the_hosts_old_way_is_kept(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    """The host then applies LoRAs in each layer's forward instead of writing them into the weights."""
    portrait = one(people)
    with server.options(lora_functional=True):
        recording = server.record(portrait, prompt="a person <lora:soft:0.8>")
        assert_people_are_seen(recording, oracle, portrait, {"soft": 0.8})
        assert_people_are_seen(server.record(portrait, prompt="a person"), oracle, portrait)
    assert_people_are_seen(server.record(portrait), oracle, portrait)


def test_every_attention_optimization_gives_the_same_people(
    server: Client, oracle: Oracle, people: dict[str, str]
) -> None:
    portrait = two(people)
    names = [*server.state()["optimizations"], "None"]
    assert len(names) >= 6, names
    latents = {}
    for name in names:
        with server.options(cross_attention_optimization=name):
            used = server.state()["optimization"]
            assert (used or "None") == name.split(" - ")[0]
            recording = server.record(portrait)
        assert_people_are_seen(recording, oracle, portrait)
        latents[name] = recording.latents()
    reference = latents["None"]
    for name, other in latents.items():
        assert difference(reference, other) < 1e-4, name


def test_token_merging_leaves_the_people(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = two(people)
    plain = server.record(portrait)
    merged = server.record(portrait, override_settings={"token_merging_ratio": 0.5})
    assert_people_are_seen(merged, oracle, portrait)
    assert (merged.latents() - plain.latents()).abs().max() > 1e-3, "token merging did nothing"


def test_hypertile_leaves_the_people(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = two(people)
    size = {"width": 256, "height": 256, "steps": 2}
    settings = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 128, "hypertile_max_depth_unet": 3}
    plain = server.record(portrait, **size)
    tiled = server.record(portrait, **size, override_settings=settings)
    assert_people_are_seen(tiled, oracle, portrait)
    assert (tiled.latents() - plain.latents()).abs().max() > 1e-3, "Hypertile did nothing"


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference in units of a latent's deviation, which is about 1 in a trained model and 20 here."""
    return ((first - second).abs().max() / first.std()).item()


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.0), (0.2, 1.0)], ids=str)
def test_one_call_and_separate_calls_agree(server: Client, people: dict[str, str], scales: tuple[float, ...]) -> None:
    """Also where negative rows take their scales from positive ones, which separate calls have run before them."""
    portrait = one(people) if len(scales) == 1 else two(people)
    portrait["identities"] = [{**own, "scale": scale} for own, scale in zip(portrait["identities"], scales)]
    for changes in ({}, {"prompt": LONG}, {"prompt": "a person AND a hat", "batch_size": 2}):
        settings = {"pad_cond_uncond": "prompt" in changes}
        together = server.record(portrait, override_settings={**settings, "batch_cond_uncond": True}, **changes)
        apart = server.record(portrait, override_settings={**settings, "batch_cond_uncond": False}, **changes)
        assert together.answer.status == apart.answer.status == 200
        assert rows(together) != rows(apart)
        assert difference(together.latents(), apart.latents()) < 1e-4


def test_a_batch_and_its_pictures_one_by_one_agree(server: Client, people: dict[str, str]) -> None:
    batch = server.record(two(people), batch_size=2, seed=7).latents()
    single = [server.record(two(people), seed=seed).latents() for seed in (7, 8)]
    assert difference(batch, torch.cat(single)) < 1e-4


# ---------------------------------------------------------------------------------------------- what was asked for


def test_other_people_give_other_pictures(server: Client, people: dict[str, str]) -> None:
    def latents(*names: str) -> torch.Tensor:
        identities = [{"photos": [people[name]]} for name in names]
        return server.record({"checkpoint": KIT, "identities": identities}, sites=()).latents()

    vanilla = server.record(sites=()).latents()
    pictures = [vanilla, latents("ada"), latents("ben"), latents("ada", "ben"), latents("ben", "cleo")]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert (first - second).norm() / second.norm() > 0.02
    assert torch.equal(latents("ada"), pictures[1])


def test_scale_zero_without_lora_is_the_vanilla_picture(server: Client, people: dict[str, str]) -> None:
    vanilla = server.record(sites=()).latents()
    absent = server.record(one(people, scale=0, lora_scale=0), sites=()).latents()
    assert difference(vanilla, absent) < 1e-5


def test_lora_scale_zero_leaves_the_identity(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    for portrait in (one(people, lora_scale=0), two(people, lora_scale=0, scale=1.3)):
        assert_people_are_seen(server.record(portrait), oracle, portrait)


def test_start_and_end_bound_the_steps(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = {"checkpoint": KIT, "identities": [{"photos": [people["ada"]], "start": 0.25, "end": 0.75}]}
    recording = server.record(portrait, steps=4)
    assert len(recording.calls) == 4
    assert_people_are_seen(recording, oracle, portrait, calls=[1, 2])
    assert_nobody_is_seen(recording, oracle, calls=[0, 3])


@pytest.mark.parametrize("how", ["box", "mask"])
def test_regions_separate_the_people(server: Client, oracle: Oracle, people: dict[str, str], how: str) -> None:
    """Ada left, Ben right, wherever the router would have put them."""
    right = Image.new("L", (256, 256))
    ImageDraw.Draw(right).rectangle((128, 0, 255, 255), fill=255)
    regions = (
        [{"box": [0, 0, 0.5, 1]}, {"box": [0.5, 0, 1, 1]}]
        if how == "box"
        else [{"mask": half_mask(257)}, {"mask": encoded(right)}]
    )
    portrait = two(people)
    for identity, region in zip(portrait["identities"], regions):
        identity["region"] = region
    recording = server.record(portrait)
    found = assert_people_are_seen(recording, oracle, portrait) if how == "box" else None
    for call in range(len(recording.calls)):
        for site, side in ((1, 16), (13, 4)):
            labels = found[(call, site)] if found else oracle.seen(recording, call, site, portrait)[:1]
            labels = labels.unflatten(-1, (side, side))
            # The mask's edge need not fall on a position's; the two columns beside it may hold both people.
            inner = side // 2 - (how == "mask")
            assert (labels[..., :inner] == 0).all(), labels
            assert (labels[..., side - inner :] == 1).all(), labels


def test_outside_of_all_regions_nobody_is_seen(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = one(people)
    portrait["identities"][0]["region"] = {"box": [0, 0, 0.5, 0.5]}
    recording = server.record(portrait)
    labels = oracle.seen(recording, 0, 1, portrait)[0].unflatten(-1, (16, 16))
    assert (labels[:8, :8] == 0).all()
    assert (labels[8:] == NOBODY).all()
    assert (labels[:, 8:] == NOBODY).all()


def test_mixing_and_structure_change_the_person(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    mixed = one(people)
    mixed["identities"][0]["mix"] = [{"photos": [people["ben"]], "weight": 0.5}]
    structured = {"checkpoint": KIT, "identities": [{"photos": [people["ada"], people["cleo"]], "structure": 1.2}]}
    latents = [server.record(one(people), sites=()).latents()]
    for portrait in (mixed, structured):
        recording = server.record(portrait)
        assert_people_are_seen(recording, oracle, portrait)
        latents.append(recording.latents())
    assert all((later - latents[0]).norm() / latents[0].norm() > 0.01 for later in latents[1:])


def test_the_routing_map_is_appended(server: Client, people: dict[str, str]) -> None:
    plain = server.generate(two(people), batch_size=2)
    shown = server.generate(two(people, show_routing=True), batch_size=2)
    assert shown.status == 200
    assert len(shown.images) > len(plain.images)

    def pixels(answer: Any) -> list[bytes]:
        return [Image.open(io.BytesIO(base64.b64decode(text))).tobytes() for text in answer.images]

    assert pixels(shown)[: len(plain.images)] == pixels(plain)


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.mark.parametrize("how", ["slices of several pictures", "slices of unequal size"])
def test_a_routing_map_is_its_picture_s_in_whatever_slices_the_host_calls(
    server: Client, people: dict[str, str], how: str
) -> None:
    changes: dict[str, Any] = {"prompt": "a person AND a hat AND a cat", "batch_size": 2}
    if how == "slices of unequal size":
        changes = {"prompt": f"{LONG} AND a hat AND a cat"}
    maps = []
    for together in (True, False):
        settings = {"batch_cond_uncond": together, "pad_cond_uncond": False, "return_grid": False}
        recording = server.record(two(people, show_routing=True), sites=(), **changes, override_settings=settings)
        assert recording.answer.status == 200, recording.answer.detail
        count = changes.get("batch_size", 1)
        assert len(recording.answer.images) == 2 * count
        maps.append([pixels_of(text) for text in recording.answer.images[count:]])
        if how == "slices of unequal size":
            assert rows(recording)[:3] == (["pp", "p", "n"] if together else ["p", "p", "p"])
    for one_call, apart in zip(*maps, strict=True):
        assert (one_call != apart).any(axis=-1).mean() < 0.01


def test_with_and_in_one_picture_of_a_batch_each_has_the_map_that_it_has_alone(
    server: Client, people: dict[str, str]
) -> None:
    data = server.scratch / "data"

    def saved(**changes: Any) -> list[np.ndarray]:
        before = set(data.rglob("*-portrait-map.png"))
        settings = {"samples_save": True, "portrait_save_maps": True}
        answer = server.generate(
            two(people, show_routing=True), save_images=True, override_settings=settings, **changes
        )
        assert answer.status == 200, answer.detail
        files = sorted(set(data.rglob("*-portrait-map.png")) - before)
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]

    script = {"script_name": "prompt matrix", "script_args": [False, False, "positive", "comma", 0]}
    batch = saved(prompt="a person in a garden|AND a red hat", batch_size=2, **script)
    alone = [saved(prompt=prompt)[0] for prompt in ("a person in a garden", "a person in a garden, AND a red hat")]
    assert (alone[0] != alone[1]).any(axis=-1).mean() > 0.05, "two maps that cannot be told apart show nothing"
    for found, expected in zip(batch, alone, strict=True):
        assert (found != expected).any(axis=-1).mean() < 0.01


def test_people_from_photos_are_seen_as_drawn_ones_are(
    server: Client, oracle: Oracle, photographed: dict[str, str]
) -> None:
    for portrait in (one(photographed), two(photographed)):
        assert_people_are_seen(server.record(portrait), oracle, portrait)


@pytest.mark.parametrize("written", ["today", "by earlier versions"])
def test_the_infotext_brings_the_picture_back(server: Client, people: dict[str, str], written: str) -> None:
    portrait = two(people, scale=0.9, lora_scale=1 / 3)
    portrait["identities"][0] |= {"structure": 0.25, "mix": [{"photos": [people["cleo"]], "weight": 0.2}]}
    portrait["identities"][1]["region"] = {"box": [0.5, 0, 1, 1]}
    first = server.record(portrait, sites=())
    infotext = first.answer.info["infotexts"][0]
    ada, ben, cleo = (Photo.of(base64.b64decode(people[name])).sha256[:HASH_DIGITS] for name in ("ada", "ben", "cleo"))
    line = (
        f"uniportrait; adapter {KIT}; scale 0.9; lora_scale 0.3333333333333333"
        f" | {ada}; structure 0.25; mix 0.2 of {cleo} | {ben}; box 0.5 0 1 1"
    )
    assert f"Portrait: {line}" in infotext
    again = server.call("/sdapi/v1/png-info", {"image": first.answer.images[0]}).body["parameters"]
    assert again["Portrait"] == line

    if written == "by earlier versions":
        request = parse_request(portrait)
        infotext = infotext.replace(line, json.dumps(json.dumps(to_json(request), sort_keys=True)))
        assert Photo.of(base64.b64decode(people["ada"])).sha256 in infotext
    second = server.record(sites=(), infotext=infotext)
    assert torch.equal(first.latents(), second.latents())
    assert f"Portrait: {line}" in second.answer.info["infotexts"][0]


def test_the_infotext_names_the_adapter_that_automatic_chose(server: Client, people: dict[str, str]) -> None:
    answer = server.generate({"identities": [{"photos": [people["ada"]]}]})
    assert f"Portrait: uniportrait; adapter {KIT} (automatic) | " in answer.info["infotexts"][0]
