"""Beside what sd-webui-controlnet has besides control networks: IP-Adapter units, and T2I-Adapters.

An IP-Adapter unit takes what CLIP's image encoder makes of a picture, as the API hands it on, so that none is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.webui.oracle import Oracle, assert_people_are_seen, recorded_sites
from tests.webui.server import Client, Recording, left_behind
from tests.webui.test_controlnet import REFERENCE, beside, control  # noqa: F401
from tests.webui.test_fusion import adapters, fused  # noqa: F401
from tests.webui.test_guidance import GUIDANCE, added, alone, assert_eq_11, kept_and_made_beside
from tests.webui.test_instantfamily import adapters as families  # noqa: F401
from tests.webui.test_instantfamily import family
from tests.webui.test_matrix import difference, drawing, one
from tests.webui.world import BLOCKS, CHANNELS, CONTEXT, World

pytestmark = pytest.mark.webui

TOKENS, EMBEDDING, WEIGHT = 4, 24, 0.8


def random(*shape: int, seed: int, gain: float = 1.0) -> Tensor:
    inside = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (gain * inside**-0.5)


def ip_adapter() -> dict[str, Tensor]:
    """One of the first kind (ip-adapter_sd15): a linear layer and a norm, and keys and values at every site."""
    made = {
        "image_proj.proj.weight": random(TOKENS * CONTEXT, EMBEDDING, seed=1),
        "image_proj.proj.bias": random(TOKENS * CONTEXT, seed=2),
        "image_proj.norm.weight": torch.ones(CONTEXT),
        "image_proj.norm.bias": torch.zeros(CONTEXT),
    }
    for number, (_, width) in enumerate(BLOCKS):
        for seed, part in enumerate("kv"):
            own = random(width, CONTEXT, seed=10 * number + seed, gain=2)
            made[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = own
    return made


def t2i_adapter() -> dict[str, Tensor]:
    """T2I-Adapter in its first form, for colour pictures: two residual blocks a level (scripts/adapter.py)."""
    widths = (CHANNELS, 2 * CHANNELS, 4 * CHANNELS, 4 * CHANNELS)
    made = {"conv_in.weight": random(CHANNELS, 3 * 64, 3, 3, seed=1), "conv_in.bias": torch.zeros(CHANNELS)}
    blocks = [(before, after) for pair in pairwise((CHANNELS, *widths)) for before, after in (pair, pair[1:] * 2)]
    for number, (before, after) in enumerate(blocks):
        layers = {"block1": (after, after, 3, 3), "block2": (after, after, 1, 1)}
        if before != after:
            layers["in_conv"] = (after, before, 1, 1)
        for seed, (name, shape) in enumerate(layers.items()):
            made[f"body.{number}.{name}.weight"] = random(*shape, seed=10 * number + seed)
            made[f"body.{number}.{name}.bias"] = torch.zeros(shape[0])
    return made


def seen_by_clip() -> Tensor:
    """What stands for the picture's embedding: (1, EMBEDDING)."""
    return random(1, EMBEDDING, seed=3) * EMBEDDING**0.5


@pytest.fixture(scope="module")
def units(world: World, server_with_controlnet: Client) -> Iterator[dict[str, dict[str, Any]]]:
    """A unit of each kind, by its name."""
    folder = world.models / "ControlNet"
    files = {"ip-adapter": folder / "imageprompt.safetensors", "t2i-adapter": folder / "colours.safetensors"}
    for file, tensors in zip(files.values(), (ip_adapter(), t2i_adapter())):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    listed = server_with_controlnet.call("/controlnet/model_list").body["model_list"]
    models = {kind: next(name for name in listed if name.startswith(file.stem)) for kind, file in files.items()}
    stream = io.BytesIO()
    torch.save({"image_embeds": seen_by_clip()}, stream)
    yield {
        "ip-adapter": {
            "enabled": True,
            "module": "ip-adapter_clip_h",
            "model": models["ip-adapter"],
            "ipadapter_input": [base64.b64encode(stream.getvalue()).decode()],
            "weight": WEIGHT,
        },
        "t2i-adapter": {
            "enabled": True,
            "module": "none",
            "model": models["t2i-adapter"],
            "image": drawing(),
            "weight": 1.0,
        },
    }
    for file in files.values():
        file.unlink()


