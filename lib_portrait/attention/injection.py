"""Inject, sample, eject: the one way in which this project changes a UNet it does not own.

An `Injection` puts functions of a method's `Rule` in front of the `forward` of single modules, on the instance, and
takes them away again; afterwards the modules have the attributes they had. The host's classes, weights and state dict
are never touched, so attention optimisations, LoRA, tiling and the like go on working underneath.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lib_portrait.attention.arguments import LATENT, Arguments, context_of
from lib_portrait.attention.rows import ONE_PICTURE, Row, unmark
from lib_portrait.attention.sites import Site, find_sites, spatial_shape
from lib_portrait.errors import PortraitError

Forward = Callable[..., torch.Tensor]
# Called as f(host, *args, **kwargs), where host(*args, **kwargs) is what the module would have done.
Wrapper = Callable[..., torch.Tensor]


@dataclass
class Call:
    """The UNet call that is under way, as a rule sees it.

    numbers: the number of each row in `table`, or None while the rule must stand aside (no call, one that is not of the
    sampling: its rows carry no mark, or a point of the sampling at which it does nothing). table: what each number
    means.
    latent: (height, width) of the call's latent. progress: how far the sampling has come, 0 to 1.
    host_state: changes whenever the host may compute something else from the same weights.
    visited: sites at which the rule did its work in this call. repeated: those that have run in this call before, or
    will run again, as guidance has it; who counts or averages what is seen leaves them out.
    """

    numbers: list[int] | None = None
    table: Mapping[int, Row] = field(default_factory=lambda: ONE_PICTURE)
    latent: tuple[int, int] = (0, 0)
    progress: float = 0.0
    host_state: Hashable = None
    visited: set[int] = field(default_factory=set)
    repeated: frozenset[int] = frozenset()

    @property
    def rows(self) -> list[Row]:
        """The call's rows in order; none while the rule must stand aside."""
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

    def check_rows(self, site: Site, rows: int) -> None:
        """Raises PortraitError unless `site`, which sees so many rows, sees those that the network was called with."""
        if rows != len(self.numbers or ()):
            raise PortraitError(
                "rows",
                f"{site.path} sees {rows} rows, the UNet was called with {len(self.numbers or ())}",
                "Switch off extensions that split or join the batch inside the UNet.",
                500,
            )

    def rows_of(self, kind: int) -> list[int]:
        return [row for row, row_kind in enumerate(self.kinds) if row_kind == kind]

    def follow(self, call: Call, active: bool) -> None:
        """Takes over what is to be known of `call`; its rows only where the rule is active."""
        self.numbers = call.numbers if active else None
        self.table, self.latent, self.progress = call.table, call.latent, call.progress
        self.host_state = call.host_state
        self.visited.clear()
        self.repeated = frozenset()


class Rule(Protocol):
    """What a method does at the attention sites of one network: a UNet, or a ControlNet."""

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        """Functions to put around modules of `site`: by path inside the attention layer, "" for the layer itself."""

    def must_visit(self, site: Site) -> bool:
        """Whether a marked call that is active must pass through this rule at `site`."""

    def active(self, progress: float) -> bool:
        """Whether the rule does anything at this point of the sampling, 0 to 1."""


@runtime_checkable
class RewritesContext(Rule, Protocol):
    """What a rule may be beside: one that changes the text's embeddings themselves."""

    def context(self, call: Call, context: torch.Tensor) -> torch.Tensor:
        """What the UNet is called with in place of a context (B, n, D), marks taken off; asked once a call while the
        rule is active, in the order of the rules. What is given is not written to."""


