"""Guidance by an energy of the UNet's decoder features, inside of the UNet's call.

The seat of OmniPortrait's RB-Guidance (eq. 11): the gradient of an energy E with respect to the latent z_t joins the
noise prediction. It is taken where the features have been computed, within that call, and joins the output
of every row of the picture; so classifier-free guidance gives eps_uncond + w (eps_cond - eps_uncond) + grad E exactly,
since (1 - w) + w = 1, and no sampler needs code of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_portrait.attention.arguments import LATENT, TIMESTEPS
from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.rows import NEGATIVE, POSITIVE
from lib_portrait.attention.sites import layout_of
from lib_portrait.attention.windows import takes_part
from lib_portrait.errors import PortraitError

# What E is of: features (P, C, h, w), at least float32, of one row for each of P pictures; the numbers of these rows in
# the call; the call. It gives (P), each picture's of its own features alone.
Energy = Callable[[Tensor, list[int], Call], Tensor]

# Up block 1, whose activations are the features of DIFT (arXiv 2306.03881): half of the latent's height and width in
# SD1, with 1280 channels.
BLOCKS = {"ldm": "output_blocks.5", "diffusers": "up_blocks.1"}


@dataclass(frozen=True)
class _Gradient:
    """grad E (4, h, w) of a picture, for one latent (c, h, w) at one timestep."""

    latent: Tensor
    t: Tensor
    value: Tensor

    def holds(self, latent: Tensor, t: Tensor) -> bool:
        return torch.equal(self.latent, latent) and bool(self.t == t)


@dataclass
class _Pass:
    """The call that is under way: the guided rows, their z_t (P, c, h, w) as a leaf, and grad E of it once it is known.

    outer: whether gradients are enabled outside of the call.
    """

    rows: list[int]
    z: Tensor
    outer: bool
    gradient: Tensor | None = None


class FeatureGuidance:
    """Adds the gradient of an energy to what a UNet puts out, for `attention.Injection(guidance=...)`.

    energy: see `Energy`; the features are those of the first positive row of each guided picture. pictures: the numbers
    of the guided ones; None for all. scale: of the gradient. alphas_cumprod: (T,) of a model that predicts v, whose
    output changes by grad E / alpha_t where eps changes by grad E; None for one that predicts eps. start, end: share of
    the sampling in which it takes part. block: where the features are taken, by its path in the UNet; None for up
    block 1.

    A picture's gradient is made once for each latent, in the first call with a positive row of it; where a host runs
    its other rows in later calls, it is kept for them. Raises PortraitError for a negative row that comes before, for
    gradients that are not finite, and where the UNet passes the block by. Gradient checkpointing must be off.
    """

    def __init__(
        self,
        energy: Energy,
        pictures: Collection[int] | None = None,
        scale: float = 1.0,
        alphas_cumprod: Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        block: str | None = None,
    ):
        self.energy = energy
        self.pictures = pictures
        self.scale = scale
        self.alphas_cumprod = alphas_cumprod
        self.start = start
        self.end = end
        self.block = block
        self._known: dict[int, _Gradient] = {}

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)

    def overrides(self, unet: nn.Module, call: Call) -> dict[str, Wrapper]:
        under_way: list[_Pass] = []

        def network(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            z = LATENT.of(args, kwargs)
            t = torch.as_tensor(TIMESTEPS.of(args, kwargs), device=z.device).expand(len(z))
            rows = self._rows(call, z, t)
            if not rows:
                return self._guided(call, z, t, host(*args, **kwargs))
            # All rows of the call are in the graph. Where nobody else stands around the UNet's forward, the guided ones
            # could be called here by themselves, and the others without a graph.
            current = _Pass(rows, z[rows].detach().requires_grad_(), torch.is_grad_enabled())
            under_way.append(current)
            try:
                # `features` switches it off again; leaving the block does where the call does not come so far.
                with torch.enable_grad():
                    leaf = z.detach().index_copy(0, torch.tensor(rows, device=z.device), current.z)
                    args, kwargs = LATENT.put(args, kwargs, leaf)
                    output = host(*args, **kwargs)
            finally:
                under_way.clear()
            self._keep(call, current, t)
            return self._guided(call, z, t, output)

        def features(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            activations = host(*args, **kwargs)
            if not under_way or under_way[0].gradient is not None:
                return activations
            current = under_way[0]
            current.gradient = self._gradient(call, current, activations[current.rows])
            torch.set_grad_enabled(current.outer)
            return activations.detach()

        return {"": network, self.block or BLOCKS[layout_of(unet)]: features}

    def _guides(self, picture: int) -> bool:
        return self.pictures is None or picture in self.pictures

    def _rows(self, call: Call, z: Tensor, t: Tensor) -> list[int]:
        """The first positive row of each guided picture whose gradient is not known for this latent."""
        first: dict[int, int] = {}
        for number, row in enumerate(call.rows):
            if row.kind == POSITIVE and self._guides(row.picture):
                first.setdefault(row.picture, number)
        return [number for picture, number in first.items() if not self._knows(picture, z[number], t[number])]

    def _knows(self, picture: int, z: Tensor, t: Tensor) -> bool:
        return picture in self._known and self._known[picture].holds(z, t)

    def _gradient(self, call: Call, current: _Pass, activations: Tensor) -> Tensor:
        """grad E with respect to z_t, (P, c, h, w), by the chain rule over the features (P, C, h', w')."""
        features = activations.detach().to(torch.promote_types(activations.dtype, torch.float32)).requires_grad_()
        (outer,) = torch.autograd.grad(self.energy(features, current.rows, call).sum(), features)
        # E is small and its gradient smaller; a power of two keeps what half precision would lose of it on the way.
        exponent = math.frexp(float(outer.abs().max()))[1]
        scaled = torch.ldexp(outer, torch.tensor(-exponent)).to(activations.dtype)
        (gradient,) = torch.autograd.grad(activations, current.z, scaled)
        return torch.ldexp(gradient.to(features.dtype), torch.tensor(exponent))

    def _keep(self, call: Call, current: _Pass, t: Tensor) -> None:
        if current.gradient is None:
            raise PortraitError(
                "model",
                "the UNet did not run the block whose features guide it",
                "Switch off what replaces the UNet (TensorRT, compiled or exported UNets) and generate again.",
                500,
            )
        if not bool(current.gradient.isfinite().all()):
            raise PortraitError(
                "guidance", "its gradient is infinite or undefined", "Lower it, or use a model in full precision.", 500
            )
        for number, z, value in zip(current.rows, current.z.detach(), current.gradient):
            self._known[call.rows[number].picture] = _Gradient(z, t[number], self.scale * value)

    def _guided(self, call: Call, z: Tensor, t: Tensor, output: Any) -> Any:
        """The UNet's output with grad E in every row of the guided pictures (eq. 11)."""
        predicted: Tensor = output if isinstance(output, Tensor) else output[0]
        added = torch.zeros_like(predicted)
        for number, row in enumerate(call.rows):
            if row.kind in (POSITIVE, NEGATIVE) and self._guides(row.picture):
                if not self._knows(row.picture, z[number], t[number]):
                    raise PortraitError(
                        "rows",
                        f"a negative row of picture {row.picture + 1} came before its positive one",
                        "Switch off extensions that split UNet calls.",
                        500,
                    )
                # An inpainting model's further channels are no part of what it predicts.
                gradient = self._known[row.picture].value[: predicted.shape[1]]
                if self.alphas_cumprod is not None:
                    gradient = gradient / signal_rate(self.alphas_cumprod, t[number])
                added[number] = gradient
        if isinstance(output, Tensor):
            return output + added
        if isinstance(output, tuple):
            return (predicted + added, *output[1:])
        output.sample = predicted + added
        return output


def signal_rate(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """alpha_t = sqrt(alphas_cumprod[t]) in float32; between two steps the log SNR is interpolated, as k-diffusion does.

    t: any shape, in [0, T - 1].
    """
    log_snr = torch.logit(alphas_cumprod.to(t.device, torch.float32))
    low = t.long().clamp(0, len(log_snr) - 1)
    high = (low + 1).clamp(max=len(log_snr) - 1)
    return torch.sigmoid(torch.lerp(log_snr[low], log_snr[high], t.float() - low)).sqrt()
