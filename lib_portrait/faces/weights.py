"""Putting the tensors of a file into a network built without memory of its own (`torch.device("meta")`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib_portrait.errors import PortraitError


def beside(tensors: Mapping[str, Tensor], leaf: str) -> dict[str, Tensor]:
    """The tensors whose names share what stands before `leaf` in the first name that ends in it, less that prefix.

    Files name the same network ``input_layer...``, ``module.input_layer...``, ``image_encoder.input_layer...``.
    Empty when no name ends in `leaf`.
    """
    for name in tensors:
        if name == leaf or name.endswith(f".{leaf}"):
            prefix = name[: len(name) - len(leaf)]
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return {}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], field: str) -> None:
    """Makes `tensors` the module's parameters and buffers, without a copy and in the dtype they have.

    Tensors that the module has no place for are left out. Whole numbers (BatchNorm's step counters, CLIP's position
    numbers) are no weights and not in every file: they stay as the module has them. Raises PortraitError naming
    `field` when a weight is missing, has another shape, or holds no floating-point numbers.
    """
    filled = {}
    for name, wanted in module.state_dict().items():
        if not wanted.is_floating_point():
            filled[name] = torch.zeros_like(wanted, device="cpu") if wanted.is_meta else wanted
            continue
        tensor = tensors.get(name)
        if tensor is None:
            raise unfit(field, f"the tensor {name} is missing")
        if tensor.shape != wanted.shape:
            raise unfit(field, f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
        if not tensor.is_floating_point():
            raise unfit(field, f"{name} holds {tensor.dtype}")
        filled[name] = tensor.detach()
    module.load_state_dict(filled, assign=True)
    module.requires_grad_(False).eval()


def unfit(field: str, problem: str) -> PortraitError:
    """What is raised for a file that does not hold the network it should."""
    return PortraitError(field, problem, "Use the published file that the README's table of weights names.")
