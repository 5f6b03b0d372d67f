"""Guidance inside the UNet's call: eq. 11 of OmniPortrait with a toy energy, against plain autograd."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Row, mark
from lib_portrait.attention.injection import Call
from lib_portrait.attention.schedule import signal_rate
from lib_portrait.attention.windows import takes_part
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.features import FeatureGuidance, Pass
from lib_portrait.methods.uniportrait import Adapter, Person, UniPortraitRule
from tests.parity.unets import diffusers_unet, flatten, ldm_unet, load_bin
from tests.unit.test_attention import Adding, Doubling, attributes

BLOCK = {"diffusers": "up_blocks.1", "ldm": "output_blocks.5"}
ROWS = {1: Row(POSITIVE, 0), 2: Row(POSITIVE, 1), 3: Row(NEGATIVE, 0), 4: Row(NEGATIVE, 1)}
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


class Guided(FeatureGuidance):
    """By a function of the features, the rows and the call's kinds."""

    def __init__(
        self,
        energy: Any,
        pictures: Any = None,
        scale: float = 1.0,
        end: float = 1.0,
        block: int = 1,
        alphas_cumprod: Tensor | None = None,
        checkpointing: bool = False,
    ):
        super().__init__(block, alphas_cumprod, checkpointing)
        self.of, self.pictures, self.scale, self.end = energy, pictures, scale, end

    def energy(self, features: Tensor, current: Pass) -> Tensor:
        return self.of(features, current)

    def active(self, progress: float) -> bool:
        return takes_part(0.0, self.end, progress)

    def guides(self, picture: int, t: float) -> bool:
        return self.pictures is None or picture in self.pictures

    def added(self, gradient: Tensor, current: Pass, prediction: Tensor) -> Tensor:
        assert prediction.shape == gradient.shape
        return self.scale * gradient


@pytest.fixture(scope="module", params=["diffusers", "ldm"])
def unet(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Its weights need gradients, as the WebUI's do. Nothing may be left in it, whatever a test does."""
    made = diffusers_unet() if request.param == "diffusers" else ldm_unet()
    assert any(weight.requires_grad for weight in made.parameters())
    before = attributes(made), [weight._version for weight in made.parameters()]
    yield made
    assert (attributes(made), [weight._version for weight in made.parameters()]) == before
    assert all(weight.grad is None for weight in made.parameters())


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As hosts sample; a test may not leave the mode changed."""
    with torch.no_grad():
        yield
        assert not torch.is_grad_enabled()


@pytest.fixture(scope="module")
def rule() -> UniPortraitRule:
    """UniPortrait with two people, with the parity adapter."""
    files = [flatten(load_bin(f"uniportrait-{role}_small.bin")) for role in ("faceid", "router")]
    adapter = Adapter.from_tensors(*files)
    generator = torch.Generator().manual_seed(4)
    tokens = [torch.randn(4, 48, generator=generator) for _ in range(3)]
    return UniPortraitRule(adapter, [Person({POSITIVE: own, NEGATIVE: tokens[2]}) for own in tokens[:2]])


def inputs(rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and contexts of two pictures' positive rows, then their negative ones."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=dtype).repeat(2, 1, 1, 1)
    context = torch.randn(4, 7, 48, generator=generator, dtype=dtype)
    return z[:rows], torch.tensor([500, 300, 500, 300])[:rows], context[:rows]


def predicted(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def energy(features: Tensor, current: Pass | None = None) -> Tensor:
    """Smooth, of every feature, and small, as a mean is: (P)."""
    assert current is None or [mark.kind for mark in current.marks] == [POSITIVE] * len(features)
    weights = torch.linspace(-1, 1, features[0].numel(), dtype=features.dtype).reshape(features[0].shape)
    return (torch.tanh(features) * weights).flatten(1).mean(dim=1) * 8


def by_autograd(unet: nn.Module, z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Two passes: the UNet's output without a graph; then, with one, dE/dz of each row's energy."""
    output = predicted(unet(z, t, context))
    kept: list[Tensor] = []
    hook = unet.get_submodule(BLOCK["ldm" if hasattr(unet, "input_blocks") else "diffusers"]).register_forward_hook(
        lambda module, args, out: kept.append(out)
    )
    try:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            unet(leaf, t, context)
            (gradient,) = torch.autograd.grad(energy(kept[-1]).sum(), leaf)
    finally:
        hook.remove()
    return output, gradient


def holding_a_graph() -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.grad_fn is not None]


