"""Low-rank adapters (LoRA, arXiv 2106.09685) of a lower rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """An adapter's tensors with every LoRA of greater rank replaced by the nearest of that rank.

    That is, in up @ down: its largest singular values are kept (Eckart and Young).
    """
    reduced = dict(tensors)
    for name, down in tensors.items():
        if name.endswith("_lora.down.weight") and len(down) > rank:
            other = name.replace(".down.", ".up.")
            left, strength, right = torch.linalg.svd(tensors[other].float() @ down.float(), full_matrices=False)
            share = strength[:rank].sqrt()
            reduced |= {other: left[:, :rank] * share, name: share[:, None] * right[:rank]}
    return reduced
