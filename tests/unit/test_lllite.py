"""Beside ControlNet-LLLite as sd-webui-controlnet puts it on a UNet: it acts in the sampling's calls, and in no other.

What it should do there is said by hooks in front of the projections (`Plainly`), which no `forward` can hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_portrait.attention import Injection, find_sites, mark
from lib_portrait.methods.fusion import STEP
from lib_portrait.methods.uniportrait import Adapter
from lib_portrait.webui import control, hooks
from tests.host_stand_in import Host, Processing, Script
from tests.parity.unets import flatten, ldm_unet, load_bin, sgm_unet
from tests.unit.test_fusion import person as fused_person
from tests.unit.test_fusion import pictures, prepared
from tests.unit.test_guidance_reference import ROWS, guidance, inputs, person, run, uniportrait, without_backward
from tests.unit.test_instantfamily import rule_of as family
from tests.unit.test_ip_adapters import ADAPTER_FILES, HostWithUnits, host, unchanged  # noqa: F401
from tests.unit.test_session import folder, one, refused, unets, untouched  # noqa: F401
from tests.unit.test_session_guidance import alone as guided_alone

WEIGHT, EMBEDDING, MLP = 0.7, 6, 5


class Module(nn.Module):
    """scripts/controlnet_lllite.py: LLLiteModule, of one projection; the network of the picture has one layer here."""

    def __init__(self, width: int):
        super().__init__()
        self.conditioning1 = nn.Conv2d(3, EMBEDDING, 8, 8)
        self.down, self.mid, self.up = nn.Linear(width, MLP), nn.Linear(MLP + EMBEDDING, MLP), nn.Linear(MLP, width)
        self.picture = torch.randn(1, 3, 128, 128)
        self.cond_emb: Tensor | None = None

    def forward(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.cond_emb is None:
            seen = self.conditioning1(self.picture.to(x))
            self.cond_emb = nn.functional.interpolate(seen, shape[2:], mode="nearest-exact").flatten(2).mT
        seen = self.cond_emb.repeat(len(x) // len(self.cond_emb), 1, 1)
        seen = torch.cat([seen, self.down(x).relu_()], dim=2)
        return self.up(self.mid(seen).relu_())


def modules(unet: nn.Module) -> list[tuple[nn.Module, Module]]:
    """Of each projection that LLLite is trained for its own part, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        projections = [
            layer
            for site in find_sites(unet)
            for name in (("to_q",) if site.cross else ("to_q", "to_k", "to_v"))
            for layer in (site.module.get_submodule(name),)
        ]
        return [(layer, Module(layer.in_features).requires_grad_(False)) for layer in projections]  # type: ignore[arg-type]


