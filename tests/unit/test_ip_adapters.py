"""Beside an IP-Adapter as sd-webui-controlnet puts it on a UNet: it acts in the sampling's calls, and in no other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor, nn

from lib_portrait.attention import Injection, find_sites, mark
from lib_portrait.guidance.reference import forget
from lib_portrait.methods.uniportrait import Adapter
from lib_portrait.webui import hooks
from tests.host_stand_in import Host, Processing, Script, standing_in
from tests.parity.unets import flatten, ldm_unet, load_bin
from tests.unit.test_attention import attributes
from tests.unit.test_fusion import person as fused_person
from tests.unit.test_fusion import pictures, prepared
from tests.unit.test_guidance_reference import (
    ROWS,
    PictureHost,
    guidance,
    inputs,
    person,
    run,
    uniportrait,
    without_backward,
)
from tests.unit.test_session import folder, one, unets, untouched  # noqa: F401
from tests.unit.test_session_guidance import alone as guided_alone

ADAPTER_FILES = ("uniportrait-faceid_small.bin", "uniportrait-router_small.bin")


class HostWithUnits(PictureHost):
    """Answers as `WebuiHost` does where units hang onto its UNet."""

    def call(self, latent: Tensor, t: Tensor, context: Any) -> Tensor:
        with self.bare():
            return super().call(latent, t, context)

    def bare(self) -> contextlib.AbstractContextManager[None]:
        return hooks.left_out(self.unet)

    def adds_to(self, layer: nn.Module) -> bool:
        return hooks.adds_to(layer)


class IPAdapter:
    """Adds, in calls of as many rows as it was told, to every cross-attention. seen: how many rows each time."""

    def __init__(self, unet: nn.Module, rows: int):
        self.seen: list[int] = []
        generator = torch.Generator().manual_seed(2)
        self.layers = [site.module for site in find_sites(unet) if site.cross]
        for layer in self.layers:
            inner = layer.to_q.out_features
            keys, values = torch.randn(2, rows, 4, inner, generator=generator)

            @torch.no_grad()
            def function(attention: Any, x: Tensor, q: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                self.seen.append(len(x))
                heads = attention.heads
                # As there, without a look at whether these are the rows that the keys were made for.
                k, v = (one.view(len(x), -1, heads, q.shape[-1]).transpose(1, 2) for one in (keys, values))
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

            layer.ipadapter_hacks = [function]
            layer.forward = MethodType(attention_with_functions, layer)

    def take_off(self) -> None:
        for layer in self.layers:
            del layer.ipadapter_hacks, layer.forward


def attention_with_functions(self: Any, x: Tensor, context: Tensor | None = None, mask: None = None) -> Tensor:
    """scripts/ipadapter/plugable_ipadapter.py: attn_forward_hacked."""
    context = x if context is None else context
    q, k, v = (
        layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for layer, given in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    for function in self.ipadapter_hacks:
        out = out + function(self, x, q)
    return self.to_out(out)


@contextlib.contextmanager
def unchanged(unet: nn.Module) -> Iterator[nn.Module]:
    """A UNet as hosts sample with it, which has to be afterwards as it was; no reference is known of earlier ones."""
    before = attributes(unet)
    forget()
    with torch.no_grad():
        yield unet
    assert attributes(unet) == before


@pytest.fixture
def unet() -> Iterator[nn.Module]:
    with unchanged(ldm_unet()) as made:
        yield made


@pytest.fixture
def own() -> Iterator[nn.Module]:
    """A UNet that nobody looks at afterwards."""
    with torch.no_grad():
        yield ldm_unet()


@pytest.fixture
def adapter(unet: nn.Module) -> Iterator[IPAdapter]:
    made = IPAdapter(unet, rows=4)
    yield made
    made.take_off()


def test_it_is_left_out_for_a_while_and_put_back_whatever_happens(unet: nn.Module, adapter: IPAdapter) -> None:
    z, t, context = inputs()
    functions = [layer.ipadapter_hacks for layer in adapter.layers]
    with_it = run(unet, z, t, context)
    with hooks.left_out(unet):
        assert not hooks.ip_adapters_on(unet)
        without = run(unet, z, t, context)
    with pytest.raises(RuntimeError, match="in between"), hooks.left_out(unet):
        raise RuntimeError("in between")
    assert all(layer.ipadapter_hacks is own for layer, own in zip(adapter.layers, functions, strict=True))
    assert hooks.ip_adapters_on(unet) and adapter.seen == [4] * len(adapter.layers)
    assert torch.equal(run(unet, z, t, context), with_it)
    torch.testing.assert_close(without, run(ldm_unet(), z, t, context), atol=1e-5, rtol=0)
    assert (with_it - without).abs().max() > 1e-2


def test_rows_that_share_their_self_attention_are_left_out_too(own: nn.Module) -> None:
    """ControlNet's style align (scripts/hook.py: hacked_basic_transformer_inner_forward)."""
    given = inputs()
    bare = run(own, *given)

    def aligned(self: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
        every = self.norm1(x).flatten(0, 1)[None]
        x = self.attn1(every).view_as(x) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x

    blocks: list[Any] = [block for block in own.modules() if hasattr(block, "attn1")]
    for block in blocks:
        block._original_inner_forward_cn_hijack = block._forward
        block._forward = MethodType(aligned, block)
    theirs = run(own, *given)
    with hooks.left_out(own):
        assert torch.equal(run(own, *given), bare)
    assert torch.equal(run(own, *given), theirs)
    assert (theirs - bare).abs().max() > 1e-2


@pytest.mark.parametrize("noise", ["fixed", "step"])
def test_references_are_seen_without_it_and_guided_rows_with_it(
    unet: nn.Module, noise: str, request: pytest.FixtureRequest
) -> None:
    z, t, context = inputs()
    plain = guidance(HostWithUnits(unet), [person(0)], noise=noise)
    with Injection(unet, guidance=plain, rows=ROWS):
        run(unet, z, t, mark(context, [1, 2, 3, 4]))
    adapter: IPAdapter = request.getfixturevalue("adapter")
    expected = run(unet, z, t, context)
    adapter.seen.clear()
    made = guidance(HostWithUnits(unet), [person(0)], noise=noise)
    # ControlNet stands around the UNet's forward, and so all rows run together.
    original = unet.forward
    unet.forward = lambda *args, **kwargs: original(*args, **kwargs)
    try:
        with Injection(unet, guidance=made, rows=ROWS):
            out = run(unet, z, t, mark(context, [1, 2, 3, 4]))
    finally:
        del unet.forward
    assert adapter.seen == [4] * len(adapter.layers)
    (own,), (bare,) = made._references[0], plain._references[0]
    torch.testing.assert_close(own, bare, atol=1e-4, rtol=0)
    outside = (out - expected)[..., 8:]
    torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-5, rtol=0)
    assert (out - expected)[..., :8].abs().max() > 1e-3


