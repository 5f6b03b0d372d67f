"""Promises of `lib_portrait.attention`: order of sites, rows told apart, inject and eject as inverses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_portrait.attention import (
    NEGATIVE,
    POSITIVE,
    Injection,
    Row,
    control_sites,
    find_sites,
    mark,
    mark_conditions,
    spatial_shape,
    unmark,
    word_attention,
)
from lib_portrait.attention.injection import _Override
from lib_portrait.attention.rows import MOST_ROWS, REFERENCE
from lib_portrait.errors import PortraitError
from tests.parity.unets import DATA, diffusers_unet, ldm_unet


@pytest.fixture(scope="module", params=["diffusers", "ldm"])
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return diffusers_unet() if request.param == "diffusers" else ldm_unet()


def attributes(module: nn.Module) -> dict[str, object]:
    """Everything that could have been left on a network: attribute names and hooks of every module, and weights."""
    found: dict[str, object] = {}
    for path, child in module.named_modules():
        found[path] = (
            sorted(child.__dict__),
            len(child._forward_hooks),
            len(child._forward_pre_hooks),
            child.__dict__.get("forward"),
        )
    return found


def run(unet: nn.Module, context: torch.Tensor, size: int = 16) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(context.shape[0], 4, size, size)
    with torch.no_grad():
        out = unet(x, torch.tensor([500] * context.shape[0]), context)
    return out if isinstance(out, torch.Tensor) else out.sample


class Doubling:
    """Doubles the output of every cross-attention."""

    def __init__(self, visiting: bool = True, limit: float = 1.0):
        self.visiting = visiting
        self.limit = limit

    def active(self, progress: float) -> bool:
        return progress <= self.limit

    def must_visit(self, site) -> bool:
        return site.cross

    def overrides(self, site, call):
        if not site.cross:
            return {}

        def double(host, *args, **kwargs):
            if self.visiting:
                call.visited.add(site.index)
            return 2 * host(*args, **kwargs)

        return {"": double}


class Adding:
    """Adds a number to the output of every cross-attention."""

    def __init__(self, number: float, start: float = 0.0):
        self.number = number
        self.start = start

    def active(self, progress: float) -> bool:
        return progress >= self.start

    def must_visit(self, site) -> bool:
        return site.cross

    def overrides(self, site, call):
        def add(host, *args, **kwargs):
            call.visited.add(site.index)
            rows = torch.tensor([float(kind == POSITIVE) for kind in call.kinds])[:, None, None]
            return host(*args, **kwargs) + self.number * rows

        return {"": add} if site.cross else {}


class Rewriting(Adding):
    """Puts another embedding at the positions of the rows' words."""

    def __init__(self, embedding: torch.Tensor, start: float = 0.0):
        super().__init__(0.0, start)
        self.embedding = embedding
        self.asked: list[int] = []

    def context(self, call, context):
        self.asked.append(context.shape[1])
        changed = context.clone()
        for number, row in enumerate(call.rows):
            changed[number, [position for own in row.words for position in own]] = self.embedding
        return changed


def text(rows: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, 7, 48)


def test_sites_come_in_the_published_order(unet: nn.Module) -> None:
    order = json.loads((DATA / "meta.json").read_text())["processor_order"]
    sites = find_sites(unet)
    assert [site.index for site in sites] == list(range(len(order)))
    assert [site.cross for site in sites] == ["attn2" in name for name in order]
    if hasattr(unet, "down_blocks"):
        assert [f"{site.path}.processor" for site in sites] == order
    else:
        blocks = [site.path.split(".")[0] + site.path.split(".")[1] for site in sites if site.cross]
        assert blocks == [f"input_blocks{i}" for i in (1, 2, 4, 5, 7, 8)] + [
            f"output_blocks{i}" for i in range(3, 12)
        ] + ["middle_block1"]


def test_both_layouts_give_the_same_sites() -> None:
    shapes = [
        [(s.channels, s.inner, s.context, s.heads) for s in find_sites(u)] for u in (diffusers_unet(), ldm_unet())
    ]
    assert shapes[0] == shapes[1]


def test_a_network_without_such_blocks_is_refused() -> None:
    with pytest.raises(PortraitError, match="not a Stable Diffusion UNet"):
        find_sites(nn.Linear(2, 2))


