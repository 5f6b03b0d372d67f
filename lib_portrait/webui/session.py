"""The life of one request in the WebUI: parse, prepare, inject, sample, eject.

The WebUI catches and logs every exception that a script or a denoiser callback raises and goes on drawing, which would
give a picture without the person. So nothing is raised from callbacks. A fault found in one is kept in the session, and
raised where the WebUI does not catch: `p.init`, `p.sample` and the UNet's own call. From there it reaches the API as an
error status and the panel as a message; where a script or another extension stands in between and catches it, `jobs`
has it heard all the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, errors, images, shared

from lib_portrait.attention import (
    NEGATIVE,
    POSITIVE,
    Injection,
    RoutingMaps,
    Row,
    control_sites,
    find_sites,
    mark_conditions,
)
from lib_portrait.attention.regions import WHOLE, Box, check_takes_part
from lib_portrait.attention.windows import check_window
from lib_portrait.checkpoints.store import AUTOMATIC
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.infotext import to_infotext
from lib_portrait.methods.declarations import Declaration
from lib_portrait.request import PortraitRequest, parse_request
from lib_portrait.webui import (
    adetailer,
    axes,
    checkpoint,
    control,
    hooks,
    instances,
    jobs,
    panel_values,
    places,
    prompts,
    settings,
    upcoming,
)
from lib_portrait.webui.host import WebuiHost, lora_state
from lib_portrait.webui.refusal import refusal

if TYPE_CHECKING:
    from lib_portrait.conditioning import Conditioning
    from lib_portrait.guidance.reference import GuidedStep, ReferenceGuidance
    from lib_portrait.methods.base import Rule

INFOTEXT_KEY = "Portrait"
NOTICES_KEY = "Portrait notices"
NO_STEPS_REMEDY = "Raise the sampling steps or the denoising strength; DDIM and PLMS may draw one step less than that."
MAP_SUFFIX = "-portrait-map"
GUIDANCE_SUFFIX = "-portrait-guidance"
_ATTRIBUTE = "portrait_session"
_numbers = itertools.count()


class Session:
    """One request while the WebUI processes it.

    number: its own. request: what was asked for, or None if it could not even be read. method: which one it is for.
    tabs: the panel's tabs that its identities come from. failure: the first fault, to be raised where the host lets it
    through. maps: of every sampling done so far the mean routing map of each picture, (pictures, N, h, w), or None
    where it drew nothing. guided: and what reference guidance did in each picture, where that is to be shown.
    """

    def __init__(
        self, request: PortraitRequest | None, method: Declaration, tabs: Sequence[int], failure: Exception | None
    ):
        self.number = next(_numbers)
        self.request = request
        self.method = method
        self.tabs = tabs
        self.failure = failure
        self.maps: list[torch.Tensor | None] = []
        self.guided: list[list[list[GuidedStep]]] = []
        self.place: Box = WHOLE
        self._notices: list[Notice] = []
        self._conditioning: Conditioning | None = None
        self._rule: Rule[Any] | None = None
        self._guidance: ReferenceGuidance | None = None
        self._injection: Injection | None = None
        self._lllites: hooks.LLLites | None = None
        self._controls: list[Injection] = []
        self._hints: control.Hints | None = None
        self._frozen: control.Frozen | None = None
        self._spared: control.Spared | None = None
        self._shown = False
        self._pre_hook: Any = None
        self._sampling = False
        self._latent = (0, 0)
        self._expected = 0
        self._seen = 0
        self._steps: set[float] = set()
        self._words: dict[tuple[tuple[str, int], ...], list[Row]] = {}

    def fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def prepare(self, p: Any) -> None:
        """Loads and computes everything the request needs, once, before the first sampling. Raises PortraitError."""
        assert self.request is not None
        places.check_script(p, self.request)
        self._notices = places.notices(p, self.request)
        unet = shared.sd_model.model.diffusion_model
        # Half precision only where the host itself uses it: face features decide who is seen.
        dtype = torch.float32 if devices.device.type == "cpu" else devices.dtype
        request = resolved(self.request)
        try:
            conditioning = instances.conditioner().prepare(
                request,
                places.picture_size(p),
                devices.device,
                dtype,
                report=_show_progress,
                sampled=(p.width, p.height),
                base=checkpoint.Loaded.of(shared.sd_model).file,
            )
        finally:
            shared.state.textinfo = None
        conditioning.check_fits(find_sites(unet))
        for role, name in upcoming.checkpoints(p):
            upcoming.check_checkpoint(conditioning.text_attentions(), role, name)
        self._conditioning = conditioning
        self._rule = conditioning.rule()
        self._guidance = conditioning.guidance(self._rule)

    def infotext(self) -> str:
        """The request as the pictures' parameters hold it, with the adapter that was used, and a kit's values."""
        assert self.request is not None and self._conditioning is not None
        # Where people are, in place of a picture that says it.
        made = self._conditioning.request
        used = dataclasses.replace(self.request, identities=made.identities, layout=None, guidance=made.guidance)
        return to_infotext(used, self._conditioning.kit.name)

    def notices(self) -> list[Notice]:
        """What the user should know of the request, fields as the panel names them where it comes from there."""
        found = [*self._notices, *(self._conditioning.notices if self._conditioning is not None else ())]

        # A notice's text may name another identity.
        return [
            Notice(self.said(one.field), re.sub(r"identities\[\d+\]", lambda match: self.said(match[0]), one.text))
            for one in found
        ]

    def said(self, field: str) -> str:
        """A field of the request as the panel names it, where the request comes from there."""
        return panel_values.said_of_tab(field, self.tabs, self.method)

    # ---- around the host's p.sample

    def sample(self, p: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the host's sampling with the people injected; nothing of it is left when this returns or raises."""
        if self._sampling:
            # Another extension put its own wrapper around ours and ours around that: the outermost does the work.
            return run(*args, **kwargs)
        self.check()
        assert self._rule is not None and self.request is not None
        self._check_windows(upcoming.steps(p))
        self._check_places(p)
        self._check_words(p)
        self._rule.routing = RoutingMaps() if self.request.shows_maps else None
        # Guidance asks the rule what it is going to be told by it.
        for part in (self._guidance, self._rule):
            if part is not None:
                part.begin()
        self._sampling = True
        self._expected = self._seen = 0
        self._steps.clear()
        try:
            self._enter(p, shared.sd_model.model.diffusion_model)
            result = run(*args, **kwargs)
            self.check()
            self._check_seen(p)
            self._check_guided(p)
            return result
        finally:
            self._leave()
            self._sampling = False
            if self._rule.routing is not None:
                self.maps.append(self._rule.routing.mean())
                self._rule.routing = None
            if self._guidance is not None and self._guidance.options["show"]:
                record = self._guidance.record
                self.guided.append([[one for one in record if one.picture == i] for i in range(p.batch_size)])
            self.place = self._rule.place

    def _enter(self, p: Any, unet: torch.nn.Module) -> None:
        self._pre_hook = unet.register_forward_pre_hook(self._check_call)
        assert self._conditioning is not None and self._rule is not None
        if self._rule.replaces_attention and hooks.ip_adapters_on(unet):
            raise PortraitError(
                "ControlNet",
                f"an IP-Adapter, InstantID or PuLID unit adds to the attention that {self.method.title} replaces, so "
                "it would be left out",
                "Switch this unit off, or choose a method that leaves the model's own attention in place.",
            )
        if self._rule.adds_rows:
            rule = self._rule
            self._spared = control.Spared(p, lambda: rule.added_rows, self.method.title)
        if self._injection is None or self._lllites is None or self._injection.unet is not unet:
            self._conditioning.check_fits(find_sites(unet))
            self._lllites = hooks.LLLites(unet)
            rules = (self._rule, self._lllites)
            self._injection = Injection(unet, *rules, host_state=lora_state, guidance=self._guidance)
        host = WebuiHost(shared.sd_model, (p.width, p.height))
        self._rule.prepare(host)
        if self._guidance is not None:
            self._guidance.prepare(host)
            self._frozen = control.Frozen(p)
        self._injection.calls.clear()
        self._lllites.take()
        self._injection.inject()
        if self._rule.in_control:
            self._enter_control(p, unet)

    def _enter_control(self, p: Any, unet: torch.nn.Module) -> None:
        """Has the rule stand in the ControlNet too that the kit names, where one of the enabled units runs it."""
        assert self._conditioning is not None and self._rule is not None
        kit = self._conditioning.kit
        wanted = kit.manifest.control if kit.manifest is not None else None
        units = control.trained_with(p, wanted) if wanted is not None else []
        for unit in units:
            sites = control_sites(unit.network, unet)
            one = Injection(unit.network, self._rule, host_state=lora_state, sites=sites, within=self._injection)
            self._controls.append(one.inject())
        self._hints = control.Hints(units, self._rule.circles, places.sampled(p))
        if self.request is not None and self.request.shows_control and not self._shown:
            for unit in units:
                control.show(p, unit)
                self._shown = True
        if not units and not places.is_detail(p):
            name = f"{wanted.name}, which it was trained with" if wanted is not None else "one that its kit names"
            text = f"no enabled unit runs {name}: people are carried by the UNet's attention alone"
            self.tell(p, [Notice("ControlNet", text)])

    def tell(self, p: Any, notices: Sequence[Notice]) -> None:
        """Has the user know of these, each once: in the picture's parameters and below the gallery."""
        known = p.extra_generation_params.get(NOTICES_KEY, "")
        for notice in map(str, notices):
            if notice not in known:
                # The parameters reach the API's answer and the picture's file; comments stand below the gallery.
                known = f"{known} {notice}".strip()
                p.comment(f"Portrait: {notice}")
        if known:
            p.extra_generation_params[NOTICES_KEY] = known

    def _leave(self) -> None:
        for kept in (self._hints, self._frozen, self._spared):
            if kept is not None:
                kept.restore()
        self._hints = self._frozen = self._spared = None
        while self._controls:
            self._controls.pop().eject()
        if self._pre_hook is not None:
            self._pre_hook.remove()
            self._pre_hook = None
        if self._injection is not None and self._injection.injected:
            self._injection.eject()
            self._seen += self._injection.calls.get(POSITIVE, 0)
        if self._lllites is not None:
            self._lllites.restore()

    def _check_call(self, unet: torch.nn.Module, args: tuple[Any, ...]) -> None:
        # A fault found in a denoiser callback stops the picture here, one line of code later.
        self.check()
        if self._injection is None or self._rule is None:
            return
        call = self._injection.call
        if call.numbers is not None and call.latent != self._latent:
            if self._guidance is not None:
                raise PortraitError(
                    self.said("guidance"),
                    "an extension sends the picture through the UNet in pieces, in which nobody's face is found",
                    "Switch reference guidance off, or tiled diffusion.",
                )
            # People without regions are routed in each piece; a region would have to know which one this is.
            first = next((i for i, person in enumerate(self._rule.people) if person.region is not None), None)
            if first is not None:
                raise PortraitError(
                    self.said(f"identities[{first}].region"),
                    "an extension sends the picture through the UNet in pieces and does not tell where they lie",
                    "Leave the regions out, so that routing places the people, or switch tiled diffusion off.",
                )

    def _check_places(self, p: Any) -> None:
        """Raises PortraitError if somebody's region lies outside of what is going to be painted."""
        assert self._rule is not None
        if places.is_detail(p):
            return
        painted, place = places.painted(p), places.sampled(p)
        for i, person in enumerate(self._rule.people):
            if person.region is not None:
                check_takes_part(person.region, self.said(f"identities[{i}].region"), painted, place)

    def _check_words(self, p: Any) -> None:
        """Raises PortraitError if some picture's prompt never names somebody who is drawn where their word stands."""
        assert self._rule is not None
        self._words.clear()
        if self._rule.reads_words:
            host = WebuiHost(shared.sd_model, (p.width, p.height))
            for of_picture in prompts.of_all_steps(p):
                self._rule.check_words([self._rule.words(host, texts) for texts in of_picture])

    def _check_windows(self, steps: Sequence[float] | set[float]) -> None:
        """Raises PortraitError if none of these steps lies in the window of somebody who is to be drawn."""
        assert self._rule is not None
        for i, person in enumerate(self._rule.people):
            if person.strength > 0:
                check_window(f"identities[{i}]", person.start, person.end, steps)

    def _check_seen(self, p: Any) -> None:
        state = shared.state
        if state.interrupted or state.skipped or state.stopping_generation:
            return
        if self._expected == 0:
            denoising = getattr(p, "denoising_strength", None)
            strength = "" if denoising is None else f", denoising strength {denoising:g}"
            problem = f"{p.sampler_name} drew no step, so nobody is in the picture (sampling steps {p.steps}{strength})"
            raise PortraitError("steps", problem, NO_STEPS_REMEDY)
        if self._seen + self._calls() < self._expected:
            raise PortraitError(
                "Portrait",
                f"of {self._expected} rows of the prompt only {self._seen + self._calls()} reached the UNet with the "
                "people in them",
                "Switch off extensions that replace sampling or the UNet, and generate again.",
                500,
            )
        self._check_windows(self._steps)
        assert self._rule is not None
        for i, person in enumerate(self._rule.people):
            if person.strength > 0 and i not in self._rule.drawn:
                raise PortraitError(
                    f"identities[{i}]",
                    "this person was added at no step, so the picture is without them",
                    "Let their window begin earlier and end later, or leave this person out.",
                )

    def _check_guided(self, p: Any) -> None:
        """Raises PortraitError where reference guidance never acted, or not on somebody it should have acted on; of
        single pictures in which it did not the comments tell."""
        state, guidance = shared.state, self._guidance
        stopped = state.interrupted or state.skipped or state.stopping_generation
        # Passes of ADetailer show one face each.
        if guidance is None or stopped or places.is_detail(p):
            return
        from lib_portrait.guidance.outcome import check_acted

        for notice in check_acted(guidance, p.batch_size):
            p.comment(f"Portrait: {Notice(self.said(notice.field), notice.text)}")

    def _calls(self) -> int:
        return self._injection.calls.get(POSITIVE, 0) if self._injection is not None else 0

    # ---- in the host's denoiser callback

    def denoise(self, params: Any) -> None:
        """Marks the rows of a denoiser step: kind and picture. Never raises: the host would swallow it."""
        if not self._sampling or self.failure is not None:
            return
        try:
            unet, denoiser = shared.sd_model.model.diffusion_model, params.denoiser
            if self._injection is None or self._injection.unet is not unet:
                # The refiner, or hires fix with a checkpoint of its own, has changed the model in mid-sampling.
                self._leave()
                self._enter(denoiser.p, unet)
            assert self._injection is not None and self._rule is not None
            self._rule.place = places.sampled(denoiser.p)
            if self._guidance is not None:
                self._guidance.place = self._rule.place
            self._latent = (params.x.shape[-2], params.x.shape[-1])
            self._injection.progress = min(denoiser.step / max(denoiser.total_steps or 1, 1), 1.0)
            self._steps.add(self._injection.progress)
            positive, negative = _rows(params)
            if self._rule.reads_words:
                positive = self._with_words(positive, denoiser)
            self._injection.rows = dict(enumerate([*positive, *negative]))
            params.text_cond = mark_conditions(params.text_cond, range(len(positive)))
            below = range(len(positive), len(positive) + len(negative))
            params.text_uncond = mark_conditions(params.text_uncond, below)
            self._expected += len(positive)
        except Exception as error:
            self.fail(_known(error, self.tabs, self.method))

    def _with_words(self, rows: list[Row], denoiser: Any) -> list[Row]:
        """The positive rows of a step, told where people's words stand in what each one's prompt says by now."""
        from lib_portrait.methods.base import with_words

        told: list[Row] = []
        assert self._rule is not None
        for of_picture in prompts.at_step(denoiser):
            key = tuple(of_picture)
            if key not in self._words:
                host = WebuiHost(shared.sd_model, (denoiser.p.width, denoiser.p.height))
                self._words[key] = with_words(self._rule, host, [Row(POSITIVE)] * len(key), key)
            told += [dataclasses.replace(row, picture=rows[len(told)].picture) for row in self._words[key]]
        return told


