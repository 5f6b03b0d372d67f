"""What methods may ask of the WebUI's model, on a stand-in for it: SD1, SDXL, inpainting, neighbours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib_portrait.attention import mark, mark_conditions
from lib_portrait.errors import PortraitError
from tests.host_stand_in import Host, standing_in
from tests.parity.unets import ldm_unet

PICTURE = np.random.default_rng(3).integers(0, 256, (16, 24, 3), np.uint8)


class Unet(nn.Module):
    """Keeps what it was called with, and gives the latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_channels = channels
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Any, timesteps: Any = None, context: Any = None, y: Any = None) -> Any:
        self.seen.append((x, timesteps, context, y))
        return x[:, :4]


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, {"first": ldm_unet()})
    with standing_in(host.modules):
        yield host
    host.take_hooks_off()


def of(host: Host, unet: nn.Module | None = None, **model: Any) -> Any:
    """A `WebuiHost` for the loaded checkpoint, with another UNet, or other attributes of the model."""
    from lib_portrait.webui.host import WebuiHost

    loaded = host.shared.sd_model
    if unet is not None:
        loaded.model.diffusion_model = unet
    loaded.model.conditioning_key = model.pop("conditioning_key", "crossattn")
    vars(loaded).update(model)
    return WebuiHost(loaded, (640, 512))


def test_a_latent_is_the_scaled_mean_and_draws_no_random_numbers(modules: Host) -> None:
    host, vae = of(modules), modules.shared.sd_model.first_stage_model
    torch.manual_seed(1)
    before = torch.get_rng_state()
    latent = host.latent(PICTURE)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(host.latent(PICTURE), latent)
    pixels = torch.tensor(PICTURE.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
    torch.testing.assert_close(latent, vae.quant_conv(vae.encoder(pixels))[:, :4] * 0.5)
    assert latent.shape == (1, 4, 2, 3)
    assert not vae.quant_conv._forward_hooks


def test_a_vae_that_gives_nan_is_named_and_left_as_it_was(modules: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = modules.shared.sd_model.first_stage_model
    monkeypatch.setattr(vae.encoder.bias, "data", torch.full((8,), torch.nan))
    with pytest.raises(PortraitError, match="VAE gives infinite") as caught:
        of(modules).latent(PICTURE)
    assert caught.value.status_code == 500

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vae, "encode", broken)
    with pytest.raises(RuntimeError):
        of(modules).latent(PICTURE)
    assert not vae.quant_conv._forward_hooks


def test_a_latent_is_decoded_and_what_was_moved_for_it_comes_back(modules: Host) -> None:
    host = of(modules)
    latent = torch.full((1, 4, 2, 3), 0.25)
    latent[0, 0] = -1
    assert host.picture(latent).shape == (16, 24, 3)
    assert host.picture(latent)[5, 7].tolist() == [0, 191, 191]
    calls: list[Any] = []
    moved = nn.Identity()
    moved.register_forward_pre_hook(lambda module, args: calls.append(module))
    moved.diffusion_model = host.unet
    host.sd_model.model = moved
    host.picture(latent)
    assert not calls
    host.sd_model.lowvram = True
    host.picture(latent)
    assert calls == [moved]
    with pytest.raises(PortraitError, match="VAE gives infinite"):
        host.picture(latent * torch.nan)


def test_the_unet_gets_the_rows_of_the_latent(modules: Host) -> None:
    unet = ldm_unet()
    host = of(modules, unet)
    latent, context = torch.randn(2, 4, 8, 8), host.text("a woman in a park")
    with torch.no_grad():
        out = host.call(latent, torch.tensor(300), context)
        expected = unet(latent, torch.tensor([300, 300]), context.expand(2, -1, -1))
    assert torch.equal(out, expected)
    assert context.shape == (1, 77, 48)


def test_sdxl_gets_its_vector_and_the_pictures_size(modules: Host) -> None:
    unet = Unet(4)
    host = of(modules, unet, is_sdxl=True)
    conditions = host.text("a woman")
    assert conditions["vector"].tolist() == [[512.0, 640.0, 0.0, 0.0]]
    marked = mark_conditions(conditions, 7)
    host.call(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), marked)
    (_, t, context, y) = unet.seen[0]
    assert t.tolist() == [1, 2, 3]
    assert torch.equal(context, mark(conditions["crossattn"], 7).expand(3, -1, -1))
    assert torch.equal(y, conditions["vector"].expand(3, -1))
    assert conditions["crossattn"].shape == (1, 77, 48)


