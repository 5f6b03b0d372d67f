"""X/Y/Z axes: their values reach the request, for this cell of the plot only."""

from __future__ import annotations

import copy
import sys
import types
from collections import namedtuple

import pytest

from lib_portrait.errors import PortraitError
from lib_portrait.webui import axes

HASH = "sha256:" + 64 * "a"
REQUEST = {"scale": 0.7, "identities": [{"photos": [HASH]}, {"photos": [HASH], "scale": 0.2, "structure": 0.1}]}


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({}, REQUEST),
        ({"scale": 0.1}, {**REQUEST, "scale": 0.1}),
        ({"checkpoint": "x", "lora_scale": 0}, {**REQUEST, "checkpoint": "x", "lora_scale": 0}),
        (
            {"identities[*].structure": 0.5},
            {**REQUEST, "identities": [{**item, "structure": 0.5} for item in REQUEST["identities"]]},
        ),
        (
            {"identities[1].scale": 2},
            {**REQUEST, "identities": [REQUEST["identities"][0], {**REQUEST["identities"][1], "scale": 2}]},
        ),
        (
            {"identities[*].scale": 1, "identities[0].scale": 0},
            {
                **REQUEST,
                "identities": [{**REQUEST["identities"][0], "scale": 0}, {**REQUEST["identities"][1], "scale": 1}],
            },
        ),
    ],
)
def test_values_are_put_in_their_place(overrides, changed):
    before = copy.deepcopy(REQUEST)
    assert axes.apply_overrides(REQUEST, overrides) == changed
    assert before == REQUEST


def test_a_person_who_is_not_there_is_named():
    with pytest.raises(PortraitError, match="2 identities") as caught:
        axes.apply_overrides(REQUEST, {"identities[2].scale": 1})
    assert caught.value.field == "identities[2].scale"


def test_the_panels_tabs_are_counted_with_the_empty_ones():
    changed = axes.apply_overrides(REQUEST, {"identities[2].scale": 2}, tabs=[1, 3])
    assert [item.get("scale") for item in changed["identities"]] == [None, 2]
    assert axes.apply_overrides(REQUEST, {"identities[*].scale": 2}, [1, 3])["identities"][1]["scale"] == 2
    with pytest.raises(PortraitError, match="Identity 2: it has no photos"):
        axes.apply_overrides(REQUEST, {"identities[1].scale": 2}, tabs=[1, 3])


@pytest.mark.parametrize("key", ["", "identities[-1].scale", "identities[x].scale", "a.b", "identities[0]"])
def test_keys_that_are_none_are_refused(key):
    with pytest.raises(PortraitError):
        axes.apply_overrides(REQUEST, {key: 1})


@pytest.mark.parametrize("identities", ["x", 3, None, [3], {}])
def test_a_malformed_request_is_left_for_checking(identities):
    assert axes.apply_overrides({"identities": identities}, {"identities[*].scale": 1}) == {"identities": identities}


# ---------------------------------------------------------------------------------------------------- in the host

AxisOption = namedtuple("AxisOption", "label type apply confirm cost choices", defaults=(None, 0.0, None))
Script = namedtuple("Script", "path module")


@pytest.fixture
def host(monkeypatch):
    """The little of the host that registering needs; gives the plot's module."""

    plot = types.SimpleNamespace(axis_options=[AxisOption("Nothing", str, None)], AxisOption=AxisOption)
    modules = types.ModuleType("modules")
    modules.scripts = types.SimpleNamespace(
        scripts_data=[Script("/x/other.py", types.SimpleNamespace()), Script("/x/scripts/xyz_grid.py", plot)]
    )
    settings = types.ModuleType("settings")
    settings.limits = lambda: types.SimpleNamespace(identities=settings.identities)
    settings.identities = 2
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "lib_portrait.webui.settings", settings)
    monkeypatch.setattr("lib_portrait.webui.settings", settings, raising=False)
    return plot, settings


def test_axes_are_added_once(host):
    plot, settings = host
    axes.register()
    labels = [option.label for option in plot.axis_options]
    # Plots that people have saved name them like this.
    assert labels[:7] == [
        "Nothing",
        "[Portrait] Checkpoint",
        "[Portrait] ID scale",
        "[Portrait] LoRA scale",
        "[Portrait] Scale of identity 1",
        "[Portrait] Scale of identity 2",
        "[Portrait] Structure scale",
    ]
    axes.register()
    assert [option.label for option in plot.axis_options] == labels
    settings.identities = 3
    axes.register()
    new = [option.label for option in plot.axis_options][len(labels) :]
    assert new[0] == "[Portrait] Scale of identity 3" and all(label.endswith(" of identity 3") for label in new)


def test_each_cell_of_the_plot_has_values_of_its_own(host):
    plot, _ = host
    axes.register()
    by_label = {option.label: option for option in plot.axis_options}
    p = types.SimpleNamespace()
    by_label["[Portrait] ID scale"].apply(p, 0.5, [0.5, 1.0])
    first, second = copy.copy(p), copy.copy(p)
    by_label["[Portrait] Scale of identity 2"].apply(first, 0.1, [0.1, 0.2])
    by_label["[Portrait] Scale of identity 2"].apply(second, 0.2, [0.1, 0.2])
    assert first.portrait_overrides == {"scale": 0.5, "identities[1].scale": 0.1}
    assert second.portrait_overrides == {"scale": 0.5, "identities[1].scale": 0.2}
    assert p.portrait_overrides == {"scale": 0.5}


def test_values_are_checked_before_the_plot_starts(host, monkeypatch):
    plot, _ = host
    seen = []
    session = types.ModuleType("session")
    session.check_axis = lambda p, cells: seen.append((p, cells))
    monkeypatch.setitem(sys.modules, "lib_portrait.webui.session", session)
    monkeypatch.setattr("lib_portrait.webui.session", session, raising=False)
    axes.register()
    by_label = {option.label: option for option in plot.axis_options}
    by_label["[Portrait] Scale of identity 2"].confirm("p", [0.5, 3.0])
    by_label["[Portrait] Checkpoint"].confirm("p", ["nope"])
    assert seen == [
        ("p", [{"identities[1].scale": 0.5}, {"identities[1].scale": 3.0}]),
        ("p", [{"checkpoint": "nope"}]),
    ]
