"""After a Portrait request, however it ended, the host is what it was: same bytes, same modules, same memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui.oracle import Oracle, assert_nobody_is_seen, assert_people_are_seen
from tests.webui.server import STEPS, Client, changes, lasting, unlike_new
from tests.webui.test_matrix import drawing, one, two
from tests.webui.world import KIT

pytestmark = pytest.mark.webui

KEPT_BYTES = 8 * 2**20
"""What the allocator may keep from one request to the next without anything being held."""


def assert_same_as_before(server: Client, images: list[str], state: dict[str, Any]) -> None:
    assert server.generate().images == images
    assert changes(state, server.state()) == {}
    assert unlike_new(server) == {}


@pytest.fixture(scope="module")
def warm(server: Client, people: dict[str, str]) -> None:
    """Has everything loaded that the host or Portrait load at first use, and keep."""
    assert server.generate(two(people, show_routing=True)).status == 200
    assert server.generate(one(people), enable_hr=True, denoising_strength=0.7).status == 200
    assert server.generate(two(people), init_images=[drawing()]).status == 200


@pytest.fixture
def before(server: Client, warm: None) -> tuple[list[str], dict[str, Any]]:
    """The vanilla picture, and the server's state after it."""
    images = server.generate().images
    return images, server.state()


def test_after_a_success(server: Client, people: dict[str, str], before: Any) -> None:
    for portrait in (one(people), two(people, show_routing=True)):
        answer = server.generate(portrait)
        assert answer.status == 200
        assert answer.images[0] != before[0][0]
    assert server.generate(two(people), init_images=[drawing()]).status == 200
    assert server.generate(one(people), enable_hr=True, denoising_strength=0.7).status == 200
    assert_same_as_before(server, *before)


@pytest.mark.parametrize(
    ("portrait", "field"),
    [
        ({"identities": []}, "identities"),
        ({"identities": [{"photos": ["AAAA"]}]}, "identities[0].photos[0]"),
        ({"identities": [{"photos": ["AAAA"], "scale": "much"}]}, "identities[0].scale"),
        ({"identities": [{"photos": ["sha256:" + 64 * "0"]}]}, "identities[0].photos[0]"),
        ({"identities": [{"photos": [drawing()]}]}, "identities[0].photos[0]"),
        ({"identities": [{"photos": [drawing()]}], "checkpoint": "absent"}, "checkpoint"),
        ({"identities": [{"photos": [drawing()]}], "method": "unknown"}, "method"),
        ({"identities": [{"photos": [drawing()]}], "colour": 1}, "colour"),
    ],
    ids=["no identities", "no image", "no number", "unknown hash", "no face", "no file", "no method", "unknown key"],
)
def test_an_invalid_request_is_refused_and_leaves_nothing(
    server: Client, before: Any, portrait: dict[str, Any], field: str
) -> None:
    recording = server.record({"checkpoint": KIT, **portrait})
    assert 400 <= recording.answer.status < 500, recording.answer
    assert recording.answer.detail.startswith(field), recording.answer.detail
    assert recording.calls == [], "it was drawn all the same"
    assert server.generate().images == before[0]


@pytest.mark.parametrize("site", [1, 31])
def test_after_an_exception_inside_a_step(server: Client, people: dict[str, str], before: Any, site: int) -> None:
    recording = server.record(two(people), probe={"fail": {"call": 1, "site": site}})
    assert recording.answer.status == 500
    assert len(recording.calls) == 2
    assert_same_as_before(server, *before)


def test_after_an_exception_in_the_second_pass(server: Client, people: dict[str, str], before: Any) -> None:
    recording = server.record(
        one(people), probe={"fail": {"call": STEPS + 1, "site": 13}}, enable_hr=True, denoising_strength=0.7
    )
    assert recording.answer.status == 500
    assert_same_as_before(server, *before)