@pytest.mark.parametrize("sdxl", [False, True])
def test_an_inpainting_model_is_asked_to_paint_everything(modules: Host, sdxl: bool) -> None:
    unet = Unet(9)
    key = {"conditioning_key": "crossattn" if sdxl else "hybrid"}
    host = of(modules, unet, is_sdxl=sdxl, is_sdxl_inpaint=sdxl, **key)
    latent = torch.randn(2, 4, 2, 3)
    assert torch.equal(host.call(latent, torch.tensor(5), host.text("")), latent)
    (x, *_) = unet.seen[0]
    assert torch.equal(x[:, :4], latent)
    assert bool((x[:, 4] == 1).all())
    vae = modules.shared.sd_model.first_stage_model
    grey = vae.quant_conv(vae.encoder(torch.zeros(1, 3, 16, 24)))[:, :4] * 0.5
    torch.testing.assert_close(x[:, 5:], grey.expand(2, -1, -1, -1))


@pytest.mark.parametrize(("channels", "key"), [(5, "hybrid"), (8, "hybrid"), (4, "crossattn-adm")])
def test_models_that_ask_for_more_are_refused(modules: Host, channels: int, key: str) -> None:
    host = of(modules, Unet(channels), conditioning_key=key)
    with pytest.raises(PortraitError, match="takes more than a latent and a text"):
        host.call(torch.randn(1, 4, 8, 8), torch.tensor(5), host.text(""))


def test_what_neighbours_put_on_the_unet_stays_out_of_the_call_and_in_its_place(modules: Host) -> None:
    unet = Unet(4)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no call of ours")

    unet.forward = theirs
    host = of(modules, unet)
    host.call(torch.randn(1, 4, 8, 8), torch.tensor(5), host.text(""))
    assert len(unet.seen) == 1
    assert unet.forward is theirs
    unet.in_channels = 5
    with pytest.raises(PortraitError):
        host.call(torch.randn(1, 4, 8, 8), torch.tensor(5), host.text(""))
    assert unet.forward is theirs


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_word_is_found_in_every_chunk(modules: Host, sdxl: bool) -> None:
    host = of(modules)
    if sdxl:
        modules.shared.sd_model.cond_stage_model = SimpleNamespace(
            embedders=[object(), modules.shared.sd_model.cond_stage_model]
        )
    assert host.positions("a woman and a woman", "woman") == ((2,), (5,))
    assert host.positions("a red-haired woman", "red-haired") == ((2, 3),)
    assert host.positions("so " * 80 + "woman", "woman") == ((77 + 6,),)
    assert host.positions("a man", "woman") == ()
    assert host.positions("a man", "") == ()
    assert host.positions("a (red-haired) woman", "red-haired") == ((2, 3),)
    weights = host.emphasis("so " * 80 + "(red-haired) woman")
    assert [place for place, weight in enumerate(weights) if weight != 1] == [77 + 6, 77 + 7] and len(weights) == 154
    modules.opts.emphasis = "Ignore"
    assert host.emphasis("a (woman)") == (1.0,) * 77


def test_the_schedule_is_the_models(modules: Host) -> None:
    host = of(modules)
    assert host.alphas_cumprod.dtype == torch.float32
    assert host.alphas_cumprod.shape == (1000,)
    assert host.prediction == "epsilon"
    assert of(modules, parameterization="v").prediction == "v"


def test_the_state_changes_with_all_that_changes_what_is_computed(
    modules: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = SimpleNamespace(name="style", te_multiplier=1.0, unet_multiplier=0.5, dyn_dim=None)
    changes = [
        lambda: modules.shared.sd_model.sd_checkpoint_info.__dict__.update(filename="second.safetensors"),
        lambda: modules.shared.sd_model.sd_checkpoint_info.__dict__.update(sha256="12"),
        lambda: setattr(modules.modules["modules.sd_vae"], "loaded_vae_file", "x.vae.pt"),
        lambda: setattr(modules.opts, "CLIP_stop_at_last_layers", 2),
        lambda: modules.shared.loaded_hypernetworks.append(SimpleNamespace(name="h", multiplier=1.0)),
        lambda: setattr(modules.shared.sd_model, "alphas_cumprod", torch.linspace(0.999, 1e-8, 1000)),
        lambda: monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(loaded_networks=[network])),
    ]
    states = [of(modules).state]
    for change in changes:
        change()
        states.append(of(modules).state)
        assert of(modules).state == states[-1]
    assert len(set(states)) == len(states)
