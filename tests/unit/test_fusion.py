"""Fusion against its equations, on ldm's and diffusers' layouts: one softmax, several references, several people."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Site, find_sites, mark
from lib_portrait.errors import PortraitError
from lib_portrait.methods.fusion import FaceFusion, FusedIdentity, FusionRule, HiddenStates, hidden_states
from tests.parity.unets import diffusers_unet, ldm_unet

LAYOUTS = ["diffusers", "ldm"]


@pytest.fixture(scope="module", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return diffusers_unet() if request.param == "diffusers" else ldm_unet()


def run(unet: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    with torch.no_grad():
        out = unet(x, torch.full((len(x),), 500), context)
    return out if isinstance(out, Tensor) else out.sample


def text(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 7, 48, generator=torch.Generator().manual_seed(seed))


def latents(rows: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))


def layers(unet: nn.Module) -> FaceFusion:
    torch.manual_seed(5)
    made = FaceFusion.for_sites(find_sites(unet)).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def references(unet: nn.Module, number: int, size: tuple[int, int] = (16, 16)) -> list[HiddenStates]:
    return hidden_states(unet, lambda context: run(unet, latents(number, size, seed=9), context), text(number, seed=8))


def plainly(
    site: Site, fusion: FaceFusion, people: list[FusedIdentity], inside: list[Tensor | None], x: Tensor, c: Tensor
) -> Tensor:
    """Eq. 2 to 7 as they stand, with the whole mask A. inside: (n) bool of each identity's mask, or None."""
    layer = site.module
    hidden = [torch.cat([reference[site.index] for reference in person.references]) for person in people]
    owner = torch.cat([torch.full((c.shape[1],), -1), *(torch.full((len(h),), i) for i, h in enumerate(hidden))])
    keys = torch.cat([layer.to_k(c), *(fusion.of(site).to_k_face(h).expand(len(x), -1, -1) for h in hidden)], dim=1)
    values = torch.cat([layer.to_v(c), *(fusion.of(site).to_v_face(h).expand(len(x), -1, -1) for h in hidden)], dim=1)
    a = torch.zeros(x.shape[1], len(owner))
    for i in range(len(people)):
        for j, mask in enumerate(inside):
            if mask is not None and j != i:
                a[mask[:, None] & (owner == i)] = -math.inf
    q, k, v = (site.split_heads(one) for one in (layer.to_q(x), keys, values))
    attended = (a + q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
    return layer.to_out[0](attended.transpose(1, 2).flatten(2))


CASES = [(people, photos, masks) for people in (1, 2, 5) for photos in (1, 3) for masks in (False, True)]


@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=["square", "oblong"])
@pytest.mark.parametrize(("people", "photos", "masks"), CASES)
def test_every_cross_attention_is_the_equations(
    unet: nn.Module, people: int, photos: int, masks: bool, size: tuple[int, int]
) -> None:
    fusion, states = layers(unet), references(unet, people * photos)
    regions: list[Tensor | None] = [None] * people
    if masks:
        # Halves that overlap in the middle, at a size that is no multiple of anything; the last person has no mask.
        for i in range(max(1, people - 1)):
            region = torch.zeros(37, 53)
            left = 53 * i // people
            region[4:, left : left + 53 // people + 6] = 1
            regions[i] = region
    asked = [FusedIdentity(tuple(states[i * photos : (i + 1) * photos]), regions[i]) for i in range(people)]
    seen: list[tuple[Site, Tensor, Tensor, Tensor]] = []

    class Watched(FusionRule):
        def _fused(self, site, call, state, x, context):  # type: ignore[no-untyped-def]
            out = super()._fused(site, call, state, x, context)
            shape = call.shape_at(site, x.shape[1])
            inside = [None if region is None else in_mask(region, call.latent, shape) for region in regions]
            wanted = plainly(site, fusion, asked, inside, x, context)
            seen.append((site, out, wanted, x))
            return out

    with Injection(unet, Watched(fusion, asked)):
        run(unet, latents(2, size), mark(text(2), POSITIVE))
    assert len(seen) == sum(site.cross for site in find_sites(unet))
    for site, out, wanted, _ in seen:
        assert (out - wanted).abs().max() < 1e-5, site.path


def in_mask(region: Tensor, latent: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    image = nn.functional.interpolate(region[None, None], size=latent, mode="area")
    return nn.functional.interpolate(image, size=shape, mode="bilinear", align_corners=False).flatten() >= 0.5


def test_only_the_rows_that_may_see_the_reference_do(unet: nn.Module) -> None:
    fusion, (reference,) = layers(unet), references(unet, 1)
    x, context = latents(1, (16, 16)).repeat(2, 1, 1, 1), text(1).repeat(2, 1, 1)
    bare = run(unet, x, context)
    marked = torch.cat([mark(context[:1], POSITIVE), mark(context[1:], NEGATIVE)])
    with Injection(unet, FusionRule(fusion, [FusedIdentity((reference,))])):
        out = run(unet, x, marked)
    assert torch.allclose(out[1], bare[1], atol=1e-5)
    assert (out[0] - bare[0]).abs().max() > 1e-2
    with Injection(unet, FusionRule(fusion, [FusedIdentity((reference,))], (POSITIVE, NEGATIVE))):
        out = run(unet, x, marked)
    assert torch.allclose(out[0], out[1], atol=1e-5)
    assert torch.equal(run(unet, x, context), bare), "nothing is left"


def test_the_layouts_agree() -> None:
    made = []
    for unet in (diffusers_unet(), ldm_unet()):
        fusion, states = layers(unet), references(unet, 2, (8, 24))
        region = torch.zeros(8, 8)
        region[:, :4] = 1
        people = [FusedIdentity((states[0],), region), FusedIdentity((states[1],))]
        with Injection(unet, FusionRule(fusion, people)):
            made.append(run(unet, latents(1, (16, 16)), mark(text(1), POSITIVE)))
    assert (made[0] - made[1]).abs().max() < 1e-5


def test_people_out_of_their_time_are_not_seen(unet: nn.Module) -> None:
    fusion, states = layers(unet), references(unet, 2)
    early = FusedIdentity((states[0],), end=0.5)
    x, context = latents(1, (16, 16)), mark(text(1), POSITIVE)

    def at(progress: float, *people: FusedIdentity) -> Tensor:
        injection = Injection(unet, FusionRule(fusion, people))
        injection.progress = progress
        with injection:
            return run(unet, x, context)

    other = FusedIdentity((states[1],))
    assert torch.equal(at(0.7, early), run(unet, x, text(1)))
    assert torch.allclose(at(0.7, early, other), at(0.7, other), atol=1e-6)
    assert (at(0.2, early, other) - at(0.2, other)).abs().max() > 1e-3


def test_training_reaches_the_new_layers_alone_and_twice(unet: nn.Module) -> None:
    """What inference keeps from step to step may not hold a graph: a second backward pass would fail on it."""
    fusion, (reference,) = layers(unet).requires_grad_(True), references(unet, 1)
    unet.requires_grad_(False)
    with Injection(unet, FusionRule(fusion, [FusedIdentity((reference,))])):
        for _ in range(2):
            out = unet(latents(1, (16, 16)), torch.tensor([500]), mark(text(1), POSITIVE))
            (out if isinstance(out, Tensor) else out.sample).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in fusion.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_files_come_back_and_foreign_ones_are_refused(unet: nn.Module) -> None:
    fusion, sites = layers(unet), find_sites(unet)
    tensors = fusion.state_dict()
    again = FaceFusion.from_tensors(tensors)
    again.check_fits(sites)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    name = next(iter(tensors))
    lacking = {key: value for key, value in tensors.items() if key != name}
    for wrong in (
        {**tensors, "7.to_q_face.weight": tensors[name]},
        {**tensors, "x.to_k_face.weight": tensors[name]},
        lacking,
        {**tensors, name: tensors[name][:-1]},
    ):
        with pytest.raises(PortraitError):
            FaceFusion.from_tensors(wrong)
    number = name.partition(".")[0]
    fewer = {key: value for key, value in tensors.items() if not key.startswith(f"{number}.")}
    with pytest.raises(PortraitError, match="another kind of model"):
        FaceFusion.from_tensors(fewer).check_fits(sites)


def test_a_masked_call_is_refused(unet: nn.Module) -> None:
    site = next(site for site in find_sites(unet) if site.cross)
    x = torch.zeros(1, 4, site.channels)
    with pytest.raises(PortraitError, match="attention mask"):
        site.arguments((x, None, torch.ones(1)), {})
    assert site.arguments((x,), {}) == (x, x)