def test_it_stays_where_other_layers_have_no_backward_pass(
    unet: nn.Module, adapter: IPAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, t, context = inputs()
    expected = run(unet, z, t, context)
    made = guidance(HostWithUnits(unet), [person(0)], strength=0.0001)
    kind = type(find_sites(unet)[0].module)
    monkeypatch.setattr(kind, "forward", without_backward("No operator found for memory_efficient_attention_backward"))
    original = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *args, **kwargs: original(*args, **kwargs))
    with Injection(unet, guidance=made, rows=ROWS):
        out = run(unet, z, t, mark(context, [1, 2, 3, 4]))
    assert made.notices and made.record
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("added", [0.0, 0.5])
def test_the_gradient_goes_through_an_encoder_that_is_run_without_gradients(unet: nn.Module, added: float) -> None:
    """As ControlNet runs it, which between its blocks adds what T2I-Adapters give."""
    z, t, context = inputs()
    made, bare = (guidance(HostWithUnits(unet), [person(0)]) for _ in range(2))

    def walk(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        kept = []
        with torch.no_grad():
            emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels))
            h = x
            for number, block in enumerate(unet.input_blocks):
                h = block(h, emb, context)
                if number in (2, 5):
                    h = h + added
                kept.append(h)
            h = unet.middle_block(h, emb, context)
        for block in unet.output_blocks:
            h = block(torch.cat([h, kept.pop()], dim=1), emb, context)
        return unet.out(h)

    unet.forward = walk
    try:
        plain = run(unet, z, t, context)
        with Injection(unet, guidance=made, rows=ROWS):
            out = run(unet, z, t, mark(context, [1, 2, 3, 4]))
    finally:
        del unet.forward
    assert not torch.is_grad_enabled() and not out.requires_grad
    assert (out - plain)[..., :8].abs().max() > 1e-3
    if not added:
        expected = run(unet, z, t, context)
        with Injection(unet, guidance=bare, rows=ROWS):
            expected = run(unet, z, t, mark(context, [1, 2, 3, 4])) - expected
        torch.testing.assert_close(out - plain, expected, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------- in the WebUI


@pytest.fixture
def host(folder: Path, unets: dict[str, nn.Module], untouched: dict[str, Any]) -> Iterator[Host]:  # noqa: F811
    made = Host(folder, unets)
    with standing_in(made.modules):
        made.load_portrait()
        yield made
    made.take_hooks_off()


def test_the_host_s_calls_of_ours_are_without_it(host: Host) -> None:
    from lib_portrait.webui.host import WebuiHost

    asked = WebuiHost(host.shared.sd_model, (64, 64))
    host.shared.sd_model.model.conditioning_key = "crossattn"
    given = torch.randn(1, 4, 16, 16), torch.tensor(300), asked.text("")
    with torch.no_grad():
        bare = asked.call(*given)
        adapter = IPAdapter(host.unet, rows=2)
        try:
            torch.testing.assert_close(asked.call(*given), bare, atol=1e-5, rtol=0)
            assert not adapter.seen
            assert hooks.ip_adapters_on(host.unet)
        finally:
            adapter.take_off()


def test_methods_that_replace_the_attention_are_refused_and_the_others_go_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_portrait.methods.base import Rule

    drawn = host.generate(Processing(host, one())).images[0].tobytes()
    adapter = IPAdapter(host.unet, rows=2)
    try:
        assert host.generate(Processing(host, one())).images[0].tobytes() != drawn
        monkeypatch.setattr(Rule, "replaces_attention", True)
        with pytest.raises(Exception, match="unit adds to the attention that UniPortrait replaces"):
            host.generate(Processing(host, one()))
    finally:
        adapter.take_off()


def test_weights_of_control_networks_need_no_gradient_in_guided_samplings(host: Host) -> None:
    """A T2I-Adapter keeps what it made of its picture, and copies it at every step (scripts/adapter.py)."""
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    seen: list[list[bool]] = []

    params = [SimpleNamespace(control_model=one) for one in (network, None)]
    controlnet: Any = Script("/x/scripts/controlnet.py", "ControlNet", object(), 0, 0)
    controlnet.latest_network = SimpleNamespace(control_params=params)

    def draw(values: tuple[Any, ...]) -> None:
        p = Processing(host, values, steps=1)
        p.scripts.alwayson_scripts.append(controlnet)
        host.before_call = lambda step: seen.append([weight.requires_grad for weight in network.parameters()])
        host.generate(p)

    draw(one())
    draw(guided_alone())
    assert seen == [[True, False], [False, False]]
    assert [weight.requires_grad for weight in network.parameters()] == [True, False]


@pytest.mark.parametrize("method", ["uniportrait", "fusion"])
def test_who_says_so_replaces_it_and_who_does_not_leaves_it(unet: nn.Module, adapter: IPAdapter, method: str) -> None:
    z, t, context = inputs()
    with hooks.left_out(unet):
        rule: Any = (
            uniportrait(Adapter.from_tensors(*map(flatten, map(load_bin, ADAPTER_FILES))), 2)
            if method == "uniportrait"
            else prepared(unet, [fused_person(*pictures(1))])
        )
    adapter.seen.clear()
    with Injection(unet, rule, rows=ROWS):
        run(unet, z, t, mark(context, [1, 2, 3, 4]))
    assert rule.replaces_attention == (adapter.seen != [4] * len(adapter.layers))
