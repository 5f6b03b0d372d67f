"""Fusion in what the host can do with a prompt: who sees the reference, and that nothing of it stays."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_portrait.attention.sites import LAYOUTS
from lib_portrait.methods.fusion import STEP, Properties
from lib_portrait.request import HASH_DIGITS, Photo
from tests.webui.oracle import NOBODY, Oracle, assert_nobody_is_seen, recorded_sites
from tests.webui.server import Client, Recording, left_behind
from tests.webui.test_controlnet import beside, control  # noqa: F401
from tests.webui.test_matrix import CELLS, LONG, Cell, difference, rows
from tests.webui.world import BLOCKS, KIT, World

pytestmark = pytest.mark.webui

# What the reference is looked at with, by the name of the adapter.
ADAPTERS = {
    "fused": Properties(reference_t=0, reference_size=128),
    "riding": Properties(reference_t=STEP, reference_size=128),
}


@pytest.fixture(scope="module", autouse=True)
def adapters(world: World) -> Iterator[None]:
    """Random adapters for the world's UNet, in its kit's folder while these tests last."""
    files = []
    for seed, (name, properties) in enumerate(ADAPTERS.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{2 * block + 1}.to_{part}_face.weight": torch.randn(width, width, generator=generator) * (4 * width**-0.5)
            for block, (_, width) in enumerate(BLOCKS)
            for part in "kv"
        }
        files.append(world.kit / f"fusion_{name}.safetensors")
        save_file(tensors, files[-1], properties.to_metadata())
    yield
    for file in files:
        file.unlink()


def fused(people: dict[str, str], *names: str, adapter: str = "fused", **more: Any) -> dict[str, Any]:
    identities = [{"photos": [people[name]]} for name in names]
    return {"method": "fusion", "checkpoint": adapter, "identities": identities, **more}


def sampled(recording: Recording) -> list[int]:
    """The UNet calls of the sampling, by number; before them may come one for each reference that was looked at."""
    looked = [number for number, call in enumerate(recording.calls) if call["kinds"] == ["unknown"]]
    found = [number for number in range(len(recording.calls)) if number not in looked]
    assert found and "unknown" not in {kind for number in found for kind in recording.calls[number]["kinds"]}
    return found


def assert_positive_rows_see_the_reference(recording: Recording, oracle: Oracle, **loras: float) -> None:
    """The attention of negative rows is that of the text alone; of positive rows it is another."""
    assert recording.answer.status == 200, recording.answer.detail
    for number in sampled(recording):
        call = recording.calls[number]
        for site in recorded_sites(recording, number):
            nobody = (oracle.seen(recording, number, site, None, loras) == NOBODY).float().mean(dim=1)
            for row, kind in enumerate(call["kinds"]):
                share = nobody[row].item()
                assert (share < 0.1) if kind == "positive" else (share == 1), (number, site, row, kind, share)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("count", [1, 2])
def test_every_row_sees_what_its_kind_does(
    server: Client, oracle: Oracle, people: dict[str, str], cell: Cell, count: int
) -> None:
    recording = server.record(fused(people, *("ada", "ben")[:count]), **cell.request())
    assert_positive_rows_see_the_reference(recording, oracle)
    if cell.rows is not None:
        assert [rows(recording)[number] for number in sampled(recording)] == cell.rows


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_people_give_other_pictures_and_the_same_the_same(
    server: Client, people: dict[str, str], adapter: str
) -> None:
    def latents(*names: str) -> torch.Tensor:
        return server.record(fused(people, *names, adapter=adapter), sites=()).latents()

    pictures = [server.record(sites=()).latents(), latents("ada"), latents("ben"), latents("ada", "ben")]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert (first - second).norm() / second.norm() > 0.01
    assert torch.equal(latents("ada"), pictures[1])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_calls_batches_and_optimizations_agree(server: Client, people: dict[str, str], adapter: str) -> None:
    portrait = fused(people, "ada", "ben", adapter=adapter)
    for asked in ({}, {"prompt": LONG}, {"prompt": "a person AND a hat", "batch_size": 2}):
        settings = {"pad_cond_uncond": "prompt" in asked}
        together, apart = (
            server.record(portrait, override_settings={**settings, "batch_cond_uncond": one}, **asked)
            for one in (True, False)
        )
        assert together.answer.status == apart.answer.status == 200
        assert difference(together.latents(), apart.latents()) < 1e-4
    batch = server.record(portrait, batch_size=2, seed=7).latents()
    assert difference(batch, torch.cat([server.record(portrait, seed=seed).latents() for seed in (7, 8)])) < 1e-4
    reference = server.record(portrait).latents()
    for name in [*server.state()["optimizations"], "None"]:
        with server.options(cross_attention_optimization=name):
            assert difference(reference, server.record(portrait).latents()) < 1e-4, name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hires_fix_refiner_and_loras_keep_the_people(
    server: Client, oracle: Oracle, people: dict[str, str], adapter: str
) -> None:
    portrait = fused(people, "ada", adapter=adapter)
    vanilla = server.generate().images
    hires = server.record(
        portrait, enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.8, hr_second_pass_steps=2
    )
    refined = server.record(portrait, refiner_checkpoint="second", refiner_switch_at=0.5, steps=4)
    assert {call["checkpoint"] for call in refined.calls} == {"first", "second"}
    assert {hires.calls[number]["shape"][-1] for number in sampled(hires)} == {16, 32}
    assert_positive_rows_see_the_reference(server.record(portrait, prompt="a person <lora:soft:0.8>"), oracle, soft=0.8)
    for recording in (hires, refined, server.record(portrait)):
        assert_positive_rows_see_the_reference(recording, oracle)
    assert server.generate().images == vanilla


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_regions_a_half_of_the_picture_sees_its_own_person_alone(
    server: Client, people: dict[str, str], adapter: str
) -> None:
    def first(other: str) -> torch.Tensor:
        portrait = fused(people, "ada", other, adapter=adapter)
        for identity, box in zip(portrait["identities"], ([0, 0, 0.5, 1], [0.5, 0, 1, 1])):
            identity["region"] = {"box": box}
        recording = server.record(portrait)
        number = sampled(recording)[0]
        positive = recording.calls[number]["kinds"].index("positive")
        return recording.tensors[f"{number}.1.0.out"][positive].unflatten(0, (16, 16))

    ben, cleo = first("ben"), first("cleo")
    assert torch.equal(ben[:, :8], cleo[:, :8])
    assert not torch.isclose(ben[:, 8:], cleo[:, 8:]).all(dim=-1).any()


def test_a_reference_is_looked_at_once_and_where_it_rides_never_by_itself(
    server: Client, people: dict[str, str]
) -> None:
    def looks(*names: str, adapter: str = "fused") -> int:
        recording = server.record(fused(people, *names, adapter=adapter))
        return len(recording.calls) - len(sampled(recording))

    assert server.call("/portrait/drop-caches", {}).status == 200
    assert [looks("ada"), looks("ada"), looks("ada", "ben"), looks("ada", adapter="riding")] == [1, 0, 1, 0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_is_left(server: Client, people: dict[str, str], adapter: str) -> None:
    portrait = fused(people, "ada", "ben", adapter=adapter)
    assert server.generate(portrait).status == 200
    vanilla = server.generate().images
    before = server.state()
    assert server.generate(portrait).status == 200
    assert server.record(portrait, {"fail": {"call": 1, "site": 13}}).answer.status == 500
    assert server.record(portrait, {"interrupt": {"call": 0}}).answer.status == 200
    assert server.generate().images == vanilla
    assert left_behind(server, before) == {}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_beside_a_control_network(
    server_with_controlnet: Client,
    oracle: Oracle,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
    adapter: str,
) -> None:
    client, portrait = server_with_controlnet, fused(people, "ada", "ben", adapter=adapter)
    vanilla = client.generate().images
    for prompt in ("a photo of a person", LONG, "a person AND a hat"):
        controlled = client.record(portrait, prompt=prompt, **beside(control))
        plain = client.record(portrait, prompt=prompt, sites=())
        assert_positive_rows_see_the_reference(controlled, oracle)
        assert (controlled.latents() - plain.latents()).abs().max() > 1e-3, "the control network had no effect"
    assert_nobody_is_seen(client.record(**beside(control)), oracle)
    assert client.generate().images == vanilla


def test_the_infotext_brings_the_picture_back(server: Client, people: dict[str, str]) -> None:
    portrait = fused(people, "ada", face_only=True)
    first = server.record(portrait, sites=())
    infotext = first.answer.info["infotexts"][0]
    ada = Photo.of(base64.b64decode(people["ada"])).sha256[:HASH_DIGITS]
    assert f"Portrait: fusion; adapter fused; face_only | {ada}" in infotext
    assert torch.equal(first.latents(), server.record(sites=(), infotext=infotext).latents())


def test_another_method_s_options_are_refused(server: Client, people: dict[str, str]) -> None:
    answer = server.generate(fused(people, "ada", lora_scale=0.5))
    assert answer.status == 422 and "lora_scale" in answer.detail
    answer = server.generate(fused(people, "ada", adapter=KIT))
    assert answer.status == 422 and "a kit of uniportrait" in answer.detail


# ----------------------------------------------------------------------------------------------- SDXL, in sgm's layout

# Of a cross-attention of every width and depth: the first, the second of two in a row, and the last of all.
SDXL_SITES = (1, 7, 33)
HEAD_WIDTH = 8


def sdxl_attentions(world: World) -> dict[int, str]:
    """The paths of the cross-attentions in the checkpoint's file, by their numbers."""
    parts = LAYOUTS["ldm"]
    found = [
        match[1]
        for key in load_file(world.checkpoint("sdxl"))
        if (match := re.fullmatch(r"(model\.diffusion_model\.(?:\w+_blocks?)\..*\.attn2)\.to_q\.weight", key))
    ]

    def place(path: str) -> tuple[int, list[int]]:
        part = next(number for number, name in enumerate(parts) if f".{name}." in path)
        return part, [int(digits) for digits in re.findall(r"\.(\d+)(?=\.)", path)]

    return {2 * number + 1: path for number, path in enumerate(sorted(found, key=place))}