def resolved(request: PortraitRequest) -> PortraitRequest:
    """The request, with the adapter that *automatic* means for the loaded checkpoint, where its method has any."""
    if request.checkpoint == AUTOMATIC and request.declaration.has_adapter:
        return dataclasses.replace(request, checkpoint=checkpoint.Loaded.of(shared.sd_model).automatic(request.method))
    return request


def _show_progress(text: str) -> None:
    shared.state.textinfo = f"Portrait: {text}"


def _rows(params: Any) -> tuple[list[Row], list[Row]]:
    """The positive and the negative rows of a denoiser step. Raises PortraitError if the conditions have others.

    The host gives every picture a positive row for each of the prompts that its own is composed of (AND), in order, and
    one negative row. Which row is whose it tells the sampler alone.
    """
    composed = params.denoiser.sampler.sampler_extra_args["cond"].batch
    positive = [Row(POSITIVE, picture) for picture, prompts in enumerate(composed) for _ in prompts]
    negative = [Row(NEGATIVE, picture) for picture in range(len(composed))]
    for rows, cond in ((positive, params.text_cond), (negative, params.text_uncond)):
        found = (cond["crossattn"] if isinstance(cond, dict) else cond).shape[0]
        if found != len(rows):
            raise PortraitError(
                "rows",
                f"the prompts of this batch make {len(rows)} rows, but the conditions have {found}",
                "Switch off extensions that change the prompts while a picture is drawn.",
                500,
            )
    return positive, negative


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
        p = self._p()
        session: Session | None = getattr(p, _ATTRIBUTE, None)
        # What fails in a cell of a plot is drawn instead of its picture, which the host's own init prepares.
        if session is None or (self._name == "init" and jobs.is_cell(p)):
            return self.host()(*args, **kwargs)
        try:
            if self._name == "sample":
                with control.marks_dropped(p):
                    result = session.sample(p, self.host(), *args, **kwargs)
                jobs.sampled(p, session.number)
                return result
            session.check()
        except PortraitError as error:
            fault = refusal(_known(error, session.tabs, session.method), p)
            jobs.sampled(p, session.number, fault)
            if jobs.is_cell(p):
                return jobs.draw_fault(p, fault)
            # Where this installation is at fault, the traceback tells more than the words.
            raise fault from (error if fault.status_code >= 500 else None)
        return self.host()(*args, **kwargs)


