"""Promises of the UniPortrait rule that parity does not cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, RoutingMaps, Row, Site, find_sites, mark
from lib_portrait.attention.injection import Call
from lib_portrait.attention.lora import FusedLinear
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import STRETCH, all_finite
from lib_portrait.methods.uniportrait import (
    ROUTER_LAYERS,
    Adapter,
    BatchRule,
    IDEmbedding,
    Identities,
    Person,
    SiteLayers,
    UniPortraitRule,
    interpolate,
)
from tests.parity.unets import diffusers_unet, flatten, ldm_unet, load_bin
from tests.unit.test_attention import attributes

TOKENS, WIDTH = 4, 48


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return ldm_unet()


def files() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return flatten(load_bin("uniportrait-faceid_small.bin")), flatten(load_bin("uniportrait-router_small.bin"))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter.from_tensors(*files())


def tokens(seed: int, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def person(seed: int, **kwargs) -> Person:
    return Person({POSITIVE: tokens(seed), NEGATIVE: tokens(99)}, **kwargs)


def run(unet: nn.Module, kinds: tuple[int, ...] = (POSITIVE, NEGATIVE), size=(16, 16), dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 4, *size, generator=generator).to(dtype)
    text = torch.randn(1, 9, WIDTH, generator=generator).to(dtype)
    context = torch.cat([mark(text, kind) for kind in kinds])
    with torch.no_grad():
        return unet(x.expand(len(kinds), -1, -1, -1), torch.tensor([500] * len(kinds)), context)


def with_people(unet: nn.Module, adapter: Adapter, people: list[Person], progress: float = 0.5, **kwargs):
    size = kwargs.pop("size", (16, 16))
    kinds = kwargs.pop("kinds", (POSITIVE, NEGATIVE))
    with Injection(unet, UniPortraitRule(adapter, people, **kwargs)) as injection:
        injection.progress = progress
        return run(unet, kinds, size)


def test_people_change_their_rows_and_only_by_their_own_tokens(unet, adapter) -> None:
    one, other = (with_people(unet, adapter, [person(seed)]) for seed in (1, 2))
    assert (one[0] - other[0]).abs().max() > 1e-3, "two people must differ in the positive row"
    assert torch.equal(one[1], other[1]), "the negative row knows the unconditional tokens only"
    changed = Person({POSITIVE: tokens(1), NEGATIVE: tokens(98)})
    third = with_people(unet, adapter, [changed])
    assert torch.equal(one[0], third[0])
    assert (one[1] - third[1]).abs().max() > 1e-3


def test_rows_may_come_in_any_order_and_number(unet, adapter) -> None:
    people = [person(1), person(2)]
    both = with_people(unet, adapter, people)
    for kinds in [(NEGATIVE, POSITIVE), (POSITIVE,), (NEGATIVE,), (POSITIVE, POSITIVE, NEGATIVE, POSITIVE)]:
        found = with_people(unet, adapter, people, kinds=kinds)
        for row, kind in enumerate(kinds):
            assert torch.allclose(found[row], both[0 if kind == POSITIVE else 1], atol=1e-5)


def test_out_of_range_people_are_absent_and_outside_all_ranges_the_unet_is_bare(unet, adapter) -> None:
    bare = with_people(unet, adapter, [person(1, scale=0.0)], lora_scale=0.0)
    early, late = person(1, end=0.4), person(2, start=0.4)
    assert torch.equal(with_people(unet, adapter, [early], progress=0.5), bare)
    assert not torch.allclose(with_people(unet, adapter, [early], progress=0.3), bare)
    pair = [early, late]
    rule = UniPortraitRule(adapter, pair)
    with Injection(unet, rule) as injection:
        outs = []
        for progress in (0.1, 0.9, 0.1):
            injection.progress = progress
            outs.append(run(unet))
    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[1])
    assert torch.equal(with_people(unet, adapter, [person(1)], progress=1.0), with_people(unet, adapter, [person(1)]))


def half(left: bool) -> torch.Tensor:
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    return mask if left else mask.flip(1)


def attention_of(unet: nn.Module, adapter: Adapter, people: list[Person], site_index: int, **kwargs) -> torch.Tensor:
    """What enters the output projection of one cross-attention, minus what enters it without people: (n, inner)."""
    site = [site for site in find_sites(unet) if site.cross][site_index]
    seen: list[torch.Tensor] = []
    for scales in ([0.0] * len(people), None):
        chosen = [Person(p.tokens, p.scale if scales is None else 0.0, p.start, p.end, p.region) for p in people]
        original = type(site.module.to_out[0]).forward
        with Injection(unet, UniPortraitRule(adapter, chosen, lora_scale=0.0, **kwargs)):
            ours = site.module.to_out[0].forward
            inner = ours.host
            ours.host = lambda x, inner=inner: (seen.append(x[:1].clone()), inner(x))[1]
            run(unet, (POSITIVE,))
        assert type(site.module.to_out[0]).forward is original
    return (seen[1] - seen[0])[0]


def test_regions_separate_people(unet, adapter) -> None:
    """At the first site (nothing upstream mixes positions yet) each half sees its own person, exactly."""
    left, right = person(1, region=half(True)), person(2, region=half(False))
    both = attention_of(unet, adapter, [left, right], 0).view(16, 16, -1)
    swapped = attention_of(unet, adapter, [person(2, region=half(True)), person(1, region=half(False))], 0)
    alone = [attention_of(unet, adapter, [person(seed)], 0).view(16, 16, -1) for seed in (1, 2)]
    assert torch.allclose(both[:, :8], alone[0][:, :8], atol=1e-5)
    assert torch.allclose(both[:, 8:], alone[1][:, 8:], atol=1e-5)
    assert torch.allclose(swapped.view(16, 16, -1)[:, :8], alone[1][:, :8], atol=1e-5)


def test_a_single_region_leaves_the_rest_alone_and_free_people_get_the_rest(unet, adapter) -> None:
    alone = attention_of(unet, adapter, [person(1, region=half(True))], 0).view(16, 16, -1)
    assert alone[:, :8].abs().max() > 1e-3
    assert alone[:, 8:].abs().max() == 0
    mixed = attention_of(unet, adapter, [person(1, region=half(True)), person(2)], 0).view(16, 16, -1)
    free = attention_of(unet, adapter, [person(2)], 0).view(16, 16, -1)
    assert torch.allclose(mixed[:, :8], alone[:, :8], atol=1e-5)
    assert torch.allclose(mixed[:, 8:], free[:, 8:], atol=1e-5)


def shares_of(unet: nn.Module, adapter: Adapter, people: list[Person]) -> torch.Tensor:
    """How much of each position each person has at the first site: (N, 16, 16)."""
    maps = RoutingMaps(keep_all=True)
    with_people(unet, adapter, people, routing=maps)
    return maps.maps[(1, 0.5, 0)]


def test_a_mask_s_grey_is_a_share_and_the_rest_is_nobody_s(unet, adapter) -> None:
    mask = half(True) + (3 / 255) * half(False)
    alone = attention_of(unet, adapter, [person(1)], 0).view(16, 16, -1)
    grey = attention_of(unet, adapter, [person(1, region=mask)], 0).view(16, 16, -1)
    assert torch.allclose(grey[:, :8], alone[:, :8], atol=1e-5)
    assert torch.allclose(grey[:, 8:], alone[:, 8:] * 3 / 255, atol=1e-5)
    soft = torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(shares_of(unet, adapter, [person(1, region=soft)])[0], soft, atol=1e-5)
    pair = shares_of(unet, adapter, [person(1, region=soft * 0.5), person(2, region=(1 - soft) * 0.5)])
    assert torch.allclose(pair, torch.stack([soft, 1 - soft]) * 0.5, atol=1e-5)


def test_what_a_grey_leaves_goes_to_those_without_a_region(unet, adapter) -> None:
    soft = torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    pair = shares_of(unet, adapter, [person(1, region=soft), person(2)])
    assert torch.allclose(pair, torch.stack([soft, 1 - soft]), atol=1e-5)
    trio = shares_of(unet, adapter, [person(1, region=soft), person(2), person(3)])
    assert torch.allclose(trio[0], soft, atol=1e-5)
    assert torch.allclose(trio[1:].amax(dim=0), 1 - soft, atol=1e-5), "one of the two, not a bit of both"


def test_where_regions_overlap_routing_decides_between_those_who_claim_the_position(unet, adapter) -> None:
    everywhere = torch.ones(16, 16)
    routed = shares_of(unet, adapter, [person(1), person(2)])
    both = shares_of(unet, adapter, [person(1, region=everywhere), person(2, region=everywhere)])
    assert torch.equal(both, routed)
    left, third = half(True), person(3, region=half(False))
    trio = shares_of(unet, adapter, [person(1, region=left), person(2, region=everywhere), third])
    assert ((trio == 0) | (trio == 1)).all()
    assert torch.equal(trio.sum(dim=0), everywhere)
    assert trio[2, :, :8].max() == 0, "who does not claim a position is not chosen for it"
    assert torch.equal(trio[:2, :, :8], routed[:, :, :8])
    assert trio[0, :, 8:].max() == 0
    # A faint claim that wins takes no more than it claims.
    faint = shares_of(unet, adapter, [person(1, region=everywhere * 0.1), person(2, region=everywhere)])
    won = routed[0] == 1
    assert torch.allclose(faint[0][won], torch.full((int(won.sum()),), 0.1), atol=1e-5)
    assert faint[0][~won].max() == 0
    assert torch.allclose(faint.sum(dim=0), everywhere, atol=1e-5)


def test_unconditional_rows_have_the_same_total_where_regions_overlap(unet, adapter) -> None:
    """They cannot be routed: their tokens are equal. A position that somebody has in whole must have them in whole."""
    one, two = 0.5 + torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(4)) / 2
    pair = [person(1, region=one), person(2, region=two)]
    single = [person(1, region=torch.ones(16, 16)), person(2, region=torch.zeros(16, 16))]
    negative = [with_people(unet, adapter, people, kinds=(NEGATIVE,)) for people in (pair, single)]
    assert torch.allclose(negative[0], negative[1], atol=1e-4)
    everywhere = torch.ones(16, 16)
    unlike, alike = (
        [person(seed, region=everywhere, scale=scale) for seed, scale in zip((1, 2), scales)]
        for scales in ((0.2, 1.0), (0.6, 0.6))
    )
    negative = [with_people(unet, adapter, people, kinds=(NEGATIVE,)) for people in (unlike, alike)]
    assert torch.allclose(negative[0], negative[1], atol=1e-4), "neither of two who cannot be told apart comes first"


def test_regions_follow_the_part_of_the_picture_that_is_sampled(unet, adapter) -> None:
    """The left half of the picture alone is sampled: all of it is the first person's."""
    rule = UniPortraitRule(
        adapter, [person(1, region=(0.0, 0.0, 0.5, 1.0)), person(2, region=half(False))], routing=RoutingMaps()
    )
    with Injection(unet, rule):
        for place, expected in (((0.0, 0.0, 0.5, 1.0), [1.0, 0.0]), ((0.5, 0.5, 1.0, 1.0), [0.0, 1.0])):
            rule.place = place
            rule.routing = RoutingMaps()
            run(unet)
            mean = rule.routing.mean()
            assert mean is not None
            assert torch.allclose(mean.mean(dim=(0, 2, 3)), torch.tensor(expected), atol=1e-6)


