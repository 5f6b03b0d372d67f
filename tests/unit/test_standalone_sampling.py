"""Promises of `lib_portrait.standalone.sampling`: rows do not touch each other, and people come in as in the WebUI."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, RoutingMaps, mark
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner, Conditioning
from lib_portrait.errors import PortraitError
from lib_portrait.faces.service import FaceService
from lib_portrait.methods.base import Rule
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.request import Identity, Photo, PortraitRequest, Region
from lib_portrait.standalone.host import encode_prompts
from lib_portrait.standalone.model import Model
from lib_portrait.standalone.sampling import Sampling, sample
from tests.parity.unets import ldm_unet
from tests.small_networks import small_kit, small_model

SIZE = {"width": 64, "height": 64, "steps": 3}


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def conditioner(tmp_path_factory: pytest.TempPathFactory) -> Conditioner:
    folder = tmp_path_factory.mktemp("kit")
    small_kit(folder, "small")
    return Conditioner(
        FaceService([], folder / "cache"), Store(Folders(own=[folder]), adapter_files(), folder / "cache")
    )


def face(seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC).save(stream, "PNG")
    return Photo.of(stream.getvalue(), aligned=True)


def people(**changes: Any) -> PortraitRequest:
    """One person from the second third of the steps on, one in the right half."""
    late = Identity((face(1),), start=0.3, options={"scale": 1.5})
    right = Identity((face(2), face(3)), region=Region(box=(0.5, 0.0, 1.0, 1.0)), options={"structure": 0.5})
    return PortraitRequest((late, right), checkpoint="small", **changes)


@pytest.fixture(scope="module")
def conditioning(conditioner: Conditioner) -> Conditioning:
    return conditioner.prepare(people(), (64, 64))


def farthest(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures in grey levels."""
    return int(np.abs(one.astype(int) - other).max())


# ------------------------------------------------------------------------------------------------------- rows and seeds


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_a_picture_does_not_depend_on_its_batch_mates(model: Model, conditioning: Conditioning, sampler: str) -> None:
    asked = [
        Sampling("a woman in a park", seed=3, sampler=sampler, **SIZE),
        Sampling("a man", "blurry", seed=4, guidance=7.0, sampler=sampler, **SIZE),
        Sampling("two people at the beach", seed=3, guidance=1.0, sampler=sampler, **SIZE),
    ]
    together = sample(model, asked, conditioning)
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in together)
    assert farthest(together[0], together[1]) > 20
    for one, picture in zip(asked, together, strict=True):
        assert farthest(sample(model, [one], conditioning)[0], picture) <= 1
    backwards = sample(model, asked[::-1], conditioning)
    assert all(farthest(one, other) <= 1 for one, other in zip(backwards[::-1], together, strict=True))


