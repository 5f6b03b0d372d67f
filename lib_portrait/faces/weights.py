"""Putting the tensors of a file into a network built without memory of its own (`torch.device("meta")`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib_portrait.errors import PortraitError

# Numbers looked at together: as many as stay in a processor's cache.
STRETCH = 2**20


@contextmanager
def unfilled() -> Iterator[None]:
    """Networks that are made meanwhile have no memory of their own and no initial values, for `fill` to give them."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on "meta" it fills nothing, and takes longer than all else of making a network."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


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


def fitting(module: nn.Module, tensors: Mapping[str, Tensor], field: str, prefix: str = "") -> dict[str, Tensor]:
    """A state dict of the module made of `tensors`, in the dtypes they have.

    Tensors that the module has no place for are left out. Whole numbers (BatchNorm's step counters, CLIP's position
    numbers) are no weights and not in every file: they stay as the module has them. prefix: what stands before the
    names in the file. Raises PortraitError naming `field` and the tensor when a weight is missing, has another shape,
    holds no floating-point numbers, or holds infinities or NaN.
    """
    fitted = {}
    for name, wanted in module.state_dict().items():
        if not wanted.is_floating_point():
            fitted[name] = torch.zeros_like(wanted, device="cpu") if wanted.is_meta else wanted
            continue
        fitted[name] = checked(tensors, name, wanted.shape, field, prefix).detach()
    return fitted


def fill(module: nn.Module, tensors: Mapping[str, Tensor], field: str, prefix: str = "") -> None:
    """Makes `tensors` the module's weights, without a copy, to compute with and not to train.

    Raises PortraitError as `fitting` does.
    """
    module.load_state_dict(fitting(module, tensors, field, prefix), assign=True)
    module.requires_grad_(False).eval()


def checked(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int | None], field: str, prefix: str = ""
) -> Tensor:
    """The tensor `name`: floating-point, finite, of that shape, in which None stands for any size above 0.

    prefix: what stands before the name in the file. Raises PortraitError naming `field` and the tensor.
    """
    tensor, full = tensors.get(name), prefix + name
    if tensor is None:
        raise unfit(field, f"the tensor {full} is missing")
    alike = (size > 0 if wanted is None else size == wanted for size, wanted in zip(tensor.shape, shape))
    if tensor.ndim != len(shape) or not all(alike):
        wanted = str(tuple(shape)).replace("None", "any")
        raise unfit(field, f"{full} has the shape {tuple(tensor.shape)} instead of {wanted}")
    if not tensor.is_floating_point():
        raise unfit(field, f"{full} holds {tensor.dtype}")
    if not all_finite(tensor):
        raise not_finite(field, full)
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither infinities nor NaN.

    By the extremes of one stretch after the other, which NaN passes through: ten times as fast as to ask each number.
    """
    for stretch in tensor.reshape(-1).split(STRETCH):
        # torch 2.1 has no extremes of half precision on a CPU.
        numbers = stretch if stretch.element_size() > 2 else stretch.float()
        if len(numbers) and not torch.stack(torch.aminmax(numbers)).isfinite().all():
            return False
    return True


def check_finite(tensors: Mapping[str, Tensor], field: str) -> None:
    """Raises PortraitError naming `field` and the first tensor that holds infinities or NaN."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise not_finite(field, name)


def not_finite(field: str, name: str) -> PortraitError:
    """What is raised for a tensor of a file that holds infinities or NaN."""
    return PortraitError(
        field,
        f"{name} holds infinities or NaN, which a training that failed or a conversion to half precision leaves",
        "Fetch the file again, or use another: models/README.md has the table of weights.",
    )


def unfit(field: str, problem: str) -> PortraitError:
    """What is raised for a file that does not hold the network it should."""
    return PortraitError(
        field,
        problem,
        "Fetch the file again, or use one that belongs to the others: models/README.md has the table of weights.",
    )