def test_scales_are_per_person(unet, adapter) -> None:
    left, right = person(1, region=half(True)), person(2, region=half(False))
    both = attention_of(unet, adapter, [left, right], 0)
    scaled = attention_of(unet, adapter, [left, person(2, region=half(False), scale=0.5)], 0)
    assert torch.allclose(scaled.view(16, 16, -1)[:, :8], both.view(16, 16, -1)[:, :8], atol=1e-5)
    assert torch.allclose(scaled.view(16, 16, -1)[:, 8:], both.view(16, 16, -1)[:, 8:] * 0.5, atol=1e-5)


def test_every_position_attends_to_exactly_one_routed_person(unet, adapter) -> None:
    pair = attention_of(unet, adapter, [person(1), person(2)], 0)
    alone = [attention_of(unet, adapter, [person(seed)], 0) for seed in (1, 2)]
    distance = torch.stack([(pair - one).abs().amax(dim=1) for one in alone])
    assert (distance.min(dim=0).values < 1e-5).all()
    assert (distance.argmin(dim=0).bincount(minlength=2) > 0).all(), "this case must route to both"


def test_routing_maps_are_given_per_site_and_step_and_averaged(unet, adapter) -> None:
    maps = RoutingMaps(keep_all=True)
    rule = UniPortraitRule(adapter, [person(1), person(2), person(3)], routing=maps)
    with Injection(unet, rule) as injection:
        for progress in (0.0, 0.5):
            injection.progress = progress
            run(unet, (POSITIVE, NEGATIVE), (16, 24))
    cross = [site.index for site in find_sites(unet) if site.cross]
    assert sorted(maps.maps) == sorted((index, progress, 0) for index in cross for progress in (0.0, 0.5))
    assert {tuple(each.shape) for each in maps.maps.values()} == {(3, 16, 24), (3, 8, 12), (3, 4, 6), (3, 2, 3)}
    # What was chosen (eq. 2), not how surely: a position is somebody's in whole.
    assert all(((each == 0) | (each == 1)).all() for each in maps.maps.values())
    mean = maps.mean()
    assert mean is not None
    assert mean.shape == (1, 3, 16, 24)
    assert torch.allclose(mean.sum(dim=1), torch.ones(1, 16, 24), atol=1e-5)


