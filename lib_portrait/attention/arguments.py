"""The arguments of a UNet's or a ControlNet's forward, given by position or by name, on every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Argument:
    """One argument. at: its place among positional ones. names: what ldm and sgm, and diffusers, call it."""

    at: int
    names: tuple[str, str]

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its value; None where it is not given."""
        if len(args) > self.at:
            return args[self.at]
        return next((kwargs[name] for name in self.names if name in kwargs), None)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Arguments:
        """The arguments with another value in place of the one that is given."""
        if len(args) > self.at:
            return (*args[: self.at], value, *args[self.at + 1 :]), kwargs
        return args, {**kwargs, next(name for name in self.names if name in kwargs): value}


# forward(x, timesteps, context, y) in ldm and sgm, forward(sample, timestep, encoder_hidden_states, ...) in diffusers.
LATENT = Argument(0, ("x", "sample"))
TIMESTEPS = Argument(1, ("timesteps", "timestep"))
CONTEXT = Argument(2, ("context", "encoder_hidden_states"))


def context_of(network: nn.Module) -> Argument:
    """The context of this network: ldm's ControlNet has forward(x, hint, timesteps, context, y)."""
    behind_hint = hasattr(getattr(network, "control_model", network), "input_hint_block")
    return Argument(3, CONTEXT.names) if behind_hint else CONTEXT


def rows_of(value: Any, count: int, rows: Sequence[int]) -> Any:
    """Some rows of a call's arguments, or of its output, in this order: of each tensor in it with `count` rows."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: rows_of(one, count, rows) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rows_of(one, count, rows) for one in value)
    return value


def predicted(output: Any) -> Tensor:
    """What a UNet's output predicts: (B, 4, h, w). The output itself in ldm and sgm, its first part in diffusers."""
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


def with_predicted(output: Any, prediction: Tensor) -> Any:
    """A UNet's output, of the same kind, with another prediction."""
    if isinstance(output, Tensor):
        return prediction
    return (prediction, *output[1:]) if isinstance(output, tuple) else replace(output, sample=prediction)
