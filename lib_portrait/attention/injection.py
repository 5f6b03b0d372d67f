"""Inject, sample, eject: the one way in which this project changes a UNet it does not own.

An `Injection` puts functions of a method's `Rule` in front of the `forward` of single modules, on the instance, and
takes them away again; afterwards the modules have the attributes they had. The host's classes, weights and state dict
are never touched, so attention optimisations, LoRA, tiling and the like go on working underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lib_portrait.attention.rows import ONE_PICTURE, Row, unmark
from lib_portrait.attention.sites import Site, find_sites, spatial_shape
from lib_portrait.errors import PortraitError

Forward = Callable[..., torch.Tensor]
# Called as f(host, *args, **kwargs), where host(*args, **kwargs) is what the module would have done.
Around = Callable[..., torch.Tensor]


@dataclass
class Call:
    """The UNet call that is under way, as the rules see it.

    numbers: the number of each row in `table`, or None while rules must stand aside (no call, or one that is not of the
    sampling: its rows carry no mark). table: what each number means.
    latent: (height, width) of the call's latent. progress: how far the sampling has come, 0 to 1.
    host_state: changes whenever the host may compute something else from the same weights.
    visited: sites at which a rule did its work in this call.
    """

    numbers: list[int] | None = None
    table: Mapping[int, Row] = field(default_factory=lambda: ONE_PICTURE)
    latent: tuple[int, int] = (0, 0)
    progress: float = 0.0
    host_state: Hashable = None
    visited: set[int] = field(default_factory=set)

    @property
    def rows(self) -> list[Row]:
        """The call's rows in order; none while rules must stand aside."""
        return [self.table[number] for number in self.numbers or []]

    @property
    def kinds(self) -> list[int]:
        """The kind of each row (`rows.POSITIVE`, ...)."""
        return [row.kind for row in self.rows]

    def shape_at(self, site: Site, tokens: int) -> tuple[int, int]:
        """(height, width) of `site`, which sees `tokens` positions. PortraitError if that is no whole level."""
        try:
            return spatial_shape(tokens, self.latent)
        except ValueError as error:
            raise PortraitError(
                "regions", f"{site.path} sees {error}", "Switch off what merges tokens of cross-attention.", 500
            ) from None

    def rows_of(self, kind: int) -> list[int]:
        return [row for row, row_kind in enumerate(self.kinds) if row_kind == kind]


class Rule(Protocol):
    """What a method does at the attention sites of one UNet."""

    def overrides(self, site: Site, call: Call) -> dict[str, Around]:
        """Functions to put around modules of `site`: by path inside the attention layer, "" for the layer itself."""

    def must_visit(self, site: Site) -> bool:
        """Whether a marked call that is active must pass through this rule at `site`."""

    def active(self, progress: float) -> bool:
        """Whether the rule does anything at this point of the sampling, 0 to 1."""