def without_ip_adapter(recording: Recording, world: World, oracle: Oracle) -> Recording:
    """The recording with what the IP-Adapter added (arXiv 2308.06721, eq. 5) taken off what attention layers gave."""
    tensors, files = dict(recording.tensors), load_file(world.models / "ControlNet" / "imageprompt.safetensors")
    told = {
        kind: F.layer_norm(
            F.linear(embedding[0], files["image_proj.proj.weight"], files["image_proj.proj.bias"]).unflatten(
                0, (TOKENS, CONTEXT)
            ),
            (CONTEXT,),
        )
        for kind, embedding in (("positive", seen_by_clip()), ("negative", torch.zeros(1, EMBEDDING)))
    }
    for number, call in enumerate(recording.calls):
        for site in recorded_sites(recording, number):
            weights = {part: oracle._weight(site, part, call["checkpoint"], {}) for part in ("to_q", "to_out")}
            x, out = tensors[f"{number}.{site}.0.in"], tensors[f"{number}.{site}.0.out"].clone()
            for row, kind in enumerate(call["kinds"]):
                k, v = (told[kind] @ files[f"ip_adapter.{site}.to_{part}_ip.weight"].T for part in "kv")
                out[row] -= (
                    WEIGHT * oracle._attend(x[[row]] @ weights["to_q"].T, k[None], v[None])[0] @ weights["to_out"].T
                )
            tensors[f"{number}.{site}.0.out"] = out
    return Recording(recording.answer, recording.calls, recording.foreign, recording.batches, tensors)


def test_the_units_alone_work_here(server_with_controlnet: Client, units: dict[str, dict[str, Any]]) -> None:
    plain = server_with_controlnet.record(sites=())
    for kind, unit in units.items():
        recording = server_with_controlnet.record(sites=(), **beside(unit))
        assert recording.answer.status == 200
        assert difference(recording.latents(), plain.latents()) > 1e-2, kind


@pytest.mark.parametrize("kinds", [("ip-adapter",), ("t2i-adapter",), ("ip-adapter", "t2i-adapter")], ids="+".join)
def test_guidance_on_top_in_either_order(
    server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]], kinds: tuple[str, ...]
) -> None:
    client, portrait = server_with_controlnet, alone(people)
    others = beside(*(units[kind] for kind in kinds))
    plain = client.record(sites=(1,), **others)
    scale = plain.tensors["0.out"].std().item()
    found = []
    try:
        for first in ("portrait", "sd-webui-controlnet"):
            assert client.call("/probe/first", {"extension": first}).status == 200
            guided = client.record(portrait, sites=(1,), **others)
            assert guided.answer.status == 200, guided.answer.detail
            assert_eq_11(added(guided, plain), 1, 1, scale)
            found.append(guided.latents())
    finally:
        assert client.call("/probe/first", {"extension": None}).status == 200
    assert torch.equal(*found)


def test_references_are_seen_without_the_units(
    server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]]
) -> None:
    """Features that were made before the units came are those that are made beside them."""
    found = kept_and_made_beside(server_with_controlnet, alone(people), beside(*units.values()))
    # A layer that has had an IP-Adapter runs PyTorch's attention, others the host's: their last digits differ.
    assert difference(*found) < 1e-3


