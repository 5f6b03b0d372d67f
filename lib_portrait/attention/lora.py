"""Low-rank adaption (LoRA, arXiv 2106.09685) of layers that others own: W' = W + s * up @ down, beside the host's W."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Call


class LowRank(nn.Module):
    """One LoRA pair: `down` (r, in) and `up` (out, r), under the names of the published files; a new one adds nothing.

    dtype and device are those of the file; what is computed with it follows its input.
    """

    def __init__(self, inside: int, outside: int, rank: int):
        super().__init__()
        self.down = nn.Linear(inside, rank, bias=False)
        self.up = nn.Linear(rank, outside, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    @property
    def trained(self) -> bool:
        return self.down.weight.requires_grad or self.up.weight.requires_grad

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """W + s * up @ down, of W (out, in)."""
        return torch.addmm(weight, self.up.weight.to(weight), self.down.weight.to(weight), alpha=scale)

    def forward(self, x: Tensor) -> Tensor:
        """up @ down @ x: (..., in) -> (..., out)."""
        return self.up(self.down(x))


class Unchanged:
    """Tells whether layers of the host compute what they did when it was asked before."""

    def __init__(self, *layers: nn.Module):
        self._layers = layers
        # Held weakly: the weights are the host's, and others may come to lie where they were.
        self._weights: list[weakref.ref[Tensor]] = []
        self._key: Hashable = None

    def __call__(self, call: Call, *others: Hashable) -> bool:
        """others: what else must be as before. The layers must have been called since the host may have changed them:
        the Lora extension applies the prompt's networks when a layer is called."""
        weights = [cast(Tensor, layer.weight) for layer in self._layers]
        key = (*(weight._version for weight in weights), call.host_state, *others)
        same = len(self._weights) == len(weights) and key == self._key
        same = same and all(one() is weight for one, weight in zip(self._weights, weights))
        self._weights, self._key = [weakref.ref(weight) for weight in weights], key
        return same


class FusedLinear:
    """One of the UNet's linear layers with a LoRA pair added to its weight: x W'^T + bias, W' = W + s * up @ down.

    W is what the host's layer computes at this moment (with its own LoRAs, casts and moves), found by asking it for the
    identity matrix; the sum lives here, never in the host. It is made anew when the host's weight changes. While the
    pair is trained nothing is kept, and W is the layer's own weight.
    """

    # The layer's bias would swallow the low bits of W in half precision; scaled up, W is the larger of the two.
    PROBE = 256.0

    def __init__(self, module: nn.Module, pair: LowRank, scale: float):
        self.module = module
        self.pair = pair
        self.scale = scale
        self._unchanged = Unchanged(module)
        self._fused: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, host: Callable[[Tensor], Tensor], x: Tensor, call: Call) -> Tensor:
        # An empty input costs nothing and lets the host bring its weight up to date.
        precision = host(x[:0]).dtype
        if self.pair.trained:
            return self._unfused(host, x, precision)
        if not self._unchanged(call, x.device, x.dtype) or self._fused is None:
            self._fused = self._fuse(host, x)
        return F.linear(x, *self._fused)

    def _unfused(self, host: Callable[[Tensor], Tensor], x: Tensor, precision: torch.dtype) -> Tensor:
        """As one product with the summed weights where that is the lesser work, else as two thin ones beside the host.

        The backward pass of the one costs in * out operations a position, that of the thin products together three
        times r * (in + out). Only in full precision: in half of it what is added to a weight would be rounded away
        while it is small. precision: what the host's layer puts out, under autocast too.
        """
        linear, pair = cast(nn.Linear, self.module), self.pair
        thin = 3 * (pair.down.weight.numel() + pair.up.weight.numel())
        full = x.dtype == linear.weight.dtype == precision == torch.float32
        if full and linear.weight.numel() <= thin:
            return F.linear(x, pair.merged(linear.weight, self.scale), linear.bias)
        return host(x) + self.scale * pair(x)

    # What is kept from call to call holds no graph: the host's weight is none of ours to train.
    @torch.no_grad()
    def _fuse(self, host: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W' (out, in), bias or None)."""
        width = self.pair.down.weight.shape[1]
        bias = host(x.new_zeros(1, width))[0]
        # Made in float32: torch 2.1 has no eye() in bfloat16.
        probe = torch.eye(width, device=x.device).mul_(self.PROBE).to(x.dtype)
        weight = (host(probe) - bias).float() / self.PROBE
        # (in, out) from the probe; F.linear wants (out, in).
        fused = self.pair.merged(weight.T, self.scale).to(bias.dtype).contiguous()
        return fused, bias if getattr(self.module, "bias", None) is not None else None
