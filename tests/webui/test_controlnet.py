"""Beside sd-webui-controlnet: both at once, in either order, and the control network sees the text alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui.oracle import Oracle, assert_nobody_is_seen, assert_people_are_seen
from tests.webui.server import Client, left_behind
from tests.webui.test_matrix import LONG, drawing, one, two

pytestmark = pytest.mark.webui


@pytest.fixture(scope="module")
def control(server_with_controlnet: Client) -> dict[str, Any]:
    """A unit with the world's control network."""
    models = server_with_controlnet.call("/controlnet/model_list").body["model_list"]
    model = next(name for name in models if name.startswith("control"))
    return {"enabled": True, "module": "none", "model": model, "image": drawing(), "weight": 1.0}


REFERENCE = {"enabled": True, "module": "reference_only", "model": "None", "image": drawing(), "threshold_a": 0.5}


def beside(*units: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ControlNet": {"args": list(units)}}, **more}


def test_the_control_network_alone_works_here(
    server_with_controlnet: Client, oracle: Oracle, control: dict[str, Any]
) -> None:
    plain = server_with_controlnet.record()
    controlled = server_with_controlnet.record(**beside(control))
    assert_nobody_is_seen(controlled, oracle)
    assert controlled.foreign, "the control network was not run"
    assert (controlled.latents() - plain.latents()).abs().max() > 1e-3


@pytest.mark.parametrize("prompt", ["a photo of a person", LONG, "a person AND a hat"], ids=["short", "long", "AND"])
def test_people_and_a_control_network(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], control: dict[str, Any], prompt: str
) -> None:
    for portrait in (one(people), two(people)):
        controlled = server_with_controlnet.record(portrait, prompt=prompt, **beside(control))
        plain = server_with_controlnet.record(portrait, prompt=prompt, sites=())
        assert_people_are_seen(controlled, oracle, portrait)
        assert (controlled.latents() - plain.latents()).abs().max() > 1e-3, "the control network had no effect"
        # Self-attention has no context of its own; cross-attention sees whole chunks of text, without any mark.
        tokens = {seen["tokens"] for seen in controlled.foreign if seen["tokens"]}
        assert tokens
        assert all(count % 77 == 0 for count in tokens), tokens


def test_people_and_reference_only(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], control: dict[str, Any]
) -> None:
    for portrait in (one(people), two(people)):
        for units in ([REFERENCE], [control, REFERENCE]):
            referred = server_with_controlnet.record(portrait, **beside(*units))
            plain = server_with_controlnet.record(portrait, sites=())
            assert_people_are_seen(referred, oracle, portrait)
            assert (referred.latents() - plain.latents()).abs().max() > 1e-3, "the reference had no effect"
            # Its own pass through the UNet, of the reference picture, comes before the one that counts.
            assert {times for site, times in referred.calls[0]["seen"].items() if int(site) % 2} == {2}


def test_controlnet_still_knows_its_negative_rows(
    server_with_controlnet: Client, people: dict[str, str], control: dict[str, Any]
) -> None:
    """It leaves them alone where the prompt is more important, which it reads from its own mark in the context."""
    modes = ("Balanced", "ControlNet is more important")
    latents = [
        server_with_controlnet.record(one(people), sites=(), **beside({**control, "control_mode": mode})).latents()
        for mode in modes
    ]
    assert (latents[0] - latents[1]).abs().max() > 1e-3


@pytest.mark.parametrize("first", ["portrait", "sd-webui-controlnet"])
def test_the_order_of_activation_does_not_matter(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], control: dict[str, Any], first: str
) -> None:
    client, portrait = server_with_controlnet, two(people)
    usual = client.record(portrait, **beside(control, REFERENCE))
    assert client.call("/probe/first", {"extension": first}).status == 200
    try:
        other = client.record(portrait, **beside(control, REFERENCE))
        assert other.calls, other.answer.detail
    finally:
        assert client.call("/probe/first", {"extension": None}).status == 200
    assert_people_are_seen(other, oracle, portrait)
    assert (usual.latents() - other.latents()).abs().max() < 1e-5


def test_nothing_is_left_beside_controlnet(
    server_with_controlnet: Client, people: dict[str, str], control: dict[str, Any]
) -> None:
    client = server_with_controlnet
    assert client.generate(two(people), **beside(control, REFERENCE)).status == 200
    vanilla = client.generate().images
    controlled = client.generate(**beside(control)).images
    assert client.generate().images == vanilla
    before = client.state()
    assert client.generate(two(people), **beside(control, REFERENCE)).status == 200
    assert client.record(two(people), {"fail": {"call": 1, "site": 13}}, **beside(control)).answer.status == 500
    assert client.record(one(people), {"interrupt": {"call": 0}}, **beside(control)).answer.status == 200
    assert client.generate(**beside(control)).images == controlled
    assert client.generate().images == vanilla
    assert left_behind(client, before) == {}
