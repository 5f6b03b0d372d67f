"""Telling the rows of a UNet call apart by something they carry.

A host builds a batch out of positive and negative rows, and may then pad, cut, slice or drop them before the UNet sees
it; a row's place says nothing for certain. So each row's context is given one extra token in front that names its kind.
It is put there where the kind is known, travels through whatever the host does (padding and cutting happen at the end
of a context), and is taken off again at the UNet's door.
"""

from __future__ import annotations

import torch

POSITIVE = 1
NEGATIVE = 2

# Small integers are exact in fp16 and bf16, and no text encoder emits a token of equal large integers.
_BASE = 192


def mark(context: torch.Tensor, kind: int) -> torch.Tensor:
    """(B, n, D) -> (B, 1 + n, D): a token in front that says the rows are of `kind` (1 to 60)."""
    token = context.new_full((context.shape[0], 1, context.shape[2]), _BASE + kind)
    return torch.cat([token, context], dim=1)


def unmark(context: torch.Tensor) -> tuple[list[int] | None, torch.Tensor]:
    """The kinds of the rows of a marked (B, 1 + n, D) context, and the (B, n, D) context without its marks.

    A context whose rows carry no mark gives None and is returned as it is. Raises ValueError when some rows are marked
    and some are not: then rows of different makers were mixed in one call.
    """
    first = context[:, 0].float()
    kinds = (first[:, 0] - _BASE).round()
    marked = (first == _BASE + kinds[:, None]).all(dim=1) & (kinds >= 1) & (kinds <= 60)
    # One transfer from the device for both tensors.
    flags = torch.stack([marked.float(), kinds]).tolist()
    if not any(flags[0]):
        return None, context
    if not all(flags[0]):
        raise ValueError("some rows of this UNet call are marked and some are not")
    return [int(kind) for kind in flags[1]], context[:, 1:]
