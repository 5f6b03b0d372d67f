"""`portrait.py bench guidance`: what a step with RB-Guidance costs beside a bare one.

An SD1.5-size ldm `UNetModel` (random weights, 64x64 latents, one positive and one negative row) takes bare steps and
guided ones in turns in one process, so that whatever else the machine does falls on both; a ratio is the median over
the pairs. The guided ones, one after the other:

guided        RB-Guidance, the positive row apart from the others
checkpointed  the same, with blocks that keep nothing for the gradient
together      the same where somebody else stands around the UNet's forward, as ControlNet does: all rows in the graph
truncated     a bare step, and a second pass of the positive row that ends where its features are
naive         a bare step, and a second pass of the positive row as a whole

With --picture a whole sampling follows: of its steps those at t <= u T are guided, and the look at the reference is
part of it. "peak" is of the process in MiB (of the accelerator, where there is one), in a process of its own for each.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step import WIDTH, sd15_unet
from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, mark
from lib_portrait.guidance.equations import energy, match, similarity
from lib_portrait.guidance.features import decoder_blocks
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.guidance.reference import GuidedPerson, ReferenceGuidance
from lib_portrait.options import defaults

VARIANTS = ("guided", "checkpointed", "together", "truncated", "naive")
# The face of a portrait: in the picture, and in the reference's crop, whose box it fills by half.
REGION = (0.3, 0.2, 0.7, 0.6)
GUIDED_AT = 300.0
T = 1000


class Stop(Exception):
    """Ends a pass at its features."""


@dataclass
class Bench:
    """The UNet as a `methods.base.Host`, one with the same weights that stays untouched, and the inputs of a step."""

    unet: nn.Module
    untouched: nn.Module
    size: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.alphas_cumprod = torch.linspace(0.9991, 0.0047, T)
        self.prediction = "epsilon"
        self.state = 0
        self.x = torch.randn(1, 4, self.size, self.size).to(self.device, self.dtype).repeat(2, 1, 1, 1)
        self.context = torch.randn(2, 77, WIDTH).to(self.device, self.dtype)
        self.marked = torch.cat([mark(self.context[:1], NEGATIVE), mark(self.context[1:], POSITIVE)])

    def latent(self, picture: np.ndarray) -> Tensor:
        return torch.randn(1, 4, picture.shape[0] // 8, picture.shape[1] // 8).to(self.x)

    def text(self, prompt: str) -> Tensor:
        return self.context[:1]

    def call(self, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(latent.to(self.dtype), t, context)

    def times(self, t: float) -> Tensor:
        return torch.full((2,), t, device=self.device)

    def bare(self, t: float) -> None:
        self.untouched(self.x, self.times(t), self.context)
        self.wait()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def guidance(self, checkpointing: bool = False) -> ReferenceGuidance:
        side = 8 * self.size
        mask = np.zeros((side, side), bool)
        mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
        picture = np.zeros((side, side, 3), np.uint8)
        # What is kept of references is another's.
        self.state += 1
        options = {**defaults(OPTIONS), "checkpointing": checkpointing}
        made = ReferenceGuidance([GuidedPerson((picture,), (mask,), REGION)], options)
        made.begin()
        made.prepare(self)  # type: ignore[arg-type]
        return made

    @contextmanager
    def stepping(self, variant: str) -> Iterator[Callable[[float], None]]:
        """Steps of that variant at a timestep."""
        if variant in ("truncated", "naive"):
            yield self._second_pass(variant == "truncated")
            return
        made = self.guidance(variant == "checkpointed")
        host = self.unet.forward
        if variant == "together":
            self.unet.forward = lambda *args, **kwargs: host(*args, **kwargs)
        try:
            with Injection(self.unet, guidance=made) as injection:

                def step(t: float) -> None:
                    # What is known of a latent is not computed again.
                    made._known.clear()
                    self.unet(self.x, self.times(t), self.marked)
                    self.wait()

                yield step
                assert injection.calls and made.record
        finally:
            if variant == "together":
                del self.unet.__dict__["forward"]

    def _second_pass(self, truncated: bool) -> Callable[[float], None]:
        path = decoder_blocks(self.unet)[1]
        side = self.size // 2
        inside = torch.zeros(side, side, dtype=torch.bool, device=self.device)
        inside[side // 5 : 3 * side // 5, 3 * side // 10 : 7 * side // 10] = True
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: object, out: Tensor) -> None:
            kept.append(out)
            if truncated:
                raise Stop

        def step(t: float) -> None:
            self.bare(t)
            hook = self.unet.get_submodule(path).register_forward_hook(keep)
            with torch.enable_grad():
                leaf = self.x[1:].detach().requires_grad_()
                try:
                    self.unet(leaf, self.times(t)[1:], self.context[1:])
                except Stop:
                    pass
                finally:
                    hook.remove()
                generated = kept.pop()[0].float()[:, inside].T
                reference = torch.randn(side * side // 4, generated.shape[1], device=self.device)
                matched, _ = match(reference, generated)
                torch.autograd.grad(energy(similarity(reference, generated[matched]), 8.5), leaf)
            self.wait()

        return step


def made(size: int, device: str, dtype: str) -> Bench:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    unet = sd15_unet().to(device, kind)
    with torch.device("meta"):
        untouched = sd15_unet()
    untouched.load_state_dict(unet.state_dict(), assign=True)
    return Bench(unet, untouched, size, torch.device(device), kind)


@torch.no_grad()
def peak(variant: str, size: int, device: str, dtype: str) -> float:
    """MiB at most held by a process that takes two steps: in its memory, or in the accelerator's."""
    bench = made(size, device, dtype)
    if variant == "bare":
        bench.bare(GUIDED_AT)
        bench.bare(GUIDED_AT)
    else:
        with bench.stepping(variant) as step:
            step(GUIDED_AT)
            step(GUIDED_AT)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="portrait.py bench guidance", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of steps for each variant (at least 5)")
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latent")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--picture", type=int, default=0, metavar="STEPS", help="a whole sampling, such as 50 steps")
    parser.add_argument("--begin", type=float, default=0.6, help="u: which of its steps are guided")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default float32"
    )
    parser.add_argument("--no-peak", action="store_true", help="leave out the memory, which starts a process for each")
    options = parser.parse_args(argv)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")

    bench = made(options.latent, options.device, options.dtype)
    with torch.no_grad():
        bench.bare(GUIDED_AT)
        for variant in options.variants:
            with bench.stepping(variant) as step:
                step(GUIDED_AT)
                pairs = [
                    (seconds(lambda: bench.bare(GUIDED_AT)), seconds(lambda: step(GUIDED_AT)))
                    for _ in range(options.pairs)
                ]
            _tell(variant, statistics.median(own / bare for bare, own in pairs), pairs=_rounded(pairs))
        if options.picture:
            _tell("picture", *_picture(bench, options.picture, options.begin))
    if not options.no_peak:
        where = (options.latent, options.device, options.dtype)
        context = multiprocessing.get_context("spawn")
        for variant in ("bare", *options.variants):
            with context.Pool(1) as pool:
                print(
                    json.dumps(
                        {"name": "guidance", "step": variant, "peak": round(pool.apply(peak, (variant, *where)))}
                    )
                )
    return 0


def _picture(bench: Bench, steps: int, begin: float) -> tuple[float, Any]:
    """A whole sampling's time as a multiple of a bare one's, step by step in turns; and what it consists of."""
    times = [T * (1 - (number + 0.5) / steps) for number in range(steps)]
    bare, own = 0.0, seconds(bench.guidance)
    with bench.stepping("guided") as step:
        for t in times:
            bare += seconds(functools.partial(bench.bare, t))
            own += seconds(functools.partial(step if t <= begin * T else bench.bare, t))
    return own / bare, {"steps": steps, "guided": sum(t <= begin * T for t in times), "bare": round(bare, 3)}


def _tell(variant: str, ratio: float, facts: dict[str, Any] | None = None, **more: Any) -> None:
    print(
        json.dumps({"name": "guidance", "step": variant, "ratio": round(ratio, 4), **(facts or {}), **more}), flush=True
    )


def _rounded(pairs: list[tuple[float, float]]) -> list[list[float]]:
    return [[round(bare, 4), round(own, 4)] for bare, own in pairs]


if __name__ == "__main__":
    sys.exit(main())
