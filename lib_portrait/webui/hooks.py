"""What sd-webui-controlnet's units hang onto the layers of a UNet (as of 1.1.455).

It is there from the extension's `process` until the pictures are done. No other file knows what it looks like.

**IP-Adapter, InstantID, PuLID.** On the instance of every cross-attention stands a `forward` that adds what the
functions in the layer's `ipadapter_hacks` give (scripts/ipadapter/plugable_ipadapter.py). They read from the UNet which
rows of the call under way are positive, as the extension's own `forward` on the UNet has left it there, and keep keys
for as many rows as they first saw.

**ControlNet-LLLite.** On the instances of projections (to_q, to_k and to_v of self-attentions, to_q of
cross-attentions) stands a `forward` that makes x + h(x) of what enters, h being the sum over the layer's `lllite_list`,
without gradients (scripts/controlnet_lllite.py). What h knows of the control picture is made at the first call, for the
size of the level at which the UNet then is.

**Reference and style align.** On the instances of transformer blocks stands a `_forward` that has self-attention see
other pictures, or other rows of the call (scripts/hook.py); the block's own is kept beside it.

So all are right in whole calls of the sampling alone. In any other they may give no error but other numbers, there and
in all calls that follow. An empty list switches the first two off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.sites import Site

_FUNCTIONS, _LLLITES = "ipadapter_hacks", "lllite_list"
_OWN_FORWARD = "_original_inner_forward_cn_hijack"
_PROJECTIONS = ("to_q", "to_k", "to_v")


def adds_to(layer: nn.Module) -> bool:
    """Whether an IP-Adapter adds to what this attention layer gives."""
    # The extension leaves the list there, empty, when its unit is done.
    return bool(getattr(layer, _FUNCTIONS, None))


def ip_adapters_on(unet: nn.Module) -> bool:
    """Whether an IP-Adapter adds to what any attention layer of the UNet gives."""
    return any(map(adds_to, unet.modules()))


@contextlib.contextmanager
def left_out(unet: nn.Module) -> Iterator[None]:
    """While the UNet runs for our own sake: its layers give what they would without any of this."""
    with contextlib.ExitStack() as stack:
        for layer in unet.modules():
            for name in (_FUNCTIONS, _LLLITES):
                if getattr(layer, name, None):
                    stack.enter_context(_replaced(layer, name, []))
            # Kept for good, with the block's own in place again, once such a unit has been there.
            if (own := getattr(layer, _OWN_FORWARD, None)) is not None:
                stack.enter_context(_replaced(layer, "_forward", own))
        yield


@contextlib.contextmanager
def _replaced(layer: Any, name: str, value: Any) -> Iterator[None]:
    theirs = getattr(layer, name)
    setattr(layer, name, value)
    try:
        yield
    finally:
        setattr(layer, name, theirs)


class LLLites:
    """The LLLites of a UNet in the calls of our sampling, as an `attention.Rule` outside of a method's own.

    Their `forward` is beneath whatever a method puts around a projection. There a LoRA that is computed beside the
    host's weight would miss h, and take it for a part of the weight. So x + h(x) is made in front of the method, which
    then finds the layer without h. In calls of others, which carry no mark, theirs acts as it stands.

    Between `take` and `restore` what theirs does has a gradient, for guidance.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self._theirs: list[tuple[Any, Callable[..., Tensor]]] = []

    @property
    def layers(self) -> list[Any]:
        return [layer for layer in self.unet.modules() if getattr(layer, _LLLITES, None)]

    def take(self) -> None:
        """Before the injection, which stands on top."""
        for layer in self.layers:
            forward = layer.forward
            self._theirs.append((layer, forward))
            # Beneath the decorator that switches gradients off.
            layer.forward = getattr(forward, "__wrapped__", forward)

    def restore(self) -> None:
        while self._theirs:
            layer, forward = self._theirs.pop()
            layer.forward = forward

    # ---- `attention.Rule`

    def active(self, progress: float) -> bool:
        return True

    def must_visit(self, site: Site) -> bool:
        return False

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        layers = {name: site.module.get_submodule(name) for name in _PROJECTIONS}
        return {
            name: partial(self._entering, layer) for name, layer in layers.items() if getattr(layer, _LLLITES, None)
        }

    def _entering(self, layer: nn.Module, host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x + self._added(layer, x)
        with _replaced(layer, _LLLITES, []):
            return host(x)

    def _added(self, layer: nn.Module, x: Tensor) -> Tensor | float:
        """h(x) of an input (B, n, C), or 0 where no LLLite acts."""
        added: Tensor | float = 0.0
        # As the extension's own forward on the UNet has left it there.
        if getattr(self.unet, "is_in_high_res_fix", False):
            return added
        progress = getattr(self.unet, "current_sampling_percent", 0.5)
        shape = getattr(self.unet, "current_h_shape", None)
        for weight, start, end, module in getattr(layer, _LLLITES):
            if start <= progress <= end:
                added = added + module.to(x.device)(x, shape) * weight
        return added