def test_every_row_of_a_picture_has_the_gradient_of_its_positive_row(unet: nn.Module) -> None:
    z, t, context = inputs()
    plain, _ = by_autograd(unet, z, t, context)
    _, gradient = by_autograd(unet, z[:2], t[:2], context[:2])
    with Injection(unet, guidance=Guided(energy), rows=ROWS):
        out = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
    torch.testing.assert_close(out - plain, gradient.repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
    assert gradient.flatten(1).norm(dim=1).min() > 0.01
    # Classifier-free guidance gives what it would give, and the gradient once (eq. 11).
    cfg = out[2:] + 7.5 * (out[:2] - out[2:])
    torch.testing.assert_close(cfg, plain[2:] + 7.5 * (plain[:2] - plain[2:]) + gradient, atol=1e-4, rtol=0)


def test_beside_people(unet: nn.Module, rule: UniPortraitRule) -> None:
    z, t, context = inputs()
    people = UniPortraitRule(rule.adapter, rule.people)
    with Injection(unet, people, rows=ROWS):
        plain = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
        # The numbers are those of the table; the first two rows are in front here, too.
        marked = mark(context[:2], [1, 2])
        _, gradient = by_autograd(unet, z[:2], t[:2], marked)
    before = len(holding_a_graph())
    with Injection(unet, rule, guidance=Guided(energy), rows=ROWS):
        first = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
        torch.testing.assert_close(first - plain, gradient.repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
        # What the rules have kept of the first call serves the second one, and holds no graph.
        assert len(holding_a_graph()) == before
        second = predicted(unet(z + 0, t, mark(context, [1, 2, 3, 4])))
        torch.testing.assert_close(second, first)
    assert not first.requires_grad


def test_the_gradient_is_that_of_finite_differences() -> None:
    # ldm's group norms compute in single precision.
    unet = diffusers_unet().double()
    z, t, context = inputs(1, torch.float64)
    kept: list[Tensor] = []

    def energy_of(latent: Tensor) -> Tensor:
        unet(latent, t, context)
        return energy(kept[-1].double()).sum()

    plain = predicted(unet(z, t, context))
    with Injection(unet, guidance=Guided(energy)):
        gradient = predicted(unet(z, t, mark(context, POSITIVE))) - plain
    unet.get_submodule(BLOCK["diffusers"]).register_forward_hook(lambda module, args, out: kept.append(out))
    for seed in range(3):
        way = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        difference = (energy_of(z + 1e-4 * way) - energy_of(z - 1e-4 * way)) / 2e-4
        torch.testing.assert_close((gradient * way).sum(), difference, rtol=1e-5, atol=1e-9)


def test_v_is_changed_by_the_gradient_over_alpha(unet: nn.Module) -> None:
    z, t, context = inputs()
    plain = predicted(unet(z, t, context))
    rows = {"rows": ROWS}
    with Injection(unet, guidance=Guided(energy), **rows):
        eps = predicted(unet(z, t, mark(context, [1, 2, 3, 4]))) - plain
    with Injection(unet, guidance=Guided(energy, scale=2.0, alphas_cumprod=ALPHAS_CUMPROD), **rows):
        v = predicted(unet(z, t, mark(context, [1, 2, 3, 4]))) - plain
    alpha = ALPHAS_CUMPROD[t].sqrt()[:, None, None, None]
    torch.testing.assert_close(v, 2 * eps / alpha, atol=1e-5, rtol=1e-3)


def test_the_signal_rate_lies_between_those_of_the_steps_beside() -> None:
    t = torch.tensor([0, 500, 999, 998])
    torch.testing.assert_close(signal_rate(ALPHAS_CUMPROD, t), ALPHAS_CUMPROD[t].sqrt())
    # k-diffusion: log sigma is interpolated, sigma^2 = (1 - abar) / abar.
    sigma = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()
    between = (sigma[500].log() * 0.75 + sigma[501].log() * 0.25).exp()
    torch.testing.assert_close(signal_rate(ALPHAS_CUMPROD, torch.tensor([500.25])), (1 + between**2).rsqrt()[None])


def test_only_chosen_pictures_are_guided_and_only_within_the_window(unet: nn.Module) -> None:
    z, t, context = inputs()
    plain = predicted(unet(z, t, context))
    with Injection(unet, guidance=Guided(energy, pictures=[1], end=0.6), rows=ROWS) as injection:
        out = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
        assert [bool((row != 0).any()) for row in out - plain] == [False, True, False, True]
        injection.progress = 0.6
        assert torch.equal(predicted(unet(z, t, mark(context, [1, 2, 3, 4]))), plain)
        assert torch.equal(predicted(unet(z, t, context)), plain)


def test_rows_that_run_apart_have_what_they_have_together(unet: nn.Module) -> None:
    """Positive ones first, as the WebUI has them; a picture's gradient is made once a step, also of several prompts."""
    z, t, context = inputs()
    asked: list[list[int]] = []

    def counted(features: Tensor, current: Pass) -> Tensor:
        asked.append(current.numbers)
        return energy(features, current)

    rows = {**ROWS, 5: Row(POSITIVE, 0)}
    with Injection(unet, guidance=Guided(energy), rows=rows):
        together = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
        # Two prompts of one picture, joined by AND.
        composed = predicted(unet(z[[0, 0, 2]], t[[0, 0, 2]], mark(context[[0, 1, 2]], [1, 5, 3])))
    with Injection(unet, guidance=Guided(counted), rows=rows):
        for row in range(4):
            out = predicted(unet(z[row : row + 1], t[row : row + 1], mark(context[row : row + 1], row + 1)))
            torch.testing.assert_close(out[0], together[row], atol=1e-5, rtol=0)
        again = predicted(unet(z[:1], t[:1], mark(context[:1], 1)))
        assert asked == [[1], [2]]
        second = predicted(unet(z[:1], t[:1], mark(context[1:2], 5)))
        torch.testing.assert_close(composed[[0, 1]], torch.cat([again, second]), atol=1e-5, rtol=0)
        unet(z[:1] + 0.1, t[:1], mark(context[:1], 1))
        unet(z[:1] + 0.1, t[:1] + 1, mark(context[:1], 1))
        assert len(asked) == 4
        with pytest.raises(PortraitError, match="negative row of picture 2 came before"):
            unet(z[:1], t[:1], mark(context[:1], 4))


def test_named_arguments_and_plain_tuples(unet: nn.Module) -> None:
    z, t, context = inputs()
    names = (
        ("x", "timesteps", "context")
        if hasattr(unet, "input_blocks")
        else ("sample", "timestep", "encoder_hidden_states")
    )
    marked = mark(context, [1, 2, 3, 4])
    with Injection(unet, guidance=Guided(energy), rows=ROWS):
        out = predicted(unet(z, t, marked))
        torch.testing.assert_close(predicted(unet(**dict(zip(names, (z, t, marked))))), out)
        if not hasattr(unet, "input_blocks"):
            torch.testing.assert_close(unet(z, t, marked, return_dict=False)[0], out)


def test_an_exception_in_the_energy_leaves_everything_clean(unet: nn.Module) -> None:
    z, t, context = inputs()
    plain = predicted(unet(z, t, context))

    def broken(features: Tensor, current: Pass) -> Tensor:
        assert torch.is_grad_enabled()
        raise RuntimeError("in the energy")

    guidance = Guided(broken)
    before = len(holding_a_graph())
    with Injection(unet, Adding(0.1), guidance=guidance, rows=ROWS):
        with pytest.raises(RuntimeError, match="in the energy") as caught:
            unet(z, t, mark(context, [1, 2, 3, 4]))
        assert not torch.is_grad_enabled()
        # The traceback has the frames in which the call was.
        del caught
        assert len(holding_a_graph()) == before
        assert torch.equal(predicted(unet(z, t, context)), plain)
        guidance.of = energy
        again = predicted(unet(z, t, mark(context, [1, 2, 3, 4])))
    with Injection(unet, Adding(0.1), guidance=Guided(energy), rows=ROWS):
        assert torch.equal(predicted(unet(z, t, mark(context, [1, 2, 3, 4]))), again)


def test_an_exception_before_the_features_leaves_the_mode(unet: nn.Module) -> None:
    class Interrupt(BaseException):
        pass

    class Failing(Doubling):
        def overrides(self, site: Any, call: Call) -> dict[str, Any]:
            def fail(host: Any, *args: Any, **kwargs: Any) -> Any:
                assert torch.is_grad_enabled()
                raise Interrupt

            return {"to_q": fail} if site.index == 1 else {}

    z, t, context = inputs()
    with Injection(unet, Failing(), guidance=Guided(energy), rows=ROWS):
        with pytest.raises(Interrupt):
            unet(z, t, mark(context, [1, 2, 3, 4]))
        assert not torch.is_grad_enabled()


def test_behind_the_features_no_graph_is_made(unet: nn.Module) -> None:
    modes: list[tuple[str, bool, bool]] = []

    class Watching(Doubling):
        def overrides(self, site: Any, call: Call) -> dict[str, Any]:
            def watch(host: Any, *args: Any, **kwargs: Any) -> Any:
                out = host(*args, **kwargs)
                call.visited.add(site.index)
                modes.append((site.path, torch.is_grad_enabled(), out.requires_grad))
                return out

            return {"": watch} if site.cross else {}

    z, t, context = inputs(2)
    with Injection(unet, Watching(), guidance=Guided(energy), rows=ROWS):
        unet(z, t, mark(context, [1, 2]))
    behind = (
        "output_blocks.6.",
        "output_blocks.7.",
        "output_blocks.8.",
        "output_blocks.9.",
        "output_blocks.1",
        "up_blocks.2",
        "up_blocks.3",
    )
    with_graph = {path for path, enabled, graph in modes if enabled and graph}
    without = {path for path, enabled, graph in modes if not enabled and not graph}
    assert without == {path for path, *_ in modes if path.startswith(behind)}
    assert with_graph | without == {path for path, *_ in modes}


def test_gradients_that_are_not_finite_are_refused(unet: nn.Module) -> None:
    z, t, context = inputs()
    guidance = Guided(lambda features, current: features.flatten(1).sum(dim=1) * torch.inf)
    with (
        Injection(unet, guidance=guidance, rows=ROWS),
        pytest.raises(PortraitError, match="infinite or undefined"),
    ):
        unet(z, t, mark(context, [1, 2, 3, 4]))


def test_half_precision_keeps_a_small_gradient() -> None:
    """1e-9 of the energy is below the smallest number of float16."""
    unet = diffusers_unet()
    z, t, context = inputs(2)
    plain = predicted(unet(z, t, context))
    tiny = Guided(lambda *args: 1e-9 * energy(*args), scale=1e9)
    with Injection(unet, guidance=Guided(energy), rows=ROWS):
        expected = predicted(unet(z, t, mark(context, [1, 2]))) - plain
    z, context, unet = z.half(), context.half(), unet.half()
    plain = predicted(unet(z, t, context))
    with Injection(unet, guidance=tiny, rows=ROWS):
        found = predicted(unet(z, t, mark(context, [1, 2]))) - plain
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_half_precision_holds_a_large_gradient() -> None:
    """Beyond float16's largest number: of a UNet that multiplies what it is given."""
    unet, large = diffusers_unet(), diffusers_unet()
    z, t, context = inputs(2)

    def summed(features: Tensor, current: Pass) -> Tensor:
        return features.flatten(1).sum(dim=1)

    plain = predicted(unet(z, t, context))
    with Injection(unet, guidance=Guided(summed), rows=ROWS):
        expected = predicted(unet(z, t, mark(context, [1, 2]))) - plain
    assert expected.abs().max() * 2**10 > torch.finfo(torch.float16).max
    large.conv_in.weight.mul_(2**10)
    large, z, context = large.half(), z.half() / 2**10, context.half()
    found: list[Tensor] = []

    class Looking(Guided):
        def added(self, gradient: Tensor, current: Pass, prediction: Tensor) -> Tensor:
            found.append(gradient / 2**10)
            return torch.zeros_like(gradient)

    with Injection(large, guidance=Looking(summed), rows=ROWS):
        large(z, t, mark(context, [1, 2]))
    assert (found[0] - expected).norm() < 0.1 * expected.norm()


def test_a_unet_that_passes_the_block_by_is_refused(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    z, t, context = inputs()
    monkeypatch.setattr(unet, "forward", lambda x, t, context: x)
    with (
        Injection(unet, guidance=Guided(energy), rows=ROWS),
        pytest.raises(PortraitError, match="did not run the block"),
    ):
        unet(z, t, mark(context, [1, 2, 3, 4]))


def test_a_neighbour_that_runs_the_encoder_without_gradients_takes_none_away(unet: nn.Module) -> None:
    """As ControlNet walks through the blocks; half a gradient would look like one."""
    if not hasattr(unet, "input_blocks"):
        pytest.skip("ControlNet's extension knows ldm's blocks alone")
    embedding = sys.modules[type(unet).__module__].timestep_embedding

    def walking(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        module: Any = unet
        with torch.no_grad():
            emb = module.time_embed(embedding(timesteps, module.model_channels))
            h, hs = x, []
            for block in module.input_blocks:
                h = block(h, emb, context)
                hs.append(h)
            h = module.middle_block(h, emb, context)
        for block in module.output_blocks:
            h = block(torch.cat([h, hs.pop()], dim=1), emb, context)
        return module.out(h)

    z, t, context = inputs()
    for checkpointing in (False, True):
        outputs = []
        for forward in (None, walking):
            if forward is not None:
                unet.forward = forward
            try:
                with Injection(unet, guidance=Guided(energy, checkpointing=checkpointing), rows=ROWS):
                    outputs.append(predicted(unet(z, t, mark(context, [1, 2, 3, 4]))))
            finally:
                vars(unet).pop("forward", None)
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
