"""IP-Adapters that sd-webui-controlnet puts on a UNet (as of 1.1.455): its IP-Adapter, InstantID and PuLID units.

On the instance of every cross-attention stands a `forward` that adds what the functions in the layer's
`ipadapter_hacks` give (scripts/ipadapter/plugable_ipadapter.py). They read from the UNet which rows of the call under
way are positive, as the extension's own `forward` on the UNet has left it there, and keep keys for as many rows as they
first saw. So they are right in whole calls of the sampling alone. In any other they may give no error but other
numbers, there and in all calls that follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_FUNCTIONS = "ipadapter_hacks"


def adds_to(layer: nn.Module) -> bool:
    """Whether one adds to what this attention layer gives."""
    # The extension leaves the list there, empty, when its unit is done.
    return bool(getattr(layer, _FUNCTIONS, None))


def are_on(unet: nn.Module) -> bool:
    """Whether one adds to what any layer of the UNet gives."""
    return any(map(adds_to, unet.modules()))


@contextlib.contextmanager
def left_out(unet: nn.Module) -> Iterator[None]:
    """While the UNet runs for our own sake: their layers give what they would without them."""
    layers: list[Any] = [layer for layer in unet.modules() if adds_to(layer)]
    theirs = [getattr(layer, _FUNCTIONS) for layer in layers]
    for layer in layers:
        setattr(layer, _FUNCTIONS, [])
    try:
        yield
    finally:
        for layer, functions in zip(layers, theirs, strict=True):
            setattr(layer, _FUNCTIONS, functions)
