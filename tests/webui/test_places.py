"""Where the people are in everything the host does with the place of what it samples.

Regions, masks and maps lie on the finished picture: a crop of it, a pass that is cut off later, or a piece of it
follows, or is refused in words.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_portrait.routing_picture import OUTSIDE, colour_of
from tests.webui.browser import Page
from tests.webui.oracle import Oracle
from tests.webui.server import STEPS, Answer, Client, Recording
from tests.webui.test_matrix import encoded, half_mask, one, two
from tests.webui.world import KIT

pytestmark = pytest.mark.webui

WIDE = (256, 128)
LEFT, RIGHT = {"box": [0, 0, 0.5, 1]}, {"box": [0.5, 0, 1, 1]}
TOP, BOTTOM = {"box": [0, 0, 1, 0.25]}, {"box": [0, 0.25, 1, 1]}


def scene(size: tuple[int, int] = WIDE) -> str:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=(200, 80, 40))
    return encoded(image)


def mask_of(box: tuple[float, float, float, float], size: tuple[int, int] = WIDE) -> str:
    """White inside the box, in pixels; the last two edges are outside."""
    image = Image.new("L", size)
    image.paste(255, tuple(round(edge) for edge in box))
    return encoded(image)


def placed(people: dict[str, str], first: Any, second: Any, **more: Any) -> dict[str, Any]:
    portrait = two(people, **more)
    portrait["identities"][0]["region"], portrait["identities"][1]["region"] = first, second
    return portrait


def inpainted(box: tuple[float, float, float, float], **changes: Any) -> dict[str, Any]:
    """Inpainting of this part, in pixels, of a wide picture, that part alone and in the common request's 128 x 128."""
    request = {"init_images": [scene()], "mask": mask_of(box), "mask_blur": 0, "inpaint_full_res": True}
    return {**request, "inpaint_full_res_padding": 0, "inpainting_fill": 1, "denoising_strength": 1.0, **changes}


@dataclass
class Cell:
    """A request, the regions in it, and where the first person's ends and the second's begins: a row or column of the
    sampled latent of each size (height, width)."""

    name: str
    changes: dict[str, Any]
    regions: tuple[Any, Any] = (LEFT, RIGHT)
    columns: dict[tuple[int, int], int] = field(default_factory=dict)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)


def img2img(mode: int) -> dict[str, Any]:
    return {"init_images": [scene()], "resize_mode": mode, "denoising_strength": 1.0}


TALLER = {"enable_hr": True, "hr_upscaler": "Latent", "denoising_strength": 0.8, "hr_second_pass_steps": 2}
MASKS = ({"mask": mask_of((0, 0, 128, 128))}, {"mask": mask_of((128, 0, 256, 128))})
CELLS = [
    Cell("txt2img, wide", {"width": 256}, columns={(16, 32): 16}),
    *(Cell(f"img2img, resize mode {mode}", img2img(mode), columns={(16, 16): 8}) for mode in range(4)),
    Cell("inpaint, whole", inpainted((0, 0, 256, 128), inpaint_full_res=False), columns={(16, 16): 8}),
    Cell("only masked, in the middle", inpainted((64, 0, 192, 128)), columns={(16, 16): 8}),
    Cell("only masked, off the middle", inpainted((96, 0, 224, 128)), columns={(16, 16): 4}),
    Cell("only masked, enlarged", inpainted((112, 32, 176, 96)), columns={(16, 16): 4}),
    Cell("only masked, padded", inpainted((104, 32, 136, 64), inpaint_full_res_padding=16), columns={(16, 16): 10}),
    Cell(
        "only masked, inverted",
        inpainted((0, 0, 64, 128), inpainting_mask_invert=1, width=192),
        (LEFT, RIGHT),
        {(16, 24): 8},
    ),
    Cell("only masked, wider than the size", inpainted((0, 0, 256, 128)), columns={(16, 16): 8}),
    # The picture lies in the middle half of the rows; what the host fills above it is as its edge.
    Cell("only masked, filled up", inpainted((0, 0, 256, 128)), (TOP, BOTTOM), rows={(16, 16): 6}),
    Cell("only masked, masks of the picture's size", inpainted((96, 0, 224, 128)), MASKS, {(16, 16): 4}),
    Cell("hires fix, same shape", {**TALLER, "hr_scale": 2}, columns={(16, 16): 8, (32, 32): 16}),
    # The upper and lower quarter of the first pass are cut off after it.
    Cell(
        "hires fix, wider",
        {**TALLER, "hr_resize_x": 256, "hr_resize_y": 128},
        (TOP, BOTTOM),
        rows={(16, 16): 6, (16, 32): 4},
    ),
    Cell("hires fix, higher", {**TALLER, "hr_resize_x": 128, "hr_resize_y": 256}, columns={(16, 16): 8, (32, 16): 8}),
]