def test_the_same_seed_gives_the_same_picture_and_another_one_another(model: Model) -> None:
    first, again, other = (sample(model, [Sampling("a woman", seed=seed, **SIZE)])[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert farthest(first, other) > 20


def test_noise_does_not_touch_the_host_s_random_numbers(model: Model) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(model, [Sampling("a woman", **SIZE)])
    assert torch.equal(before, torch.get_rng_state())


def test_people_change_the_picture_and_nobody_is_left_in_the_model(model: Model, conditioning: Conditioning) -> None:
    asked = [Sampling("two people", seed=1, **SIZE)]
    bare = sample(model, asked)[0]
    assert farthest(sample(model, asked, conditioning)[0], bare) > 5
    assert np.array_equal(sample(model, asked)[0], bare)


def test_routing_maps_have_a_row_a_picture(model: Model, conditioning: Conditioning) -> None:
    routing = RoutingMaps()
    sample(model, [Sampling("two people", seed=seed, **SIZE) for seed in (1, 2)], conditioning, routing)
    maps = routing.mean()
    assert maps is not None
    assert maps.shape == (2, 2, 8, 8)
    # The second person's region is the right half; the coarsest of the averaged maps have a single position.
    assert maps[:, 1, :, 5:].min() > 0.9
    assert maps[:, 1, :, :3].max() < 0.1


def test_a_rule_is_prepared_once_and_what_it_asks_for_changes_nothing(
    model: Model, conditioning: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.Tensor] = []

    def prepare(rule: Any, host: Any) -> None:
        asked.append(host.call(torch.zeros(1, 4, 8, 8), torch.tensor(500), host.text("a person")))

    expected = sample(model, [Sampling("two people", **SIZE)], conditioning)[0]
    monkeypatch.setattr(Rule, "prepare", prepare)
    assert np.array_equal(sample(model, [Sampling("two people", **SIZE)], conditioning)[0], expected)
    assert len(asked) == 1


def test_every_step_is_told(model: Model) -> None:
    told: list[tuple[int, int]] = []
    sample(model, [Sampling("a woman", **SIZE)], on_step=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


# ------------------------------------------------------------------------------------------------------ as in the WebUI


@torch.no_grad()
def test_the_people_are_those_that_the_webui_s_unet_sees(
    model: Model, conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request's people in ldm's UNet, put there as `lib_portrait.webui.session` does, give the same predictions."""
    prepared = conditioner.prepare(people(options={"scale": 1.0, "lora_scale": 0.8}), (64, 64))
    asked = [Sampling("a woman and a man", "blurry", seed=seed, **SIZE) for seed in (1, 2)]
    calls: list[Any] = []
    inside = model.unet.forward

    def forward(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> Any:
        answer = inside(x, t, context)
        calls.append((x, t, answer.sample))
        return answer

    monkeypatch.setattr(model.unet, "forward", forward)
    sample(model, asked, prepared)

    host = ldm_unet()
    negative = mark(encode_prompts(model, ["blurry"] * 2), NEGATIVE)
    positive = mark(encode_prompts(model, ["a woman and a man"] * 2), POSITIVE)
    # The WebUI has the prompts' rows in front.
    order = torch.tensor([2, 3, 0, 1])
    assert len(calls) == 3
    with Injection(host, prepared.rule()) as injection:
        for step, (x, t, ours) in enumerate(calls):
            injection.progress = step / 3
            theirs = host(x[order], t.expand(4), context=torch.cat([positive, negative]))
            assert torch.allclose(theirs[order], ours, atol=1e-4)
    bare = host(calls[-1][0][order], calls[-1][1].expand(4), context=torch.cat([positive, negative])[:, 1:])
    assert not torch.allclose(bare[order], calls[-1][2], atol=1e-2)


@torch.no_grad()
def test_ddim_is_that_of_the_published_code(model: Model) -> None:
    """Its loop, written out, with eta 0: CompVis/stable-diffusion, ldm/models/diffusion/ddim.py.

    The WebUI's is the same without the last step, from t = 1 to 0.
    """
    steps, guidance, seed = 4, 5.0, 11
    kept = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    timesteps = (torch.arange(0, 1000, 1000 // steps) + 1).clip(0, 999)
    before = torch.nn.functional.pad(timesteps[:-1], (1, 0))
    torch.manual_seed(seed)
    x = torch.randn(4, 8, 8)[None]
    context = encode_prompts(model, ["", "a woman"])
    for number in reversed(range(steps)):
        a, a_before = kept[timesteps[number]], kept[before[number]]
        without, wanted = model.unet(x.repeat(2, 1, 1, 1), timesteps[number], context).sample.chunk(2)
        eps = without + guidance * (wanted - without)
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_before) * clean + math.sqrt(1 - a_before) * eps
    decoded = model.vae.decode(x / model.vae.config.scaling_factor).sample
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    (ours,) = sample(model, [Sampling("a woman", width=64, height=64, steps=steps, guidance=guidance, seed=seed)])
    assert np.abs(ours - expected).max() <= 1


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampler": "heun"}, "'heun' is not a sampler.*ddim, euler"),
        ({"steps": 0}, "steps: 0 is out of range"),
        ({"width": 60}, "60x64 is not possible.*multiples of 8"),
        ({"height": 8192}, "64x8192 is not possible"),
        ({"guidance": -1.0}, "cfg: -1.0"),
        ({"guidance": math.nan}, "cfg: nan"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_impossible_samplings_are_refused(model: Model, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PortraitError, match=told):
        sample(model, [Sampling("a woman", **{**SIZE, **changes})])


@pytest.mark.parametrize(
    ("network", "weight", "told"),
    [
        ("text_encoder", "final_layer_norm.bias", "model: the text encoder gives infinite .* of the prompt"),
        ("unet", "conv_out.bias", "model: the UNet gives infinite .* at step 1 of 3"),
        ("vae", "decoder.conv_out.bias", "model: the VAE gives infinite .* of the finished picture"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_there_is_no_black_picture(
    model: Model, network: str, weight: str, told: str, value: float, sampler: str
) -> None:
    """As half precision may bring forth from weights that are all finite."""
    spoilt = next(p for name, p in getattr(model, network).named_parameters() if name.endswith(weight))
    kept = spoilt.detach().clone()
    try:
        with torch.no_grad():
            spoilt[0] = value
        with pytest.raises(PortraitError, match=told):
            sample(model, [Sampling("a woman", sampler=sampler, **SIZE)])
    finally:
        with torch.no_grad():
            spoilt.copy_(kept)


def test_one_batch_has_one_size_and_something_in_it(model: Model) -> None:
    with pytest.raises(PortraitError, match="nothing to draw"):
        sample(model, [])
    with pytest.raises(PortraitError, match="one batch cannot have"):
        sample(model, [Sampling("a", **SIZE), Sampling("a", **{**SIZE, "width": 128})])


def test_what_a_long_prompt_loses_is_told(model: Model) -> None:
    with pytest.warns(UserWarning, match=r"has 103 tokens, the model reads 77; left out: 'very( very)* last'"):
        encode_prompts(model, ["very " * 100 + "last"])


def test_a_person_whose_window_meets_no_step_is_refused(model: Model, conditioner: Conditioner) -> None:
    late = Identity((face(1),), start=0.9)
    with pytest.raises(PortraitError, match="start at 0.66 or before") as caught:
        request = PortraitRequest((late,), checkpoint="small")
        sample(model, [Sampling("a woman", **SIZE)], conditioner.prepare(request, (64, 64)))
    assert caught.value.field == "identities[0].start"
    # Who is not to be drawn at all need not take part.
    request = PortraitRequest((late,), checkpoint="small", options={"scale": 0.0})
    sample(model, [Sampling("a woman", **SIZE)], conditioner.prepare(request, (64, 64)))