# Picture 0 is composed of two prompts (AND), picture 1 is not; each row has a latent and a text of its own.
COMPOSED = {
    0: Row(POSITIVE, 0),
    1: Row(POSITIVE, 0),
    2: Row(POSITIVE, 1),
    3: Row(NEGATIVE, 0),
    4: Row(NEGATIVE, 1),
}


def composed(injection: Injection, *slices: Sequence[int], side: int = 16) -> dict[int, torch.Tensor]:
    """What the UNet gives for the rows of COMPOSED, called with some of them at a time."""
    x = torch.randn(5, 4, side, side, generator=torch.Generator().manual_seed(5))
    text = torch.randn(5, 9, WIDTH, generator=torch.Generator().manual_seed(6))
    found = {}
    with injection, torch.no_grad():
        for numbers in slices:
            own = list(numbers)
            out = injection.unet(x[own], torch.tensor([500] * len(own)), mark(text[own], own))
            found |= dict(zip(numbers, out, strict=True))
    return found


def test_every_picture_has_its_own_map_in_whatever_slices_its_rows_come(unet, adapter) -> None:
    people = [person(1), person(2)]

    def mean_of(*slices: Sequence[int]) -> torch.Tensor:
        maps = RoutingMaps()
        composed(Injection(unet, UniPortraitRule(adapter, people, routing=maps), rows=COMPOSED), *slices)
        mean = maps.mean()
        assert mean is not None
        return mean

    first, second, other = (mean_of([number])[-1] for number in (0, 1, 2))
    expected = torch.stack([(first + second) / 2, other])
    assert (expected[0] - expected[1]).abs().max() > 0.1, "two pictures that cannot be told apart show nothing"
    for slices in ([range(5)], [[0, 1], [2, 3], [4]], [[3, 4], [0, 1, 2]], [[2], [1, 0]], [[4, 0], [3], [2, 1]]):
        assert torch.allclose(mean_of(*slices), expected, atol=1e-5), slices


