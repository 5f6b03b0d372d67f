"""The panel in a real browser, driven as someone would who opens it for the first time.

Screenshots go to the folder that PORTRAIT_SCREENSHOTS names, else to pytest's temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_portrait.request import Photo
from tests.portraits import portrait
from tests.webui.server import Client

pytestmark = pytest.mark.webui

SECONDS = 180
WINDOW = "1280,900"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: see requirements/dev.txt")
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    helper = shutil.which("chromedriver")
    if browser is None or helper is None:
        pytest.skip("no Chromium with its chromedriver: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--window-size={WINDOW}",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=Service(helper))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("PORTRAIT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Page:
    """The WebUI's page in one tab, with the Portrait panel unfolded."""

    def __init__(self, driver: Any, base: str, screenshots: Path, tab: str = "txt2img", theme: str = "light"):
        self.driver = driver
        self.screenshots = screenshots
        self.panel = f"#{tab}_portrait"
        driver.get(f"{base}/?__theme={theme}")
        self.wait(lambda: self.all(f"{self.panel} .label-wrap"), "the page")
        # Buttons of the host work once its own scripts have run.
        self.wait(lambda: driver.execute_script("return uiCurrentTab !== null"), "the host's scripts")
        if tab != "txt2img":
            self.open_tab(tab)
        self.unfold(tab)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = condition()
            if found:
                return found
            time.sleep(0.2)
        self.save("timeout")
        raise TimeoutError(f"waited {SECONDS} s for {what}; see timeout.png in {self.screenshots}")

    def save(self, name: str) -> None:
        self.driver.save_screenshot(str(self.screenshots / f"{name}.png"))

    def show(self, selector: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", selector)
        time.sleep(0.3)

    def click(self, selector: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.one(selector).click()

    def unfold(self, tab: str) -> None:
        if not self.all(f"#{tab}_portrait > .label-wrap.open"):
            self.click(f"#{tab}_portrait > .label-wrap")
        self.wait(lambda: self.one(f"#{tab}_portrait_enabled").is_displayed(), "the unfolded panel")

    def open_tab(self, title: str) -> None:
        button = next(button for button in self.all("#tabs > .tab-nav > button") if button.text.strip() == title)
        button.click()
        time.sleep(0.5)

    def identity(self, number: int) -> None:
        self.click(f"{self.panel}_people > .tab-nav > button:nth-child({number})")
        self.wait(lambda: self.one(f"{self.panel}_{number - 1}_scale").is_displayed(), f"identity {number}")

    def upload(self, number: int, *files: Path) -> None:
        self.one(f"{self.panel}_{number - 1}_uploads input[type=file]").send_keys("\n".join(map(str, files)))

    def cards(self, number: int) -> list[Any]:
        return self.all(f"{self.panel}_{number - 1}_photos_found .portrait-card")

    def crops(self, number: int) -> list[Any]:
        return self.all(f"{self.panel}_{number - 1}_photos_found .portrait-card img")

    def kept(self, number: int) -> list[Any]:
        value = self.one(f"{self.panel}_{number - 1}_photos textarea").get_property("value")
        return json.loads(value or "[]")

    def badge(self) -> str:
        script = "return document.querySelector(arguments[0]).dataset.portraitPeople ?? ''"
        return self.driver.execute_script(script, f"{self.panel} > .label-wrap > span")

    def set_number(self, element: str, value: float) -> None:
        script = "arguments[0].value = arguments[1]; updateInput(arguments[0])"
        self.driver.execute_script(script, self.one(f"#{element} input[type=number]"), str(value))

    def generate(self) -> str:
        """Presses Generate and waits; the error shown, or ""."""
        log = "#html_log_txt2img .performance"
        self.driver.execute_script(
            "document.querySelectorAll(arguments[0]).forEach((shown) => { shown.dataset.seen = 'yes'; })", log
        )
        self.click("#txt2img_generate")
        # The page leaves a message that reads like the one before as it is, so its newness alone would not do.
        idle_since = time.monotonic()

        def done() -> bool:
            nonlocal idle_since
            if self.one("#txt2img_interrupt").is_displayed():
                idle_since = time.monotonic()
            return bool(self.all(f"{log}:not([data-seen])")) or time.monotonic() - idle_since > 4

        self.wait(done, "the picture")
        return self.text("#html_log_txt2img .error")

    def small_picture(self) -> None:
        self.set_number("txt2img_steps", 2)
        self.set_number("txt2img_width", 128)
        self.set_number("txt2img_height", 128)

    def problems(self) -> list[str]:
        """What scripts complained about in the browser; failed downloads from elsewhere are not ours."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] == "javascript"]


def reference(path: Path) -> str:
    return "sha256:" + Photo.of(path.read_bytes()).sha256


def test_two_people_from_photos_to_picture_and_back(
    driver: Any, server: Client, screenshots: Path, tmp_path: Path
) -> None:
    ada, ben = portrait("synthetic-0100.png"), portrait("newton.jpg")
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
    assert "identities[0].photos[1]" in error and "no face" in error
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
    for place, name in enumerate(("synthetic-0100.png", "synthetic-0293.png")):
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
    prompt = page.one("#txt2img_prompt textarea")
    driver.execute_script("arguments[0].value = arguments[1]; updateInput(arguments[0])", prompt, parameters)
    time.sleep(0.5)
    page.click("#paste")
    page.wait(lambda: shown in page.text(page.panel), "the message")
    assert prompt.get_property("value") == "a meadow"
    assert page.one("#txt2img_steps input[type=number]").get_property("value") == "7"
    page.show(page.panel)
    page.save(f"14-{shown.split()[-1]}")