def check_axis(p: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    """Raises PortraitError for what can be known of a plot before it starts: for each cell the values that an axis puts
    into the request, and once for all the photos. Says nothing where Portrait is switched off."""
    script = next(one for one in p.scripts.alwayson_scripts if one.title() == INFOTEXT_KEY)
    values = p.script_args[script.args_from : script.args_to]
    tabs: Sequence[int] = ()
    try:
        tabs, form = panel_values.read_form(values, settings.limits())
        if form is None:
            return
        for cell in cells:
            request = parse_request(axes.apply_overrides(form, cell, tabs), instances.limits())
            instances.conditioner().check(resolved(request))
    except PortraitError as error:
        raise refusal(_known(error, tabs, panel_values.method_of(values)), p) from None


def begin(p: Any, values: Sequence[Any]) -> None:
    """`before_process`: reads the request and sets the guards. Faults are kept, not raised."""
    forget(p)
    jobs.release_copy(p)
    request: PortraitRequest | None = None
    failure: Exception | None = None
    tabs: Sequence[int] = ()
    try:
        tabs, form = panel_values.read_form(values, settings.limits())
        if form is None:
            return
        form = axes.apply_overrides(form, getattr(p, axes.ATTRIBUTE, {}), tabs)
        request = parse_request(form, instances.limits())
    except Exception as error:
        failure = _known(error, tabs, panel_values.method_of(values))
    setattr(p, _ATTRIBUTE, Session(request, panel_values.method_of(values), tabs, failure))
    for name in ("init", "sample"):
        setattr(p, name, _Guard(p, name))


def prepare(p: Any) -> None:
    """`process`: the model is loaded by now. Computes the conditioning and writes the infotext. Faults are kept."""
    session = session_of(p)
    if session is None or session.failure is not None:
        return
    try:
        session.prepare(p)
        p.extra_generation_params[INFOTEXT_KEY] = session.infotext()
        session.tell(p, [*session.notices(), *adetailer.notices(p)])
    except Exception as error:
        session.fail(_known(error, session.tabs, session.method))


def denoise(params: Any) -> None:
    """`cfg_denoiser` callback, called for every generation of the host."""
    session = session_of(getattr(params.denoiser, "p", None))
    if session is not None:
        session.denoise(params)


def finish(p: Any, processed: Any) -> None:
    """`postprocess`: appends to the pictures what is shown of them, if asked for, and takes the guards off."""
    session = session_of(p)
    if session is None:
        return
    forget(p, keep_infotext=True)
    if (session.maps or session.guided) and session.request is not None:
        _add_pictures(p, processed, session)


def _add_pictures(p: Any, processed: Any, session: Session) -> None:
    """Draws the routing maps and where reference guidance acted, saves them beside the saved pictures if the settings
    say so, and appends them."""
    from lib_portrait.guidance_picture import draw_guidance
    from lib_portrait.routing_picture import Legend, draw_routing

    assert session.request is not None
    numbers = session.tabs or range(1, len(session.request.identities) + 1)
    legend = Legend([f"Identity {number}" for number in numbers], numbers, images.get_font)
    infotexts = processed.infotexts[processed.index_of_first_image :]
    shown = list(zip(places.pictures(p, processed), infotexts))
    # The host gives none to inpaint masks, which stand between the pictures; those of the maps must come after them.
    processed.infotexts += processed.infotexts[-1:] * (len(processed.images) - len(processed.infotexts))
    added = [
        (picture, infotext, draw_routing([picture], [own], session.place, legend)[0], MAP_SUFFIX)
        for (picture, infotext), own in _each_with_its(session.maps, shown, p.batch_size)
    ]
    added += [
        (picture, infotext, draw_guidance(picture, steps, legend, session.place), GUIDANCE_SUFFIX)
        for (picture, infotext), steps in _each_with_its(session.guided, shown, p.batch_size)
        if steps
    ]
    for picture, infotext, drawn, suffix in added:
        saved = getattr(picture, "already_saved_as", None)
        if saved and settings.saves_maps():
            file = Path(saved)
            images.save_image(
                drawn,
                str(file.parent),
                "",
                info=infotext,
                p=p,
                forced_filename=file.stem + suffix,
                save_to_dirs=False,
            )
        if places.shows_maps(p):
            processed.images.append(drawn)
            processed.infotexts.append(infotext)


def _each_with_its(records: Sequence[Any], shown: Sequence[Any], batch_size: int) -> list[tuple[Any, Any]]:
    """What is shown of all samplings in order, each with its own of what was kept of every picture of each sampling,
    where there is something."""
    found = []
    for number, one in enumerate(shown):
        sampling, place = divmod(number, batch_size)
        own = records[sampling] if sampling < len(records) else None
        if own is not None and place < len(own):
            found.append((one, own[place]))
    return found


def forget(p: Any, keep_infotext: bool = False) -> None:
    """Takes everything of ours off a processing object: scripts process one several times, or copy it."""
    p.__dict__.pop(_ATTRIBUTE, None)
    if not keep_infotext:
        for key in (INFOTEXT_KEY, NOTICES_KEY, jobs.FAULTS_KEY):
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


def _known(error: Exception, tabs: Sequence[int], method: Declaration) -> PortraitError:
    """The error if it is meant for users, as the panel says it; else one that says whose fault it is."""
    if isinstance(error, PortraitError):
        return panel_values.said_in_panel(error, tabs, method)
    errors.report("Portrait failed", exc_info=True)
    return PortraitError(
        "Portrait", f"it failed with {type(error).__name__}: {error}", "Please report the log above.", 500
    )
