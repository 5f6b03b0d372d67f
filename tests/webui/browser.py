"""The WebUI's page as a test drives it."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SECONDS = 180
WINDOW = "1280,900"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A headless Chromium; the test that asks for it is skipped where there is none."""
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
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=Service(helper))
    try:
        yield made
    finally:
        made.quit()


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
        # gradio 3 loses an upload that comes while it fills the page with the host's settings.
        self.wait(lambda: driver.execute_script("return Object.keys(opts).length > 0"), "the host's settings")
        time.sleep(1.5)
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
            time.sleep(0.1)
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

    def found(self, number: int) -> str:
        """What stands on the cards of an identity."""
        return self.text(f"{self.panel}_{number - 1}_photos_found")

    def notice(self, number: int) -> str:
        return self.text(f"{self.panel}_{number - 1}_photos_notice").strip()

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

    def paste(self, parameters: str) -> None:
        """Reads generation parameters into the fields of txt2img, by the button under Generate."""
        prompt = self.one("#txt2img_prompt textarea")
        self.driver.execute_script("arguments[0].value = arguments[1]; updateInput(arguments[0])", prompt, parameters)
        time.sleep(0.5)
        self.click("#paste")

    def gallery(self) -> list[Image.Image]:
        """The pictures that were made, in the order of their small ones."""
        thumbnails = self.all("#txt2img_gallery .thumbnail-item.thumbnail-small img")
        return [Image.open(urllib.request.urlopen(image.get_attribute("src"))) for image in thumbnails]

    def small_picture(self) -> None:
        self.set_number("txt2img_steps", 2)
        self.set_number("txt2img_width", 128)
        self.set_number("txt2img_height", 128)

    def problems(self) -> list[str]:
        """What scripts complained about in the browser; failed downloads from elsewhere are not ours."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] == "javascript"]