@runtime_checkable
class Widening(Protocol):
    """What a rule may be beside: one that has rows of its own in a UNet call, which the host does not see."""

    def enter(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the UNet is called with instead, marks taken off; the rule tells `call` of the rows that it adds."""

    def leave(self, call: Call, output: Any) -> Any:
        """What the host gets of the UNet's output."""


class _Override:
    """`around` in front of one module's forward, on the instance."""

    def __init__(self, module: nn.Module, around: Around, call: Call):
        self.module = module
        self.around = around
        self.call = call
        self.previous: Forward | None = None
        self.removed = False

    def host(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # Looked up at every call: hosts replace forward on classes when the attention optimisation changes.
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.removed or self.call.numbers is None:
            return self.host(*args, **kwargs)
        return self.around(self.host, *args, **kwargs)

    def install(self) -> None:
        self.previous = self.module.__dict__.get("forward")
        self.module.forward = self

    def remove(self) -> None:
        self.removed = True
        if self.module.__dict__.get("forward") is not self:
            # Somebody wrapped this one while it was in place and holds a reference to it: it can only become
            # transparent, which `removed` has made it.
            return
        if self.previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.previous


class Injection:
    """A method's rule on one UNet, between `inject()` and `eject()` (or inside a `with`), as often as wanted.

    unet: ldm, sgm or diffusers layout. Its context must be marked (`rows.mark`) in every call that belongs to the
    sampling; calls without marks run as if nothing were injected.
    rows: what the numbers in the marks mean; may be set anew between two calls.
    host_state: asked once a call; whenever its answer changes, what was computed from the host's weights is stale.

    Raises PortraitError from inside a UNet call when the call cannot be honoured: rows are mixed up or unknown, or a
    site was passed by (its attention was replaced by something that does not use the layer's own projections).
    """

    def __init__(
        self,
        unet: nn.Module,
        rule: Rule,
        host_state: Callable[[], Hashable] = lambda: None,
        rows: Mapping[int, Row] = ONE_PICTURE,
    ):
        self.unet = unet
        self.rule = rule
        self.rows = rows
        self.sites = find_sites(unet)
        self.call = Call()
        self.progress = 0.0
        self.calls: dict[int, int] = {}
        """How many rows of each kind have passed through the UNet since injection."""
        self._host_state = host_state
        self._arounds = [
            (site.module.get_submodule(path), around)
            for site in self.sites
            for path, around in rule.overrides(site, self.call).items()
        ]
        self._overrides: list[_Override] = []
        self._handles: list[Any] = []

    @property
    def injected(self) -> bool:
        return bool(self._handles)

    def inject(self) -> Injection:
        if self.injected:
            raise RuntimeError("this injection is in place already")
        try:
            # In front of all other hooks, so that whoever else reads the context finds it without our marks.
            self._handles.append(self.unet.register_forward_pre_hook(self._enter_call, prepend=True, with_kwargs=True))
            self._handles.append(self.unet.register_forward_hook(self._leave_call))
            for module, around in self._arounds:
                override = _Override(module, around, self.call)
                override.install()
                self._overrides.append(override)
        except BaseException:
            self.eject()
            raise
        return self

    def eject(self) -> None:
        self.call.numbers = None
        # Reverse order, so that two overrides of one module come off as they went on.
        for override in reversed(self._overrides):
            override.remove()
        for handle in self._handles:
            handle.remove()
        self._overrides.clear()
        self._handles.clear()

    def __enter__(self) -> Injection:
        return self.inject()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.eject()

    def _enter_call(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self.call
        call.numbers = None
        call.visited.clear()
        # forward(x, timesteps, context, ...) in ldm and sgm, forward(sample, timestep, encoder_hidden_states, ...) in
        # diffusers.
        name = next((key for key in ("context", "encoder_hidden_states") if key in kwargs), None)
        context = kwargs[name] if name else args[2] if len(args) > 2 else None
        if context is None:
            return args, kwargs
        try:
            numbers, context = unmark(context)
            if numbers is not None and (unknown := set(numbers) - set(self.rows)):
                raise ValueError(f"no row of this sampling has the number {min(unknown)}")
        except ValueError as error:
            raise PortraitError("rows", str(error), "Switch off extensions that join UNet calls.", 500) from None
        if numbers is None:
            return args, kwargs
        if name:
            kwargs = {**kwargs, name: context}
        else:
            args = (*args[:2], context, *args[3:])
        latent: torch.Tensor = args[0] if args else kwargs["x" if "x" in kwargs else "sample"]
        for number in numbers:
            kind = self.rows[number].kind
            self.calls[kind] = self.calls.get(kind, 0) + 1
        call.latent = (latent.shape[-2], latent.shape[-1])
        call.progress = self.progress
        call.host_state = self._host_state()
        call.table = self.rows
        call.numbers = numbers if self.rule.active(self.progress) else None
        if call.numbers is not None and isinstance(self.rule, Widening):
            return self.rule.enter(call, args, kwargs)
        return args, kwargs

    def _leave_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self.call
        if call.numbers is None:
            return output
        call.numbers = None
        passed_by = [site.path for site in self.sites if self.rule.must_visit(site) and site.index not in call.visited]
        if passed_by:
            raise PortraitError(
                "model",
                f"the UNet did not run the attention layer {passed_by[0]} ({len(passed_by)} layers passed by)",
                "Switch off what replaces the UNet (TensorRT, compiled or exported UNets) and generate again.",
                500,
            )
        return self.rule.leave(call, output) if isinstance(self.rule, Widening) else output