@pytest.mark.parametrize("options", [{"noise": "step"}, {"checkpointing": True}, {"every": 2}], ids=str)
def test_guidance_in_its_other_ways(
    server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    client, others = server_with_controlnet, beside(units["ip-adapter"])
    plain = client.record(sites=(1,), **others)
    guided = client.record(alone(people, guidance={**GUIDANCE, **options}), sites=(1,), **others)
    assert guided.answer.status == 200, guided.answer.detail
    assert_eq_11(added(guided, plain), 1, 1, plain.tensors["0.out"].std().item())


def test_people_and_an_ip_adapter_are_both_seen(
    server_with_controlnet: Client,
    world: World,
    oracle: Oracle,
    people: dict[str, str],
    units: dict[str, dict[str, Any]],
) -> None:
    client, portrait = server_with_controlnet, one(people, lora_scale=0)
    for asked in (portrait, {**portrait, "guidance": GUIDANCE}):
        if "guidance" in asked:
            asked["identities"] = [{**asked["identities"][0], "region": {"box": [0, 0, 1, 1]}}]
            assert client.generate(asked).status == 200
        recording = client.record(asked, **beside(units["ip-adapter"]))
        assert recording.answer.status == 200, recording.answer.detail
        assert_people_are_seen(without_ip_adapter(recording, world, oracle), oracle, asked)


@pytest.mark.parametrize("method", ["fused", "riding", "instantfamily"])
def test_methods_that_would_hide_it_are_refused(
    server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]], method: str
) -> None:
    client = server_with_controlnet
    portrait = family(people, "ada") if method == "instantfamily" else fused(people, "ada", adapter=method)
    vanilla = client.generate().images
    refused = client.record(portrait, **beside(units["ip-adapter"]))
    assert refused.answer.status == 422 and not refused.calls
    assert refused.answer.detail.startswith("ControlNet: an IP-Adapter")
    # The same prompt, which ControlNet had marked by then.
    assert client.generate().images == vanilla
    assert client.generate(portrait, **beside(units["t2i-adapter"])).status == 200
    assert client.generate(portrait).status == 200


@pytest.mark.parametrize("mode", ["Balanced", "ControlNet is more important"])
@pytest.mark.parametrize("kind", ["control", "t2i-adapter"])
def test_references_that_ride_along_are_not_controlled(
    server_with_controlnet: Client,
    people: dict[str, str],
    units: dict[str, dict[str, Any]],
    control: dict[str, Any],  # noqa: F811
    kind: str,
    mode: str,
) -> None:
    client, portrait, sites = server_with_controlnet, fused(people, "ada", adapter="riding"), (13, 31)
    unit = {**units, "control": control}[kind]
    plain = client.record(portrait, sites=sites)
    controlled = client.record(portrait, sites=sites, **beside({**unit, "control_mode": mode}))
    assert controlled.answer.status == 200, controlled.answer.detail
    for number, call in enumerate(plain.calls):
        for site in sites:
            alone_here, here = (one.tensors[f"{number}.{site}.0.in"] for one in (plain, controlled))
            rows = len(call["kinds"])
            assert len(here) == rows + 1
            assert torch.equal(alone_here[rows:], here[rows:])
    assert not torch.equal(alone_here[:rows], here[:rows])


def test_what_would_refer_to_them_too_is_refused(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client, portrait = server_with_controlnet, fused(people, "ada", adapter="riding")
    own = client.generate(portrait).images
    refused = client.record(portrait, **beside(control, REFERENCE))
    assert refused.answer.status == 422 and not refused.calls
    assert refused.answer.detail.startswith("ControlNet: a unit of the kind AttentionInjection")
    assert client.generate(portrait).images == own


def test_nothing_is_left(
    server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]]
) -> None:
    client, portrait, others = server_with_controlnet, alone(people), beside(*units.values())
    assert client.generate(portrait, **others).status == 200
    alone_here = client.generate(**others).images
    vanilla = client.generate().images
    before = client.state()
    assert client.generate(portrait, **others).status == 200
    assert client.record(portrait, {"fail": {"call": 1, "site": 13}}, **others).answer.status == 500
    assert client.record(portrait, {"interrupt": {"call": 0}}, **others).answer.status == 200
    assert client.generate(**others).images == alone_here
    assert client.generate().images == vanilla
    assert left_behind(client, before) == {}
