"""Low-rank adaption (LoRA, arXiv 2106.09685) of layers that others own: fused once, beside the host's weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Call


@dataclass(frozen=True)
class LowRank:
    """One LoRA pair: W + up @ down. up (out, r), down (r, in)."""

    up: Tensor
    down: Tensor


class FusedLinear:
    """One of the UNet's linear layers with a LoRA pair added to its weight: W' = W + s * up @ down.

    W is what the host's layer computes at this moment (with its own LoRAs, casts and moves), found by asking it for the
    identity matrix; the sum lives here, never in the host. It is made anew when the host's weight changes.
    """

    # The layer's bias would swallow the low bits of W in half precision; scaled up, W is the larger of the two.
    PROBE = 256.0

    def __init__(self, module: nn.Module, pair: LowRank, scale: float):
        self.module = module
        self.pair = pair
        self.scale = scale
        # Held weakly: the weight is the host's, and another one may come to lie where it was.
        self._made_of: weakref.ref[Tensor] | None = None
        self._made_for: Hashable = None
        self._fused: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, host: Callable[[Tensor], Tensor], x: Tensor, call: Call) -> Tensor:
        # An empty input costs nothing and lets the host bring its weight up to date: the Lora extension applies the
        # prompt's networks when a layer is called.
        host(x[:0])
        weight = cast(Tensor, self.module.weight)
        current = (weight._version, call.host_state, x.device, x.dtype)
        if self._fused is None or self._made_of is None or self._made_of() is not weight or current != self._made_for:
            self._fused = self._fuse(host, x)
            self._made_of, self._made_for = weakref.ref(weight), current
        return F.linear(x, *self._fused)

    # What is kept from call to call holds no graph: the host's weight is none of ours to train.
    @torch.no_grad()
    def _fuse(self, host: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W' (out, in), bias or None)."""
        width = self.pair.down.shape[1]
        bias = host(x.new_zeros(1, width))[0]
        # Made in float32: torch 2.1 has no eye() in bfloat16.
        probe = torch.eye(width, device=x.device).mul_(self.PROBE).to(x.dtype)
        weight = (host(probe) - bias).float() / self.PROBE
        up, down = (pair.to(x.device, torch.float32) for pair in (self.pair.up, self.pair.down))
        # (in, out) from the probe; F.linear wants (out, in).
        fused = (weight.T + self.scale * (up @ down)).to(bias.dtype).contiguous()
        return fused, bias if getattr(self.module, "bias", None) is not None else None
