"""Reference guidance in what the host can do, with every method and with none: what it adds, to whom, what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.webui.server import Client, Recording, changes, left_behind, unlike_new
from tests.webui.test_controlnet import REFERENCE, beside, control  # noqa: F401
from tests.webui.test_fusion import adapters, fused, sampled  # noqa: F401
from tests.webui.test_instantfamily import adapters as families  # noqa: F401
from tests.webui.test_instantfamily import family
from tests.webui.test_left_behind import KEPT_BYTES
from tests.webui.test_matrix import CELLS, LONG, Cell, difference, drawing, half_mask, one, rows, two
from tests.webui.test_omniportrait import files as pivots  # noqa: F401
from tests.webui.test_omniportrait import pivoted

pytestmark = pytest.mark.webui

# Much and always, so that a random model shows it.
GUIDANCE = {"begin": 1.0, "gradient": "share", "strength": 0.5}
LEFT, RIGHT = {"box": [0, 0, 0.5, 1]}, {"box": [0.5, 0, 1, 1]}
REGIONS = (LEFT, RIGHT)


def kept_and_made_beside(client: Client, portrait: dict[str, Any], others: dict[str, Any]) -> list[torch.Tensor]:
    """Latents beside others' units: with features of the references from before they came, and with new ones."""
    found = []
    for asked_before in (True, False):
        assert client.call("/portrait/drop-caches", {}).status == 200
        if asked_before:
            assert client.generate(portrait).status == 200
        found.append(client.record(portrait, sites=(), **others).latents())
    return found


def alone(people: dict[str, str], count: int = 1, **more: Any) -> dict[str, Any]:
    """Guidance without any method, of one person in the left half, or of another in the right half too."""
    names = ("ada", "ben")[:count]
    identities = [{"photos": [people[name]], "region": region} for name, region in zip(names, REGIONS)]
    return {"method": "none", "identities": identities, "guidance": GUIDANCE, **more}


# One person with each method; what draws that person, and what stands around the UNet's call, differs.
METHODS: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "none": alone,
    "uniportrait": lambda people: one(people, method="uniportrait"),
    "fused": lambda people: fused(people, "ada"),
    "riding": lambda people: fused(people, "ada", adapter="riding"),
    "omniportrait": pivoted,
    "instantfamily": lambda people: family(people, "ada", kit="alone"),
}


def without(portrait: dict[str, Any]) -> dict[str, Any] | None:
    """The same request without guidance; None where nothing would be left of it."""
    return None if portrait["method"] == "none" else {**portrait, "guidance": {"enabled": False}}


def request_of(people: dict[str, str], method: str) -> dict[str, Any]:
    """One person with a method, in the left half, and guidance."""
    portrait = METHODS[method](people)
    identities = [{**identity, "region": LEFT} for identity in portrait["identities"]]
    return {**portrait, "identities": identities, "guidance": GUIDANCE}


def first_step(recording: Recording, pictures: int) -> dict[tuple[str, int], torch.Tensor]:
    """What the UNet put out in the first step: by kind and number among its kind of each row (4, h, w)."""
    assert recording.answer.status == 200, recording.answer.detail
    found: dict[tuple[str, int], torch.Tensor] = {}
    for number in sampled(recording):
        for row, kind in enumerate(recording.calls[number]["kinds"]):
            place = sum(1 for of, _ in found if of == kind)
            if sum(1 for of, _ in found if of == "negative") == pictures and kind == "positive":
                return found
            found[(kind, place)] = recording.tensors[f"{number}.out"][row]
    return found


def added(guided: Recording, plain: Recording, pictures: int = 1) -> dict[tuple[str, int], torch.Tensor]:
    """What guidance added to each row in the first step, which both draw from the same latent."""
    first, second = first_step(guided, pictures), first_step(plain, pictures)
    common = [key for key in first if key in second]
    return {key: first[key] - second[key] for key in common}


def assert_eq_11(found: dict[tuple[str, int], torch.Tensor], prompts: int, pictures: int, scale: float) -> None:
    """The same in every row of a picture, something in its person's half, and nothing in the other (eq. 9 and 11)."""
    for picture in range(pictures):
        own = [
            value
            for (kind, place), value in found.items()
            if place // (prompts if kind == "positive" else 1) == picture
        ]
        assert own
        for value in own:
            assert (value - own[0]).abs().max() < 1e-3 * scale
            assert value[..., :, 8:].abs().max() < 1e-3 * scale, "outside of the mask"
            assert value[..., :, :8].abs().max() > 1e-2 * scale, "nothing was guided"