def assert_halves_are_eq_2_to_7(
    x: Tensor, context: Tensor, references: list[Tensor], out: Tensor, host: Mapping[str, Tensor], own: list[Tensor]
) -> None:
    """One row: x (n, C) and context (m, D) in, out (n, C). references: of each person h_f (m, C), seen in that person's
    half of the picture. own: W_kf and W_vf."""

    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (-1, HEAD_WIDTH)).transpose(0, 1)

    q = heads(x @ host["to_q.weight"].T)
    side = round(len(x) ** 0.5)
    left = (torch.arange(len(x)) % side) < side // 2
    expected = torch.empty_like(out)
    for positions, seen in ((left, references[:1]), (~left, references[1:])):
        k, v = (
            heads(torch.cat([context @ host[f"to_{part}.weight"].T, *(one @ own_part.T for one in seen)]))
            for part, own_part in zip("kv", own)
        )
        attended = (q[:, positions] @ k.mT * HEAD_WIDTH**-0.5).softmax(dim=-1) @ v
        merged = attended.transpose(0, 1).flatten(1)
        expected[positions] = F.linear(merged, host["to_out.0.weight"], host["to_out.0.bias"])
    assert (out - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("reference_t", [0, STEP])
def test_in_sdxl_positive_rows_are_eq_2_to_7_and_negative_ones_eq_1(
    server: Client, world: World, people: dict[str, str], reference_t: int | str
) -> None:
    checkpoint, paths = load_file(world.checkpoint("sdxl")), sdxl_attentions(world)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for site, path in paths.items():
        inner, channels = checkpoint[f"{path}.to_q.weight"].shape
        for part in "kv":
            weight = torch.randn(inner, channels, generator=generator) * (4 * channels**-0.5)
            tensors[f"{site}.to_{part}_face.weight"] = weight
    file = world.kit / "fusion_large.safetensors"
    save_file(tensors, file, Properties(reference_t=reference_t, reference_size=128).to_metadata())
    portrait = fused(people, "ada", "ben", adapter="large")
    for identity, box in zip(portrait["identities"], ([0, 0, 0.5, 1], [0.5, 0, 1, 1])):
        identity["region"] = {"box": box}
    try:
        with server.options(sd_model_checkpoint="sdxl.safetensors"):
            vanilla = server.generate().images
            recording = server.record(portrait, sites=SDXL_SITES, prompt="a person AND a hat", steps=2)
            other = server.generate(fused(people, "ada"))
            assert other.status == 422 and "another kind of model" in other.detail
            assert server.generate().images == vanilla
        wrong = server.generate(portrait)
        assert wrong.status == 422 and "another kind of model" in wrong.detail
    finally:
        file.unlink()
    assert recording.answer.status == 200, recording.answer.detail
    steps = sampled(recording)
    looks = [number for number in range(len(recording.calls)) if number not in steps]
    assert len(looks) == (0 if reference_t == STEP else 2) and len(steps) == 2
    for number in steps:
        kinds = recording.calls[number]["kinds"]
        assert kinds == ["positive", "positive", "negative"] and recording.calls[number]["checkpoint"] == "sdxl"
        for site in SDXL_SITES:
            x, context, out = (recording.tensors[f"{number}.{site}.0.{what}"] for what in ("in", "context", "out"))
            # What rides along stands behind the rows of the picture.
            seen = [recording.tensors[f"{look}.{site}.0.in"][0] for look in looks] or list(x[len(kinds) :])
            assert len(seen) == 2
            host = {
                name: checkpoint[f"{paths[site]}.{name}"].float()
                for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
            }
            own = [tensors[f"{site}.to_{part}_face.weight"] for part in "kv"]
            for row, kind in enumerate(kinds):
                references = seen if kind == "positive" else []
                assert_halves_are_eq_2_to_7(x[row], context[row], references, out[row], host, own)
