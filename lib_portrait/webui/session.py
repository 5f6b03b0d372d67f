"""The life of one request in the WebUI: parse, prepare, inject, sample, eject.

The WebUI catches and logs every exception that a script or a denoiser callback raises and goes on drawing, which would
give a picture without the person. So nothing is raised from callbacks. A fault found in one is kept in the session, and
raised where the WebUI does not catch: `p.init`, `p.sample` and the UNet's own call. From there it reaches the API as an
error status and the panel as a message.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, errors, shared

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, find_sites, mark
from lib_portrait.checkpoints.store import AUTOMATIC, EMBEDDED
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.request import PortraitRequest, parse_request, to_infotext
from lib_portrait.webui import axes, panel, services, world
from lib_portrait.webui import values as layout

if TYPE_CHECKING:
    from lib_portrait.conditioning import Conditioning
    from lib_portrait.methods.uniportrait import UniPortraitRule

INFOTEXT_KEY = "Portrait"
NOTICES_KEY = "Portrait notices"
_ATTRIBUTE = "portrait_session"


class Session:
    """One request while the WebUI processes it.

    request: what was asked for, or None if it could not even be read. tabs: the panel's tabs that its identities come
    from. failure: the first fault, to be raised where the host lets it through. maps: the mean routing map of every
    sampling done so far, (rows, N, h, w).
    """

    def __init__(self, request: PortraitRequest | None, tabs: Sequence[int], failure: Exception | None):
        self.request = request
        self.tabs = tabs
        self.failure = failure
        self.maps: list[torch.Tensor] = []
        self._conditioning: Conditioning | None = None
        self._rule: UniPortraitRule | None = None
        self._injection: Injection | None = None
        self._door: Any = None
        self._sampling = False
        self._expected = 0
        self._seen = 0

    def fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def prepare(self, p: Any) -> None:
        """Loads and computes everything the request needs, once, before the first sampling. Raises PortraitError."""
        assert self.request is not None
        unet = shared.sd_model.model.diffusion_model
        # Half precision only where the host itself uses it: face features decide who is seen.
        dtype = torch.float32 if devices.device.type == "cpu" else devices.dtype
        request = self.request
        if request.checkpoint == AUTOMATIC and world.is_world(shared.sd_model):
            request = dataclasses.replace(request, checkpoint=EMBEDDED)
        conditioning = services.conditioner().prepare(request, (p.width, p.height), devices.device, dtype)
        conditioning.adapter.check_fits(find_sites(unet))
        self._conditioning = conditioning
        self._rule = conditioning.rule()

    def notices(self) -> list[Notice]:
        """What the user should know of the request, fields as the panel names them where it comes from there."""
        found = self._conditioning.notices if self._conditioning is not None else ()
        return [Notice(layout.said_of_tab(notice.field, self.tabs), notice.text) for notice in found]

    # ---- around the host's p.sample

    def sample(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the host's sampling with the people injected; nothing of it is left when this returns or raises."""
        if self._sampling:
            # Another extension put its own wrapper around ours and ours around that: the outermost does the work.
            return run(*args, **kwargs)
        self.check()
        assert self._rule is not None and self.request is not None
        from lib_portrait.methods.uniportrait import RoutingMaps

        self._rule.routing = RoutingMaps() if self.request.show_routing else None
        self._sampling = True
        self._expected = self._seen = 0
        try:
            self._enter(shared.sd_model.model.diffusion_model)
            result = run(*args, **kwargs)
            self.check()
            self._check_seen()
            return result
        finally:
            self._leave()
            self._sampling = False
            if self._rule.routing is not None and (mean := self._rule.routing.mean()) is not None:
                self.maps.append(mean)
                self._rule.routing = None

    def _enter(self, unet: torch.nn.Module) -> None:
        self._door = unet.register_forward_pre_hook(self._at_the_door)
        assert self._conditioning is not None and self._rule is not None
        if self._injection is None or self._injection.unet is not unet:
            self._conditioning.adapter.check_fits(find_sites(unet))
            self._injection = Injection(unet, self._rule, lora_state)
        self._injection.calls.clear()
        self._injection.inject()

    def _leave(self) -> None:
        if self._door is not None:
            self._door.remove()
            self._door = None
        if self._injection is not None and self._injection.injected:
            self._injection.eject()
            self._seen += self._injection.calls.get(POSITIVE, 0)

    def _at_the_door(self, unet: torch.nn.Module, args: tuple[Any, ...]) -> None:
        # A fault found in a denoiser callback stops the picture here, one line of code later.
        self.check()

    def _check_seen(self) -> None:
        state = shared.state
        if state.interrupted or state.skipped or state.stopping_generation:
            return
        if self._expected == 0 or self._seen + self._calls() < self._expected:
            raise PortraitError(
                "Portrait",
                f"of {self._expected} rows of the prompt only {self._seen + self._calls()} reached the UNet with the "
                "people in them",
                "Switch off extensions that replace sampling or the UNet, and generate again.",
                500,
            )

    def _calls(self) -> int:
        return self._injection.calls.get(POSITIVE, 0) if self._injection is not None else 0

    # ---- in the host's denoiser callback

    def denoise(self, params: Any) -> None:
        """Marks the rows of a denoiser step by their kind. Never raises: the host would swallow it."""
        if not self._sampling or self.failure is not None:
            return
        try:
            unet = shared.sd_model.model.diffusion_model
            if self._injection is None or self._injection.unet is not unet:
                # The refiner, or hires fix with a checkpoint of its own, has changed the model in mid-sampling.
                self._leave()
                self._enter(unet)
            assert self._injection is not None
            denoiser = params.denoiser
            self._injection.progress = min(denoiser.step / max(denoiser.total_steps or 1, 1), 1.0)
            params.text_cond = _marked(params.text_cond, POSITIVE)
            params.text_uncond = _marked(params.text_uncond, NEGATIVE)
            self._expected += _rows(params.text_cond)
        except Exception as error:
            self.fail(_known(error, self.tabs))