SHAPES = {"AND": (2, 1), "AND in a batch": (2, 2), "batch size x count": (1, 2), "cond and uncond apart": (1, 2)}
# Steps without negative rows, and CFG that begins later, are compared as a whole.
WHOLE = ("NGMS", "NGMS on all steps", "skip early CFG", "PLMS Automatic", "UniPC Automatic")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_row_of_a_picture_gets_the_same_inside_of_the_mask(
    server: Client, people: dict[str, str], cell: Cell
) -> None:
    prompts, pictures = SHAPES.get(cell.name, (1, 1))
    guided = server.record(alone(people), sites=(1,), **cell.request())
    plain = server.record(sites=(1,), **cell.request())
    assert guided.answer.status == 200, guided.answer.detail
    assert difference(guided.latents(), plain.latents()) > 1e-2
    if cell.rows is not None:
        assert [rows(guided)[number] for number in sampled(guided)] == cell.rows
    if cell.name not in WHOLE:
        scale = plain.tensors["0.out"].std().item()
        assert_eq_11(added(guided, plain, pictures), prompts, pictures, scale)


# What a method has to do with is how the host splits rows.
SPLIT = ("txt2img", "AND in a batch", "cond and uncond apart")
ON_TOP = [
    *((method, name) for method in METHODS if method != "none" for name in SPLIT),
    *((method, name) for method in ("uniportrait", "fused", "riding") for name in ("inpaint", "NGMS")),
]


@pytest.mark.parametrize(("method", "name"), ON_TOP)
def test_on_top_of_every_method(server: Client, people: dict[str, str], method: str, name: str) -> None:
    cell = next(one for one in CELLS if one.name == name)
    portrait = request_of(people, method)
    guided = server.record(portrait, sites=(1,), **cell.request())
    plain = server.record(without(portrait), sites=(1,), **cell.request())
    assert guided.answer.status == plain.answer.status == 200, guided.answer.detail
    assert difference(guided.latents(), plain.latents()) > 1e-2
    if name not in WHOLE:
        prompts, pictures = SHAPES.get(name, (1, 1))
        scale = plain.tensors[f"{sampled(plain)[0]}.out"].std().item()
        assert_eq_11(added(guided, plain, pictures), prompts, pictures, scale)


@pytest.mark.parametrize("where", ["attention", "routing"])
def test_where_a_method_s_own_maps_tell_where_people_are(server: Client, people: dict[str, str], where: str) -> None:
    """The words' attention (eq. 6), and the routing map, of which the parts of two people hardly overlap."""
    portrait = pivoted(people, 2) if where == "attention" else two(people)
    asked = {"prompt": "a man and a woman", "steps": 1}
    plain = server.record(portrait, sites=(1,), **asked)
    scale = plain.tensors["0.out"].std().item()
    masks = []
    for guided in range(2):
        identities = [{**own, "guided": number == guided} for number, own in enumerate(portrait["identities"])]
        told = {**portrait, "identities": identities, "guidance": {**GUIDANCE, "where": where}}
        (value, *others) = added(server.record(told, sites=(1,), **asked), plain).values()
        assert others and all((one - value).abs().max() < 1e-3 * scale for one in others)
        masks.append(value.abs().amax(dim=0) > 1e-3 * scale)
    assert all(0 < mask.float().mean() < 1 for mask in masks)
    assert (masks[0] != masks[1]).any()
    if where == "routing":
        assert (masks[0] & masks[1]).float().mean() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_calls_and_batches_agree(server: Client, people: dict[str, str], method: str) -> None:
    portrait = request_of(people, method)
    asked = {"prompt": "a person AND a hat", "batch_size": 2, "steps": 2}
    together, apart = (
        server.record(
            portrait, sites=(), override_settings={"pad_cond_uncond": True, "batch_cond_uncond": one}, **asked
        )
        for one in (True, False)
    )
    assert together.answer.status == apart.answer.status == 200, together.answer.detail
    assert difference(together.latents(), apart.latents()) < 1e-3
    batch = server.record(portrait, sites=(), batch_size=2, steps=2, seed=7).latents()
    single = [server.record(portrait, sites=(), steps=2, seed=seed).latents() for seed in (7, 8)]
    assert difference(batch, torch.cat(single)) < 1e-3