class Watched(UniPortraitRule):
    """Keeps what was added to each row of COMPOSED at the first cross-attention, which nobody's scale
    has reached from before: (n, inner) by number, the last time counts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.of_row: dict[int, torch.Tensor] = {}

    def added(self, site, call, hidden, q):
        added = super().added(site, call, hidden, q)
        if site.index == 1:
            self.of_row |= dict(zip(call.numbers, added, strict=True))
        return added


def added(unet: nn.Module, adapter: Adapter, people: list[Person], *slices: Sequence[int]) -> dict[int, torch.Tensor]:
    rule = Watched(adapter, people, lora_scale=0.0)
    composed(Injection(unet, rule, rows=COMPOSED), *slices)
    return rule.of_row


def nothing(row: torch.Tensor) -> torch.Tensor:
    """Where nothing was added: (n)."""
    return row.abs().amax(dim=-1) < 1e-6


SLICES = [[range(5)], [[3, 4, 0, 1, 2]], [[0, 1], [2, 3], [4]], [[0], [1], [2], [4, 3]], [[3, 4], [2, 1, 0], [3, 4]]]


@pytest.mark.parametrize("slices", SLICES, ids=str)
def test_a_negative_row_has_the_scale_of_whom_the_positive_row_put_there(unet, adapter, slices) -> None:
    """One of scale 0, one of scale 1: nothing to push away from where the first one is, all of it where the second is.

    In one call, in slices, and with the negative rows first, which then have it from the step before.
    """
    everywhere = torch.ones(16, 16)
    for region in (None, everywhere):
        whole = added(unet, adapter, [person(1, region=region), person(2, region=region)], range(5))
        found = added(unet, adapter, [person(1, scale=0.0, region=region), person(2, region=region)], *slices)
        of_second = [(~nothing(found[number])).float() for number in (0, 1, 2)]
        assert all(0.05 < share.mean() < 0.95 for share in of_second), "this case must route to both"
        assert not torch.equal(of_second[0], of_second[1])
        # Picture 0 has two positive rows, and the mean of both.
        for number, share in ((3, (of_second[0] + of_second[1]) / 2), (4, of_second[2])):
            assert torch.allclose(found[number], whole[number] * share[:, None], atol=1e-5)


def test_a_negative_row_that_can_be_routed_has_the_positive_row_s_scales_too(unet, adapter) -> None:
    """Unconditional tokens of unlike structure: the negative row's router says whose, the positive row's how much."""
    pair = [Person({POSITIVE: tokens(seed), NEGATIVE: tokens(90 + seed)}) for seed in (1, 2)]
    whole = added(unet, adapter, pair, range(5))
    found = added(unet, adapter, [dataclasses.replace(pair[0], scale=0.0), pair[1]], range(5))
    absent = nothing(found[2])
    assert 0.05 < absent.float().mean() < 0.95
    assert torch.allclose(found[4], whole[4] * ~absent[:, None], atol=1e-5)


def test_a_negative_row_of_people_with_and_without_regions(unet, adapter) -> None:
    """The left half is one's of scale 0.5; the right one is shared by two without a region, of scale 0 and 1."""
    regions, scales = (half(True), None, None), (0.5, 0.0, 1.0)
    trio = [person(seed, region=region) for seed, region in zip((1, 2, 3), regions)]
    whole = added(unet, adapter, trio, range(5))
    found = added(unet, adapter, [dataclasses.replace(one, scale=s) for one, s in zip(trio, scales)], range(5))
    left = half(True).bool().flatten()
    absent = nothing(found[2])
    assert not absent[left].any()
    assert 0.05 < absent[~left].float().mean() < 0.95
    expected = whole[4] * torch.where(left, 0.5, (~absent).float())[:, None]
    assert torch.allclose(found[4], expected, atol=1e-5)


def test_a_negative_row_without_its_positive_row_has_everybody_s_mean_scale(unet, adapter) -> None:
    """Before any has run, after another sampling began, and where the last one had another size."""
    whole = added(unet, adapter, [person(1), person(2)], [4])[4]
    rule = Watched(adapter, [person(1, scale=0.0), person(2)], lora_scale=0.0)
    injection = Injection(unet, rule, rows=COMPOSED)
    for sampling in ([[4]], [[0, 1], [4]]):
        rule.begin()
        composed(injection, *sampling)
        assert torch.allclose(rule.of_row[4], whole / 2, atol=1e-5)
        composed(injection, range(5))
        assert nothing(rule.of_row[4]).any()
    composed(injection, [4], side=8)
    assert not nothing(rule.of_row[4]).any()