def _marked(cond: Any, kind: int) -> Any:
    """A condition with its rows marked: a tensor (SD1, SD2), or a mapping with `crossattn` (SDXL)."""
    if isinstance(cond, dict):
        # The host's mapping type carries a shape that others read; its other entries stay shared.
        marked = copy.copy(cond)
        marked["crossattn"] = mark(cond["crossattn"], kind)
        return marked
    return mark(cond, kind)


def _rows(cond: Any) -> int:
    return (cond["crossattn"] if isinstance(cond, dict) else cond).shape[0]


def lora_state() -> Hashable:
    """Changes with the networks that the built-in Lora extension has loaded, for it may apply them without touching
    weights ("Lora/Networks: use old method" in its settings)."""
    loaded = getattr(sys.modules.get("networks"), "loaded_networks", ())
    return tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in loaded)


# ------------------------------------------------------------------------------------------- the script's callbacks


class _Guard:
    """Stands before `p.init` or `p.sample` of one processing object, on the instance."""

    def __init__(self, p: Any, name: str):
        # The processing object owns the guard; a strong reference back would keep both, and the weights, alive.
        self._p = weakref.ref(p)
        self._name = name
        self._previous = p.__dict__.get(name)

    def belongs_to(self, p: Any) -> bool:
        return self._p() is p

    def host(self) -> Callable[..., Any]:
        p = self._p()
        return self._previous if self._previous is not None else getattr(type(p), self._name).__get__(p)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session: Session | None = getattr(self._p(), _ATTRIBUTE, None)
        if session is None:
            return self.host()(*args, **kwargs)
        if self._name == "init":
            session.check()
            return self.host()(*args, **kwargs)
        return session.sample(self.host(), *args, **kwargs)


def begin(p: Any, values: Sequence[Any]) -> None:
    """`before_process`: reads the request and sets the guards. Faults are kept, not raised."""
    forget(p)
    request: PortraitRequest | None = None
    failure: Exception | None = None
    tabs: Sequence[int] = ()
    try:
        tabs = layout.tabs_in_use(values)
        form = panel.request_from_values(values)
        if form is None:
            return
        form = axes.apply_overrides(form, getattr(p, "portrait_overrides", {}), tabs)
        request = parse_request(form, services.limits())
        if not request.enabled:
            return
    except Exception as error:
        failure = _known(error, tabs)
    setattr(p, _ATTRIBUTE, Session(request, tabs, failure))
    for name in ("init", "sample"):
        setattr(p, name, _Guard(p, name))


def prepare(p: Any) -> None:
    """`process`: the model is loaded by now. Computes the conditioning and writes the infotext. Faults are kept."""
    session = session_of(p)
    if session is None or session.failure is not None:
        return
    try:
        session.prepare(p)
        assert session.request is not None
        p.extra_generation_params[INFOTEXT_KEY] = to_infotext(session.request)
        notices = [str(notice) for notice in session.notices()]
        if notices:
            # The parameters reach the API's answer and the picture's file; the comments stand below the gallery.
            p.extra_generation_params[NOTICES_KEY] = " ".join(notices)
            for notice in notices:
                p.comment(f"Portrait: {notice}")
    except Exception as error:
        session.fail(_known(error, session.tabs))


def denoise(params: Any) -> None:
    """`cfg_denoiser` callback, called for every generation of the host."""
    session = session_of(getattr(params.denoiser, "p", None))
    if session is not None:
        session.denoise(params)


def finish(p: Any, processed: Any) -> None:
    """`postprocess`: appends the routing maps to the pictures, if asked for, and takes the guards off."""
    session = session_of(p)
    if session is None:
        return
    forget(p, keep_infotext=True)
    if session.maps:
        from lib_portrait.routing_picture import draw_routing

        first = processed.index_of_first_image
        pictures = processed.images[first : first + len(processed.all_prompts)]
        for number, drawn in enumerate(draw_routing(pictures, session.maps)):
            processed.images.append(drawn)
            processed.infotexts.append(processed.infotexts[min(first + number, len(processed.infotexts) - 1)])


def forget(p: Any, keep_infotext: bool = False) -> None:
    """Takes everything of ours off a processing object: scripts process one several times, or copy it."""
    p.__dict__.pop(_ATTRIBUTE, None)
    if not keep_infotext:
        for key in (INFOTEXT_KEY, NOTICES_KEY):
            p.extra_generation_params.pop(key, None)
    for name in ("init", "sample"):
        guard = p.__dict__.get(name)
        if isinstance(guard, _Guard):
            if guard.belongs_to(p) and guard._previous is not None:
                p.__dict__[name] = guard._previous
            else:
                del p.__dict__[name]


def session_of(p: Any) -> Session | None:
    return getattr(p, _ATTRIBUTE, None)


def _known(error: Exception, tabs: Sequence[int]) -> Exception:
    """The error if it is meant for users, as the panel says it; else one that says whose fault it is."""
    if isinstance(error, PortraitError):
        return layout.said_in_panel(error, tabs)
    errors.report("Portrait failed", exc_info=True)
    return PortraitError(
        "Portrait", f"it failed with {type(error).__name__}: {error}", "Please report the log above.", 500
    )
