"""Beside ControlNet-LLLite units of sd-webui-controlnet, which change what enters projections of attention layers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.webui.oracle import Oracle, assert_nobody_is_seen, assert_people_are_seen
from tests.webui.server import Client, Recording, left_behind
from tests.webui.test_controlnet import beside, control  # noqa: F401
from tests.webui.test_fusion import adapters, assert_positive_rows_see_the_reference, fused  # noqa: F401
from tests.webui.test_guidance import (
    GUIDANCE,
    METHODS,
    added,
    alone,
    assert_eq_11,
    kept_and_made_beside,
    request_of,
    without,
)
from tests.webui.test_instantfamily import Equations, equations, family, recorded  # noqa: F401
from tests.webui.test_instantfamily import adapters as families  # noqa: F401
from tests.webui.test_ip_adapter import random
from tests.webui.test_matrix import difference, drawing, one, two
from tests.webui.test_omniportrait import assert_words_are_mixed, e_refs, pivoted  # noqa: F401
from tests.webui.test_omniportrait import files as pivots  # noqa: F401
from tests.webui.world import CHANNELS, LDM_PATHS, World

pytestmark = pytest.mark.webui

EMBEDDING, MLP, WEIGHT = 16, 8, 0.8
# Those that kohya-ss's trainer makes one for.
PROJECTIONS = re.compile(
    r"model\.diffusion_model\.(.*\.transformer_blocks\.\d+\.)(attn1\.to_[qkv]|attn2\.to_q)\.weight"
)
# The convolutions that the control picture goes through, by the depth of the level: as wide as their strides.
KERNELS = ((4, 2), (4, 4), (4, 4, 2))
# Cross-attentions of the first, a middle and the last level, and a self-attention.
SITES = (1, 12, 13, 31)


def lllite(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """One for that checkpoint's UNet, by the names that scripts/controlnet_lllite.py reads."""
    made = {}
    for number, (key, weight) in enumerate(checkpoint.items()):
        if not (match := PROJECTIONS.fullmatch(key)):
            continue
        width = weight.shape[1]
        kernels = KERNELS[(width // CHANNELS).bit_length() - 1]
        channels = [3, *[EMBEDDING // 2] * (len(kernels) - 1), EMBEDDING]
        layers: dict[str, tuple[int, ...]] = {
            f"conditioning1.{2 * i}": (channels[i + 1], channels[i], kernel, kernel) for i, kernel in enumerate(kernels)
        }
        layers |= {"down.0": (MLP, width), "mid.0": (MLP, MLP + EMBEDDING), "up.0": (width, MLP)}
        name = f"lllite_unet_{match[1]}{match[2]}".replace(".", "_")
        for i, (layer, shape) in enumerate(layers.items()):
            made[f"{name}.{layer}.weight"] = random(*shape, seed=100 * number + i, gain=2)
            made[f"{name}.{layer}.bias"] = random(shape[0], seed=100 * number + 50 + i) * 0.1
    return made


@pytest.fixture(scope="module")
def units(world: World, server_with_controlnet: Client) -> Iterator[dict[str, dict[str, Any]]]:
    """A unit for each of two checkpoints, by its name."""
    files = {name: world.models / "ControlNet" / f"lines-{name}.safetensors" for name in ("first", "sdxl")}
    for name, file in files.items():
        save_file(lllite(load_file(world.checkpoint(name))), file)
    listed = server_with_controlnet.call("/controlnet/model_list").body["model_list"]
    models = {kind: next(name for name in listed if name.startswith(file.stem)) for kind, file in files.items()}
    common = {"enabled": True, "module": "none", "image": drawing(), "weight": WEIGHT}
    yield {kind: {**common, "model": model} for kind, model in models.items()}
    for file in files.values():
        file.unlink()


@pytest.fixture
def unit(units: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return units["first"]


class Entering:
    """What the unit makes of a projection's input x (B, n, C): x + w h(x)."""

    def __init__(self, world: World):
        self.parts = load_file(world.models / "ControlNet" / "lines-first.safetensors")
        picture = Image.open(io.BytesIO(base64.b64decode(drawing())))
        self.picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255 * 2 - 1

    def __call__(self, site: int, x: Tensor, projection: str = "to_q") -> Tensor:
        path = f"{LDM_PATHS[site // 2]}.transformer_blocks.0.attn{1 + site % 2}.{projection}"
        own = {
            name.split(".", 1)[1]: tensor
            for name, tensor in self.parts.items()
            if name.startswith(f"lllite_unet_{path.replace('.', '_')}.")
        }
        seen = self.picture
        for layer in sorted(name.removesuffix(".weight") for name in own if re.search(r"conditioning1.*weight", name)):
            weight = own[f"{layer}.weight"]
            seen = seen if seen is self.picture else seen.relu()
            seen = F.conv2d(seen, weight, own[f"{layer}.bias"], stride=weight.shape[-1])
        side = round(x.shape[1] ** 0.5)
        seen = F.interpolate(seen, (side, side), mode="nearest-exact").flatten(2).mT.expand(len(x), -1, -1)
        inner = F.linear(x, own["down.0.weight"], own["down.0.bias"]).relu()
        inner = F.linear(torch.cat([seen, inner], dim=2), own["mid.0.weight"], own["mid.0.bias"]).relu()
        return x + WEIGHT * F.linear(inner, own["up.0.weight"], own["up.0.bias"])


@pytest.fixture
def entering(
    world: World, oracle: Oracle, units: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Entering:
    """While it is there, the oracle knows what the unit does to queries."""
    made = Entering(world)
    monkeypatch.setattr(oracle, "queried", made)
    return made


def assert_self_attention_is_of(
    recording: Recording, oracle: Oracle, entering: Entering, portrait: dict[str, Any] | None = None
) -> None:
    """LoRA on what the unit has made of the input: softmax(W_q x_q (W_k x_k)^T / sqrt(d)) W_v x_v, in every row."""
    site, lora = 12, {}
    if portrait is not None:
        source = oracle._adapter["faceid" if len(portrait["identities"]) == 1 else "router"]
        for part in ("to_q", "to_k", "to_v", "to_out"):
            up, down = (source[f"faceid_adapter.{site}.{part}_lora.{side}.weight"] for side in ("up", "down"))
            lora[part] = up @ down
    for number, call in enumerate(recording.calls):
        x, out = recording.tensors[f"{number}.{site}.0.in"], recording.tensors[f"{number}.{site}.0.out"]
        weights = {part: oracle._weight(site, part, call["checkpoint"], {}) for part in ("to_q", "to_k", "to_v")}
        weights["to_out"] = oracle._weight(site, "to_out", call["checkpoint"], {})
        weights = {part: weight + lora.get(part, 0) for part, weight in weights.items()}
        q, k, v = (entering(site, x, part) @ weights[part].T for part in ("to_q", "to_k", "to_v"))
        wanted = F.linear(oracle._attend(q, k, v), weights["to_out"], oracle._bias(site, call["checkpoint"]))
        assert (out - wanted).norm() < 1e-3 * wanted.norm(), number


def crossing(recording: Recording) -> Recording:
    """Without the self-attention, which the oracle does not know."""
    kept = {name: tensor for name, tensor in recording.tensors.items() if not re.match(r"\d+\.12\.", name)}
    return Recording(recording.answer, recording.calls, recording.foreign, recording.batches, kept)


def in_either_order(client: Client, portrait: dict[str, Any], *units: dict[str, Any], **more: Any) -> Recording:
    """The recording, which is the same whoever comes first."""
    found = []
    try:
        for first in ("portrait", "sd-webui-controlnet"):
            assert client.call("/probe/first", {"extension": first}).status == 200
            found.append(recorded(client, portrait, *units, sites=SITES, **more))
            assert found[-1].answer.status == 200, found[-1].answer.detail or client.scratch
    finally:
        assert client.call("/probe/first", {"extension": None}).status == 200
    assert torch.equal(found[0].latents(), found[1].latents())
    return found[0]


def test_the_unit_alone_is_what_is_said_of_it_here(
    server_with_controlnet: Client, oracle: Oracle, unit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    recording = server_with_controlnet.record(sites=SITES, **beside(unit))
    with pytest.raises(AssertionError):
        assert_nobody_is_seen(crossing(recording), oracle)
    entering = Entering(world)
    monkeypatch.setattr(oracle, "queried", entering)
    assert_nobody_is_seen(crossing(recording), oracle)
    assert_self_attention_is_of(recording, oracle, entering)


def test_people_and_the_unit_are_both_seen(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], unit: dict[str, Any], entering: Entering
) -> None:
    """LoRA, the identities' attention and routing; the prompt's own LoRA beside them."""
    for portrait in (one(people), two(people)):
        recording = in_either_order(server_with_controlnet, portrait, unit)
        assert_people_are_seen(crossing(recording), oracle, portrait)
        assert_self_attention_is_of(recording, oracle, entering, portrait)
        assert {times for call in recording.calls for times in call["seen"].values()} == {1}
    with_lora = server_with_controlnet.record(one(people), prompt="a person <lora:soft:0.8>", **beside(unit))
    assert_people_are_seen(with_lora, oracle, one(people), {"soft": 0.8})


def test_words_are_mixed_and_the_unit_is_seen(
    server_with_controlnet: Client,
    world: World,
    oracle: Oracle,
    people: dict[str, str],
    e_refs: list[Tensor],  # noqa: F811
    unit: dict[str, Any],
    entering: Entering,
) -> None:
    recording = in_either_order(server_with_controlnet, pivoted(people), unit, prompt="a photo of a woman")
    assert_words_are_mixed(recording, world, e_refs, [[{5: 0}]])
    assert_nobody_is_seen(crossing(recording), oracle)
    assert_self_attention_is_of(recording, oracle, entering)


def test_masked_attention_and_the_unit_beside_the_kit_s_own_network(
    server_with_controlnet: Client,
    oracle: Oracle,
    people: dict[str, str],
    equations: Equations,  # noqa: F811
    control: dict[str, Any],  # noqa: F811
    unit: dict[str, Any],
    entering: Entering,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("ada", "ben")
    # What other releases of packages cut out of a photo is a little different, and queries are larger here.
    monkeypatch.setattr(equations, "tolerance", 1e-2)
    recording = in_either_order(server_with_controlnet, family(people, *names), control, unit)
    equations.check(crossing(recording), names)
    assert_self_attention_is_of(recording, oracle, entering)


def test_references_of_fusion_are_seen_without_the_unit(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], unit: dict[str, Any], entering: Entering
) -> None:
    client, portrait, found = server_with_controlnet, fused(people, "ada"), []
    for asked_before in (True, False):
        assert client.call("/portrait/drop-caches", {}).status == 200
        if asked_before:
            assert client.generate(portrait).status == 200
        found.append(in_either_order(client, portrait, unit))
    assert torch.equal(found[0].latents(), found[1].latents())
    assert_positive_rows_see_the_reference(crossing(found[0]), oracle)
    assert_self_attention_is_of(found[0], oracle, entering)


def test_references_that_ride_along_would_be_controlled_too_and_that_is_refused(
    server_with_controlnet: Client, people: dict[str, str], unit: dict[str, Any]
) -> None:
    client, portrait = server_with_controlnet, fused(people, "ada", adapter="riding")
    vanilla, own = client.generate().images, client.generate(portrait).images
    for guidance in ({}, {"guidance": GUIDANCE}):
        refused = client.record({**portrait, **guidance}, **beside(unit))
        assert refused.answer.status == 422 and not refused.calls
        assert refused.answer.detail.startswith("ControlNet: a unit of the kind Controlllite"), refused.answer.detail
    assert client.generate(portrait).images == own
    assert client.generate().images == vanilla


@pytest.mark.parametrize("method", [name for name in METHODS if name != "riding"])
def test_guidance_on_top_in_either_order(
    server_with_controlnet: Client, people: dict[str, str], unit: dict[str, Any], method: str
) -> None:
    client, portrait = server_with_controlnet, request_of(people, method)
    plain = client.record(without(portrait), sites=(1,), **beside(unit))
    guided = in_either_order(client, portrait, unit)
    first = next(n for n, call in enumerate(plain.calls) if "positive" in call["kinds"])
    assert_eq_11(added(guided, plain), 1, 1, plain.tensors[f"{first}.out"].std().item())


def test_references_of_guidance_are_seen_without_the_unit(
    server_with_controlnet: Client, people: dict[str, str], unit: dict[str, Any]
) -> None:
    assert torch.equal(*kept_and_made_beside(server_with_controlnet, alone(people), beside(unit)))


@pytest.mark.parametrize("options", [{"noise": "step"}, {"checkpointing": True}, {"every": 2}], ids=str)
def test_guidance_in_its_other_ways(
    server_with_controlnet: Client, people: dict[str, str], unit: dict[str, Any], options: dict[str, Any]
) -> None:
    client = server_with_controlnet
    plain = client.record(sites=(1,), **beside(unit))
    guided = client.record(alone(people, guidance={**GUIDANCE, **options}), sites=(1,), **beside(unit))
    assert_eq_11(added(guided, plain), 1, 1, plain.tensors["0.out"].std().item())


def test_in_sdxl_too(server_with_controlnet: Client, people: dict[str, str], units: dict[str, dict[str, Any]]) -> None:
    client, others = server_with_controlnet, beside(units["sdxl"])
    with client.options(sd_model_checkpoint="sdxl.safetensors"):
        vanilla = client.record(sites=())
        plain = client.record(sites=(1,), **others)
        assert plain.calls[0]["checkpoint"] == "sdxl" and difference(plain.latents(), vanilla.latents()) > 1e-2
        guided = client.record(alone(people), sites=(1,), **others)
        assert guided.answer.status == 200, guided.answer.detail
        assert_eq_11(added(guided, plain), 1, 1, plain.tensors["0.out"].std().item())
        assert torch.equal(client.record(sites=()).latents(), vanilla.latents())


def test_hires_fix_and_windows_of_the_unit_are_kept(
    server_with_controlnet: Client, oracle: Oracle, people: dict[str, str], unit: dict[str, Any], world: World
) -> None:
    """It does nothing in hires fix, nor outside of its own window; people stay."""
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.8}
    portrait, entering, plainly = one(people), Entering(world), oracle.queried
    for more, late in (
        ({**hires, "hr_second_pass_steps": 2}, lambda call: call["shape"][-1] == 32),
        ({"steps": 4, "guidance_end": 0.4}, None),
    ):
        own = {**unit, "guidance_end": more.pop("guidance_end", 1.0)}
        recording = server_with_controlnet.record(portrait, **beside(own), **more)
        assert recording.answer.status == 200, recording.answer.detail
        # The extension reads how far the sampling is before the host has counted the step.
        without_it = [n for n, call in enumerate(recording.calls) if (late(call) if late else n == 3)]
        with_it = [n for n in range(len(recording.calls)) if n not in without_it]
        assert with_it and without_it
        assert_people_are_seen(recording, oracle, portrait, calls=without_it)
        oracle.queried = entering  # type: ignore[method-assign]
        try:
            assert_people_are_seen(recording, oracle, portrait, calls=with_it)
        finally:
            oracle.queried = plainly  # type: ignore[method-assign]


def test_nothing_is_left(server_with_controlnet: Client, people: dict[str, str], unit: dict[str, Any]) -> None:
    client, others = server_with_controlnet, beside(unit)
    portraits = (request_of(people, "uniportrait"), fused(people, "ada"))
    for portrait in portraits:
        assert client.generate(portrait, **others).status == 200
    alone_here = client.generate(**others).images
    vanilla = client.generate().images
    before = client.state()
    for portrait in portraits:
        assert client.generate(portrait, **others).status == 200
        assert client.record(portrait, {"fail": {"call": 1, "site": 13}}, **others).answer.status == 500
        assert client.record(portrait, {"interrupt": {"call": 0}}, **others).answer.status == 200
    assert client.generate(**others).images == alone_here
    assert client.generate().images == vanilla
    assert left_behind(client, before) == {}