def test_equal_scales_leave_negative_rows_as_they_are_alone(unet, adapter) -> None:
    for region in (None, torch.ones(16, 16)):
        pair = [person(1, scale=0.7, region=region), person(2, scale=0.7, region=region)]
        assert torch.equal(added(unet, adapter, pair, [0, 1, 2], [4])[4], added(unet, adapter, pair, [4])[4])


def test_one_person_has_a_map_too_and_regions_show_in_it(unet, adapter) -> None:
    for people, expected in [
        ([person(1)], torch.ones(1, 16, 16)),
        ([person(1, region=half(True)), person(2, region=half(False))], torch.stack([half(True), half(False)])),
    ]:
        maps = RoutingMaps(keep_all=True)
        with_people(unet, adapter, people, routing=maps)
        assert torch.allclose(maps.maps[(1, 0.5, 0)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_host(adapter, dtype) -> None:
    try:
        F.linear(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    except RuntimeError:
        pytest.skip(f"this torch has no {dtype} on the CPU")
    expected = with_people(diffusers_unet(), adapter, [person(1)]).sample
    small = diffusers_unet().to(dtype)
    found = {}
    for count in (1, 2):
        people = [person(seed) for seed in range(1, count + 1)]
        with Injection(small, UniPortraitRule(adapter, people)):
            found[count] = run(small, dtype=dtype).sample
        assert found[count].dtype == dtype
        assert found[count].isfinite().all()
    # One person only: with two, a position on the border between them may go to the other by rounding.
    assert F.cosine_similarity(found[1].float().flatten(), expected.flatten(), dim=0) > 0.99


def test_the_host_s_weights_are_followed_when_they_change_in_place(adapter) -> None:
    """As the WebUI's Lora extension and its checkpoint change do, between two steps of one injection."""
    unet = ldm_unet()
    weight = find_sites(unet)[3].module.to_q.weight
    with Injection(unet, UniPortraitRule(adapter, [person(1)])):
        before = run(unet)
        with torch.no_grad():
            original = weight.clone()
            weight.copy_(weight * 1.5)
        changed = run(unet)
        with torch.no_grad():
            weight.copy_(original)
        assert not torch.allclose(changed, before)
        assert torch.equal(run(unet), before)
    with torch.no_grad():
        weight.copy_(original * 1.5)
    assert torch.allclose(with_people(unet, adapter, [person(1)]), changed, atol=1e-6)


def test_host_networks_applied_on_the_fly_are_seen_through_the_host_state(adapter) -> None:
    """As with the Lora extension's `lora_functional`: the same weights compute something else."""
    unet = ldm_unet()
    linear = find_sites(unet)[3].module.to_q
    factor = {"now": 1.0}
    linear.forward = lambda x: factor["now"] * type(linear).forward(linear, x)
    with Injection(unet, UniPortraitRule(adapter, [person(1)]), host_state=lambda: factor["now"]):
        before = run(unet)
        factor["now"] = 2.0
        assert not torch.allclose(run(unet), before)
        factor["now"] = 1.0
        assert torch.equal(run(unet), before)


def test_the_host_s_weights_are_never_written(unet, adapter) -> None:
    before, weights = attributes(unet), {key: value.clone() for key, value in unet.state_dict().items()}
    with_people(unet, adapter, [person(1), person(2)])
    assert attributes(unet) == before
    assert all(torch.equal(weights[key], value) for key, value in unet.state_dict().items())


def test_lora_scale_scales_and_zero_switches_off(unet, adapter) -> None:
    quiet = [person(1, scale=0.0)]
    full, some, none = (with_people(unet, adapter, quiet, lora_scale=scale) for scale in (1.0, 0.5, 0.0))
    assert (full - none).abs().max() > (some - none).abs().max() > 0


def test_interpolation_ends_at_both_people() -> None:
    a, b = tokens(1), tokens(2)
    assert torch.equal(interpolate(a, [], []), a)
    assert torch.allclose(interpolate(a, [b], [1.0]), b)
    assert torch.allclose(interpolate(a, [b], [0.25]), 0.75 * a + 0.25 * b)


def test_several_people_need_a_router(adapter) -> None:
    alone = Adapter.from_tensors(files()[0], None)
    UniPortraitRule(alone, [person(1)])
    with pytest.raises(PortraitError, match="no router file"):
        UniPortraitRule(alone, [person(1), person(2)])


def test_an_adapter_of_another_family_is_refused_with_both_shapes(unet, adapter) -> None:
    sites = find_sites(unet)
    with pytest.raises(PortraitError, match="another kind of model"):
        adapter.check_fits([dataclasses.replace(site, context=2048) for site in sites])
    with pytest.raises(PortraitError, match="16 ID attentions, the loaded model 14"):
        adapter.check_fits(sites[:-4])


def cut(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("faceid_proj.latents", "ID embedding"),
        ("layers.0.1", r"proj\.layers\.0\.1\.norm1\.weight is"),
        ("to_k_faceid", "no ID attention"),
    ],
)
def test_incomplete_faceid_files_are_refused(part: str, message: str) -> None:
    with pytest.raises(PortraitError, match=message):
        Adapter.from_tensors(cut(files()[0], part), None)


@pytest.mark.parametrize("part", ["aggr_router", "to_q_router.2", "faceid_adapter."])
def test_incomplete_router_files_are_refused(part: str) -> None:
    with pytest.raises(PortraitError, match="router"):
        Adapter.from_tensors(files()[0], cut(files()[1], part))


NAMES = ("uniportrait-faceid_x.bin", "uniportrait-router_x.bin")
AT = "faceid_adapter."


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)]


