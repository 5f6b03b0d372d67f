"""InstantFamily against its equations, on all layouts and in the ControlNet: the stack, the masks, the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Row, Site, control_sites, find_sites, mark
from lib_portrait.attention.regions import grown
from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import FaceFeatures
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.methods.base import Placement, method
from lib_portrait.methods.instantfamily import (
    EXCLUDE,
    METHOD,
    MULTIPLY,
    NONE,
    FaceMasks,
    FaceProjections,
    Families,
    FamilyMember,
    FamilyRule,
    Properties,
    masked_attention,
)
from tests.parity.unets import diffusers_unet, ldm_unet, sgm_unet
from tests.unit.test_attention import attributes, control_net, run_control
from tests.unit.test_fusion import in_mask, latents, run, text

LAYOUTS: dict[str, Callable[[], nn.Module]] = {"diffusers": diffusers_unet, "ldm": ldm_unet, "sgm": sgm_unet}
MASKS = (MULTIPLY, EXCLUDE, NONE)
GLOBAL, LOCAL, SIDE = 16, 12, 3
TOKENS = SIDE**2 + 1


@pytest.fixture(scope="module", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return LAYOUTS[request.param]().requires_grad_(False)


def adapter(unet: nn.Module, **properties: Any) -> FaceProjections:
    torch.manual_seed(5)
    made = FaceProjections.for_sites(find_sites(unet), GLOBAL, LOCAL, **{"local_side": SIDE, **properties})
    for parameter in made.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def faces(number: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Embeddings (number, GLOBAL) and local features (number, SIDE^2, LOCAL)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(number, GLOBAL, generator=generator),
        torch.randn(number, SIDE**2, LOCAL, generator=generator),
    )


def overlapping(people: int) -> list[Tensor]:
    """Masks side by side that overlap, at a size that is no multiple of anything."""
    masks = []
    for i in range(people):
        mask = torch.zeros(37, 53)
        mask[4 + i : 30, 53 * i // people : 53 * i // people + 53 // people + 6] = 1
        masks.append(mask)
    return masks


def members(unet: nn.Module, regions: Sequence[Any], seed: int = 3) -> list[FamilyMember]:
    tokens = adapter(unet)(*faces(len(regions), seed))
    return [FamilyMember(own, region) for own, region in zip(tokens, regions, strict=True)]


def rule_of(unet: nn.Module, regions: Sequence[Any], mask: str = MULTIPLY, seed: int = 3) -> FamilyRule:
    return FamilyRule(adapter(unet), members(unet, regions, seed), mask)


def plain_tokens(projections: FaceProjections, embedding: Tensor, local: Tensor) -> Tensor:
    """K_fn of sec. 3.3, one token after the other."""

    def projected(name: str, feature: Tensor) -> Tensor:
        weights = {key.removeprefix(f"{name}."): w for key, w in projections.state_dict().items() if name in key}
        token = weights["0.weight"] @ feature
        token = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        return token * weights["1.weight"] + weights["1.bias"]

    return torch.stack([projected("global_proj", embedding), *(projected("local_proj", one) for one in local)])


def plainly(site: Site, stack: list[Tensor], inside: list[Tensor], x: Tensor, c: Tensor, mask: str) -> Tensor:
    """Eq. 4 to 7 as they stand, with the whole mask M. stack: K_fn (T, D) of each face; inside: M_fn (n)."""
    layer, rows = site.module, len(x)
    whole = torch.cat([c, *(tokens.expand(rows, -1, -1) for tokens in stack)], dim=1)
    m = torch.ones(x.shape[1], whole.shape[1])
    for i, own in enumerate(inside):
        start = c.shape[1] + i * TOKENS
        m[:, start : start + TOKENS] = own[:, None].float()
    q, k, v = (site.split_heads(one) for one in (layer.to_q(x), layer.to_k(whole), layer.to_v(whole)))
    logits = q @ k.transpose(2, 3)
    if mask == MULTIPLY:
        logits = m * logits
    elif mask == EXCLUDE:
        logits = logits.masked_fill(m == 0, -math.inf)
    attended = (logits / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
    return layer.to_out[0](attended.transpose(1, 2).flatten(2))


def watched(sites: Sequence[Site]) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor], list[Any]]:
    """What enters and leaves each cross-attention, by site number, from now on, and the hooks that see it."""
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for site in (site for site in sites if site.cross):

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Tensor, site: Site = site) -> None:
            inputs[site.index], outputs[site.index] = site.arguments(args, kwargs), out

        handles.append(site.module.register_forward_hook(keep, with_kwargs=True))
    return inputs, outputs, handles


def test_the_stack_is_one_global_and_the_local_tokens_of_each_face(unet: nn.Module) -> None:
    projections, (embedding, local) = adapter(unet), faces(4)
    made = projections(embedding, local)
    assert made.shape == (4, TOKENS, 48)
    for i in range(4):
        torch.testing.assert_close(made[i], plain_tokens(projections, embedding[i], local[i]), atol=1e-5, rtol=0)


SIZES = [(16, 16), (16, 24), (24, 16), (8, 40)]
CASES = [(people, mask) for people in (1, 4, 7) for mask in MASKS]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
def test_every_cross_attention_is_the_equations(unet: nn.Module, number: int, case: tuple[int, str]) -> None:
    (people, mask), size = case, SIZES[number % len(SIZES)]
    regions: list[Any] = overlapping(people)
    if people == 7:
        regions[6] = (0.05, 0.05, 0.09, 0.09)
    rule = rule_of(unet, regions, mask)
    sites = find_sites(unet)
    inputs, outputs, handles = watched(sites)
    with Injection(unet, rule) as injection:
        run(unet, latents(3, size), mark(text(3), [POSITIVE, NEGATIVE, POSITIVE]))
    for handle in handles:
        handle.remove()
    assert rule.drawn == set(range(people)) and len(outputs) == sum(site.cross for site in sites)
    stack = [one.tokens for one in rule.people]
    with torch.no_grad():
        for site in (site for site in sites if site.cross):
            x, c = inputs[site.index]
            shape = injection.call.shape_at(site, x.shape[1])
            boxes = [torch.zeros(400, 400) if isinstance(one, tuple) else one for one in regions]
            if people == 7:
                boxes[6][20:36, 20:36] = 1
            inside = [in_mask(one, shape) for one in boxes]
            wanted = plainly(site, stack, inside, x, c, mask)
            wanted[1] = plainly(site, [], [], x[1:2], c[1:2], mask)[0]
            assert (outputs[site.index] - wanted).abs().max() < 1e-5, site.path


@pytest.mark.parametrize("kind", ["diffusers", "ldm", "plugable"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_cross_attention_of_the_control_net_is_the_equations(kind: str, mask: str) -> None:
    control, unet = control_net(kind)
    control.requires_grad_(False)
    regions = overlapping(3)
    rule, sites = rule_of(unet, regions, mask), control_sites(control, unet)
    before = attributes(control)
    inputs, outputs, handles = watched(sites)
    with Injection(control, rule, sites=sites) as injection:
        run_control(control, mark(text(2), [POSITIVE, NEGATIVE]))
    for handle in handles:
        handle.remove()
    assert len(outputs) == 7 and attributes(control) == before
    for site in (site for site in sites if site.cross):
        x, c = inputs[site.index]
        inside = [in_mask(one, injection.call.shape_at(site, x.shape[1])) for one in regions]
        wanted = plainly(site, [one.tokens for one in rule.people], inside, x, c, mask)
        wanted[1] = plainly(site, [], [], x[1:2], c[1:2], mask)[0]
        assert (outputs[site.index] - wanted).abs().max() < 1e-5, site.path


def test_one_rule_stands_in_the_unet_and_in_a_control_net_called_within_it() -> None:
    control, unet = control_net("plugable")
    inside, seen = unet.forward, []

    def forward(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(run_control(control, context))
        return inside(x, t, context)

    unet.forward = forward
    plain, clean = run_control(control, text(2)), run(unet, latents(2), text(2))
    rule = rule_of(unet, overlapping(2))
    outer = Injection(unet, rule)
    inner = Injection(control, rule, sites=control_sites(control, unet), within=outer)
    seen.clear()
    with outer, inner:
        changed = run(unet, latents(2), mark(text(2), [POSITIVE, NEGATIVE]))
    assert (seen[0][-1][0] - plain[-1][0]).abs().max() > 1e-2
    torch.testing.assert_close(seen[0][-1][1], plain[-1][1], atol=1e-4, rtol=1e-4)
    assert (changed[0] - clean[0]).abs().max() > 1e-2
    torch.testing.assert_close(changed[1], clean[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_rows_with_faces_of_their_own_see_what_requests_do(unet: nn.Module, mask: str, size: tuple[int, int]) -> None:
    """As in training: three faces, two and none; where a row has none, its stack is the text."""
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.25, 0.25, 0.75, 1.0), (0.5, 0.0, 1.0, 0.5)]
    shares = torch.zeros(3, *size)
    h, w = size
    shares[0, :, : w // 2] = shares[1, h // 4 :, w // 4 : 3 * w // 4] = shares[2, : h // 2, w // 2 :] = 1
    counts, x, context = (3, 2, 0), latents(3, size), text(3)
    tokens = torch.stack([adapter(unet)(*faces(3, seed)) for seed in (11, 12, 13)])
    rule = FamilyRule(adapter(unet), mask=mask)
    rule.families = Families(tokens, torch.arange(3) < torch.tensor(counts)[:, None], shares.expand(3, -1, -1, -1))
    with Injection(unet, rule):
        together = run(unet, x, mark(context, POSITIVE))
    for row, count in enumerate(counts):
        own = [FamilyMember(one, box) for one, box in zip(tokens[row, :count], boxes)]
        with Injection(unet, FamilyRule(adapter(unet), own, mask)):
            alone = run(unet, x[row : row + 1], mark(context[row : row + 1], POSITIVE))
        if count == 0:
            alone = run(unet, x[row : row + 1], context[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < 2e-5


def test_what_is_computed_by_parts_has_the_gradient_of_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    q, k, v, key, value = (
        random(2, 3, 20, 4),
        random(2, 3, 5, 4),
        random(2, 3, 5, 4),
        *(random(1, 3, 2, 6, 4) for _ in range(2)),
    )
    inside = torch.rand(1, 2, 20, generator=generator) > 0.5
    for mask in MASKS:
        found = []
        for masks in (FaceMasks(inside), FaceMasks(inside.expand(2, -1, -1))):
            out = masked_attention(q, k, v, key, value, masks, mask)
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, key, value))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_no_mask_of_all_positions_and_keys_is_made(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        given.append(attn_mask)
        return original(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with Injection(unet, rule_of(unet, overlapping(4))):
        run(unet, latents(1), mark(text(1), POSITIVE))
    assert given and all(one is None for one in given)


def test_keys_are_made_once_and_anew_when_the_hosts_weights_change(unet: nn.Module) -> None:
    rule = rule_of(unet, overlapping(2))
    site = next(site for site in find_sites(unet) if site.cross)
    made: list[int] = []
    handle = site.module.to_k.register_forward_hook(lambda module, args, out: made.append(args[0].shape[1]))
    state = ["a"]
    x, context = latents(1), mark(text(1), POSITIVE)
    length = context.shape[1] - 1
    weight = site.module.to_k.weight
    with Injection(unet, rule, host_state=lambda: state[0]):
        first = run(unet, x, context)
        run(unet, x, context)
        assert made.count(2 * TOKENS) == 1 and made.count(length) == 2
        state[0] = "b"
        run(unet, x, context)
        assert made.count(2 * TOKENS) == 2
        kept = weight.clone()
        weight.mul_(1.5)
        changed = run(unet, x, context)
        weight.copy_(kept)
        assert made.count(2 * TOKENS) == 3
        assert torch.equal(run(unet, x, context), first)
    handle.remove()
    assert (changed - first).abs().max() > 1e-4


def test_a_lora_on_the_hosts_layers_is_in_the_faces_keys_and_values(unet: nn.Module) -> None:
    """However it is put there: a hook, or a forward of the instance, as hosts do."""
    site = [site for site in find_sites(unet) if site.cross][2]
    low = torch.randn(site.inner, site.context, generator=torch.Generator().manual_seed(1)) * 0.3
    regions = overlapping(2)
    for name in ("to_k", "to_v"):
        rule, layer = rule_of(unet, regions), getattr(site.module, name)
        hook = layer.register_forward_hook(lambda module, args, out: out + args[0] @ low.T)
        inputs, outputs, handles = watched([site])
        with Injection(unet, rule) as injection:
            run(unet, latents(1), mark(text(1), POSITIVE))
        for handle in handles:
            handle.remove()
        x, c = inputs[site.index]
        inside = [in_mask(one, injection.call.shape_at(site, x.shape[1])) for one in regions]
        wanted = plainly(site, [one.tokens for one in rule.people], inside, x, c, MULTIPLY)
        hook.remove()
        assert (outputs[site.index] - wanted).abs().max() < 1e-5
        assert (wanted - plainly(site, [one.tokens for one in rule.people], inside, x, c, MULTIPLY)).abs().max() > 1e-3


def test_people_come_and_go_with_their_windows(unet: nn.Module) -> None:
    tokens, (left, right) = adapter(unet)(*faces(2)), ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    people = [FamilyMember(tokens[0], left, end=0.5), FamilyMember(tokens[1], right, start=0.25)]
    x, context = latents(1), mark(text(1), POSITIVE)

    def at(progress: float, *who: FamilyMember) -> Tensor:
        with Injection(unet, FamilyRule(adapter(unet), who)) as injection:
            injection.progress = progress
            return run(unet, x, context)

    rule = FamilyRule(adapter(unet), people)
    always = [FamilyMember(one.tokens, one.region) for one in people]
    with Injection(unet, rule) as injection:
        for progress, who in ((0.0, always[:1]), (0.3, always), (0.6, always[1:]), (0.3, always)):
            injection.progress = progress
            assert (run(unet, x, context) - at(0.0, *who)).abs().max() < 1e-6
    assert rule.drawn == {0, 1}


def test_masks_lie_on_the_picture_and_not_on_the_part_that_is_sampled(unet: nn.Module) -> None:
    rule = rule_of(unet, [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], EXCLUDE)
    x, context = latents(1), mark(text(1), POSITIVE)
    rule.place = (0.0, 0.0, 0.5, 1.0)
    with Injection(unet, rule):
        part = run(unet, x, context)
    with Injection(unet, FamilyRule(rule.adapter, [FamilyMember(rule.people[0].tokens)], EXCLUDE)):
        assert (run(unet, x, context) - part).abs().max() < 1e-5


def test_nothing_is_left_behind(unet: nn.Module) -> None:
    before, weights = attributes(unet), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    x, context = latents(1), text(1)
    bare = run(unet, x, context)
    with pytest.raises(RuntimeError), Injection(unet, rule_of(unet, overlapping(2))):
        run(unet, x, mark(torch.zeros(1, 3, 5), POSITIVE))
    with Injection(unet, rule_of(unet, overlapping(2))):
        assert torch.equal(run(unet, x, mark(context, NEGATIVE)), bare)
        run(unet, x, mark(context, POSITIVE))
    assert attributes(unet) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(run(unet, x, context), bare)


# ------------------------------------------------------------------------------------------------------- the method


class SmallReference:
    def __init__(self, embedding: Tensor, local: Tensor):
        self.features = FaceFeatures(local, torch.empty(0, 0), embedding)


def encoded(unet: nn.Module, photos: Sequence[tuple[Tensor, Tensor]], region: Any = None, **own: Any) -> FamilyMember:
    references = tuple(SmallReference(*photo) for photo in photos)
    placement = Placement(region, 0.1, 0.9)
    return METHOD.encode(adapter(unet), IdentityFaces(references), {"mask": MULTIPLY}, own, placement)  # type: ignore[arg-type]


def test_photos_of_one_person_are_averaged_and_boxes_grown(unet: nn.Module) -> None:
    embedding, local = faces(2)
    drawn = torch.ones(5, 7)
    alone, both = (encoded(unet, list(zip(embedding[:n], local[:n])), (0.2, 0.2, 0.6, 0.4)) for n in (1, 2))
    directions = embedding / embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(alone.tokens, adapter(unet)(directions[0], local[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        both.tokens, adapter(unet)(directions.mean(dim=0), local.mean(dim=0)), atol=1e-5, rtol=1e-5
    )
    assert np.allclose(both.region, (0.15, 0.175, 0.65, 0.425)) and (both.start, both.end) == (0.1, 0.9)
    assert encoded(unet, [(embedding[0], local[0])], drawn).region is drawn
    assert grown((0.0, 0.0, 1.0, 1.0), 1.0) == (-0.5, -0.5, 1.5, 1.5)


def test_several_people_need_places(unet: nn.Module) -> None:
    people = members(unet, [(0.0, 0.0, 0.5, 1.0), None])
    for mask in (MULTIPLY, EXCLUDE):
        with pytest.raises(PortraitError, match=r"has no place") as caught:
            METHOD.rule(adapter(unet), people, {"mask": mask})
        assert caught.value.field == "identities[1].region"
    assert METHOD.rule(adapter(unet), people, {"mask": NONE}).mask == NONE
    assert METHOD.rule(adapter(unet), people[1:], {"mask": EXCLUDE}).mask == EXCLUDE
    assert method("instantfamily") is METHOD


def test_the_file_brings_back_what_was_trained(unet: nn.Module) -> None:
    one = adapter(unet, margin=0.5, colours=("0000ff", "00ff00"))
    tensors, metadata = one.state_dict(), one.properties.to_metadata()
    back = FaceProjections.from_tensors(tensors, Properties.from_metadata(metadata))
    assert back.properties == one.properties
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.state_dict().items())
    assert back.widths == {"embedding": GLOBAL, "intrinsic": LOCAL}
    assert METHOD.text_attentions(back) == {
        "to_k": [tuple(site.module.to_k.weight.shape) for site in find_sites(unet) if site.cross]
    }
    back.check_fits(find_sites(unet))


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_side": "0"},
        {"local_side": "many"},
        {"margin": "-1"},
        {"margin": "nan"},
        {"inner": ""},
        {"colours": "ff0000 red"},
        {"colours": ""},
        {"circle": "7"},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(wrong: dict[str, str]) -> None:
    good = Properties(inner=(8, 16)).to_metadata()
    assert Properties.from_metadata(good) == Properties(inner=(8, 16))
    with pytest.raises(PortraitError, match=r"file\.safetensors.*metadata"):
        Properties.from_metadata({**good, **wrong}, "file.safetensors")
    for name in wrong:
        with pytest.raises(PortraitError, match=name):
            Properties.from_metadata({key: value for key, value in good.items() if key != name})


def test_tensors_that_are_no_projections_are_refused(unet: nn.Module) -> None:
    one = adapter(unet)
    good = one.state_dict()

    def refused(match: str, **changes: Any) -> None:
        tensors = {**good, **changes}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(PortraitError, match=match):
            FaceProjections.from_tensors(tensors, one.properties, "file")

    refused("no key", other=torch.zeros(1))
    refused(r"local_proj\.0\.weight is missing", **{"local_proj.0.weight": None})
    refused(r"local_proj\.0\.weight has the shape", **{"local_proj.0.weight": torch.zeros(47, 12)})
    refused(r"global_proj\.1\.bias has the shape", **{"global_proj.1.bias": torch.zeros(47)})
    refused(r"global_proj\.0\.weight", **{"global_proj.0.weight": torch.full((48, GLOBAL), torch.nan)})


def test_another_kind_of_model_and_other_features_are_refused(unet: nn.Module) -> None:
    one = adapter(unet)
    narrow = FaceProjections(GLOBAL, LOCAL, 40, one.properties)
    short = FaceProjections(GLOBAL, LOCAL, 48, Properties(inner=one.properties.inner[1:]))
    other = FaceProjections(GLOBAL, LOCAL, 48, Properties(inner=(8, *one.properties.inner[1:])))
    for wrong, match in ((narrow, "width 40"), (short, "one with"), (other, "and other layers")):
        with pytest.raises(PortraitError, match=match):
            wrong.check_fits(find_sites(unet))
    embedding, local = faces(1)
    with pytest.raises(PortraitError, match=r"3x3 local features.*gives 8"):
        encoded(unet, [(embedding[0], local[0, :8])])


def test_rows_that_were_split_are_refused(unet: nn.Module) -> None:
    site = next(site for site in find_sites(unet) if site.cross)
    inside = site.module.forward
    rule = rule_of(unet, overlapping(2))
    with pytest.raises(PortraitError, match="sees 1 rows"), Injection(unet, rule) as injection:
        injection.rows = {1: Row(POSITIVE)}
        ours = site.module.forward
        try:
            site.module.forward = lambda x, *args, **kwargs: ours(x[:1], *args, **kwargs)
            run(unet, latents(2), mark(text(2), POSITIVE))
        finally:
            site.module.forward = ours
    assert site.module.forward == inside


# ------------------------------------------------------------------------------------------------- without the WebUI


@torch.no_grad()
def test_a_control_net_is_told_of_people_in_standalone_sampling_where_it_was_trained_with_them() -> None:
    from types import SimpleNamespace

    from diffusers import ControlNetModel

    from lib_portrait.standalone.control import Control
    from lib_portrait.standalone.sampling import Sampling, sample
    from tests.small_networks import small_model

    model = small_model()
    network = ControlNetModel.from_unet(model.unet).eval()
    for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        convolution.weight.normal_(generator=torch.Generator().manual_seed(6))
    before = attributes(network), attributes(model.unet)
    people = members(model.unet, [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)])
    conditioning: Any = SimpleNamespace(
        people=people,
        guidance=lambda rule: None,
        check_fits=lambda sites: None,
        rule=lambda routing: FamilyRule(adapter(model.unet), people),
    )
    asked = [Sampling("a woman and a man", "blurry", 64, 64, steps=2, seed=seed) for seed in (1, 2)]
    contexts: list[Tensor] = []
    site = next(site for site in control_sites(network, model.unet) if site.cross)
    site.module.to_k.register_forward_hook(lambda module, args, out: contexts.append(args[0]))
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    drawn = {}
    for name, control in (
        ("none", None),
        ("trained", Control(network, picture)),
        ("another", Control(network, picture, trained=False)),
        ("bare", Control(network, picture, weight=0.0)),
    ):
        contexts.clear()
        drawn[name] = np.stack(sample(model, asked, conditioning, control=control)).astype(int)
        seen = {one.shape[1] for one in contexts}
        assert seen == {"none": set(), "trained": {77, 2 * TOKENS}, "bare": {77, 2 * TOKENS}}.get(name, {77})
    assert np.array_equal(drawn["none"], drawn["bare"])
    assert (
        np.abs(drawn["trained"] - drawn["none"]).mean() > 1 and np.abs(drawn["trained"] - drawn["another"]).mean() > 0.1
    )
    site.module.to_k._forward_hooks.clear()
    assert (attributes(network), attributes(model.unet)) == before
