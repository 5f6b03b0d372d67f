"""The panel in a real browser, driven as someone would who opens it for the first time.

Screenshots go to the folder that PORTRAIT_SCREENSHOTS names, else to pytest's temporary folder.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_portrait.methods.declarations import Declaration, declarations
from lib_portrait.options import Option
from lib_portrait.request import Photo
from tests.portraits import DRAWN, portrait
from tests.webui.browser import Page
from tests.webui.server import Client
from tests.webui.world import World

pytestmark = pytest.mark.webui


def reference(path: Path) -> str:
    return "sha256:" + Photo.of(path.read_bytes()).sha256


def test_two_people_from_photos_to_picture_and_back(
    driver: Any, server: Client, screenshots: Path, tmp_path: Path
) -> None:
    ada, ben = (portrait(name) for name in DRAWN[:2])
    page = Page(driver, server.base, screenshots)
    page.show(page.panel)
    page.save("1-panel")

    page.upload(1, ada)
    page.wait(lambda: page.crops(1), "the first crop")
    page.identity(2)
    page.upload(2, ben)
    page.wait(lambda: page.crops(2), "the second crop")
    page.wait(lambda: page.badge() == "2 people", "the badge")
    assert page.one(f"{page.panel}_enabled input").is_selected()
    page.click(f"{page.panel}_show_routing input")
    page.set_number("txt2img_portrait_1_scale", 1.2)
    page.show(page.panel)
    page.save("2-two-people")

    page.one("#txt2img_prompt textarea").send_keys("two people in a garden")
    page.small_picture()
    assert page.generate() == ""
    page.wait(lambda: len(page.all("#txt2img_gallery .thumbnail-item.thumbnail-small")) >= 2, "picture and map")
    page.show("#txt2img_results")
    page.save("3-result")
    page.all("#txt2img_gallery .thumbnail-item.thumbnail-small")[-1].click()
    time.sleep(0.5)
    page.save("4-routing-map")
    thumbnails = page.all("#txt2img_gallery .thumbnail-item.thumbnail-small img")
    addresses = [image.get_attribute("src") for image in thumbnails]
    picture, drawn = (Image.open(urllib.request.urlopen(address)) for address in (addresses[0], addresses[-1]))
    assert drawn.convert("RGB").tobytes() != picture.convert("RGB").tobytes()
    assert "Portrait: " in page.text("#html_info_txt2img")

    file = tmp_path / "picture.png"
    file.write_bytes(urllib.request.urlopen(addresses[0]).read())
    assert page.problems() == []
    page = Page(driver, server.base, screenshots)
    assert page.badge() == "" and page.kept(1) == []
    page.open_tab("PNG Info")
    page.one("#pnginfo_image input[type=file]").send_keys(str(file))
    page.wait(lambda: "Portrait: " in page.text("#tab_pnginfo .infotext, #tab_pnginfo"), "the picture's parameters")
    page.save("5-png-info")
    page.click("#tab_pnginfo #txt2img_tab")
    page.wait(lambda: page.crops(1) and page.crops(2), "the people in the panel again")
    assert (page.kept(1), page.kept(2)) == ([reference(ada)], [reference(ben)])
    assert float(page.one("#txt2img_portrait_1_scale input[type=number]").get_property("value")) == 1.2
    page.wait(lambda: page.badge() == "2 people", "the badge")
    page.unfold("txt2img")
    page.show(page.panel)
    page.save("6-people-are-back")
    assert page.problems() == []


def test_what_goes_wrong_is_said_in_the_panel(driver: Any, server: Client, screenshots: Path, tmp_path: Path) -> None:
    meadow, text = tmp_path / "meadow.png", tmp_path / "notes.png"
    Image.new("RGB", (400, 300), (90, 140, 60)).save(meadow)
    text.write_bytes(b"no picture at all")
    page = Page(driver, server.base, screenshots)
    page.upload(1, portrait(), meadow, text)
    page.wait(lambda: len(page.cards(1)) == 2, "two cards")
    assert "notes.png" in page.notice(1)
    assert "Photo 2: no face was found" in page.cards(1)[1].text
    page.small_picture()
    error = page.generate()
    assert "Identity 1, photo 2: no face" in error
    page.show("#txt2img_results")
    page.save("7-error")
    page.show(page.panel)
    page.save("8-photo-without-face")

    page.click(f"{page.panel}_0_photos_found .portrait-card[data-index='1'] .portrait-remove")
    page.wait(lambda: len(page.cards(1)) == 1, "the card to go")
    page.wait(lambda: page.notice(1) == "", "the message on what was refused to go with the list it was about")
    assert page.kept(1) == [reference(portrait())]
    assert page.generate() == ""
    assert page.problems() == []


def test_the_people_of_a_group_photo_become_identities(
    driver: Any, server: Client, screenshots: Path, tmp_path: Path
) -> None:
    group = Image.new("RGB", (1024, 512))
    for place, name in enumerate(DRAWN[:2]):
        group.paste(Image.open(portrait(name)).convert("RGB").resize((512, 512)), (512 * place, 0))
    file = tmp_path / "group.png"
    group.save(file)
    page = Page(driver, server.base, screenshots)
    page.upload(1, portrait("synthetic-0381.png"), file)
    page.wait(lambda: "Largest of 2 faces" in page.found(1), "the faces of the group")
    faces = f"{page.panel}_0_photos_found .portrait-card[data-index='1'] .portrait-face"
    page.click(f"{faces}[data-face='1']")
    page.wait(lambda: "2nd from left of 2 faces" in page.found(1), "the other face")
    page.wait(lambda: page.all(f"{faces}[data-face='1'][aria-pressed=true]"), "its mark")
    alone, second = reference(portrait("synthetic-0381.png")), {"image": reference(file), "face": 1}
    # The portrait beside it is used as before.
    assert page.kept(1) == [alone, second] and "1 face" in page.found(1)

    page.click(f"{page.panel}_0_spread")
    page.wait(lambda: page.crops(2), "the second identity")
    page.wait(lambda: "keeps its other photos" in page.notice(1), "what was done")
    assert (page.kept(1), page.kept(2)) == ([alone, second], [{"image": reference(file), "face": 0}])
    page.show(page.panel)
    page.save("9-group-photo")
    page.small_picture()
    assert page.generate() == ""
    page.click(f"{page.panel}_0_undo")
    page.wait(lambda: page.kept(2) == [] and page.kept(1) == [alone, second], "the photos as they were")
    page.wait(lambda: not page.crops(2) and not page.all(f"{page.panel}_0_undo:not(.hidden)"), "nothing to undo")


def test_an_aligned_crop_beside_a_photo(driver: Any, server: Client, screenshots: Path) -> None:
    page = Page(driver, server.base, screenshots)
    page.upload(1, portrait(), portrait("synthetic-0293.png"))
    page.wait(lambda: len(page.crops(1)) == 2, "two crops")
    second = f"{page.panel}_0_photos_found .portrait-card[data-index='1'] .portrait-aligned"
    page.click(second)
    page.wait(lambda: page.found(1).count("aligned crop") == 1, "the one photo as it is")
    photo = reference(portrait("synthetic-0293.png"))
    assert page.kept(1) == [reference(portrait()), {"image": photo, "aligned": True}]
    page.click(second)
    page.wait(lambda: page.kept(1) == [reference(portrait()), photo], "the photo as before")


def test_missing_weights_are_loud_and_name_the_button(
    driver: Any, server: Client, screenshots: Path, world: World
) -> None:
    kept = world.kit / "uniportrait-faceid_tiny.safetensors"
    away = kept.with_suffix(".away")
    kept.rename(away)
    try:
        page = Page(driver, server.base, screenshots)
        # The adapter of the embedded world is there all the same, and does not fit this checkpoint.
        page.wait(lambda: "Weights are missing" in page.text(f"{page.panel}_weights"), "the message")
        assert page.one(f"{page.panel}_weights .portrait-warning").is_displayed()
        assert page.one(f"{page.panel}_download").is_displayed()
        assert not page.one(f"{page.panel}_weights li").is_displayed()
        page.upload(1, portrait())
        page.wait(lambda: page.crops(1), "the crop")
        page.small_picture()
        error = page.generate()
        assert "Press Download missing weights" in error and str(world.kit) not in error
        page.show(page.panel)
        page.save("15-missing-weights")
    finally:
        away.rename(kept)
    page.click(f"{page.panel}_refresh")
    page.wait(lambda: "missing" not in page.text(f"{page.panel}_weights"), "the message to go")
    assert not page.all(f"{page.panel}_download:not(.hidden)")
    assert page.generate() == ""


def test_the_worlds_checkpoint_offers_its_settings(
    driver: Any, server: Client, screenshots: Path, world: World
) -> None:
    shipped = Path(__file__).resolve().parents[2] / "models" / "world"
    if not (shipped / "world.safetensors").is_file():
        pytest.skip(f"{shipped} is not complete")
    for suffix in (".safetensors", ".yaml"):
        shutil.copyfile(shipped / f"world{suffix}", world.checkpoint("world").with_suffix(suffix))
    assert server.call("/sdapi/v1/refresh-checkpoints", {}).status == 200
    page = Page(driver, server.base, screenshots)
    page.wait(lambda: page.text(f"{page.panel}_weights").strip() == "", "nothing to say of the usual checkpoint")
    before = server.call("/sdapi/v1/options").body["sd_model_checkpoint"]
    try:
        # As the host's own cards do: the panel follows without being asked to.
        driver.execute_script("selectCheckpoint('world.safetensors')")
        page.wait(lambda: "128 × 128 px" in page.text(f"{page.panel}_weights"), "the world's message")
        assert "missing" not in page.text(f"{page.panel}_weights")
        page.show(page.panel)
        page.save("16-world")
        page.click(f"{page.panel}_kit_settings")
        wanted = {"width": "128", "height": "128", "steps": "20", "cfg_scale": "5"}
        for name, value in wanted.items():
            field = page.one(f"#txt2img_{name} input[type=number]")
            page.wait(lambda field=field, value=value: field.get_property("value") == value, f"{name} {value}")
        assert page.one("#txt2img_sampling input").get_property("value") == "DDIM"
        driver.execute_script("document.querySelector('#img2img_portrait_kit_settings').click()")
        field = page.one("#img2img_width input[type=number]")
        page.wait(lambda: field.get_property("value") == "128", "the other tab's size")
        page.upload(1, portrait())
        page.wait(lambda: page.crops(1), "the crop")
        assert page.generate() == ""
        assert "Steps: 20, Sampler: DDIM" in page.text("#html_info_txt2img")
    finally:
        driver.execute_script("selectCheckpoint(arguments[0])", before)
    page.wait(lambda: page.text(f"{page.panel}_weights").strip() == "", "the message to go")
    assert page.problems() == []


def test_the_options_of_the_chosen_method_are_shown_and_no_others(
    driver: Any, server: Client, screenshots: Path
) -> None:
    page = Page(driver, server.base, screenshots)
    default, *others = declarations()

    def control(method: Declaration, option: Option, place: str) -> str:
        return f"{place}_{option.name}" if method is default else f"{place}_{method.name}_{option.name}"

    elements = {
        method.name: [
            *(control(method, option, page.panel) for option in method.options),
            *(control(method, option, f"{page.panel}_0") for option in method.identity_options),
        ]
        for method in (default, *others)
    }
    for chosen in (default, *others, default):
        page.click(f"{page.panel}_method input")
        page.wait(lambda: page.all(f"{page.panel}_method .options .item"), "the methods")
        next(item for item in page.all(f"{page.panel}_method .options .item") if chosen.title in item.text).click()
        for name, own in elements.items():
            shown = name == chosen.name
            page.wait(lambda: all(page.one(one).is_displayed() is shown for one in own), f"the options of {name}")  # noqa: B023
        page.wait(lambda: page.one(f"{page.panel}_0_mix").is_displayed() is chosen.mixes, "mixing")  # noqa: B023
        page.save(f"18-{chosen.name}")


def test_reference_guidance_is_a_section_of_its_own(driver: Any, server: Client, screenshots: Path) -> None:
    page = Page(driver, server.base, screenshots)
    section = f"{page.panel}_guidance"
    strength = f"{section}_strength input[type=number]"
    assert not page.one(strength).is_displayed(), "it is off and folded at first"
    page.upload(1, portrait())
    page.wait(lambda: page.crops(1), "the crop")
    page.wait(lambda: page.text(f"{section}_references").strip() == "", "nothing to be shown")

    page.click(f"{section} > .label-wrap")
    page.wait(lambda: page.one(strength).is_displayed(), "the settings in front")
    assert page.one(f"{section}-checkbox input").is_selected()
    assert not page.one(f"{section}_reference_t").is_displayed(), "the others are folded away"
    page.wait(lambda: len(page.all(f"{section}_references img")) == 1, "what of the photo guides")
    page.show(section)
    page.save("19-guidance")
    page.click(f"{section}_details > .label-wrap")
    page.wait(lambda: page.one(f"{section}_reference_t").is_displayed(), "the other settings")
    page.show(section)
    page.save("20-guidance-details")
    page.click(f"{page.panel}_0_guidance_guided input")
    page.wait(lambda: page.text(f"{section}_references").strip() == "", "nobody guides")
    assert "Reference guidance: it acts on nobody" in page.generate()
    assert page.problems() == []


def test_settings_defaults_keeps_the_sliders_and_no_photo(driver: Any, server: Client, screenshots: Path) -> None:
    file = server.scratch / "data" / "ui-config.json"
    first = file.read_text()
    of = "customscript/portrait.py/txt2img/{}/value".format
    assert json.loads(first)[of("Scale of identity 1")] == json.loads(first)[of("Scale of identity 4")] == 1
    try:
        page = Page(driver, server.base, screenshots)
        page.upload(1, portrait())
        page.wait(lambda: page.badge() == "1 person", "the person")
        page.set_number("txt2img_portrait_scale", 0.9)
        page.set_number("txt2img_portrait_1_scale", 1.2)
        page.set_number("txt2img_portrait_1_mix2_weight", 0.3)
        driver.execute_script("document.querySelector('#ui_defaults_apply').click()")
        page.wait(lambda: file.read_text() != first, "the host to write its file")
        time.sleep(0.5)
        before, after = json.loads(first), json.loads(file.read_text())
        changed = {key: value for key, value in after.items() if before.get(key) != value and "portrait" in key}
        assert changed == {
            of("ID scale"): 0.9,
            of("Scale of identity 2"): 1.2,
            of("Share of mixed-in person 2 of identity 2"): 0.3,
        }
        assert "sha256:" not in file.read_text()
    finally:
        file.write_text(first)


def test_the_tabs_stand_in_one_row(driver: Any, server: Client, screenshots: Path) -> None:
    size = driver.get_window_size()
    driver.set_window_size(900, 900)
    try:
        page = Page(driver, server.base, screenshots)
        for number in range(1, 5):
            page.identity(number)
            page.upload(number, portrait())
            page.wait(lambda number=number: page.crops(number), "the crop")
        page.wait(lambda: page.badge() == "4 people", "the numbers in the tabs")
        for width in (900, 1280):
            driver.set_window_size(width, 900)
            page.show(page.panel)
            page.save(f"17-{width}-wide")
            tops = {button.rect["y"] for button in page.all(f"{page.panel}_people > .tab-nav > button")}
            assert len(tops) == 1, width
    finally:
        driver.set_window_size(size["width"], size["height"])


def test_regions(driver: Any, server: Client, screenshots: Path) -> None:
    from selenium.webdriver import ActionChains

    page = Page(driver, server.base, screenshots, theme="dark")
    page.upload(1, portrait())
    page.wait(lambda: page.crops(1), "the crop")
    page.click(f"{page.panel}_0_region label:nth-of-type(2)")
    page.wait(lambda: page.one(f"{page.panel}_0_box").is_displayed(), "the box")
    page.one(f"{page.panel}_0_box textarea").send_keys("0, 10, 50, 100")
    page.wait(lambda: page.all(f"{page.panel}_0_box_preview rect[width='50']"), "the box's drawing")
    page.show(f"{page.panel}_0_region")
    page.save("10-box")

    page.small_picture()
    page.set_number("txt2img_height", 192)
    page.click(f"{page.panel}_0_region label:nth-of-type(3)")
    page.wait(lambda: page.one(f"{page.panel}_0_canvas").is_displayed(), "the mask")
    assert "Identity 1, region, mask: nothing is painted" in page.generate()
    page.click(f"{page.panel}_0_canvas")
    page.wait(lambda: page.all(f"{page.panel}_0_drawing canvas"), "the canvas")
    time.sleep(1)
    canvas = page.all(f"{page.panel}_0_drawing canvas")[-1]
    page.show(f"{page.panel}_0_region")
    ActionChains(driver).move_to_element(canvas).click_and_hold().move_by_offset(30, 40).release().perform()
    page.save("11-mask")
    assert page.generate() == ""
    assert "mask" in page.text("#html_info_txt2img")
    page.show(page.panel)
    page.save("12-dark")


def test_send_to_img2img_takes_the_people_along(driver: Any, server: Client, screenshots: Path) -> None:
    page = Page(driver, server.base, screenshots)
    page.upload(1, portrait())
    page.wait(lambda: page.crops(1), "the crop")
    page.small_picture()
    assert page.generate() == ""
    page.click("#txt2img_send_to_img2img")
    page.wait(lambda: page.all("#img2img_portrait_0_photos_found img"), "the person in the other tab")
    assert page.one("#img2img_portrait_enabled input").is_selected()
    page.unfold("img2img")
    page.show("#img2img_portrait")
    page.save("13-img2img")
    assert page.problems() == []


def test_foreign_parameters_are_said_and_do_no_harm(driver: Any, server: Client, screenshots: Path) -> None:
    """One after the other in one page, each told of in other words than the one before."""
    refused = "Portrait was not restored"
    page = Page(driver, server.base, screenshots)
    for steps, value, shown in (
        (7, '{"identities":[{"photos":["../../secret"]}]}', refused),
        (8, f"uniportrait | {12 * '0'}", f"{12 * '0'}... is not kept here"),
        (9, "<img src=x onerror=alert(1)>,", refused),
        (10, '{"identities":[{"photos":["sha256:%s"]}]}' % (64 * "1"), f"{12 * '1'}... is not kept here"),
    ):
        settings = f"Steps: {steps}, Sampler: Euler, CFG scale: 4, Size: 128x128"
        page.paste(f"meadow {steps}\n{settings}, Portrait: {json.dumps(value)}")
        page.wait(lambda shown=shown: shown in page.text(page.panel), "the message")
        assert page.one("#txt2img_prompt textarea").get_property("value") == f"meadow {steps}"
        assert page.one("#txt2img_steps input[type=number]").get_property("value") == str(steps)
        page.wait(lambda shown=shown: (refused in page.text(page.panel)) is (shown == refused), "the one before to go")
        page.show(page.panel)
        page.save(f"14-{steps}-{shown.split()[-1]}")
