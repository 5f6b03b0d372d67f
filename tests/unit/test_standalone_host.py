"""What methods may ask of diffusers' model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_portrait.standalone.host import DiffusersHost
from lib_portrait.standalone.model import Model
from tests.small_networks import small_model

PICTURE = np.random.default_rng(3).integers(0, 256, (16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


def test_a_latent_is_the_scaled_mean_and_draws_no_random_numbers(model: Model) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    latent = DiffusersHost(model).latent(PICTURE)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.tensor(PICTURE.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
    moments = model.vae.quant_conv(model.vae.encoder(pixels))
    torch.testing.assert_close(latent, moments[:, :4] * model.vae.config.scaling_factor)
    assert latent.shape == (1, 4, 2, 3)


def test_the_unet_gets_the_rows_of_the_latent(model: Model) -> None:
    host = DiffusersHost(model)
    latent, context = torch.randn(2, 4, 8, 8), host.text("a woman in a park")
    with torch.no_grad():
        expected = model.unet(latent, torch.tensor([300, 300]), context.expand(2, -1, -1)).sample
        assert torch.equal(host.call(latent, torch.tensor(300), context), expected)
        rows = host.call(latent, torch.tensor([300, 20]), context.expand(2, -1, -1))
    assert torch.allclose(rows[0], expected[0], atol=1e-5)
    assert not torch.allclose(rows[1], expected[1], atol=1e-3)


def test_a_word_stands_where_its_token_does(model: Model) -> None:
    host, tokenizer = DiffusersHost(model), model.tokenizer
    prompt = "a woman, an uncharacteristically-dressed woman"
    words = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert host.positions(prompt, "woman") == tuple((i,) for i, word in enumerate(words) if word == "woman</w>")
    (split,) = host.positions(prompt, "uncharacteristically")
    assert len(split) > 1
    assert "".join(words[i] for i in split) == "uncharacteristically</w>"
    assert host.positions(prompt, "man") == host.positions(prompt, "") == ()
    assert host.positions("so " * 74 + "woman", "woman") == ((75,),)
    assert host.positions("so " * 75 + "woman", "woman") == ()
    assert host.emphasis(prompt) == (1.0,) * 77


def test_the_schedule_is_the_models(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DiffusersHost(model)
    assert host.prediction == "epsilon"
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    torch.testing.assert_close(host.alphas_cumprod, torch.tensor(kept, dtype=torch.float32))
    monkeypatch.setitem(model.config["model"]["params"], "parameterization", "v")
    monkeypatch.setitem(model.config["model"]["params"], "linear_end", 0.02)
    assert host.prediction == "v"
    assert host.alphas_cumprod[-1] < kept[-1]


def test_the_state_is_the_models_own(model: Model) -> None:
    assert DiffusersHost(model).state == DiffusersHost(model).state
    assert DiffusersHost(model).state != DiffusersHost(small_model()).state