class Unit:
    """An LLLite unit while it is hooked onto a UNet. seen: how many rows it has acted on, each time."""

    def __init__(self, unet: nn.Module, start: float = 0.0, end: float = 1.0):
        self.unet: Any = unet
        self.parts = modules(unet)
        self.seen: list[int] = []
        self._hooks = [
            block.register_forward_pre_hook(self._tell_shape)
            for block in (*self.unet.input_blocks, self.unet.middle_block, *self.unet.output_blocks)
        ]
        self._told(0.5, False)
        self.layers: list[Any] = []
        for layer, module in self.parts:
            module.register_forward_hook(lambda module, args, out: self.seen.append(len(out)))
            hack(layer, (WEIGHT, start, end, module), self.unet)
            self.layers.append(layer)

    def _tell_shape(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.unet.current_h_shape = tuple(args[0].shape)

    def _told(self, progress: float, in_high_res_fix: bool) -> None:
        """What the extension's own forward on the UNet tells."""
        self.unet.current_sampling_percent, self.unet.is_in_high_res_fix = progress, in_high_res_fix

    def take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            del layer.lllite_list, layer.forward
        for name in ("current_h_shape", "current_sampling_percent", "is_in_high_res_fix"):
            vars(self.unet).pop(name, None)


def hack(layer: Any, entry: tuple[float, float, float, Module], unet: Any) -> None:
    """scripts/controlnet_lllite.py: PlugableControlLLLite.hook and get_hacked_forward."""
    layer.lllite_list = []
    original = layer.forward

    @torch.no_grad()
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        if not unet.is_in_high_res_fix:
            added: Any = 0
            for weight, start, end, module in layer.lllite_list:
                if start <= unet.current_sampling_percent <= end:
                    added = added + module(x, unet.current_h_shape) * weight
            x = x + added
        return original(x, **kwargs)

    layer.forward = forward
    layer.lllite_list.append(entry)


class Plainly(Unit):
    """The same by hooks in front of the projections."""

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self.take_off()
        self.layers = []
        blocks = (*self.unet.input_blocks, self.unet.middle_block, *self.unet.output_blocks)
        self._hooks = [block.register_forward_pre_hook(self._tell_shape) for block in blocks]
        for layer, module in self.parts:
            self._hooks.append(
                layer.register_forward_pre_hook(
                    lambda layer, args, module=module: (
                        args[0] + WEIGHT * module(args[0], self.unet.current_h_shape),
                        *args[1:],
                    )
                )
            )


def around(unet: nn.Module) -> Callable[[], None]:
    """Has somebody stand around the UNet's forward, as ControlNet does; returns what takes it away."""
    original = unet.forward
    unet.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return lambda: delattr(unet, "forward")


@pytest.fixture(params=["ldm", "sgm"])
def unet(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    with unchanged(ldm_unet() if request.param == "ldm" else sgm_unet()) as made:
        yield made


@pytest.fixture
def unit(unet: nn.Module) -> Iterator[Unit]:
    made = Unit(unet)
    yield made
    made.take_off()


def expected(unet: nn.Module, *given: Tensor, **injected: Any) -> Tensor:
    """What the UNet puts out where LLLite stands in front of everybody."""
    plainly = Plainly(unet)
    try:
        with Injection(unet, *injected.pop("rules", ()), rows=ROWS, **injected):
            return run(unet, given[0], given[1], mark(given[2], [1, 2, 3, 4]))
    finally:
        plainly.take_off()


def beside(unet: nn.Module, *given: Tensor, rules: Any = (), **injected: Any) -> Tensor:
    """As the session has it."""
    lllites = hooks.LLLites(unet)
    lllites.take()
    try:
        with Injection(unet, *rules, lllites, rows=ROWS, **injected):
            return run(unet, given[0], given[1], mark(given[2], [1, 2, 3, 4]))
    finally:
        lllites.restore()


def test_it_is_left_out_for_a_while_and_put_back_whatever_happens(unet: nn.Module) -> None:
    given = inputs()
    bare = run(unet, *given)
    unit = Unit(unet)
    try:
        forwards = [(layer.forward, layer.lllite_list) for layer in unit.layers]
        with_it = run(unet, *given)
        with hooks.left_out(unet):
            assert torch.equal(run(unet, *given), bare)
        with pytest.raises(RuntimeError, match="in between"), hooks.left_out(unet):
            raise RuntimeError("in between")
        assert torch.equal(beside(unet, *given), with_it)
        lllites = hooks.LLLites(unet)
        lllites.take()
        # Calls of others carry no mark.
        with Injection(unet, lllites):
            assert torch.equal(run(unet, *given), with_it)
        lllites.restore()
        assert all((layer.forward, layer.lllite_list) == own for layer, own in zip(unit.layers, forwards, strict=True))
        assert (with_it - bare).abs().max() > 1e-2
    finally:
        unit.take_off()
    torch.testing.assert_close(with_it, expected(unet, *given), atol=1e-5, rtol=0)


def rule_of(unet: nn.Module, method: str) -> Any:
    if method == "uniportrait":
        return uniportrait(Adapter.from_tensors(*map(flatten, map(load_bin, ADAPTER_FILES))), 1)
    if method == "fusion":
        return prepared(unet, [fused_person(*pictures(1))])
    return family(unet, [None])


@pytest.mark.parametrize("method", ["uniportrait", "fusion", "instantfamily"])
def test_beside_methods_that_stand_in_the_attention(method: str) -> None:
    unet, given = ldm_unet(), inputs()
    with torch.no_grad():
        rule = rule_of(unet, method)
        without = expected(unet, *given)
        wanted = expected(unet, *given, rules=(rule_of(unet, method),))
        alone = run(unet, *given)
        unit = Unit(unet)
        out = beside(unet, *given, rules=(rule,))
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)
    assert (out - without).abs().max() > 1e-2, "the method is hidden"
    assert (out - alone).abs().max() > 1e-2, "LLLite is hidden"
    assert max(unit.seen) <= 4


def test_routing_looks_at_what_enters_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, given = ldm_unet(), inputs()
    rule = uniportrait(Adapter.from_tensors(*map(flatten, map(load_bin, ADAPTER_FILES))), 2)
    entered, hidden = {}, {}

    def keep(site: Any, call: Any, x: Tensor, q: Tensor, added: Any = rule.added) -> Any:
        hidden[site.index] = x
        return added(site, call, x, q)

    monkeypatch.setattr(rule, "added", keep)
    for site in find_sites(unet):
        if site.cross:
            site.module.register_forward_pre_hook(
                lambda layer, args, number=site.index: entered.update({number: args[0]})
            )
    Unit(unet)
    with torch.no_grad():
        beside(unet, *given, rules=(rule,))
    assert entered.keys() == hidden.keys() and len(entered) > 2
    assert all(torch.equal(entered[number], hidden[number]) for number in entered)


@pytest.mark.parametrize(
    ("unet", "options"),
    [("ldm", {}), ("sgm", {"noise": "step"}), ("ldm", {"noise": "step"}), ("sgm", {"checkpointing": True})],
    indirect=["unet"],
    ids=str,
)
def test_guidance_has_its_gradient_and_references_are_seen_without_it(unet: nn.Module, options: dict[str, Any]) -> None:
    given = inputs()
    bare = guidance(HostWithUnits(unet), [person(0)], **options)
    with Injection(unet, guidance=bare, rows=ROWS):
        run(unet, given[0], given[1], mark(given[2], [1, 2, 3, 4]))
    take_away = around(unet)
    try:
        plain = expected(unet, *given)
        # Its references are those of the bare UNet; made by hand, for hooks act in every call.
        front = guidance(HostWithUnits(unet), [person(0)], **options)
        if "noise" in options:
            monkey: Any = front
            monkey._look_at_step = lambda *args: front._references.update(bare._references)
        wanted = expected(unet, *given, guidance=front)
        unit = Unit(unet)
        try:
            made = guidance(HostWithUnits(unet), [person(0)], **options)
            assert not unit.seen, "the references were seen with it"
            out = beside(unet, *given, guidance=made)
        finally:
            unit.take_off()
    finally:
        take_away()
    assert not made.notices and not out.requires_grad and not torch.is_grad_enabled()
    (own,), (theirs,) = made._references[0], bare._references[0]
    torch.testing.assert_close(own, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)
    assert (wanted - plain)[..., :8].abs().max() > 1e-3


def test_guided_rows_keep_it_where_attention_has_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, given = ldm_unet(), inputs()
    with torch.no_grad():
        wanted = expected(unet, *given, guidance=guidance(HostWithUnits(unet), [person(0)]))
        Unit(unet)
        made = guidance(HostWithUnits(unet), [person(0)])
        kind = type(find_sites(unet)[0].module)
        monkeypatch.setattr(kind, "forward", without_backward("No operator found"))
        out = beside(unet, *given, guidance=made)
    assert made.notices and made.record
    torch.testing.assert_close(out, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("progress", "hires"), [(0.2, False), (0.6, False), (0.9, False), (0.6, True)])
def test_its_own_window_and_hires_fix_are_kept(progress: float, hires: bool) -> None:
    unet, given = ldm_unet(), inputs()
    unit = Unit(unet, 0.5, 0.7)
    unit._told(progress, hires)
    with torch.no_grad():
        theirs = run(unet, *given)
        seen = len(unit.seen)
        assert torch.equal(beside(unet, *given), theirs)
    assert len(unit.seen) == 2 * seen and bool(seen) == (progress == 0.6 and not hires)


# ----------------------------------------------------------------------------------------------------- in the WebUI


@pytest.mark.parametrize("values", [one(), guided_alone()], ids=["a method", "guidance"])
def test_both_are_in_the_picture_and_nothing_is_left(host: Host, values: Any) -> None:  # noqa: F811
    without = host.generate(Processing(host, values)).images[0].tobytes()
    plain = host.generate(Processing(host, ({"enabled": False}, ""))).images[0].tobytes()
    unit = Unit(host.unet)
    try:
        forwards = [(layer.forward, layer.lllite_list) for layer in unit.layers]
        alone = host.generate(Processing(host, ({"enabled": False}, ""))).images[0].tobytes()
        both = host.generate(Processing(host, values)).images[0].tobytes()
        assert len({without, plain, alone, both}) == 4

        def fail(step: int) -> None:
            if step == 1:
                raise RuntimeError("in between")

        host.before_call = fail
        with pytest.raises(Exception, match="in between"):
            host.generate(Processing(host, values))
        assert all((layer.forward, layer.lllite_list) == own for layer, own in zip(unit.layers, forwards, strict=True))
        host.before_call = lambda step: None
        assert host.generate(Processing(host, values)).images[0].tobytes() == both
    finally:
        unit.take_off()
    assert host.generate(Processing(host, values)).images[0].tobytes() == without


def test_rows_of_other_pictures_would_be_changed_too_and_that_is_refused(
    host: Host,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lib_portrait.methods.base import Rule

    def beside(network: object) -> tuple[Any, list[Any]]:
        p: Any = Processing(host, one())
        controlnet: Any = Script("/x/scripts/controlnet.py", "ControlNet", object(), 0, 0)
        controlnet.latest_network = network
        p.scripts.alwayson_scripts.append(controlnet)
        p.cached_c = ["its parameters", "conditions, with ControlNet's mark beside its units"]
        return p, p.cached_c

    def fail(step: int) -> None:
        raise RuntimeError("in between")

    monkeypatch.setattr(Rule, "adds_rows", True)
    kind = SimpleNamespace(is_controlnet=False, name="Controlllite")
    unit = SimpleNamespace(control_model_type=kind, control_model=None)
    p, kept = beside(SimpleNamespace(control_params=[unit]))
    fault: Any = refused(host, p)
    assert fault.field == "ControlNet" and fault.status_code == 422 and "Controlllite" in fault.problem
    assert kept == [None, None]
    # Without an enabled unit there is no mark.
    p, kept = beside(None)
    monkeypatch.setattr(host, "before_call", fail)
    with pytest.raises(Exception, match="in between"):
        host.generate(p)
    assert kept != [None, None]


@pytest.mark.parametrize("reference_t", [0, STEP])
def test_who_has_rows_along_says_so(reference_t: int | str) -> None:
    with torch.no_grad():
        rule = prepared(ldm_unet(), [fused_person(*pictures(1))], reference_t=reference_t)
    assert rule.adds_rows == (reference_t == STEP)


def test_rows_along_get_nothing_of_what_a_unit_adds_to_the_others() -> None:
    class Parameters:
        control_model_type = SimpleNamespace(is_controlnet=True)

        def apply_effective_region_mask(self, added: Tensor) -> Tensor:
            return added * 2

    unit, rows = Parameters(), range(0)
    network = SimpleNamespace(control_params=[unit])
    controlnet = SimpleNamespace(title=lambda: "ControlNet", latest_network=network)
    p = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[controlnet]))
    spared = control.Spared(p, lambda: rows, "Fusion")
    for_each, alike = torch.ones(3, 2, 4, 4), torch.ones(1, 2, 4, 4)
    assert torch.equal(unit.apply_effective_region_mask(for_each), for_each * 2)
    rows = range(2, 3)
    wanted = torch.tensor([2.0, 2.0, 0.0])[:, None, None, None].expand(3, 2, 4, 4)
    assert torch.equal(unit.apply_effective_region_mask(for_each), wanted)
    assert torch.equal(unit.apply_effective_region_mask(alike), wanted)
    spared.restore()
    assert vars(unit) == {}
