"""RB-Guidance in a UNet against its equations written out, by any method, in every way that a host runs the rows."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Row, find_sites, mark
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.schedule import noised
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.guidance.reference import GuidedPerson, ReferenceGuidance
from lib_portrait.methods.fusion import STEP, FusionRule
from lib_portrait.methods.uniportrait import Adapter, Person, UniPortraitRule
from lib_portrait.options import Value, defaults
from tests.parity.unets import diffusers_unet, flatten, ldm_unet, load_bin, sgm_unet
from tests.unit import test_fusion
from tests.unit.test_attention import attributes
from tests.unit.test_fusion import SmallHost, others, pictures

LAYOUTS: dict[str, Callable[[], nn.Module]] = {"diffusers": diffusers_unet, "ldm": ldm_unet, "sgm": sgm_unet}
BLOCKS = {"diffusers": ("up_blocks.0", "up_blocks.1", "up_blocks.2"), "ldm": ("output_blocks.2", "output_blocks.5")}
ROWS = {1: Row(POSITIVE, 0), 2: Row(POSITIVE, 1), 3: Row(NEGATIVE, 0), 4: Row(NEGATIVE, 1)}
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 1.0)
T0 = 671


class PictureHost(SmallHost):
    """Draws a latent as its first channels, enlarged; no other host shares what is kept of it."""

    def __init__(self, unet: nn.Module, prediction: str = "epsilon"):
        super().__init__(unet, state=object())
        self.prediction = prediction  # type: ignore[assignment]
        self.drawn: list[Tensor] = []

    def picture(self, latent: Tensor) -> np.ndarray:
        self.drawn.append(latent)
        return np.full((8 * latent.shape[2], 8 * latent.shape[3], 3), 128, np.uint8)


@pytest.fixture(scope="module", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Its weights need gradients, as the WebUI's do. Nothing may be left in it, whatever a test does."""
    made = LAYOUTS[request.param]()
    before = attributes(made), [(weight._version, weight.requires_grad) for weight in made.parameters()]
    assert any(weight.requires_grad for weight in made.parameters())
    yield made
    assert (attributes(made), [(weight._version, weight.requires_grad) for weight in made.parameters()]) == before
    assert all(weight.grad is None for weight in made.parameters())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return ldm_unet()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
        assert not torch.is_grad_enabled()