def test_every_attention_optimization_gives_the_same(server: Client, people: dict[str, str]) -> None:
    """Also those without a backward pass, whose guided rows take PyTorch's own attention."""
    latents = {}
    for name in [*server.state()["optimizations"], "None"]:
        with server.options(cross_attention_optimization=name):
            recording = server.record(alone(people), sites=(), steps=2)
            assert recording.answer.status == 200, (name, recording.answer.detail)
            latents[name] = recording.latents()
    for name, other in latents.items():
        assert difference(latents["None"], other) < 1e-3, name


def test_two_people_each_in_their_own_half(server: Client, people: dict[str, str]) -> None:
    both = server.record(alone(people, 2), sites=(1,), steps=1)
    plain = server.record(sites=(1,), steps=1)
    scale = plain.tensors["0.out"].std().item()
    (value, *others) = added(both, plain).values()
    assert value[..., :8].abs().max() > 1e-2 * scale and value[..., 8:].abs().max() > 1e-2 * scale
    assert all((one - value).abs().max() < 1e-3 * scale for one in others)
    ben = alone(people, 2)
    ben["identities"][0]["guided"] = False
    refused = server.generate(ben)
    assert refused.status == 422 and "identities[0].guided" in refused.detail


def test_hires_fix_refiner_loras_and_masks(server: Client, people: dict[str, str]) -> None:
    portrait = alone(people)
    vanilla = server.generate().images
    for asked in (
        {
            "enable_hr": True,
            "hr_scale": 2,
            "hr_upscaler": "Latent",
            "denoising_strength": 0.8,
            "hr_second_pass_steps": 2,
        },
        {"refiner_checkpoint": "second", "refiner_switch_at": 0.5, "steps": 4},
        {"prompt": "a person <lora:soft:0.8>"},
    ):
        guided, plain = server.record(portrait, sites=(), **asked), server.record(sites=(), **asked)
        assert guided.answer.status == 200, guided.answer.detail
        assert difference(guided.latents(), plain.latents()) > 1e-2
        assert {call["checkpoint"] for call in guided.calls} == {call["checkpoint"] for call in plain.calls}
    # The left half is painted, where she is; the right one is as it was.
    inpaint = {"init_images": [drawing()], "mask": half_mask(), "denoising_strength": 0.9, "inpainting_fill": 1}
    guided, plain = (server.record(which, sites=(), mask_blur=0, **inpaint).latents() for which in (portrait, None))
    assert difference(guided[..., :8], plain[..., :8]) > 1e-2
    assert (guided[..., 9:] - plain[..., 9:]).abs().max() < 1e-4
    assert server.generate().images == vanilla


@pytest.mark.parametrize("checkpoint", ["vpred", "inpaint", "sdxl"])
def test_other_models_are_guided_too(server: Client, people: dict[str, str], checkpoint: str) -> None:
    """One that predicts v, one of nine channels, and SDXL in sgm's layout: none needs an adapter of its own."""
    with server.options(sd_model_checkpoint=f"{checkpoint}.safetensors"):
        plain = server.record(sites=(1,))
        assert plain.answer.status == 200 and plain.calls[0]["checkpoint"] == checkpoint
        assert plain.calls[0]["shape"][1] == (9 if checkpoint == "inpaint" else 4)
        guided = server.record(alone(people), sites=(1,))
        assert guided.answer.status == 200, guided.answer.detail
        scale = plain.tensors["0.out"].std().item()
        assert_eq_11(added(guided, plain), 1, 1, scale)
        assert server.record(sites=()).latents().equal(plain.latents())


def test_nothing_is_left(server: Client, people: dict[str, str]) -> None:
    # Alone, with a rule whose reference rides along, and with one that is told of words: the others come and go alike.
    portraits = [request_of(people, method) for method in ("none", "riding", "omniportrait")]
    for portrait in portraits:
        assert server.generate(portrait).status == 200
    vanilla = server.generate().images
    before = server.state()
    for portrait in portraits:
        assert server.generate(portrait).status == 200
        # Within the guided rows' pass, and after it.
        for site in (1, 31):
            recording = server.record(portrait, {"fail": {"call": 4, "site": site}}, steps=6)
            assert recording.answer.status == 500, recording.answer.detail
        assert server.record(portrait, {"interrupt": {"call": 1}}, steps=4).answer.status == 200
    assert server.generate().images == vanilla
    assert left_behind(server, before) == {}
    assert unlike_new(server) == {}


