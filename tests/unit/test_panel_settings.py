"""What the settings page offers is what messages name and what requests obey."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest

from lib_portrait.request import Limits

NAME = "lib_portrait.webui.settings"


class OptionInfo:
    def __init__(self, default: Any, label: str, component: Any = None, args: Any = None, **rest: Any):
        self.default, self.label, self.args = default, label, args

    def info(self, text: str) -> OptionInfo:
        return self

    def needs_reload_ui(self) -> OptionInfo:
        return self


@pytest.fixture
def page(monkeypatch):
    """The settings module beside stand-ins for the host's, after the host has built its page; options by name."""
    options: dict[str, OptionInfo] = {}
    opts = types.SimpleNamespace(data={}, add_option=options.__setitem__)
    modules, paths = types.ModuleType("modules"), types.ModuleType("modules.paths_internal")
    modules.shared = types.SimpleNamespace(opts=opts, OptionInfo=OptionInfo, cmd_opts=types.SimpleNamespace())
    paths.data_path = paths.extensions_dir = paths.models_path = "."
    gradio = types.SimpleNamespace(Slider=None, Textbox=None, Radio=None)
    for name, module in (("modules", modules), ("modules.paths_internal", paths), ("gradio", gradio)):
        monkeypatch.setitem(sys.modules, name, module)
    package = importlib.import_module("lib_portrait.webui")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.delattr(package, "settings", raising=False)
    settings = importlib.import_module(NAME)
    settings.on_ui_settings()
    yield types.SimpleNamespace(settings=settings, options=options, opts=opts)
    sys.modules.pop(NAME, None)
    if hasattr(package, "settings"):
        delattr(package, "settings")


@pytest.mark.parametrize("name", ["identities", "photos", "photo_bytes", "photo_pixels"])
def test_every_setting_that_a_message_names_is_on_the_page(page, name):
    limits = page.settings.limits()
    labels = [option.label for option in page.options.values()]
    assert any(f'"{label}" in {limits.page}.' in limits.remedy(name, "Use less") for label in labels)
    assert limits.page == "Settings > Portrait"


def test_the_page_begins_with_the_limits_that_hold_without_it(page):
    assert page.options["portrait_max_photo_megapixels"].default == 250
    limits, defaults = page.settings.limits(), Limits()
    assert (limits.photo_pixels, limits.photo_bytes) == (defaults.photo_pixels, defaults.photo_bytes)


@pytest.mark.parametrize(("value", "pixels"), [(108, 108_000_000), (10**9, 10**9), ("x", 250_000_000), (0, 10**6)])
def test_the_most_megapixels_are_those_of_the_page(page, value, pixels):
    page.opts.portrait_max_photo_megapixels = value
    assert page.settings.limits().photo_pixels == pixels


def test_crops_are_filtered_only_where_that_was_chosen(page):
    assert page.options["portrait_filter_crops"].default is False
    assert not page.settings.filter_crops()
    page.opts.portrait_filter_crops = True
    assert page.settings.filter_crops()