def labels_at(recording: Recording, oracle: Oracle, portrait: dict[str, Any], call: int) -> torch.Tensor:
    """Who is seen at each position of the largest attention map of a call's first positive row: (h, w)."""
    row = recording.calls[call]["kinds"].index("positive")
    height, width = recording.calls[call]["shape"][-2:]
    return oracle.seen(recording, call, 1, portrait)[row].unflatten(-1, (height, width))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_regions_follow_what_is_sampled(server: Client, oracle: Oracle, people: dict[str, str], cell: Cell) -> None:
    portrait = placed(people, *cell.regions)
    recording = server.record(portrait, **cell.changes)
    assert recording.answer.status == 200, recording.answer.detail
    shapes = set()
    for call, told in enumerate(recording.calls):
        shape = tuple(told["shape"][-2:])
        shapes.add(shape)
        labels = labels_at(recording, oracle, portrait, call)
        if cell.rows:
            labels, edge = labels.T, cell.rows[shape]
        else:
            edge = cell.columns[shape]
        assert (labels[:, :edge] == 0).all(), labels
        assert (labels[:, edge:] == 1).all(), labels
    assert shapes == set(cell.rows or cell.columns)


def test_inpainting_one_half_has_its_own_person_alone(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    """The other's region is not painted at all: they are named. Without them the first person has all of the crop."""
    half = inpainted((0, 0, 128, 128))
    refused = server.generate(placed(people, LEFT, RIGHT), **half)
    assert refused.status == 422
    assert "identities[1].region" in refused.detail
    assert "outside of what is painted" in refused.detail
    alone = one(people)
    alone["identities"][0]["region"] = LEFT
    recording = server.record(alone, **half)
    for call in range(len(recording.calls)):
        assert (labels_at(recording, oracle, alone, call) == 0).all()


def test_a_region_that_the_inpaint_mask_leaves_out_is_named(server: Client, people: dict[str, str]) -> None:
    changes = inpainted((0, 0, 128, 128), inpaint_full_res=False)
    assert "identities[1].region" in server.generate(placed(people, LEFT, RIGHT), **changes).detail


def test_a_mask_has_the_shape_of_the_whole_picture(server: Client, people: dict[str, str]) -> None:
    portrait = one(people)
    portrait["identities"][0]["region"] = {"mask": half_mask(128)}
    refused = server.generate(portrait, **inpainted((0, 0, 128, 128)))
    assert refused.status == 422
    assert "the mask is 128x128, the picture 256x128" in refused.detail
    # A blank inpaint mask makes the host forget the crop.
    blank = inpainted((0, 0, 0, 0))
    assert server.generate(portrait, **blank).status == 200
    refused = server.generate(portrait, enable_hr=True, hr_resize_x=256, hr_resize_y=128, hr_upscaler="Latent")
    assert "the mask is 128x128, the picture 256x128" in refused.detail


@pytest.mark.parametrize("blur", [0, 4])
def test_soft_inpainting_follows_too(server: Client, oracle: Oracle, people: dict[str, str], blur: int) -> None:
    portrait = placed(people, LEFT, RIGHT)
    soft = {"Soft Inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}}
    changes = inpainted((96, 0, 224, 128), mask_blur=blur, alwayson_scripts=soft)
    recording = server.record(portrait, **changes)
    assert "Soft inpainting enabled" in recording.answer.info["infotexts"][0]
    labels = labels_at(recording, oracle, portrait, 0)
    # A blurred edge widens the crop, which puts the border between the two into the fifth column.
    assert (labels[:, :4] == 0).all()
    assert (labels[:, 5:] == 1).all()


def test_each_loop_of_loopback_follows(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    portrait = placed(people, LEFT, RIGHT)
    changes = inpainted((96, 0, 224, 128), script_name="Loopback", script_args=[2, 1.0, "Linear", "None"])
    recording = server.record(portrait, **changes)
    assert recording.answer.status == 200, recording.answer.detail
    assert len(recording.calls) >= 2 * STEPS
    for call in range(len(recording.calls)):
        labels = labels_at(recording, oracle, portrait, call)
        assert (labels[:, :4] == 0).all()
        assert (labels[:, 4:] == 1).all()


PIECEMEAL = {
    "SD upscale": ["", 64, "None", 1.0],
    "Outpainting mk2": ["", 64, 4, ["left"], 1.0, 0.05],
    "Poor man's outpainting": [64, 4, 1, ["left"]],
}


@pytest.mark.parametrize("script", PIECEMEAL)
def test_scripts_that_draw_pieces_refuse_regions_and_take_people(
    server: Client, people: dict[str, str], script: str
) -> None:
    changes = {"init_images": [scene()], "denoising_strength": 0.8, "mask_blur": 0}
    changes |= {"script_name": script, "script_args": PIECEMEAL[script]}
    refused = server.generate(placed(people, None, RIGHT), **changes)
    assert refused.status == 422
    assert refused.detail.startswith("identities[1].region: ")
    assert f"the script {script} draws the picture in pieces" in refused.detail
    # The host's VAE draws from random numbers that the request before has left.
    server.generate(two(people), **changes)
    recording = server.record(two(people), sites=(), **changes)
    assert recording.answer.status == 200, recording.answer.detail
    assert "positive" in recording.kinds()
    # A map would be taken for a piece.
    shown = server.record(two(people, show_routing=True), sites=(), **changes)
    assert pictures(shown.answer) == pictures(recording.answer)
    assert "no place for routing maps" in shown.answer.info["infotexts"][0]


def test_pieces_inside_a_step_refuse_regions_and_take_people(server: Client, people: dict[str, str]) -> None:
    tiled = {"probe": {"tiles": True}, "sites": ()}
    refused = server.record(placed(people, None, RIGHT), width=256, **tiled).answer
    assert refused.status == 422
    assert refused.detail.startswith("identities[1].region: an extension sends the picture through the UNet in pieces")
    assert server.record(two(people), width=256, **tiled).answer.status == 200


def pictures(answer: Answer) -> list[bytes]:
    return [np.asarray(opened(text)).tobytes() for text in answer.images]


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def test_scripts_that_hand_on_all_pictures_show_the_maps(server: Client, people: dict[str, str]) -> None:
    prompts = ["a person\na woman in a garden"]
    script = {"script_name": "Prompts from file or textbox", "script_args": [False, False, "start", *prompts]}
    answer = server.generate(two(people, show_routing=True), **script)
    assert answer.status == 200, answer.detail
    assert len(answer.images) >= 4


def test_overlapping_regions_are_told(server: Client, people: dict[str, str]) -> None:
    answer = server.generate(placed(people, {"box": [0, 0, 0.75, 1]}, RIGHT))
    told = answer.info["infotexts"][0]
    assert "identities[1].region: it overlaps that of identities[0] on 25% of the picture" in told
    assert "overlaps" not in server.generate(placed(people, LEFT, RIGHT)).info["infotexts"][0]


def test_where_regions_overlap_somebody_has_each_position(
    server: Client, oracle: Oracle, people: dict[str, str]
) -> None:
    everywhere = {"box": [0, 0, 1, 1]}
    portrait = placed(people, everywhere, everywhere)
    recording = server.record(portrait)
    for call in range(len(recording.calls)):
        row = recording.calls[call]["kinds"].index("positive")
        labels = oracle.seen(recording, call, 1, portrait)[row]
        routed = oracle.routed(recording.tensors[f"{call}.1.0.in"], 1, portrait)[row]
        sure = routed >= 0
        assert (labels[sure] == routed[sure]).all()
        assert set(labels.tolist()) <= {0, 1}


def test_a_mask_s_grey_is_no_white(server: Client, oracle: Oracle, people: dict[str, str]) -> None:
    mask = Image.new("L", (128, 128), 3)
    mask.paste(255, (0, 0, 64, 128))
    portrait = one(people)
    portrait["identities"][0]["region"] = {"mask": encoded(mask)}
    recording = server.record(portrait)
    labels = labels_at(recording, oracle, portrait, 0)
    assert (labels[:, :8] == 0).all()
    assert (labels[:, 8:] != 0).all()
    assert not torch.equal(recording.latents(), server.record(one(people)).latents())


# ------------------------------------------------------------------------------------------------------------- maps


def owners(picture: Image.Image, shown: Image.Image) -> np.ndarray:
    """Who has each pixel of a map, by its colour: numbers from 0, OUTSIDE where the picture is as it was."""
    seen = np.asarray(shown, dtype=int)[: picture.height, : picture.width]
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None]
    wanted = [np.asarray(picture, dtype=float)] + [0.45 * grey + 0.55 * np.array(colour_of(n)) for n in (1, 2)]
    return np.stack([np.abs(seen - one).sum(axis=-1) for one in wanted]).argmin(axis=0) + OUTSIDE


def test_the_map_of_a_crop_lies_where_the_crop_was_pasted(server: Client, people: dict[str, str]) -> None:
    answer = server.generate(placed(people, LEFT, RIGHT, show_routing=True), **inpainted((64, 0, 192, 128)))
    assert answer.status == 200, answer.detail
    picture, shown = (opened(text) for text in answer.images)
    assert picture.size == WIDE
    assert shown.width == 256 and shown.height > 128, "the picture with the legend below it"
    found = owners(picture, shown)
    # A numbered disc stands in each area.
    assert (found[4:124, 4:60] == OUTSIDE).mean() == 1
    assert (found[4:124, 68:124] == 0).mean() > 0.8
    assert (found[4:124, 132:188] == 1).mean() > 0.8
    assert (found[4:124, 196:] == OUTSIDE).mean() == 1


def test_the_map_of_hires_fix_is_the_last_pass_s(server: Client, people: dict[str, str]) -> None:
    portrait = placed(people, TOP, BOTTOM, show_routing=True)
    answer = server.generate(portrait, **TALLER, hr_resize_x=256, hr_resize_y=128)
    picture, shown = (opened(text) for text in answer.images)
    assert picture.size == WIDE
    found = owners(picture, shown)
    assert (found[2:26] == 0).mean() > 0.7
    assert (found[40:] == 1).mean() > 0.9


def test_maps_stand_beside_inpaint_masks(server: Client, people: dict[str, str]) -> None:
    """With the host's masks among the results each picture still has its own map."""
    settings = {"return_mask": True, "return_mask_composite": True}
    changes = inpainted((64, 0, 192, 128), batch_size=2, override_settings=settings)
    answer = server.generate(placed(people, LEFT, RIGHT, show_routing=True), **changes)
    shown = [opened(text) for text in answer.images]
    maps = [image for image in shown if image.height > 128 and image.width == 256]
    assert len(maps) == 2, [image.size for image in shown]
    # The results: a grid perhaps, then picture, mask, composite of each.
    taken = shown[-8:-2:3]
    for picture, drawn in zip(taken, maps):
        assert (owners(picture, drawn)[4:124, 4:60] == OUTSIDE).all()


def test_maps_are_saved_beside_the_pictures_on_request(server: Client, people: dict[str, str]) -> None:
    data = server.scratch / "data"

    def saved(portrait: dict[str, Any], **more: Any) -> list[Path]:
        before = set(data.rglob("*.png"))
        settings = {"samples_save": True, **more}
        answer = server.generate(portrait, save_images=True, override_settings=settings)
        assert answer.status == 200, answer.detail
        return sorted(set(data.rglob("*.png")) - before, key=lambda path: len(path.name))

    shown = {"checkpoint": KIT, **two(people, show_routing=True)}
    assert len(saved(shown)) == 1
    assert len(saved(two(people), portrait_save_maps=True)) == 1
    first, second = saved(shown, portrait_save_maps=True)
    assert second == first.with_name(first.stem + "-portrait-map.png")
    with Image.open(second) as image:
        assert image.width == 128 and image.height > 128
        assert "Portrait: " in image.info["parameters"]


# ------------------------------------------------------------------------------------------------------------- panel


def test_a_new_canvas_has_the_shape_of_the_finished_picture(
    driver: Any, server: Client, screenshots: Path, tmp_path: Path
) -> None:
    def size(tab: str) -> str:
        return driver.execute_script("return portraitPictureSize(arguments[0])", tab)

    page = Page(driver, server.base, screenshots)
    page.small_picture()
    assert size("txt2img") == "128 x 128"
    page.click("#txt2img_hr > .label-wrap")
    page.wait(lambda: page.one("#txt2img_hr_resize_x").is_displayed(), "hires fix")
    page.set_number("txt2img_hr_resize_x", 256)
    page.set_number("txt2img_hr_resize_y", 128)
    assert size("txt2img") == "256 x 128"

    picture = tmp_path / "wide.png"
    opened(scene()).save(picture)
    page.open_tab("img2img")
    page.click("#mode_img2img > .tab-nav > button:nth-child(3)")
    page.one("#img2maskimg input[type=file]").send_keys(str(picture))
    page.wait(lambda: page.all("#img2maskimg img"), "the picture")
    page.set_number("img2img_width", 128)
    page.set_number("img2img_height", 128)
    assert size("img2img") == "128 x 128"
    page.click("#img2img_inpaint_full_res label:nth-of-type(2)")
    page.wait(lambda: size("img2img") == "256 x 128", "the whole picture's size")
    page.save("15-only-masked")


def test_tabs_have_the_colours_of_the_maps(driver: Any, server: Client, screenshots: Path) -> None:
    page = Page(driver, server.base, screenshots)
    script = "return getComputedStyle(document.querySelector(arguments[0]), '::before').backgroundColor"
    for number in (1, 2, 4):
        found = driver.execute_script(script, f"{page.panel}_people > .tab-nav > button:nth-child({number})")
        assert found == "rgb({}, {}, {})".format(*colour_of(number))
    page.show(page.panel)
    page.save("16-tabs")