@pytest.mark.slow
def test_fifty_requests_leave_no_memory_no_gradient_and_no_graph(server: Client, people: dict[str, str]) -> None:
    portrait, middle = alone(people), None
    for number in range(50):
        assert server.generate(portrait, steps=1).status == 200
        if number == 9:
            middle = server.state()
    after = server.state()
    assert middle is not None and changes(middle, after) == {}
    assert after["rss"] - middle["rss"] < KEPT_BYTES, (middle["rss"], after["rss"])
    assert after["tensors"]["with a gradient"] == after["tensors"]["with a graph"] == 0


@pytest.mark.parametrize("units", ["control", "reference", "both"])
def test_beside_control_networks_in_either_order(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
    units: str,
) -> None:
    client, portrait = server_with_controlnet, alone(people)
    chosen = {"control": [control], "reference": [REFERENCE], "both": [control, REFERENCE]}[units]
    vanilla = client.generate().images
    plain = client.record(sites=(1,), **beside(*chosen))
    scale = plain.tensors["0.out"].std().item()
    found = []
    try:
        for first in ("portrait", "sd-webui-controlnet"):
            assert client.call("/probe/first", {"extension": first}).status == 200
            guided = client.record(portrait, sites=(1,), **beside(*chosen))
            assert guided.answer.status == 200, guided.answer.detail
            assert_eq_11(added(guided, plain), 1, 1, scale)
            found.append(guided.latents())
    finally:
        assert client.call("/probe/first", {"extension": None}).status == 200
    assert difference(*found) < 1e-3
    assert client.generate().images == vanilla


def test_on_top_of_a_method_that_is_in_the_control_network_too(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client, portrait = server_with_controlnet, {**family(people, "ada"), "guidance": GUIDANCE}
    portrait["identities"][0]["region"] = LEFT
    vanilla = client.generate().images
    guided, plain = (client.record(one, sites=(1,), **beside(control)) for one in (portrait, without(portrait)))
    assert guided.answer.status == 200, guided.answer.detail
    assert_eq_11(added(guided, plain), 1, 1, plain.tensors["0.out"].std().item())
    assert len(guided.foreign) == len(plain.foreign) > 0, "the control network is not run for guidance's sake"
    assert client.generate().images == vanilla


def test_beside_a_control_network_the_whole_unet_has_the_gradient(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    """Also the encoder, which ControlNet runs without: one of hardly any weight leaves the guidance as it was."""
    client = server_with_controlnet
    faint = beside({**control, "weight": 1e-4})
    found = []
    for units in ({}, faint):
        plain, guided = (client.record(one, sites=(1,), steps=1, **units) for one in (None, alone(people)))
        assert guided.answer.status == 200, guided.answer.detail
        found.append(added(guided, plain)[("positive", 0)])
    assert (found[0] - found[1]).abs().max() < 0.02 * found[0].abs().max()


def test_the_infotext_brings_the_picture_back(server: Client, people: dict[str, str]) -> None:
    first = server.record(alone(people), sites=())
    infotext = first.answer.info["infotexts"][0]
    assert (
        "Portrait: none; guidance; guidance.strength 0.5; guidance.begin 1; guidance.gradient share | " in infotext
    ), infotext
    assert torch.equal(first.latents(), server.record(sites=(), infotext=infotext).latents())


def test_where_it_acted_is_appended_beside_the_routing_map(server: Client, people: dict[str, str]) -> None:
    shown = {**GUIDANCE, "show": True}
    plain = server.generate(alone(people), batch_size=2)
    assert len(server.generate(alone(people, guidance=shown), batch_size=2).images) == len(plain.images) + 2
    beside_map = {**two(people, show_routing=True), "guidance": shown}
    for identity, region in zip(beside_map["identities"], REGIONS):
        identity["region"] = region
    answer = server.generate(beside_map)
    assert answer.status == 200 and len(answer.images) == 3, answer.detail


def test_a_long_prompt_in_several_calls(server: Client, people: dict[str, str]) -> None:
    latents = [
        server.record(alone(people), sites=(), prompt=LONG, override_settings={"pad_cond_uncond": padded}, steps=2)
        for padded in (True, False)
    ]
    assert [one.answer.status for one in latents] == [200, 200], latents[0].answer.detail


@pytest.fixture(autouse=True, scope="module")
def warm(server: Client, people: dict[str, str]) -> Iterator[None]:
    """Has everything loaded that is loaded at first use."""
    assert server.generate(alone(people)).status == 200
    yield
