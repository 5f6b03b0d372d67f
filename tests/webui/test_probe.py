"""The test equipment itself: the server starts, vanilla pictures come out, and the probe sees what is left behind."""

from __future__ import annotations

import pytest

from tests.webui.oracle import Oracle, assert_nobody_is_seen
from tests.webui.server import SITES, STEPS, Client, changes

pytestmark = pytest.mark.webui


def test_a_vanilla_picture_is_seen_with_nobody_in_it(server: Client, oracle: Oracle) -> None:
    recording = server.record()

    assert len(recording.answer.images) == 1
    assert [call["kinds"] for call in recording.calls] == [["positive", "negative"]] * STEPS
    assert all(len(call["seen"]) == 32 for call in recording.calls)
    assert set(SITES) <= set(map(int, recording.calls[0]["seen"]))
    assert recording.latents().shape == (1, 4, 16, 16)
    assert_nobody_is_seen(recording, oracle)


def test_vanilla_pictures_repeat_byte_for_byte(server: Client) -> None:
    assert server.generate().images == server.generate().images
    assert server.generate().images != server.generate(prompt="a cat").images


def test_the_probe_sees_what_is_left_behind(server: Client) -> None:
    server.generate()
    before = server.state()
    for leak in ("attribute", "hook", "weight", "class", "callback", "tensor"):
        with server.planted(leak):
            assert changes(before, server.state()), f"a planted {leak} was not seen"
    assert changes(before, server.state()) == {}


def test_a_planted_exception_is_an_error_answer(server: Client) -> None:
    recording = server.record(probe={"fail": {"call": 1, "site": 13}})
    assert recording.answer.status == 500
    assert len(recording.calls) == 2


def test_an_interrupt_ends_the_sampling_early(server: Client) -> None:
    recording = server.record(probe={"interrupt": {"call": 1}}, steps=6)
    assert recording.answer.status == 200
    assert len(recording.calls) == 2
