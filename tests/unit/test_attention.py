"""Promises of `lib_portrait.attention`: order of sites, rows told apart, inject and eject as inverses."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Row, find_sites, mark, spatial_shape, unmark
from lib_portrait.attention.injection import _Override
from lib_portrait.attention.rows import MOST_ROWS
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
    table = {7: Row(POSITIVE, 0), 300: Row(POSITIVE, 1), 4095: Row(NEGATIVE, 1, (3, 4))}
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
    assert seen[-1] == [Row(POSITIVE, 1), Row(NEGATIVE, 1, (3, 4))]


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