def inputs(dtype: torch.dtype = torch.float32, t: float = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and contexts of two pictures' positive rows, then their negative ones."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=dtype).repeat(2, 1, 1, 1)
    return z, torch.full((4,), t), torch.randn(4, 7, 48, generator=generator, dtype=dtype)


def run(unet: nn.Module, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    more = {key: value.to(z) for key, value in others(unet, len(z)).items()}
    out = unet(z, t, context, **more)
    return out if isinstance(out, Tensor) else out[0]


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((128, 128), bool)
    mask[16 * number : 96, 32 : 112 - 16 * number] = True
    return mask


def person(*photos: int, region: Any = LEFT, guided: bool = True) -> GuidedPerson:
    every = pictures(4)
    return GuidedPerson(tuple(every[n] for n in photos), tuple(mask_of(n) for n in photos), region, guided)


def guidance(
    host: SmallHost, people: Sequence[GuidedPerson], rule: Any = None, locate: Any = None, **options: Value
) -> ReferenceGuidance:
    given = {**defaults(OPTIONS), "strength": 1000.0, **options}
    made = ReferenceGuidance(people, given, rule, locate)
    made.begin()
    made.prepare(host)  # type: ignore[arg-type]
    return made


def features_of(unet: nn.Module, block: int, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    layout = "ldm" if hasattr(unet, "input_blocks") else "diffusers"
    kept: list[Tensor] = []
    module = unet.get_submodule(BLOCKS[layout][block])
    hook = module.register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        run(unet, z, t, context)
    finally:
        hook.remove()
    return kept[0]


def box(region: tuple[float, float, float, float], side: int) -> Tensor:
    inside = torch.zeros(side, side, dtype=torch.bool)
    left, top, right, bottom = (round(edge * side) for edge in region)
    inside[top:bottom, left:right] = True
    return inside


def plainly(
    unet: nn.Module,
    host: SmallHost,
    people: Sequence[GuidedPerson],
    z: Tensor,
    t: Tensor,
    context: Tensor,
    mask: Callable[[int, int], Tensor],
    **options: Value,
) -> tuple[Tensor, list[float]]:
    """Eq. 7 to 10 for one row (1, 4, h, w), as they stand: the gradient, masked, and each person's S.

    mask: of a person, at a number of positions along either side.
    """
    given = {**defaults(OPTIONS), "strength": 1000.0, **options}
    block, p = int(given["block"]), float(given["strength"]) if given["gradient"] == "plain" else 1.0
    t0 = float(t[0]) if given["noise"] == "step" else T0
    text = host.text("")
    text = text if isinstance(text, Tensor) else text["crossattn"]
    sums = []
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        gen = features_of(unet, block, leaf, t, context)[0]
        energy = torch.zeros(())
        for number, one in enumerate(people):
            points = []
            for picture, own in zip(one.references, one.masks):
                latent = noised(host.latent(picture), t0, host.alphas_cumprod)
                ref = features_of(unet, block, latent.to(z), torch.full((1,), t0), text.to(z))[0].detach()
                within = F.adaptive_avg_pool2d(torch.from_numpy(own)[None].float(), ref.shape[1:])[0] >= 0.5
                points.append(ref[:, within].T)
            inside = mask(number, gen.shape[-1])
            generated, ref = gen[:, inside].T, torch.cat(points)
            if given["features"] == "centred":
                mean, std = ref.mean(dim=0), ref.std(dim=0, unbiased=False)
                generated, ref = (generated - mean) / std, (ref - mean) / std
            s, count = torch.zeros(()), 0
            for point in ref:
                nearest = generated[(generated - point).square().sum(dim=1).argmin()]
                s, count = s + (torch.dot(nearest, point) / nearest.norm() / point.norm() + 1) / 2, count + 1
            s = s / count if given["reduction"] == "mean" else s
            sums.append(float(s.detach()))
            energy = energy + p / (1 + s)
        (gradient,) = torch.autograd.grad(energy, leaf)
    union = torch.stack([mask(number, z.shape[-1]) for number in range(len(people))]).any(dim=0)
    return gradient * union, sums


def holding_a_graph() -> int:
    gc.collect()
    return sum(issubclass(type(one), Tensor) and one.grad_fn is not None for one in gc.get_objects())


VARIANTS: list[Mapping[str, Value]] = [
    {},
    {"reduction": "mean", "block": 0, "strength": 100.0},
    {"features": "centred", "noise": "step"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_is_the_equations_step(unet: nn.Module, options: Mapping[str, Value]) -> None:
    z, t, context = inputs()
    host, people = PictureHost(unet), [person(0), person(1, region=RIGHT)]
    plain = run(unet, z, t, context)
    made = guidance(host, people, **options)
    with Injection(unet, guidance=made, rows=ROWS):
        out = run(unet, z, t, mark(context, [1, 2, 3, 4]))
    where = [LEFT, RIGHT]
    outside = ~(box(LEFT, 16) | box(RIGHT, 16))
    for row in range(2):
        gradient, sums = plainly(
            unet,
            host,
            people,
            z[[row]],
            t[[row]],
            context[[row]],
            lambda number, side: box(where[number], side),
            **options,
        )
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(out[[row]] - plain[[row]], gradient, atol=1e-5, rtol=1e-4)
        # The negative row of the picture has the same (eq. 11).
        torch.testing.assert_close(out[[row + 2]] - plain[[row + 2]], gradient, atol=1e-5, rtol=1e-4)
        step = made.record[row]
        count = [1.0] * 2 if options.get("reduction") == "mean" else [s / m for s, m in zip(sums, step.similarity)]
        p = float(options.get("strength", 1000.0))
        assert step.energy == pytest.approx(sum(p / (1 + s) for s in sums), rel=1e-4)
        assert step.gradient == pytest.approx(float(gradient.norm()), rel=1e-3)
        assert step.picture == row and step.t == 500 and all(round(n) == pytest.approx(n, rel=1e-3) for n in count)
        assert torch.equal(step.masks, torch.stack([box(LEFT, 16), box(RIGHT, 16)]))
        # To the bit; the rows themselves run in batches of another size, which is seen in their last digits.
        assert not made._known[row].value[:, outside].any()


def test_the_gradient_is_that_of_finite_differences() -> None:
    """In double precision, where the pairs of eq. 7 stay the same."""
    unet = diffusers_unet().double()
    z, t, context = (one[:1] for one in inputs(torch.float64))
    whole = (0.0, 0.0, 1.0, 1.0)
    host = PictureHost(unet)
    people = [person(0, region=whole)]
    plain = run(unet, z, t, context)
    with Injection(unet, guidance=guidance(host, people)):
        gradient = run(unet, z, t, mark(context, POSITIVE)) - plain

    def energy_of(latent: Tensor) -> float:
        made = guidance(host, people)
        with Injection(unet, guidance=made):
            run(unet, latent, t, mark(context, POSITIVE))
        return made.record[0].energy

    for seed in range(3):
        way = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        difference = (energy_of(z + 1e-6 * way) - energy_of(z - 1e-6 * way)) / 2e-6
        assert float((gradient * way).sum()) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("calls", [[[0, 2]], [[2, 0]], [[0], [2]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 1, 0, 2]]])
def test_eq_11_holds_however_the_host_splits_rows(unet: nn.Module, calls: Sequence[Sequence[int]]) -> None:
    """calls: the rows of each call, of two pictures' positive and negative ones; w is any."""
    z, t, context = inputs()
    host, people, w = PictureHost(unet), [person(0)], 7.5
    plain = run(unet, z, t, context)
    outputs: dict[int, Tensor] = {}
    with Injection(unet, guidance=guidance(host, people), rows=ROWS):
        for rows in calls:
            out = run(unet, z[rows], t[rows], mark(context[rows], [row + 1 for row in rows]))
            outputs |= dict(zip(rows, out))
    for picture in {row % 2 for row in outputs}:
        gradient, _ = plainly(
            unet,
            host,
            people,
            z[[picture]],
            t[[picture]],
            context[[picture]],
            lambda number, side: box(LEFT, side),
        )
        cond, uncond = outputs[picture], outputs[picture + 2]
        expected = plain[picture + 2] + w * (plain[picture] - plain[picture + 2]) + gradient[0]
        torch.testing.assert_close(uncond + w * (cond - uncond), expected, atol=1e-4, rtol=1e-4)


def test_eq_11_holds_with_and(unet: nn.Module) -> None:
    """Several positive rows of one picture: eps_uncond + w sum_i w_i (eps_i - eps_uncond) + grad E of the first."""
    z, t, context = inputs()
    rows = {1: Row(POSITIVE, 0), 2: Row(POSITIVE, 0), 3: Row(NEGATIVE, 0)}
    z, t, context = z[:1].repeat(3, 1, 1, 1), t[:3], context[:3]
    host, people = PictureHost(unet), [person(0)]
    plain = run(unet, z, t, context)
    gradient, _ = plainly(unet, host, people, z[:1], t[:1], context[:1], lambda number, side: box(LEFT, side))

    def composed(eps: Tensor) -> Tensor:
        return eps[2] + 5 * (0.7 * (eps[0] - eps[2]) + 0.6 * (eps[1] - eps[2]))

    with Injection(unet, guidance=guidance(host, people), rows=rows):
        out = run(unet, z, t, mark(context, [1, 2, 3]))
    torch.testing.assert_close(composed(out), composed(plain) + gradient[0], atol=1e-4, rtol=1e-4)


def test_only_guided_rows_have_a_graph_where_nobody_else_is_around_the_unet(small: nn.Module) -> None:
    z, t, context = inputs()
    z = z[[0, 0, 1, 1]]
    calls: list[tuple[int, bool]] = []
    block = small.get_submodule("input_blocks.1")
    hook = block.register_forward_hook(lambda module, args, out: calls.append((len(out), out.requires_grad)))
    made = guidance(PictureHost(small), [person(0)])
    try:
        with Injection(small, guidance=made, rows=ROWS):
            calls.clear()
            apart = run(small, z, t, mark(context, [3, 1, 2, 4]))
            assert calls == [(2, True), (2, False)]
        original = small.forward
        small.forward = lambda *args, **kwargs: original(*args, **kwargs)
        made.begin()
        with Injection(small, guidance=made, rows=ROWS):
            calls.clear()
            together = run(small, z, t, mark(context, [3, 1, 2, 4]))
            assert calls == [(4, True)]
    finally:
        small.__dict__.pop("forward", None)
        hook.remove()
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


def test_the_share_of_eps(small: nn.Module) -> None:
    z, t, context = inputs()
    plain = run(small, z, t, context)
    for prediction in ("epsilon", "v"):
        host = PictureHost(small, prediction)
        made = guidance(host, [person(0)], strength=0.1, gradient="share")
        with Injection(small, guidance=made, rows=ROWS):
            added = run(small, z, t, mark(context, [1, 2, 3, 4])) - plain
        alpha = host.alphas_cumprod[500].sqrt() if prediction == "v" else torch.tensor(1.0)
        sigma = (1 - alpha**2).sqrt()
        inside = box(LEFT, 16)
        for row in range(2):
            eps = (alpha * plain + sigma * z)[row][:, inside]
            assert float((alpha * added[row]).norm()) == pytest.approx(0.1 * float(eps.norm()), rel=1e-3)
            torch.testing.assert_close(added[row], added[row + 2], atol=1e-5, rtol=0)


def test_steps_are_guided_from_u_on_and_every_kth(small: nn.Module) -> None:
    z, _, context = inputs()
    made = guidance(PictureHost(small), [person(0)], every=2, begin=0.6)
    with Injection(small, guidance=made, rows=ROWS):
        for t in (900.0, 601.0, 600.0, 450.0, 300.0, 100.0):
            # Positive and negative rows apart: the same step.
            for rows in ([0, 1], [2, 3]):
                run(small, z[rows], torch.full((2,), t), mark(context[rows], [row + 1 for row in rows]))
    assert [step.t for step in made.record] == [600.0, 600.0, 300.0, 300.0]
    made.begin()
    assert made.record == []


def test_what_is_off_changes_nothing(small: nn.Module) -> None:
    z, t, context = inputs()
    plain = run(small, z, t, context)
    for people, options in (
        ([person(0, guided=False)], {}),
        ([person(0)], {"strength": 0.0}),
        ([person(0)], {"begin": 0.4}),
        ([GuidedPerson()], {}),
    ):
        made = guidance(PictureHost(small), people, **options)
        with Injection(small, guidance=made, rows=ROWS):
            assert torch.equal(run(small, z, t, mark(context, [1, 2, 3, 4])), plain)
        assert not made.record


def test_of_several_references_each_position_has_the_nearest(small: nn.Module) -> None:
    """The same reference twice is the same as once; another one beside it is not."""
    z, t, context = inputs()
    found = []
    for photos in ((0,), (0, 0), (0, 2)):
        made = guidance(PictureHost(small), [person(*photos)])
        with Injection(small, guidance=made, rows=ROWS):
            found.append(run(small, z, t, mark(context, [1, 2, 3, 4])))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert (found[0] - found[2]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- where somebody is


def test_the_words_attention_map(unet: nn.Module) -> None:
    """Eq. 6 at the 16 x 16 level, by hooks on the layers' own projections."""
    z, t, context = inputs()
    z, t, context = z[:1], t[:1], context[:1]
    words = ((2, 3), (5,))
    before = (*BLOCKS["ldm" if hasattr(unet, "input_blocks") else "diffusers"][:2],)
    plain = run(unet, z, t, context)
    maps: dict[bool, list[Tensor]] = {True: [], False: []}
    hooks = []
    done: list[bool] = []
    hooks.append(unet.get_submodule(before[1]).register_forward_hook(lambda *args: done.append(True)))
    for site in find_sites(unet):
        projections: dict[str, Tensor] = {}

        def keep(name: str, projections: dict[str, Tensor] = projections) -> Any:
            return lambda module, args, out: projections.__setitem__(name, out)

        def softmax(module: Any, args: Any, out: Any, site: Any = site, own: Any = projections) -> None:
            q, k = (own[name].unflatten(-1, (site.heads, -1)) for name in ("to_q", "to_k"))
            weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])).softmax(dim=-1)[0].mean(dim=0)
            if len(weights) == 256 and not done:
                maps[site.cross].append(weights)

        hooks += [site.module.get_submodule(name).register_forward_hook(keep(name)) for name in ("to_q", "to_k")]
        hooks.append(site.module.register_forward_hook(softmax))
    run(unet, z, t, context)
    for hook in hooks:
        hook.remove()
    own = torch.stack(maps[False]).mean(dim=0)
    expected = []
    for positions in words:
        attention = torch.stack(maps[True]).mean(dim=0)[:, list(positions)].sum(dim=1)
        for _ in range(3):
            attention = ((attention - attention.min()) / (attention.max() - attention.min())) ** 2
        spread = own @ attention
        expected.append(((spread - spread.min()) / (spread.max() - spread.min()) > 0.5).reshape(16, 16))
    made = guidance(PictureHost(unet), [person(0, region=None), person(1, region=None)])
    with Injection(unet, guidance=made, rows={1: Row(POSITIVE, 0, words)}):
        out = run(unet, z, t, mark(context, [1]))
    assert torch.equal(made.record[0].masks, torch.stack(expected))
    assert 0 < int(expected[0].sum()) < 256
    assert not made._known[0].value[:, ~(expected[0] | expected[1])].any()
    assert (out - plain).abs().max() > 1e-3


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter.from_tensors(*(flatten(load_bin(f"uniportrait-{role}_small.bin")) for role in ("faceid", "router")))


def uniportrait(adapter: Adapter, count: int, **where: Any) -> UniPortraitRule:
    generator = torch.Generator().manual_seed(4)
    tokens = [torch.randn(4, 48, generator=generator) for _ in range(3)]
    people = [
        Person({POSITIVE: own, NEGATIVE: tokens[2]}, scale=0.4 + 0.3 * n, **where)
        for n, own in enumerate(tokens[:count])
    ]
    return UniPortraitRule(adapter, people)


def test_the_routing_map_of_the_method(small: nn.Module, adapter: Adapter) -> None:
    z, t, context = inputs()
    host, rule = PictureHost(small), uniportrait(adapter, 2)
    plain_rule = uniportrait(adapter, 2)
    plain_rule.routing = RoutingMaps(keep_all=True)
    with Injection(small, plain_rule, rows=ROWS):
        plain = run(small, z, t, mark(context, [1, 2, 3, 4]))
    rule.routing = RoutingMaps(keep_all=True)
    made = guidance(host, [person(0, region=None), person(1, region=None)], rule)
    with Injection(small, rule, guidance=made, rows=ROWS):
        out = run(small, z, t, mark(context, [1, 2, 3, 4]))
    (one, _, two, _), masks = (out - plain).abs().sum(dim=1), [step.masks for step in made.record]
    for change, own in ((one, masks[0]), (two, masks[1])):
        assert own.any(dim=0).any() and change[~own.any(dim=0)].sum() < 1e-4 < change.max()
    # Of the sites before the features, the mean of who was chosen.
    sites = [site for site in find_sites(small) if site.cross and not site.path.startswith(tuple(LATER))]
    maps = [plain_rule.routing.maps[(site.index, 0.0, 0)] for site in sites]
    shares = torch.cat([F.interpolate(one[None], size=(16, 16), mode="bilinear", align_corners=False) for one in maps])
    assert torch.equal(masks[0], shares.mean(dim=0) >= 0.5)
    # The rows ran in two calls, and were counted once.
    assert rule.routing.mean() is not None
    torch.testing.assert_close(rule.routing.mean(), plain_rule.routing.mean(), atol=1e-6, rtol=0)
    assert rule.drawn == {0, 1}


LATER = [f"output_blocks.{number}." for number in range(6, 12)]


def test_a_face_in_the_first_prediction(small: nn.Module) -> None:
    """Eq. 2 of the guided step's own prediction; found once, and looked for again where it was not."""
    z, t, context = inputs()
    host = PictureHost(small)
    faces: list[list[np.ndarray]] = [[], []]
    asked: list[np.ndarray] = []

    def locate(picture: np.ndarray) -> list[np.ndarray]:
        asked.append(picture)
        return faces[len(asked) % 2]

    plain = run(small, z, t, context)
    made = guidance(host, [person(0, region=None), person(1, region=LEFT)], locate=locate)
    with Injection(small, guidance=made, rows=ROWS):
        out = run(small, z, t, mark(context, [1, 2, 3, 4]))
        # Nobody is found: the other person alone is guided.
        assert len(asked) == 2 and [step.similarity[0] for step in made.record] == [None, None]
        assert (out - plain)[:, :, ~box(LEFT, 16)].abs().max() < 1e-5
        alpha = host.alphas_cumprod[500].sqrt()
        expected = (z[:1] - (1 - alpha**2).sqrt() * plain[:1]) / alpha
        torch.testing.assert_close(host.drawn[0], expected, atol=1e-5, rtol=0)
        bystander, face = np.zeros((128, 128), bool), np.zeros((128, 128), bool)
        bystander[:24, 64:88], face[32:96, 64:128] = True, True
        faces[:] = [[bystander, face], [bystander, face]]
        out = run(small, z + 0.01, t - 1, mark(context, [1, 2, 3, 4]))
        assert len(asked) == 4
        run(small, z + 0.02, t - 2, mark(context, [1, 2, 3, 4]))
        assert len(asked) == 4
    for step in made.record[-2:]:
        assert torch.equal(step.masks, torch.stack([box((0.5, 0.25, 1.0, 0.75), 16), box(LEFT, 16)]))


def test_two_faces_are_peoples_from_the_left(small: nn.Module) -> None:
    z, t, context = inputs()
    left, right = np.zeros((128, 128), bool), np.zeros((128, 128), bool)
    left[32:96, :48], right[16:96, 64:] = True, True
    people = [person(0, region=None), person(1, region=None)]
    made = guidance(PictureHost(small), people, locate=lambda picture: [right, left])
    with Injection(small, guidance=made, rows=ROWS):
        run(small, z, t, mark(context, [1, 2, 3, 4]))
    assert torch.equal(
        made.record[0].masks, torch.stack([box((0, 0.25, 0.375, 0.75), 16), box((0.5, 0.125, 1, 0.75), 16)])
    )


@pytest.mark.parametrize("where", ["automatic", "region", "attention", "routing", "face"])
def test_where_nothing_tells_it_that_is_said(small: nn.Module, where: str) -> None:
    z, t, context = inputs()
    made = guidance(PictureHost(small), [person(0, region=None)], where=where)
    with Injection(small, guidance=made, rows=ROWS), pytest.raises(PortraitError, match="Give the person a region"):
        run(small, z, t, mark(context, [1, 2, 3, 4]))


def test_what_cannot_be_prepared_is_refused(small: nn.Module) -> None:
    host = PictureHost(small)
    with pytest.raises(PortraitError, match=r"identities\[0\].photos\[0\]: no part of it"):
        guidance(host, [GuidedPerson((pictures(1)[0],), (np.zeros((128, 128), bool),))])
    with pytest.raises(PortraitError, match="decoder has 4 blocks|decoder has 3 blocks"):
        guidance(host, [person(0)], block=9)
    host.alphas_cumprod = host.alphas_cumprod[:600]
    with pytest.raises(PortraitError, match="600 timesteps"):
        guidance(host, [person(0)])


# ------------------------------------------------------------------------------------------------------ beside others


def test_beside_uniportrait(unet: nn.Module, adapter: Adapter) -> None:
    """With different scales, which negative rows take from the positive ones; nothing that is kept holds a graph."""
    if hasattr(unet, "label_emb"):
        pytest.skip("the adapter is for one transformer block a level")
    z, t, context = inputs()
    host, people = PictureHost(unet), [person(0), person(1, region=RIGHT)]
    # A rule's caches are warm, and the last call's rows are those of the plain version, in both.
    rule = uniportrait(adapter, 2)
    with Injection(unet, rule, rows=ROWS):
        plain = run(unet, z, t, mark(context, [1, 2, 3, 4]))
        where = [LEFT, RIGHT]
        gradient, _ = plainly(
            unet,
            host,
            people,
            z[:1],
            t[:1],
            mark(context[:1], [1]),
            lambda number, side: box(where[number], side),
        )
    rule = uniportrait(adapter, 2)
    before = holding_a_graph()
    with Injection(unet, rule, guidance=guidance(host, people, rule), rows=ROWS):
        out = run(unet, z, t, mark(context, [1, 2, 3, 4]))
        torch.testing.assert_close(out[[0, 2]] - plain[[0, 2]], gradient.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)
        assert holding_a_graph() == before


@pytest.mark.parametrize("reference_t", [0, STEP])
@pytest.mark.parametrize("negative", [False, True])
def test_beside_fusion(small: nn.Module, reference_t: int | str, negative: bool) -> None:
    """Its reference as a fixed one, or as a row of its own in the call, which then runs as a whole."""
    z, t, context = inputs()
    host, people = PictureHost(small), [person(0)]

    def rule() -> FusionRule:
        made = FusionRule(
            test_fusion.adapter(small, reference_t=reference_t, negative=negative),
            [test_fusion.person(*pictures(2))],
        )
        made.prepare(host)  # type: ignore[arg-type]
        return made

    with Injection(small, rule(), rows=ROWS):
        plain = run(small, z, t, mark(context, [1, 2, 3, 4]))
        gradient, _ = plainly(
            small,
            host,
            people,
            z[:1],
            t[:1],
            mark(context[:1], [1]),
            lambda number, side: box(LEFT, side),
        )
    before = holding_a_graph()
    fusion = rule()
    with Injection(small, fusion, guidance=guidance(host, people, fusion), rows=ROWS):
        out = run(small, z, t, mark(context, [1, 2, 3, 4]))
        torch.testing.assert_close(out[[0, 2]] - plain[[0, 2]], gradient.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)
        assert out.shape == z.shape and holding_a_graph() == before


def test_beside_a_forward_that_looks_at_a_picture_of_its_own_first(
    small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ControlNet's "reference" does, within the call and by the forward beneath ours."""
    z, t, context = inputs()
    host, people = PictureHost(small), [person(0, region=None)]
    words = {number: Row(row.kind, row.picture, ((2, 3),)) for number, row in ROWS.items()}
    found = []
    for own_pass in (False, True):
        original = small.forward

        def forward(x: Tensor, t: Tensor, context: Tensor, of: Any = original, own: bool = own_pass) -> Tensor:
            if own:
                of(torch.flip(x.detach(), (3,)), t, context)
            return of(x, t, context)

        monkeypatch.setattr(small, "forward", forward)
        with Injection(small, guidance=guidance(host, people), rows=words):
            found.append(run(small, z, t, mark(context, [1, 2, 3, 4])))
        monkeypatch.undo()
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- memory and attention


def test_checkpointed_blocks_give_the_same(unet: nn.Module) -> None:
    z, t, context = inputs()
    found = []
    for checkpointing in (False, True):
        made = guidance(PictureHost(unet), [person(0)], checkpointing=checkpointing)
        with Injection(unet, guidance=made, rows=ROWS):
            found.append(run(unet, z, t, mark(context, [1, 2, 3, 4])))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_checkpointed_blocks_keep_less_and_count_once(
    small: nn.Module, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, t, context = inputs()
    kept: dict[bool, int] = {}
    seen: dict[int, int] = {}
    means = []
    for checkpointing in (False, True):
        rule = uniportrait(adapter, 2)
        rule.routing = RoutingMaps()
        made = guidance(PictureHost(small), [person(0), person(1, region=RIGHT)], rule, checkpointing=checkpointing)
        seen.clear()

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def weighed(features: Tensor, current: Any, of: Any = made.energy, own: bool = checkpointing) -> Tensor:
            kept[own] = sum(seen.values())
            return of(features, current)

        monkeypatch.setattr(made, "energy", weighed)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            Injection(small, rule, guidance=made, rows=ROWS),
        ):
            run(small, z, t, mark(context, [1, 2, 3, 4]))
        means.append(rule.routing.mean())
    assert kept[True] < 0.5 * kept[False]
    torch.testing.assert_close(means[0], means[1], atol=1e-6, rtol=0)


def without_backward(message: str | None) -> Callable[..., Tensor]:
    """An attention whose result torch cannot differentiate; None for one that just forgets the graph."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise NotImplementedError(message)

    def forward(self: Any, x: Tensor, context: Tensor | None = None, mask: Any = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(one).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, one in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = Opaque.apply(q, k, v) if message else F.scaled_dot_product_attention(q, k, v).detach()
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return out if message else out.detach()

    return forward


@pytest.mark.parametrize("message", ["No operator found for memory_efficient_attention_backward", None])
@pytest.mark.parametrize("apart", [True, False])
def test_an_attention_without_backward_is_replaced_for_guided_rows(
    small: nn.Module, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, message: str | None, apart: bool
) -> None:
    z, t, context = inputs()
    host, people = PictureHost(small), [person(0)]
    expected, found = [], []
    for out, broken in ((expected, False), (found, True)):
        rule = uniportrait(adapter, 2)
        rule.routing = RoutingMaps()
        made = guidance(host, people, rule)
        if broken:
            kind = type(find_sites(small)[0].module)
            monkeypatch.setattr(kind, "forward", without_backward(message))
        if not apart:
            original = small.forward
            monkeypatch.setattr(small, "forward", lambda *args, original=original, **kwargs: original(*args, **kwargs))
        with Injection(small, rule, guidance=made, rows=ROWS):
            for step in range(2):
                out.append(run(small, z - 0.1 * step, t - step, mark(context, [1, 2, 3, 4])))
        out.append(rule.routing.mean())
        assert len(made.notices) == broken
        monkeypatch.undo()
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_other_faults_are_not_taken_for_it(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    z, t, context = inputs()
    made = guidance(PictureHost(small), [person(0)])
    site = find_sites(small)[0]

    def fail(message: str) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            raise RuntimeError(message)

        return forward

    monkeypatch.setattr(type(site.module), "forward", fail("no CUDA GPUs are available"))
    with Injection(small, guidance=made, rows=ROWS):
        with pytest.raises(RuntimeError, match="no CUDA GPUs"):
            run(small, z, t, mark(context, [1, 2, 3, 4]))
        monkeypatch.setattr(type(site.module), "forward", fail("CUDA out of memory. Tried to allocate 2 GiB"))
        with pytest.raises(PortraitError, match="checkpointing") as caught:
            run(small, z, t, mark(context, [1, 2, 3, 4]))
    assert caught.value.status_code == 500 and not made.notices


# --------------------------------------------------------------------------------------------------------- what is left


def test_reference_features_are_kept_between_requests(small: nn.Module) -> None:
    host = PictureHost(small)
    guidance(host, [person(0, 1)])
    assert host.calls == 2
    guidance(host, [person(1, 0)])
    assert host.calls == 2
    guidance(host, [person(0)], reference_t=300)
    assert host.calls == 3
    guidance(host, [person(0)], block=0)
    assert host.calls == 4
    host.state = object()
    guidance(host, [person(0)])
    assert host.calls == 5
    guidance(host, [person(0)], noise="step")
    assert host.calls == 5


def test_nothing_of_a_call_lives_on(small: nn.Module, adapter: Adapter) -> None:
    z, t, context = inputs()
    host, rule = PictureHost(small), uniportrait(adapter, 2)
    made = guidance(host, [person(0), person(1, region=RIGHT)], rule, noise="step")
    watched: list[weakref.ref[Tensor]] = []
    hook = small.get_submodule("output_blocks.5").register_forward_hook(
        # What the references' own row shows is kept from step to step.
        lambda module, args, out: watched.extend(weakref.ref(one) for one in (out, args[0]) if len(one) == 2)
    )
    before = holding_a_graph()
    try:
        with Injection(small, rule, guidance=made, rows=ROWS):
            for step in range(2):
                run(small, z - 0.1 * step, t - step, mark(context, [1, 2, 3, 4]))
        gc.collect()
        assert len(watched) >= 8 and all(one() is None for one in watched)
        assert holding_a_graph() == before
    finally:
        hook.remove()


def test_an_exception_in_a_guided_step_leaves_the_mode_and_the_rows(small: nn.Module) -> None:
    z, t, context = inputs()
    made = guidance(PictureHost(small), [person(0)])
    site = find_sites(small)[3]

    class Interrupt(BaseException):
        pass

    def fail(module: Any, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            raise Interrupt

    plain = run(small, z, t, context)
    before = holding_a_graph()
    flags = [weight.requires_grad for weight in small.parameters()]
    with Injection(small, guidance=made, rows=ROWS) as injection:
        hook = site.module.register_forward_hook(fail)
        with pytest.raises(Interrupt) as caught:
            run(small, z, t, mark(context, [1, 2, 3, 4]))
        hook.remove()
        del caught
        assert not torch.is_grad_enabled() and holding_a_graph() == before
        assert [weight.requires_grad for weight in small.parameters()] == flags
        assert torch.equal(run(small, z, t, context), plain)
        out = run(small, z, t, mark(context, [1, 2, 3, 4]))
        assert injection.call.numbers is None and len(made.record) == 2
    gradient, _ = plainly(
        small,
        made._host,  # type: ignore[arg-type]
        made.people,
        z[:1],
        t[:1],
        context[:1],
        lambda number, side: box(LEFT, side),
    )
    torch.testing.assert_close(out[:1] - plain[:1], gradient, atol=1e-5, rtol=1e-4)
