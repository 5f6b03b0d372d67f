"""The arguments of a UNet's or a ControlNet's forward, given by position or by name, on every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

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
