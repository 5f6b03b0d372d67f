"""The panel in a real browser, driven as someone would who opens it for the first time.

Screenshots go to the folder that PORTRAIT_SCREENSHOTS names, else to pytest's temporary folder.
"""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_portrait.request import Photo
from tests.portraits import DRAWN, portrait
from tests.webui.browser import Page
from tests.webui.server import Client

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
    assert "notes.png" in page.text(f"{page.panel}_0_photos_notice")
    assert "Photo 2: no face was found" in page.cards(1)[1].text
    page.small_picture()
    error = page.generate()
    assert "Identity 1, photo 2: no face" in error
    page.show("#txt2img_results")
    page.save("7-error")
    page.show(page.panel)
    page.save("8-photo-without-face")

    page.click(f"{page.panel}_0_photos_found .portrait-remove[data-index='1']")
    page.wait(lambda: len(page.cards(1)) == 1, "the card to go")
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
    page.upload(1, file)
    page.wait(lambda: page.cards(1), "the crop")
    assert "of 2 faces" in page.cards(1)[0].text
    page.click(f"{page.panel}_0_spread")
    page.wait(lambda: page.crops(2), "the second identity")
    page.wait(lambda: "1st from left" in page.cards(1)[0].text, "the first identity's own face")
    assert page.kept(1) == page.kept(2) == [reference(file)]
    assert page.crops(1)[0].get_attribute("src") != page.crops(2)[0].get_attribute("src")
    page.show(page.panel)
    page.save("9-group-photo")


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
    assert "nothing is painted" in page.generate()
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f"uniportrait | {12 * '0'}", "is not kept here"),
        ('{"identities":[{"photos":["sha256:%s"]}]}' % (64 * "0"), "is not kept here"),
        ('{"identities":[{"photos":["../../secret"]}]}', "Portrait was not restored"),
        ("<img src=x onerror=alert(1)>,", "Portrait was not restored"),
    ],
)
def test_foreign_parameters_are_said_and_do_no_harm(
    driver: Any, server: Client, screenshots: Path, value: str, shown: str
) -> None:
    page = Page(driver, server.base, screenshots)
    parameters = f"a meadow\nSteps: 7, Sampler: Euler, CFG scale: 4, Size: 128x128, Portrait: {json.dumps(value)}"
    page.paste(parameters)
    page.wait(lambda: shown in page.text(page.panel), "the message")
    assert page.one("#txt2img_prompt textarea").get_property("value") == "a meadow"
    assert page.one("#txt2img_steps input[type=number]").get_property("value") == "7"
    page.show(page.panel)
    page.save(f"14-{shown.split()[-1]}")