def of_shape(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def with_one(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


# What was done to which file (0: faceid, 1: router), and the tensor, what was found and what is wanted.
SPOILT = {
    "value missing at one site": (0, without(f"{AT}1.to_v_faceid"), r"1\.to_v_faceid\.weight is missing"),
    "key missing at one site": (0, without(f"{AT}1.to_k_faceid"), r"1\.to_k_faceid\.weight is missing"),
    "value of another width": (0, of_shape(f"{AT}1.to_v_faceid.weight", 16, 48), r"\(16, 48\) instead of \(32, 48\)"),
    "key of another context": (0, of_shape(f"{AT}1.to_k_faceid.weight", 32, 40), r"\(32, 40\) instead of \(any, 48\)"),
    "LoRA without down": (0, without(f"{AT}2.to_q_lora.down"), r"2\.to_q_lora\.down\.weight is missing"),
    "LoRA without up": (1, without(f"{AT}2.to_out_lora.up"), r"2\.to_out_lora\.up\.weight is missing"),
    "LoRA of two ranks": (0, of_shape(f"{AT}2.to_q_lora.up.weight", 32, 7), r"\(32, 7\) instead of \(any, 8\)"),
    "LoRA of one dimension": (0, of_shape(f"{AT}2.to_q_lora.down.weight", 32), r"\(32,\) instead of \(any, any\)"),
    "LoRA of rank 0": (0, of_shape(f"{AT}2.to_q_lora.down.weight", 0, 32), r"\(0, 32\) instead of \(any, any\)"),
    "LoRA of another input": (0, of_shape(f"{AT}2.to_q_lora.down.weight", 8, 31), r"\(32, 31\).*\(32, 32\) at input"),
    "LoRA of another output": (1, of_shape(f"{AT}3.to_out_lora.up.weight", 31, 8), r"\(31, 32\).*\(32, 32\) at input"),
    "router at all sites but one": (1, without(f"{AT}1."), r"1\.to_q_router\.0\.weight is missing"),
    "router without aggregation": (1, without(f"{AT}1.aggr_router.weight"), r"1\.aggr_router\.weight is missing"),
    "router for other tokens": (1, of_shape(f"{AT}1.aggr_router.weight", 1, 16), r"\(1, 16\) instead of \(1, 4\)"),
    "router for other channels": (
        1,
        of_shape(f"{AT}1.to_q_router.0.weight", 64, 31),
        r"\(64, 31\).*\(64, 32\) at",
    ),
    "router for another context": (1, of_shape(f"{AT}1.to_k_router.0.weight", 96, 40), r"instead of \(any, 48\)"),
    "router of two widths": (1, of_shape(f"{AT}1.to_k_router.2.weight", 31, 96), r"\(31, 96\) instead of \(32, 96\)"),
    "router bias": (1, of_shape(f"{AT}1.to_q_router.0.bias", 63), r"\(63,\) instead of \(64,\)"),
    "router where there is no ID attention": (
        1,
        lambda tensors: tensors.update({f"{AT}0.{name}": tensors[f"{AT}1.{name}"] for name in ROUTER_LAYERS}),
        "router at site 0, where uniportrait-faceid_x.bin has no ID attention",
    ),
    "NaN in the router": (1, with_one(f"{AT}1.to_q_router.0.weight", float("nan")), r"1\.to_q_router.* NaN"),
    "infinity in a LoRA": (0, with_one(f"{AT}1.to_q_lora.up.weight", -float("inf")), r"1\.to_q_lora\.up.*infinit"),
    "NaN in the embedding": (0, with_one("faceid_proj.latents", float("nan")), r"faceid_proj\.latents .*NaN"),
    "embedding of another width": (0, of_shape("faceid_proj.proj_in.bias", 3), r"proj_in\.bias has no place"),
    "whole numbers": (
        0,
        lambda tensors: tensors.update({f"{AT}1.to_k_faceid.weight": torch.ones(32, 48, dtype=torch.int32)}),
        r"1\.to_k_faceid\.weight holds torch\.int32",
    ),
    "site that the model lacks": (
        0,
        lambda tensors: tensors.update({f"{AT}77.{name}": tensors[f"{AT}0.{name}"] for name in LORA}),
        "another kind of model.*33 and 32 attention layers",
    ),
    "width 0": (0, of_shape("faceid_proj.latents", 1, 4, 0), "ID embedding"),
}
LORA = ("to_q_lora.up.weight", "to_q_lora.down.weight")


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_file_is_refused_by_tensor_and_nothing_stays_on_the_unet(unet, case: str) -> None:
    which, spoil, words = SPOILT[case]
    pair, before = files(), attributes(unet)
    spoil(pair[which])
    with pytest.raises(PortraitError, match=words) as caught:
        Adapter.from_tensors(*pair, NAMES).check_fits(find_sites(unet))
    assert NAMES[which] in caught.value.detail
    assert attributes(unet) == before


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_tensor_of_either_file_can_be_spoilt_unnoticed(unet, data: st.DataObject) -> None:
    pair = files()
    which = data.draw(st.integers(0, 1))
    name = data.draw(st.sampled_from(sorted(pair[which])))
    tensor = pair[which].pop(name)
    changes: dict[str, torch.Tensor | None] = {
        "missing": None,
        "longer": torch.cat([tensor, tensor[:1]]),
        "deeper": tensor[None],
        "NaN": tensor * float("nan"),
        "infinite": tensor + float("inf"),
        "whole": tensor.int(),
    }
    changed = changes[data.draw(st.sampled_from(sorted(changes)))]
    if changed is not None:
        pair[which][name] = changed
    with pytest.raises(PortraitError):
        Adapter.from_tensors(*pair, NAMES).check_fits(find_sites(unet))


def test_tensors_of_unknown_names_are_left_out_and_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    faceid, router = files()
    router[f"{AT}1.to_k_ip.weight"] = torch.zeros(3)
    Adapter.from_tensors(faceid, router, NAMES)
    assert caplog.messages == [f"{NAMES[1]}: 1 tensors are not read, the first is {AT}1.to_k_ip.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, STRETCH, STRETCH + 1])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, count: int) -> None:
    numbers = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
    numbers[1::2] *= -1
    assert all_finite(numbers)
    for place in {0, count // 2, count - 1} if count else ():
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = numbers.clone()
            spoilt[place] = value
            assert not all_finite(spoilt)


@pytest.mark.parametrize(("count", "width", "output"), [(4, 48, 48), (16, 64, 96), (1, 128, 32)])
def test_sizes_of_the_id_embedding_are_read_off_the_file(count: int, width: int, output: int) -> None:
    source = IDEmbedding(20, 30, count, width, output, depth=2, ff_factor=3)
    copy = IDEmbedding.from_tensors(source.state_dict())
    intrinsic, structure = torch.randn(1, 5, 20), torch.randn(1, 6, 30)
    assert copy(intrinsic, structure).shape == (1, count, output)
    assert torch.equal(copy(intrinsic, structure, 0.3), source.eval()(intrinsic, structure, 0.3))


def test_who_was_added_is_remembered(unet, adapter) -> None:
    people = [person(1, end=0.3), person(2, start=0.6), person(3, scale=0.0)]
    rule = UniPortraitRule(adapter, people)
    with Injection(unet, rule) as injection:
        for progress, drawn in ((0.4, set()), (0.1, {0}), (0.7, {0, 1})):
            injection.progress = progress
            run(unet)
            assert rule.drawn == drawn


# ------------------------------------------------------------------------------------------------------------ gradients


def test_gradients_may_be_taken_again_and_reach_no_weight_whose_lora_is_fused(adapter: Adapter) -> None:
    """What is kept from step to step would hold the first call's graph, and the host's weights would get a .grad."""
    own = ldm_unet()
    site = next(site for site in find_sites(own) if site.cross)
    own.requires_grad_(False)
    fused = [site.module.get_submodule(path).weight for path in ("to_q", "to_k", "to_v", "to_out.0")]
    for weight in fused:
        weight.requires_grad_(True)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    context = mark(torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(4)), POSITIVE)
    with Injection(own, UniPortraitRule(adapter, [person(1)])):
        first, second = (
            torch.autograd.grad(own(x, torch.tensor([500]), context).square().sum(), x)[0] for _ in range(2)
        )
        own(x, torch.tensor([500]), context).square().sum().backward()
    assert torch.equal(first, second) and first.abs().max() > 0
    assert all(weight.grad is None for weight in fused)


def test_a_weight_that_lies_where_another_lay_is_seen(adapter: Adapter) -> None:
    own = ldm_unet()
    layer = next(site for site in find_sites(own) if site.cross).module.to_q
    other = nn.Parameter(torch.empty_like(layer.weight))
    with torch.no_grad():
        while other._version < layer.weight._version:
            other.copy_(layer.weight * 1.5)
    with Injection(own, UniPortraitRule(adapter, [person(1)])):
        before = run(own)
        assert other._version == layer.weight._version, "the counter does not tell them apart"
        layer.weight = other
        assert not torch.equal(run(own), before)


def plain(
    adapter: Adapter, site: Site, own: Identities, hidden: torch.Tensor, q: torch.Tensor, noise: torch.Tensor | None
) -> torch.Tensor:
    """Eq. 3, eq. 2 (straight through where there is noise) and lambda * identity attention, one by one as printed."""
    w = {**dict(adapter.router_at(site).named_parameters()), **dict(adapter.faceid_at(site).named_parameters())}
    rows = []
    for b, ids in enumerate(own.id_tokens):
        theta = F.gelu(hidden[b] @ w["to_q_router.0.weight"].T + w["to_q_router.0.bias"]) @ w["to_q_router.2.weight"].T
        pooled = torch.einsum("t,ntd->nd", w["aggr_router.weight"][0], ids) + w["aggr_router.bias"]
        phi = F.gelu(pooled @ w["to_k_router.0.weight"].T + w["to_k_router.0.bias"]) @ w["to_k_router.2.weight"].T
        logits = torch.where(own.present[b], theta @ phi.T, -torch.inf)
        soft = (logits + (0 if noise is None else noise[b])).softmax(dim=-1)
        m = F.one_hot(soft.argmax(dim=-1), len(ids)) + (0 if noise is None else soft - soft.detach())
        attended = []
        for i, person in enumerate(ids):
            k, v = (
                (person @ w[name].T).chunk(site.heads, dim=-1) for name in ("to_k_faceid.weight", "to_v_faceid.weight")
            )
            of_heads = [
                (q_h @ k_h.T / q_h.shape[-1] ** 0.5).softmax(dim=-1) @ v_h
                for q_h, k_h, v_h in zip(q[b].chunk(site.heads, dim=-1), k, v)
            ]
            attended.append(m[:, i : i + 1] * torch.cat(of_heads, dim=-1))
        rows.append(own.scale[b] * sum(attended))
    return torch.stack(rows)


@pytest.mark.parametrize(("people", "by_chance"), [(1, False), (3, False), (3, True)])
def test_what_is_trained_has_the_output_and_the_gradients_of_the_printed_equations(
    unet, people: int, by_chance: bool
) -> None:
    adapter = Adapter.from_tensors(*files()).requires_grad_(True)
    site = [site for site in find_sites(unet) if site.cross][1]
    torch.manual_seed(8)
    hidden, q = (
        torch.randn(2, 20, site.channels, requires_grad=True),
        torch.randn(2, 20, site.inner, requires_grad=True),
    )
    present = torch.tensor([[True] * people, [True, True, False][:people]])
    own = Identities(
        torch.randn(2, people, TOKENS, WIDTH, requires_grad=True), present, torch.tensor([0.7, 1.2])[:, None, None]
    )
    noise = torch.randn(2, 20, people) * 3 if by_chance else None
    rule = BatchRule(adapter, several=people > 1)
    rule.begin(own, None if noise is None else lambda index, shape: noise)
    found = rule.added(site, Call(), hidden, q)
    expected = plain(adapter, site, own, hidden, q, noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    layers = [adapter.faceid_at(site).to_k_faceid, adapter.faceid_at(site).to_v_faceid]
    router = adapter.router_at(site)
    learned = [q, own.id_tokens, *(layer.weight for layer in layers)]
    if by_chance:
        routing = (router.to_q_router, router.to_k_router, router.aggr_router)
        learned += [hidden, *(parameter for module in routing for parameter in module.parameters())]
        assert set(rule.logits) == {site.index} and (rule.logits[site.index] == -torch.inf)[1, :, 2].all()
    weight = torch.randn_like(found)
    wanted, got = (torch.autograd.grad((out * weight).sum(), learned) for out in (expected, found))
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_kept_from_step_to_step_is_made_anew_while_it_is_trained(unet, monkeypatch, count: int) -> None:
    """Identities' keys and values, the router's keys, and fused LoRA."""
    made: dict[str, int] = {}

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            made[name] = made.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("keys_values", "router_keys"):
        counted(SiteLayers, name)
    counted(FusedLinear, "_fuse")
    cross = sum(site.cross for site in find_sites(unet))
    once = {"keys_values": 2 * cross, **({"router_keys": 2 * cross} if count > 1 else {})}
    twice = {name: 2 * calls for name, calls in once.items()}
    adapter = Adapter.from_tensors(*files())

    def calls_of(people: list[Person]) -> dict[str, int]:
        made.clear()
        outputs = []
        with Injection(unet, UniPortraitRule(adapter, people)):
            outputs = [run(unet) for _ in range(2)]
        assert torch.equal(*outputs)
        return dict(made)

    people = [person(seed) for seed in range(1, count + 1)]
    fused = {"_fuse": 4 * len(find_sites(unet))}
    assert calls_of(people) == {**once, **fused}
    learned = [Person({kind: own.clone().requires_grad_() for kind, own in one.tokens.items()}) for one in people]
    assert calls_of(learned) == {**twice, **fused}
    adapter.faceid.requires_grad_(True)
    assert calls_of(people) == (twice if count == 1 else {**twice, **fused})
    adapter.requires_grad_(False).router.requires_grad_(True)
    assert calls_of(people) == ({**once, **fused} if count == 1 else twice)