def test_an_injection_that_fails_halfway_leaves_nothing(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before, injection, installed = attributes(unet), Injection(unet, Doubling()), _Override.install

    def install(override: _Override) -> None:
        if len(injection._overrides) == 3:
            raise RuntimeError("this module takes no attributes")
        installed(override)

    monkeypatch.setattr(_Override, "install", install)
    with pytest.raises(RuntimeError, match="takes no attributes"):
        injection.inject()
    assert attributes(unet) == before
    assert not injection.injected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(
    numbers=st.lists(st.integers(0, MOST_ROWS - 1) | st.sampled_from([0, 63, 64, 4095]), min_size=1, max_size=6),
    width=st.integers(2, 6),
)
def test_marks_survive_dtypes_padding_cutting_and_slicing(dtype: torch.dtype, numbers: list[int], width: int) -> None:
    context = torch.randn(len(numbers), 9, width)
    marked = mark(context, numbers).to(dtype)
    padded = torch.cat([marked, marked[:, -1:].repeat(1, 4, 1)], dim=1)
    for found, rest in (
        unmark(marked),
        unmark(marked[:, :4]),
        unmark(padded),
        unmark(mark(context.to(dtype), numbers)),
    ):
        assert found == numbers
        assert rest.shape[1] in (9, 3, 13)
    assert unmark(marked[1:])[0] == (numbers[1:] or None)
    assert torch.equal(unmark(marked)[1], context.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_is_exact(dtype: torch.dtype) -> None:
    numbers = list(range(MOST_ROWS))
    assert unmark(mark(torch.zeros(MOST_ROWS, 1, 8, dtype=dtype), numbers))[0] == numbers


def test_what_cannot_be_a_number_is_refused() -> None:
    for numbers in ([MOST_ROWS, 0], [0, -1], [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="numbered from 0|cannot be marked"):
            mark(torch.zeros(2, 3, 8), numbers)


@given(values=st.lists(st.sampled_from([0.0, 192.0, 193.0, 254.0, 255.0, 256.0, 191.0]), min_size=5, max_size=5))
def test_a_token_that_is_no_mark_is_not_taken_for_one(values: list[float]) -> None:
    context = torch.tensor(values).expand(1, 3, 5)
    even, odd = set(values[::2]), set(values[1::2])
    whole = len(even) == len(odd) == 1 and all(192 <= value <= 255 for value in values)
    assert (unmark(context)[0] is not None) == whole


def test_unmarked_rows_are_none_and_mixed_rows_are_refused() -> None:
    context = torch.randn(2, 4, 8)
    kinds, same = unmark(context)
    assert kinds is None
    assert same is context
    with pytest.raises(ValueError, match="some rows"):
        unmark(torch.cat([mark(context[:1], POSITIVE), torch.cat([context[1:], context[1:, :1]], dim=1)]))


@given(height=st.integers(1, 130), width=st.integers(1, 130), level=st.integers(0, 4))
def test_spatial_shape_follows_the_strided_convolutions(height: int, width: int, level: int) -> None:
    x = torch.zeros(1, 1, height, width)
    for _ in range(level):
        x = nn.functional.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    assert spatial_shape(x.shape[-2] * x.shape[-1], (height, width)) == tuple(x.shape[-2:])


def test_token_counts_of_no_level_are_refused() -> None:
    with pytest.raises(ValueError, match="no level"):
        spatial_shape(4095, (64, 64))


def test_ejecting_leaves_nothing(unet: nn.Module) -> None:
    before, clean = attributes(unet), run(unet, text())
    injection = Injection(unet, Doubling())
    for _ in range(2):
        with injection:
            changed = run(unet, mark(text(), POSITIVE))
            assert not torch.allclose(changed, clean)
        assert attributes(unet) == before
        assert torch.equal(run(unet, text()), clean)


def test_an_exception_inside_a_step_leaves_nothing(unet: nn.Module) -> None:
    before = attributes(unet)

    class Failing(Doubling):
        def overrides(self, site, call):
            def fail(host, *args, **kwargs):
                raise RuntimeError("in the step")

            return {"to_q": fail} if site.index == 9 else {}

    with pytest.raises(RuntimeError, match="in the step"), Injection(unet, Failing()):
        run(unet, mark(text(), POSITIVE))
    assert attributes(unet) == before


def test_unmarked_calls_run_bare_and_marks_do_not_reach_the_text(unet: nn.Module) -> None:
    clean = run(unet, text())
    with Injection(unet, Doubling(limit=0.5)) as injection:
        assert torch.equal(run(unet, text()), clean)
        assert injection.calls == {}
        injection.progress = 0.6
        assert torch.equal(run(unet, mark(text(), NEGATIVE)), clean)
        assert injection.calls == {NEGATIVE: 2}


def test_a_number_is_a_row_of_the_table(unet: nn.Module) -> None:
    """A positive row of either picture, then the second one's negative row."""
    table = {7: Row(POSITIVE, 0), 300: Row(POSITIVE, 1), 4095: Row(NEGATIVE, 1, ((3, 4),))}
    seen: list[list[Row]] = []

    class Watching(Doubling):
        def overrides(self, site, call):
            def watch(host, *args, **kwargs):
                call.visited.add(site.index)
                seen.append(call.rows)
                return host(*args, **kwargs)

            return {"": watch} if site.cross else {}

    with Injection(unet, Watching(), rows=table) as injection:
        run(unet, mark(text(3), [7, 300, 4095]))
        run(unet, mark(text(3), [7, 300, 4095])[1:])
        assert injection.calls == {POSITIVE: 3, NEGATIVE: 2}
        with pytest.raises(PortraitError, match="no row of this sampling has the number 8"):
            run(unet, mark(text(), [7, 8]))
        assert injection.call.rows == []
    assert seen[0] == list(table.values())
    assert seen[-1] == [Row(POSITIVE, 1), Row(NEGATIVE, 1, ((3, 4),))]


def test_a_site_that_is_passed_by_is_an_error(unet: nn.Module) -> None:
    with (
        pytest.raises(PortraitError, match=r"did not run the attention layer \w+_blocks"),
        Injection(unet, Doubling(visiting=False)),
    ):
        run(unet, mark(text(), POSITIVE))


def test_a_wrapper_put_around_ours_and_left_there_becomes_transparent(unet: nn.Module) -> None:
    clean = run(unet, text())
    module = find_sites(unet)[1].module
    with Injection(unet, Doubling()):
        ours = module.forward
        module.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert torch.equal(run(unet, text()), clean)
    assert torch.equal(run(unet, mark(text(), POSITIVE)[:, 1:]), clean)
    del module.forward


def test_an_override_that_was_there_before_is_restored(unet: nn.Module) -> None:
    module = find_sites(unet)[1].module
    host = type(module).forward
    module.forward = lambda *args, **kwargs: 0.5 * host(module, *args, **kwargs)
    theirs = module.forward
    clean = run(unet, text())
    with Injection(unet, Doubling()):
        assert not torch.allclose(run(unet, mark(text(), POSITIVE)), clean)
    assert module.forward is theirs
    assert torch.equal(run(unet, text()), clean)
    del module.forward


# -------------------------------------------------------------------------------------------------------- several rules


def test_rules_on_one_unet_add_up_in_either_order_and_leave_nothing(unet: nn.Module) -> None:
    before, context = attributes(unet), mark(text(3), [POSITIVE, NEGATIVE, POSITIVE])
    with Injection(unet, Adding(0.5)):
        expected = run(unet, context)
    outputs = []
    for numbers in ((0.2, 0.3), (0.3, 0.2)):
        with Injection(unet, *map(Adding, numbers)) as injection:
            outputs.append(run(unet, context))
            assert injection.calls == {POSITIVE: 2, NEGATIVE: 1}
        assert attributes(unet) == before
    for out in outputs:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_each_rule_has_its_own_window(unet: nn.Module) -> None:
    context = mark(text(), POSITIVE)
    with Injection(unet, Adding(0.5)):
        expected = run(unet, context)
    with Injection(unet, Adding(0.5), Adding(1.0, start=0.5)) as injection:
        injection.progress = 0.25
        assert torch.equal(run(unet, context), expected)
        injection.progress = 0.5
        assert not torch.allclose(run(unet, context), expected, atol=1e-2)


def test_the_later_rule_is_outside_of_the_earlier_one(unet: nn.Module) -> None:
    """At one module: the later one's host is the earlier one."""
    seen: list[float] = []

    class Watching(Doubling):
        def overrides(self, site, call):
            def watch(host, *args, **kwargs):
                call.visited.add(site.index)
                out = host(*args, **kwargs)
                seen.append(float(out.mean()))
                return out

            return {"": watch} if site.index == 1 else {}

        def must_visit(self, site) -> bool:
            return site.index == 1

    for rules in ((Watching(), Adding(10.0)), (Adding(10.0), Watching())):
        with Injection(unet, *rules):
            run(unet, mark(text(), POSITIVE))
    assert seen[1] - seen[0] == pytest.approx(10, abs=1e-3)


def test_a_rule_that_another_hides_counts_as_passed_by(unet: nn.Module) -> None:
    """The outer one replaces the layers; each rule's visits are its own."""

    class Replacing(Doubling):
        def overrides(self, site, call):
            def replace(host, x, *args, **kwargs):
                call.visited.add(site.index)
                return torch.zeros_like(x)

            return {"": replace} if site.cross else {}

    run_with = mark(text(), POSITIVE)
    with Injection(unet, Adding(1.0), Replacing()), pytest.raises(PortraitError, match="did not run the attention"):
        run(unet, run_with)
    with Injection(unet, Replacing(), Adding(1.0)):
        run(unet, run_with)


def test_an_injection_inside_another_has_its_calls_to_itself(unet: nn.Module) -> None:
    before, context = attributes(unet), mark(text(), POSITIVE)
    with Injection(unet, Adding(0.5)):
        expected = run(unet, context)
    with Injection(unet, Doubling()) as outer:
        doubled = run(unet, context)
        with Injection(unet, Adding(0.5)):
            torch.testing.assert_close(run(unet, context), expected)
        assert torch.equal(run(unet, context), doubled)
        assert outer.calls == {POSITIVE: 4}
    assert attributes(unet) == before


class AddingRows(Adding):
    """Appends copies of the first row, as a kind of its own."""

    def __init__(self, number: float, own: int, rows: int = 1):
        super().__init__(number)
        self.own, self.rows = own, rows

    def enter(self, call, args, kwargs):
        self.before = len(call.numbers)
        call.numbers = [*call.numbers, *[self.own] * self.rows]
        call.table = {**call.table, self.own: Row(REFERENCE)}
        grown = [torch.cat([one, one[:1].expand(self.rows, *one.shape[1:])]) for one in args]
        return tuple(grown), kwargs

    def leave(self, output):
        sample = output if isinstance(output, torch.Tensor) else output.sample
        assert len(sample) == self.before + self.rows
        return sample[: self.before]


def test_rows_that_rules_add_are_seen_by_all_rules_and_not_by_the_host(unet: nn.Module) -> None:
    kinds: list[list[int]] = []

    class Watching(Doubling):
        def overrides(self, site, call):
            def watch(host, *args, **kwargs):
                call.visited.add(site.index)
                kinds.append(call.kinds)
                return host(*args, **kwargs)

            return {"": watch} if site.cross else {}

    context = mark(text(), POSITIVE)
    with Injection(unet, Adding(0.5)):
        expected = run(unet, context)
    for rules in (
        (AddingRows(0.2, 70), Watching(), AddingRows(0.3, 71, rows=2)),
        (Watching(), AddingRows(0.3, 71, rows=2), AddingRows(0.2, 70)),
    ):
        kinds.clear()
        with Injection(unet, *rules) as injection:
            out = run(unet, context)
            assert injection.calls == {POSITIVE: 2}
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert all(one == [POSITIVE, POSITIVE, REFERENCE, REFERENCE, REFERENCE] for one in kinds) and kinds


# -------------------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("named", [False, True])
def test_a_rule_rewrites_the_context_before_the_unet_and_neighbours_see_it(unet: nn.Module, named: bool) -> None:
    table = {0: Row(POSITIVE, 0, ((2,), (5,))), 1: Row(NEGATIVE)}
    embedding, context = torch.full((48,), 0.7), text()
    expected = context.clone()
    expected[0, [2, 5]] = embedding
    seen: list[torch.Tensor] = []

    def neighbour(module, args, kwargs):
        seen.append(args[2] if len(args) > 2 else kwargs.get("context", kwargs.get("encoder_hidden_states")))

    def call(context: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        x, t = torch.randn(2, 4, 16, 16), torch.tensor([500, 500])
        names = (
            ("x", "timesteps", "context")
            if hasattr(unet, "input_blocks")
            else ("sample", "timestep", "encoder_hidden_states")
        )
        with torch.no_grad():
            out = unet(**dict(zip(names, (x, t, context)))) if named else unet(x, t, context)
        return out if isinstance(out, torch.Tensor) else out.sample

    first, second = Rewriting(embedding, start=0.5), Rewriting(embedding)
    hook = unet.register_forward_pre_hook(neighbour, with_kwargs=True)
    try:
        with Injection(unet, first, second, rows=table):
            out = call(mark(context, [0, 1]))
            assert (first.asked, second.asked) == ([], [7])
            assert torch.equal(seen[-1], expected)
            bare = call(context)
            assert second.asked == [7]
        assert torch.equal(call(expected), out)
        assert torch.equal(call(context), bare)
    finally:
        hook.remove()


def test_conditions_of_either_form_are_marked_and_not_written_to() -> None:
    context = text()
    assert torch.equal(mark_conditions(context, [1, 2]), mark(context, [1, 2]))
    mapping = {"crossattn": context, "vector": torch.ones(2, 3)}
    marked = mark_conditions(mapping, [1, 2])
    assert torch.equal(marked["crossattn"], mark(context, [1, 2]))
    assert marked["vector"] is mapping["vector"]
    assert mapping["crossattn"] is context


# ----------------------------------------------------------------------------------------------------------- ControlNet


class ControlNet(nn.Module):
    """sd-webui-controlnet's `ControlNet` (scripts/cldm.py): a UNet's first part and middle, in ldm's layout."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        torch.manual_seed(6)
        self.time_embed = copy.deepcopy(unet.time_embed)
        self.input_blocks, self.middle_block = copy.deepcopy(unet.input_blocks), copy.deepcopy(unet.middle_block)
        self.input_hint_block = nn.Conv2d(3, 32, 8, 8)
        widths = [32, *(block[0].out_channels for block in self.input_blocks[1:])]
        self.zero_convs = nn.ModuleList([nn.Conv2d(width, width, 1) for width in widths])
        self.middle_block_out = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, x, hint, timesteps, context, y=None):
        from ldm.modules.diffusionmodules.util import timestep_embedding

        emb, h, outs = self.time_embed(timestep_embedding(timesteps, 32)), x, []
        for number, (module, convolution) in enumerate(zip(self.input_blocks, self.zero_convs)):
            h = module(h, emb, context)
            if number == 0:
                h = h + self.input_hint_block(hint)
            outs.append(convolution(h))
        return [*outs, self.middle_block_out(self.middle_block(h, emb, context))]


class PlugableControlModel(nn.Module):
    """The same extension's module around it."""

    def __init__(self, control: nn.Module):
        super().__init__()
        self.control_model = control

    def forward(self, *args, **kwargs):
        return self.control_model(*args, **kwargs)


def control_net(kind: str) -> tuple[nn.Module, nn.Module]:
    """A ControlNet and its UNet."""
    if kind == "diffusers":
        from diffusers import ControlNetModel

        unet = diffusers_unet()
        made = ControlNetModel.from_unet(unet)
        for convolution in (*made.controlnet_down_blocks, made.controlnet_mid_block):
            convolution.weight.data.normal_(generator=torch.Generator().manual_seed(6))
        return made.eval(), unet
    unet = ldm_unet()
    made = ControlNet(unet).eval()
    return (made if kind == "ldm" else PlugableControlModel(made)), unet


def run_control(control: nn.Module, context: torch.Tensor, named: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(context), 4, 16, 16, generator=generator)
    hint = torch.randn(len(context), 3, 128, 128, generator=generator)
    t = torch.tensor([500] * len(context))
    with torch.no_grad():
        if hasattr(control, "down_blocks"):
            down, middle = (
                control(x, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
                if named
                else control(x, t, context, hint, return_dict=False)
            )
            return [*down, middle]
        return control(x=x, hint=hint, timesteps=t, context=context) if named else control(x, hint, t, context)


CONTROLS = pytest.mark.parametrize("kind", ["diffusers", "ldm", "plugable"])


@CONTROLS
def test_a_control_nets_sites_have_the_numbers_of_those_that_they_copy(kind: str) -> None:
    control, unet = control_net(kind)
    own, sites = find_sites(unet), control_sites(control, unet)
    assert [site.index for site in sites] == [*range(12), 30, 31]
    for site in sites:
        twin = own[site.index]
        assert (site.path, site.cross, site.channels, site.context) == (
            twin.path,
            twin.cross,
            twin.channels,
            twin.context,
        )
        assert site.module is getattr(control, "control_model", control).get_submodule(site.path)
        assert torch.equal(site.module.to_q.weight, twin.module.to_q.weight)


def test_what_is_no_control_net_of_the_unet_is_refused(unet: nn.Module) -> None:
    for other in (unet, nn.Linear(2, 2)):
        with pytest.raises(PortraitError, match="is not a ControlNet"):
            control_sites(other, unet)
    control, _ = control_net("diffusers" if hasattr(unet, "down_blocks") else "ldm")
    narrow = copy.deepcopy(unet)
    for site in find_sites(narrow):
        site.module.to_k = nn.Linear(site.context + 1, site.inner)
    with pytest.raises(PortraitError, match="made for another kind of model"):
        control_sites(control, narrow)


@CONTROLS
@pytest.mark.parametrize("named", [False, True])
def test_marked_rows_of_a_control_net_change_and_nothing_is_left(kind: str, named: bool) -> None:
    control, unet = control_net(kind)
    before, clean = attributes(control), run_control(control, text(), named)
    with Injection(control, Adding(1.0), sites=control_sites(control, unet)) as injection:
        bare = run_control(control, text(), named)
        assert all(torch.equal(one, other) for one, other in zip(bare, clean, strict=True))
        changed = run_control(control, mark(text(), [POSITIVE, NEGATIVE]), named)
        assert injection.calls == {POSITIVE: 1, NEGATIVE: 1}
    for out, other in zip(changed[2:], clean[2:], strict=True):
        assert not torch.allclose(out[0], other[0], atol=1e-3)
    for out, other in zip(changed, clean, strict=True):
        torch.testing.assert_close(out[1], other[1], atol=1e-4, rtol=1e-4)
    assert attributes(control) == before
    again = run_control(control, text(), named)
    assert all(torch.equal(one, other) for one, other in zip(again, clean, strict=True))


def test_a_control_net_called_inside_the_unet_has_its_rows() -> None:
    """As sd-webui-controlnet does: around the UNet's forward, with the context that the UNet got."""
    control, unet = control_net("plugable")
    inside = unet.forward
    seen: list[list[torch.Tensor]] = []

    def forward(x, t, context):
        seen.append(run_control(control, context))
        return inside(x, t, context)

    unet.forward = forward
    plain = run_control(control, text())
    outer = Injection(unet, Adding(1.0))
    inner = Injection(control, Adding(1.0), sites=control_sites(control, unet), within=outer)
    with outer, inner:
        run(unet, mark(text(), [POSITIVE, NEGATIVE]))
        run(unet, text())
    changed, bare = seen
    assert not torch.allclose(changed[-1][0], plain[-1][0], atol=1e-3)
    torch.testing.assert_close(changed[-1][1], plain[-1][1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(one, other) for one, other in zip(bare, plain, strict=True))


def test_what_attends_to_a_word_is_its_share_of_the_softmax(unet: nn.Module) -> None:
    """One site by hand: softmax(Q K^T / sqrt(d)), the mean over the heads, the sum over a person's words."""
    site = next(site for site in find_sites(unet) if site.cross)
    x, context = torch.randn(2, 16, site.channels), torch.randn(2, 7, site.context)
    words = [((2,), ()), ((1, 5), (3,))]
    found = word_attention(site, x, context, words)
    d = site.inner // site.heads
    for row in range(2):
        by_head = []
        for head in range(site.heads):
            own = slice(head * d, (head + 1) * d)
            q, k = (x[row] @ site.module.to_q.weight.T)[:, own], (context[row] @ site.module.to_k.weight.T)[:, own]
            by_head.append((q @ k.T / d**0.5).softmax(dim=-1))
        mean = torch.stack(by_head).mean(dim=0)
        for person, positions in enumerate(words[row]):
            torch.testing.assert_close(found[row, person], mean[:, list(positions)].sum(dim=1), atol=1e-6, rtol=1e-5)
    assert found.shape == (2, 2, 16) and not found[0, 1].any()
    context.requires_grad_(True)
    word_attention(site, x, context, words)[1, 1].sum().backward()
    assert context.grad is not None and context.grad[1].abs().sum() > 0 and not context.grad[0].any()
