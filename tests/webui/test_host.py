"""What methods may ask of the WebUI's model, of the real one: SD1 and SDXL."""

from __future__ import annotations

import pytest

from tests.webui.server import Client, changes

pytestmark = pytest.mark.webui


@pytest.mark.parametrize("checkpoint", ["first.safetensors", "sdxl.safetensors"])
def test_the_host_answers_with_what_its_own_modules_give(server: Client, checkpoint: str) -> None:
    with server.options(sd_model_checkpoint=checkpoint):
        picture = server.generate().images
        before = server.state()
        asked = {"prompt": "so " * 80 + "a photo of a woman in a garden", "word": "woman", "instead": "dog"}
        answer = server.call("/probe/host", asked).body
        emphasised = {**asked, "prompt": "so " * 80 + "a photo of a ((woman) in) a garden"}
        assert server.call("/probe/host", emphasised).body["positions"] == answer["positions"]
        assert changes(before, server.state()) == {}
        assert server.generate().images == picture
    assert answer["latent"] < 1e-4 * answer["largest"]
    assert answer["call"] < 1e-5
    assert answer["random"] and answer["same"]
    assert answer["context"][:2] == [1, 154]
    # 75 words in the first chunk, of 77 tokens; then its start, 5 words, "a photo of a".
    assert answer["positions"] == [answer["changed"]] == [77 + 1 + 5 + 4]
    length, first, last = answer["alphas_cumprod"]
    assert length == 1000 and first > 0.99 and 0.004 < last < 0.005
    assert answer["prediction"] == "epsilon"
    assert checkpoint in answer["state"]