@runtime_checkable
class AddsRows(Rule, Protocol):
    """What a rule may be beside: one that has rows of its own in a UNet call, which the host does not see."""

    def enter(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """What the UNet is called with instead, marks taken off; `call` is told of rows that are added at the end."""

    def leave(self, output: Any) -> Any:
        """What is left of the UNet's output without them."""


class Guidance(Protocol):
    """What is done to the UNet's call as a whole, such as `guidance.features.FeatureGuidance`."""

    def overrides(self, unet: nn.Module, call: Call, injection: Injection) -> dict[str, Wrapper]:
        """Functions to put around modules of the UNet: by path inside it, "" for the UNet itself, marks taken off.
        They are inside of those of rules. injection: the one that asks, which is not in place yet."""

    def active(self, progress: float) -> bool:
        """Whether it does anything at this point of the sampling, 0 to 1."""


class _Override:
    """`around` in front of one module's forward, on the instance."""

    def __init__(self, module: nn.Module, wrapper: Wrapper, call: Call):
        self.module = module
        self.wrapper = wrapper
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
        return self.wrapper(self.host, *args, **kwargs)

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


@dataclass
class _Part:
    """One rule, or the guidance, in an injection: what it is told, and which functions it has around which modules."""

    active: Callable[[float], bool]
    call: Call
    wrappers: list[tuple[nn.Module, Wrapper]]
    rule: Rule | None = None
    rewrites: RewritesContext | None = None
    adds: AddsRows | None = None


class Injection:
    """Rules on one network, between `inject()` and `eject()` (or inside a `with`), as often as wanted.

    unet: ldm, sgm or diffusers layout, or a ControlNet with its `sites`. Its context must be marked (`rows.mark`) in
    every call that belongs to the sampling; calls without marks run as if nothing were injected. So an injection inside
    of another one has the calls that are marked within it to itself.
    rules: each sees the call by itself. Where two have put a function around the same module, a later one's is outside
    of an earlier one's and may call it as its host; one that replaces the module hides the other, whose site then
    counts as passed by.
    rows: what the numbers in the marks mean; may be set anew between two calls.
    host_state: asked once a call; whenever its answer changes, what was computed from the host's weights is stale.
    guidance: see `Guidance`.
    within: the injection on the UNet in whose calls a ControlNet is called (in the WebUI), with contexts without marks
    and the same rows. Elsewhere a ControlNet's own contexts are marked.

    Raises PortraitError from inside a call that cannot be honoured: rows are mixed up or unknown, or a site was
    passed by (its attention was replaced by something that does not use the layer's own projections).
    """

    def __init__(
        self,
        unet: nn.Module,
        *rules: Rule,
        host_state: Callable[[], Hashable] = lambda: None,
        rows: Mapping[int, Row] = ONE_PICTURE,
        guidance: Guidance | None = None,
        sites: Sequence[Site] | None = None,
        within: Injection | None = None,
    ):
        self.unet = unet
        self.rows = rows
        self.sites = list(find_sites(unet) if sites is None else sites)
        self.call = Call()
        """The call that is under way, with its rows also while no rule is active."""
        self.progress = 0.0
        self.calls: dict[int, int] = {}
        """How many rows of each kind have passed through the UNet since injection."""
        self._host_state = host_state
        self._within = within
        self._context = context_of(unet)
        self._parts = [self._part_of(rule) for rule in rules]
        if guidance is not None:
            call = Call()
            wrappers = [(unet.get_submodule(path), one) for path, one in guidance.overrides(unet, call, self).items()]
            self._parts.insert(0, _Part(guidance.active, call, wrappers))
        self._left: list[list[int] | None] = []
        self._overrides: list[_Override] = []
        self._handles: list[Any] = []

    def _part_of(self, rule: Rule) -> _Part:
        call = Call()
        wrappers = [
            (site.module.get_submodule(path), wrapper)
            for site in self.sites
            for path, wrapper in rule.overrides(site, call).items()
        ]
        rewrites = rule if isinstance(rule, RewritesContext) else None
        return _Part(rule.active, call, wrappers, rule, rewrites, rule if isinstance(rule, AddsRows) else None)

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
            for part in self._parts:
                for module, wrapper in part.wrappers:
                    override = _Override(module, wrapper, part.call)
                    override.install()
                    self._overrides.append(override)
        except BaseException:
            self.eject()
            raise
        return self

    def eject(self) -> None:
        self._stand_aside()
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

    def resume(self) -> None:
        """Lets the rules act on the rows of the last call again, for gradient checkpointing runs its layers anew."""
        for part, numbers in zip(self._parts, self._left, strict=True):
            part.call.numbers = numbers

    # ---- for guidance, within the call that is under way

    @property
    def alone(self) -> bool:
        """Whether nobody else has put a `forward` on the UNet itself, beneath ours."""
        return all(override.previous is None for override in self._overrides if override.module is self.unet)

    @contextlib.contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """While some of the call's rows run by themselves, in this order: nobody sees others."""
        with self._numbered(lambda call: [call.numbers[row] for row in rows] if call.numbers is not None else None):
            yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While the UNet runs for the guidance's own sake: the rules do nothing."""
        own = [part.call for part in self._parts if part.rule is None]
        with self._numbered(lambda call: call.numbers if any(call is one for one in own) else None):
            yield

    @contextlib.contextmanager
    def repeated(self, sites: Collection[int] | None = None) -> Iterator[None]:
        """While sites run that have run in the call already, or will do so for certain: these ones, or all."""
        calls = [part.call for part in self._parts]
        before = [call.repeated for call in calls]
        now = frozenset((site.index for site in self.sites) if sites is None else sites)
        for call in calls:
            call.repeated |= now
        try:
            yield
        finally:
            for call, own in zip(calls, before, strict=True):
                call.repeated = own

    @contextlib.contextmanager
    def _numbered(self, numbers: Callable[[Call], list[int] | None]) -> Iterator[None]:
        calls = [self.call, *(part.call for part in self._parts)]
        before = [call.numbers for call in calls]
        for call, own in zip(calls, [numbers(call) for call in calls], strict=True):
            call.numbers = own
        try:
            yield
        finally:
            for call, own in zip(calls, before, strict=True):
                call.numbers = own

    def _stand_aside(self) -> None:
        self.call.numbers = None
        for part in self._parts:
            part.call.numbers = None

    def _enter_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        self._stand_aside()
        context = self._context.of(args, kwargs)
        if context is None:
            return args, kwargs
        try:
            numbers, context = unmark(context)
            if numbers is not None and (unknown := set(numbers) - set(self.rows)):
                raise ValueError(f"no row of this sampling has the number {min(unknown)}")
        except ValueError as error:
            raise PortraitError("rows", str(error), "Switch off extensions that join UNet calls.", 500) from None
        call, table = self.call, self.rows
        if numbers is None and self._within is not None:
            numbers, table = self._within.call.numbers, self._within.call.table
        if numbers is None:
            return args, kwargs
        latent = LATENT.of(args, kwargs)
        for number in numbers:
            kind = table[number].kind
            self.calls[kind] = self.calls.get(kind, 0) + 1
        call.latent = (latent.shape[-2], latent.shape[-1])
        call.progress = self.progress if self._within is None else self._within.progress
        call.host_state = self._host_state()
        call.table, call.numbers = table, numbers
        for part in self._parts:
            part.call.follow(call, part.active(call.progress))
            if part.call.numbers is not None and part.rewrites is not None:
                context = part.rewrites.context(part.call, context)
        args, kwargs = self._context.put(args, kwargs, context)
        for part in self._parts:
            if part.call.numbers is not None and part.adds is not None:
                args, kwargs = part.adds.enter(part.call, args, kwargs)
                for other in self._parts:
                    if other.call.numbers is not None:
                        other.call.table, other.call.numbers = part.call.table, part.call.numbers
        return args, kwargs

    def _leave_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for part in reversed(self._parts):
            if part.call.numbers is not None and part.adds is not None:
                output = part.adds.leave(output)
        passed_by = [
            site.path
            for part in self._parts
            if part.rule is not None and part.call.numbers is not None
            for site in self.sites
            if part.rule.must_visit(site) and site.index not in part.call.visited
        ]
        self._left = [part.call.numbers for part in self._parts]
        self._stand_aside()
        if passed_by:
            raise PortraitError(
                "model",
                f"the UNet did not run the attention layer {passed_by[0]} ({len(passed_by)} layers passed by)",
                "Switch off what replaces the UNet (TensorRT, compiled or exported UNets) and generate again.",
                500,
            )
        return output