def test_after_an_interrupt(server: Client, people: dict[str, str], before: Any) -> None:
    recording = server.record(two(people), probe={"interrupt": {"call": 1}}, steps=6, n_iter=2)
    assert recording.answer.status == 200
    assert len(recording.calls) == 2
    assert_same_as_before(server, *before)


def test_after_another_extensions_callback_failed(
    server: Client, oracle: Oracle, people: dict[str, str], before: Any
) -> None:
    """The host swallows exceptions of callbacks; the others' callbacks must go on."""
    recording = server.record(one(people), probe={"callback_fails": True}, sites=())
    assert recording.answer.status == 200
    assert recording.answer.images[0] != before[0][0]
    assert_same_as_before(server, *before)


def test_after_a_change_of_checkpoint(server: Client, oracle: Oracle, people: dict[str, str], before: Any) -> None:
    with server.options(sd_model_checkpoint="second.safetensors"):
        other = server.generate().images
        recording = server.record(two(people))
        assert_people_are_seen(recording, oracle, two(people))
        assert recording.calls[0]["checkpoint"] == "second"
        assert server.generate().images == other != before[0]
    assert server.generate(two(people)).status == 200
    assert server.generate().images == before[0]
    after = changes(lasting(before[1]), lasting(server.state()))
    # Loading a checkpoint gives new functions and new tensors; nothing of ours may be among the attributes.
    assert {name for name in after if name.startswith(("modules.", "global_hooks", "weights"))} == set()


def test_a_disabled_request_changes_nothing(
    server: Client, oracle: Oracle, people: dict[str, str], before: Any
) -> None:
    for portrait in ({"enabled": False}, one(people, enabled=False)):
        recording = server.record(portrait)
        assert recording.answer.images == before[0]
        assert_nobody_is_seen(recording, oracle)
        assert "Portrait" not in recording.answer.info["infotexts"][0]
    assert_same_as_before(server, *before)


def test_an_sdxl_model_is_refused_with_an_sd15_adapter(server: Client, people: dict[str, str], before: Any) -> None:
    with server.options(sd_model_checkpoint="sdxl.safetensors"):
        vanilla = server.record(sites=())
        assert vanilla.answer.status == 200, vanilla.answer.detail
        assert vanilla.calls[0]["checkpoint"] == "sdxl"
        refused = server.record(one(people), sites=())
        assert 400 <= refused.answer.status < 500
        assert refused.answer.detail.startswith("checkpoint"), refused.answer.detail
        assert refused.calls == []
        assert server.generate().images == vanilla.answer.images
    assert server.generate().images == before[0]


@pytest.mark.slow
def test_fifty_alternating_requests_leave_nothing(server: Client, people: dict[str, str], before: Any) -> None:
    images, state = before
    small = {"steps": 1, "width": 64, "height": 64}
    vanilla = server.generate(**small).images
    middle = None
    for number in range(50):
        if number % 2:
            assert server.generate(**small).images == vanilla
        else:
            kind = (one, two)[number // 2 % 2]
            assert server.generate(kind(people), **small).status == 200
        if number == 9:
            middle = server.state()
    after = server.state()
    assert middle is not None
    assert changes(middle, after) == {}, "more is kept after 50 requests than after 10"
    assert after["rss"] - middle["rss"] < KEPT_BYTES, (middle["rss"], after["rss"])
    assert_same_as_before(server, images, state)


def test_nothing_heavy_is_loaded_at_start(server: Client) -> None:
    """After a vanilla picture neither faces nor methods were imported, of these what they declare; the host itself
    imports transformers."""
    assert "facenet_pytorch" not in server.at_start["heavy"]
    assert "insightface" not in server.at_start["heavy"]
    early = {name for name in server.at_start["portrait"] if name.startswith("lib_portrait")}
    light = {name for name in early if name.startswith("lib_portrait.methods.declarations")} | {"lib_portrait.methods"}
    assert not {name for name in early - light if name.split(".")[1:2] in (["faces"], ["methods"], ["conditioning"])}
