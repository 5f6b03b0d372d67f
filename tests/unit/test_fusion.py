"""Fusion against its equations, on all layouts: one softmax, several references, several people, two ways to look."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Call, Injection, Row, Site, find_sites, mark
from lib_portrait.attention.rows import REFERENCE
from lib_portrait.attention.schedule import noised
from lib_portrait.errors import PortraitError
from lib_portrait.methods.fusion import STEP, FaceFusion, FusedIdentity, FusionRule, HiddenStates, Properties
from tests.parity.unets import diffusers_unet, ldm_unet, sgm_unet
from tests.unit.test_attention import attributes

LAYOUTS: dict[str, Callable[[], nn.Module]] = {"diffusers": diffusers_unet, "ldm": ldm_unet, "sgm": sgm_unet}
T = 500
WIDTH = 48


@pytest.fixture(scope="module", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return LAYOUTS[request.param]().requires_grad_(False)


def others(unet: nn.Module, rows: int) -> dict[str, Any]:
    return {"y": torch.linspace(-1, 1, 8).expand(rows, 8)} if hasattr(unet, "label_emb") else {}


def run(unet: nn.Module, x: Tensor, context: Tensor, t: float = T) -> Tensor:
    with torch.no_grad():
        out = unet(x, torch.full((len(x),), t), context, **others(unet, len(x)))
    return out if isinstance(out, Tensor) else out.sample


def text(rows: int, seed: int = 0, tokens: int = 7) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def latents(rows: int, size: tuple[int, int] = (16, 16), seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))


def pictures(number: int, size: int = 16) -> list[np.ndarray]:
    return list(np.random.default_rng(4).integers(0, 256, (number, 8 * size, 8 * size, 3), dtype=np.uint8))


class SmallHost:
    """A host whose VAE is the mean of 8 x 8 pixels, and whose prompts are random contexts. calls: of its UNet."""

    alphas_cumprod = torch.linspace(0.999, 0.01, 1000)
    prediction = "epsilon"

    def __init__(self, unet: nn.Module, state: object = "loaded"):
        self.unet, self.state, self.calls = unet, state, 0

    def latent(self, picture: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
        small = nn.functional.avg_pool2d(pixels, 8) * 8
        return torch.cat([small, small.mean(dim=0, keepdim=True)])[None]

    def text(self, prompt: str) -> Any:
        context = text(1, seed=len(prompt), tokens=5)
        return {"crossattn": context, "vector": others(self.unet, 1)["y"]} if others(self.unet, 1) else context

    def call(self, latent: Tensor, t: Tensor, context: Any) -> Tensor:
        self.calls += 1
        context, more = (context, {}) if isinstance(context, Tensor) else (context["crossattn"], context["vector"])
        dtype = next(self.unet.parameters()).dtype
        more = {"y": more} if isinstance(more, Tensor) else {}
        out = self.unet(latent.to(dtype), t, context.to(dtype), **more)
        return out if isinstance(out, Tensor) else out.sample

    def bare(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def adds_to(self, layer: nn.Module) -> bool:
        return False


def adapter(unet: nn.Module, **properties: Any) -> FaceFusion:
    torch.manual_seed(5)
    made = FaceFusion.for_sites(find_sites(unet), Properties(**properties)).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def person(*references: np.ndarray, **where: Any) -> FusedIdentity:
    return FusedIdentity(references, **where)


def prepared(unet: nn.Module, people: Sequence[FusedIdentity], **properties: Any) -> FusionRule:
    rule = FusionRule(adapter(unet, **properties), people)
    rule.prepare(SmallHost(unet))  # type: ignore[arg-type]
    return rule


def fused(unet: nn.Module, people: Sequence[FusedIdentity], x: Tensor, context: Tensor, **properties: Any) -> Tensor:
    with Injection(unet, prepared(unet, people, **properties)):
        return run(unet, x, context)


def plainly(
    site: Site, fusion: FaceFusion, hidden: list[Tensor], inside: list[Tensor | None], x: Tensor, c: Tensor
) -> Tensor:
    """Eq. 2 to 7 as they stand, with the whole mask A. hidden: (m, C) of each identity; inside: (n) bool, or None."""
    layer, keys_of = site.module, fusion.of(site)
    owner = torch.cat([torch.full((c.shape[1],), -1), *(torch.full((len(h),), i) for i, h in enumerate(hidden))])
    keys = torch.cat([layer.to_k(c), *(keys_of.to_k_face(h).expand(len(x), -1, -1) for h in hidden)], dim=1)
    values = torch.cat([layer.to_v(c), *(keys_of.to_v_face(h).expand(len(x), -1, -1) for h in hidden)], dim=1)
    a = torch.zeros(x.shape[1], len(owner))
    for j, mask in enumerate(inside):
        if mask is not None:
            a[mask[:, None] & (owner >= 0) & (owner != j)] = -math.inf
    q, k, v = (site.split_heads(one) for one in (layer.to_q(x), keys, values))
    attended = (a + q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
    return layer.to_out[0](attended.transpose(1, 2).flatten(2))


def entering(unet: nn.Module, x: Tensor, context: Tensor, t: float) -> dict[int, Tensor]:
    """What enters each cross-attention of a bare UNet, by hooks on the layers."""
    found, handles = {}, []
    for site in find_sites(unet):
        if site.cross:

            def keep(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                found[site.index] = site.arguments(args, kwargs)[0]

            handles.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
    run(unet, x, context, t)
    for handle in handles:
        handle.remove()
    return found


def halves(people: int) -> list[Tensor | None]:
    """Masks side by side that overlap, at a size that is no multiple of anything; the last of many has none."""
    masks: list[Tensor | None] = [None] * people
    for i in range(people if people < 3 else people - 1):
        mask = torch.zeros(37, 53)
        mask[4:, 53 * i // people : 53 * i // people + 53 // people + 6] = 1
        masks[i] = mask
    return masks


def in_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """(n) bool: where at least half of a position lies inside, or where most does if nowhere half does."""
    fine = mask.repeat_interleave(shape[0], 0).repeat_interleave(shape[1], 1)[None, None]
    share = nn.functional.avg_pool2d(fine, (mask.shape[0], mask.shape[1])).flatten()
    return share >= min(0.5, float(share.max())) - 1e-6


SIZES = [(16, 16), (16, 24), (24, 16), (8, 40)]
CASES = [(people, photos, masks) for people in (1, 2, 5) for photos in (1, 2, 3) for masks in (False, True)]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
def test_every_cross_attention_is_the_equations(unet: nn.Module, number: int, case: tuple[int, int, bool]) -> None:
    (people, photos, masks), size = case, SIZES[number % len(SIZES)]
    regions = halves(people) if masks else [None] * people
    faces = pictures(people * photos)
    asked = [person(*faces[i * photos : (i + 1) * photos], region=regions[i]) for i in range(people)]
    rule, host = prepared(unet, asked, reference_t=100), SmallHost(unet)
    context = host.text("")
    looks = [
        entering(
            unet,
            noised(host.latent(face), 100, host.alphas_cumprod),
            context if isinstance(context, Tensor) else context["crossattn"],
            100,
        )
        for face in faces
    ]
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for site in (site for site in find_sites(unet) if site.cross):

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Tensor, site: Site = site) -> None:
            inputs[site.index], outputs[site.index] = site.arguments(args, kwargs), out

        handles.append(site.module.register_forward_hook(keep, with_kwargs=True))
    with Injection(unet, rule) as injection:
        run(unet, latents(2, size), mark(text(2), POSITIVE))
    for handle in handles:
        handle.remove()
    assert len(outputs) == sum(site.cross for site in find_sites(unet))
    with torch.no_grad():
        for site in find_sites(unet):
            if site.cross:
                x, c = inputs[site.index]
                hidden = [
                    torch.cat([look[site.index][0] for look in looks[i * photos : (i + 1) * photos]])
                    for i in range(people)
                ]
                shape = injection.call.shape_at(site, x.shape[1])
                inside = [None if region is None else in_mask(region, shape) for region in regions]
                wanted = plainly(site, rule.adapter, hidden, inside, x, c)
                assert (outputs[site.index] - wanted).abs().max() < 1e-5, site.path


def test_masks_lie_on_the_picture_and_not_on_the_part_that_is_sampled(unet: nn.Module) -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    faces = pictures(2)
    rule = prepared(unet, [person(faces[0], region=left), person(faces[1], region=(0.5, 0.0, 1.0, 1.0))])
    x, context = latents(1), mark(text(1), POSITIVE)
    rule.place = (0.0, 0.0, 0.5, 1.0)
    with Injection(unet, rule):
        part = run(unet, x, context)
    alone = fused(unet, [person(faces[0])], x, context)
    assert torch.allclose(part, alone, atol=1e-5)


def test_a_face_smaller_than_half_a_position_is_still_somewhere(unet: nn.Module) -> None:
    faces = pictures(2)
    small = person(faces[0], region=(0.02, 0.02, 0.06, 0.06))
    x, context = latents(1), mark(text(1), POSITIVE)
    everywhere = fused(unet, [person(faces[0]), person(faces[1])], x, context)
    assert (fused(unet, [small, person(faces[1])], x, context) - everywhere).abs().max() > 1e-4


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("t", [300, STEP])
def test_negative_rows_see_the_reference_where_the_weights_say_so(
    unet: nn.Module, negative: bool, t: int | str
) -> None:
    x, context = latents(1).repeat(2, 1, 1, 1), text(1).repeat(2, 1, 1)
    bare = run(unet, x, context)
    marked = torch.cat([mark(context[:1], POSITIVE), mark(context[1:], NEGATIVE)])
    out = fused(unet, [person(*pictures(1))], x, marked, reference_t=t, negative=negative)
    assert (out[0] - bare[0]).abs().max() > 1e-2
    assert torch.allclose(out[1], out[0] if negative else bare[1], atol=1e-5)


def test_nothing_is_left_behind(unet: nn.Module) -> None:
    before, weights = attributes(unet), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    x, context = latents(1), text(1)
    bare = run(unet, x, context)
    for t in (300, STEP):
        rule = prepared(unet, [person(*pictures(1))], reference_t=t)
        with pytest.raises(RuntimeError), Injection(unet, rule):  # a context of a width that no layer takes
            run(unet, x, mark(torch.zeros(1, 3, 5), POSITIVE))
        with Injection(unet, rule):
            run(unet, x, mark(context, POSITIVE))
    assert attributes(unet) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(run(unet, x, context), bare)


# ------------------------------------------------------------------------------------------------ how the UNet looks


@pytest.mark.parametrize("kinds", [(POSITIVE,), (NEGATIVE, POSITIVE), (NEGATIVE, POSITIVE, POSITIVE)])
@pytest.mark.parametrize("people", [1, 2])
def test_references_that_ride_are_seen_as_fixed_ones_of_the_same_noise(
    unet: nn.Module, kinds: tuple[int, ...], people: int
) -> None:
    """Whatever rides beside them: more text tokens than theirs, inputs by name, one timestep for all rows."""
    faces = pictures(3)
    asked = [person(*faces[:2], region=(0.0, 0.0, 0.5, 1.0)), person(faces[2])][:people]
    x, t = latents(len(kinds)), torch.full((len(kinds),), T)
    context = torch.cat([mark(one[None], kind) for kind, one in zip(kinds, text(len(kinds)))])
    fixed = fused(unet, asked, x, context, reference_t=T)
    rule = prepared(unet, asked, reference_t=STEP)
    with Injection(unet, rule) as injection, torch.no_grad():
        riding = run(unet, x, context)
        name = "encoder_hidden_states" if hasattr(unet, "down_blocks") else "context"
        called = unet(x, t[:1] if hasattr(unet, "down_blocks") else t, **{name: context}, **others(unet, len(x)))
    assert riding.shape == x.shape
    assert (riding - fixed).abs().max() < 1e-5
    assert ((called if isinstance(called, Tensor) else called.sample) - fixed).abs().max() < 1e-5
    assert REFERENCE not in injection.calls, "the host has not called the UNet with them"
    assert (fused(unet, asked, x, context, reference_t=100) - fixed).abs().max() > 1e-4


def test_references_ride_at_the_size_of_the_picture(unet: nn.Module) -> None:
    rule = prepared(unet, [person(*pictures(1))], reference_t=STEP)
    with Injection(unet, rule):
        for size in ((16, 24), (24, 16), (8, 8)):
            x, context = latents(1, size), text(1)
            assert (run(unet, x, mark(context, POSITIVE)) - run(unet, x, context)).abs().max() > 1e-3


def test_riding_references_get_no_control_and_their_own_vector() -> None:
    unet = sgm_unet().requires_grad_(False)
    rule = prepared(unet, [person(*pictures(1))], reference_t=STEP)
    rows, call = torch.zeros(2, 3), Call([1, 1], {1: Row(POSITIVE)}, (16, 16))
    args, kwargs = rule.enter(
        call,
        (torch.ones(2, 9, 16, 16), torch.tensor([3.5, 3.5])),
        {"context": text(2), "y": rows.repeat(1, 3)[:, :8], "extra": [rows], "middle_residual": rows + 1},
    )
    assert args[0].shape == (3, 9, 16, 16) and args[0][2, 4:].mean(dim=(1, 2)).tolist() == [1, 0, 0, 0, 0]
    assert args[1].tolist() == [3.5] * 3 and call.kinds == [POSITIVE, POSITIVE, REFERENCE]
    assert torch.equal(kwargs["y"][2], others(unet, 1)["y"][0]) and kwargs["extra"][0].shape == (3, 3)
    assert kwargs["middle_residual"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_a_look_is_kept_by_what_decides_it(unet: nn.Module) -> None:
    one, other = pictures(2)
    fusion = adapter(unet, reference_t=200)

    def calls(picture: np.ndarray, state: object = "loaded") -> int:
        host = SmallHost(unet, state)
        FusionRule(fusion, [person(picture)]).prepare(host)  # type: ignore[arg-type]
        return host.calls

    assert [calls(one), calls(one.copy()), calls(other), calls(one, "other LoRA"), calls(one)] == [1, 0, 1, 1, 0]
    fusion.properties = Properties(reference_t=201)
    assert calls(one) == 1


def test_keys_are_made_once_and_anew_after_another_look(unet: nn.Module) -> None:
    faces = pictures(2)
    rule = prepared(unet, [person(faces[0])])
    made: list[object] = []
    rule.adapter.apply(lambda layer: layer.register_forward_hook(lambda *args: made.append(args)))
    x, context = latents(1), mark(text(1), POSITIVE)
    sites = sum(site.cross for site in find_sites(unet))
    with Injection(unet, rule):
        first = run(unet, x, context)
        assert torch.equal(run(unet, x, context), first) and len(made) == 3 * sites, "a site's, its k_f's and its v_f's"
        rule.prepare(SmallHost(unet, "another model"))  # type: ignore[arg-type]
        run(unet, x, context)
        assert len(made) == 6 * sites


@pytest.mark.parametrize("t", [300, STEP])
def test_the_adapter_stays_where_and_as_it_is_while_the_unet_computes_in_another_precision(t: int | str) -> None:
    unet = diffusers_unet().requires_grad_(False).to(torch.bfloat16)
    rule = prepared(unet, [person(*pictures(1))], reference_t=t)
    x, context = latents(1).bfloat16(), text(1).bfloat16()
    with Injection(unet, rule):
        out = run(unet, x, mark(context, POSITIVE))
    assert out.dtype == torch.bfloat16 and (out - run(unet, x, context)).abs().max() > 1e-2
    assert {parameter.dtype for parameter in rule.adapter.parameters()} == {torch.float32}
    exact = diffusers_unet().requires_grad_(False)
    wanted = fused(exact, [person(*pictures(1))], latents(1), mark(text(1), POSITIVE), reference_t=t)
    assert (out.float() - wanted).abs().max() < 0.1


def test_noise_between_two_timesteps_lies_between_theirs() -> None:
    abar, latent = SmallHost.alphas_cumprod, latents(1)
    low, between, high = (noised(latent, t, abar) for t in (700, 700.5, 701))
    assert torch.equal(noised(latent, 700.0, abar), low)
    # abar^(1/2) x_0 of a latent of ones; the noise is the same for all.
    signal = [float((noised(latent + 1, t, abar) - noised(latent, t, abar)).mean()) for t in (700, 700.5, 701)]
    assert signal[0] == pytest.approx(float(abar[700].sqrt()), abs=1e-5) and signal[0] > signal[1] > signal[2]
    assert (between - low).abs().max() < (high - low).abs().max()


def test_a_model_without_the_references_timestep_is_refused(unet: nn.Module) -> None:
    with pytest.raises(PortraitError, match="timestep 1000"):
        prepared(unet, [person(*pictures(1))], reference_t=1000)


# ------------------------------------------------------------------------------------------------------ people, files


def test_people_take_part_in_their_time_and_with_a_strength(unet: nn.Module) -> None:
    faces = pictures(2)
    x, context = latents(1), mark(text(1), POSITIVE)

    def at(progress: float, *people: FusedIdentity) -> tuple[Tensor, set[int]]:
        rule = prepared(unet, people)
        injection = Injection(unet, rule)
        injection.progress = progress
        with injection:
            return run(unet, x, context), rule.drawn

    early, other = person(faces[0], end=0.5), person(faces[1])
    assert torch.equal(at(0.7, early)[0], run(unet, x, text(1)))
    assert torch.allclose(at(0.7, early, other)[0], at(0.7, other)[0], atol=1e-6)
    assert at(0.7, early, other)[1] == {1} and at(0.2, early, other)[1] == {0, 1}
    assert (at(0.2, early, other)[0] - at(0.2, other)[0]).abs().max() > 1e-3
    left_out = person(faces[0], strength=0.0)
    assert torch.allclose(at(0.2, left_out, other)[0], at(0.2, other)[0], atol=1e-6)


def test_training_reaches_the_new_layers_alone_and_twice(unet: nn.Module) -> None:
    """What inference keeps from step to step may not hold a graph: a second backward pass would fail on it."""
    rule = prepared(unet, [person(*pictures(1))])
    rule.adapter.requires_grad_(True)
    with Injection(unet, rule):
        for _ in range(2):
            out = unet(latents(1), torch.tensor([T]), mark(text(1), POSITIVE), **others(unet, 1))
            (out if isinstance(out, Tensor) else out.sample).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rule.adapter.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())
    with Injection(unet, rule):
        unet(latents(1), torch.tensor([T]), mark(text(1), POSITIVE), **others(unet, 1))
        for parameter in rule.adapter.parameters():
            parameter.data.mul_(1.5)
        after = run(unet, latents(1), mark(text(1), POSITIVE))
    rule.prepare(SmallHost(unet))  # type: ignore[arg-type]
    with Injection(unet, rule):
        assert torch.equal(run(unet, latents(1), mark(text(1), POSITIVE)), after), "no key of older weights is kept"


def test_every_row_may_have_its_own_reference(unet: nn.Module) -> None:
    """As training has it: the rows of one call are then those of calls of one row."""
    fusion, host, table = adapter(unet), SmallHost(unet), {1: Row(POSITIVE), 2: Row(NEGATIVE)}
    looks: list[HiddenStates] = []
    for face in pictures(3):
        FusionRule(fusion, [person(face)]).prepare(host)  # type: ignore[arg-type]
        looks.append(fusion.kept.get(next(reversed(fusion.kept._values))))  # type: ignore[arg-type]
    rule = FusionRule(fusion, [FusedIdentity()])
    x, context = latents(3), torch.cat([mark(one[None], kind) for one, kind in zip(text(3), (1, 2, 1))])
    with Injection(unet, rule, rows=table):
        rule.see([[{site: torch.cat([look[site] for look in looks]) for site in looks[0]}]])
        together = run(unet, x, context)
        for row in range(3):
            rule.see([[looks[row]]])
            alone = run(unet, x[row : row + 1], context[row : row + 1])
            assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_the_layouts_agree() -> None:
    faces, made = pictures(2, 8), []
    for unet in (diffusers_unet(), ldm_unet()):
        people = [person(faces[0], region=(0.0, 0.0, 0.5, 1.0)), person(faces[1])]
        made.append(fused(unet, people, latents(1), mark(text(1), POSITIVE)))
    assert (made[0] - made[1]).abs().max() < 1e-5


def test_files_come_back_and_foreign_ones_are_refused(unet: nn.Module) -> None:
    fusion, sites = adapter(unet), find_sites(unet)
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
        {**tensors, name: tensors[name] * math.nan},
        {},
    ):
        with pytest.raises(PortraitError):
            FaceFusion.from_tensors(wrong)
    number = name.partition(".")[0]
    fewer = {key: value for key, value in tensors.items() if not key.startswith(f"{number}.")}
    with pytest.raises(PortraitError, match="another kind of model"):
        FaceFusion.from_tensors(fewer).check_fits(sites)


def test_how_a_reference_is_seen_stands_in_the_metadata() -> None:
    for properties in (Properties(STEP, "a portrait", 512, True), Properties(17, "", 128, False)):
        stored = properties.to_metadata()
        assert Properties.from_metadata({**stored, "steps": "9"}) == properties
        for name, wrong in (("reference_t", "-1"), ("reference_t", "x"), ("negative", "1"), ("reference_size", "100")):
            with pytest.raises(PortraitError, match="how the reference is seen"):
                Properties.from_metadata({**stored, name: wrong})
            with pytest.raises(PortraitError):
                Properties.from_metadata({key: value for key, value in stored.items() if key != name})
