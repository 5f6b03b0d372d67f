"""From prompts, people and seeds to pictures: classifier-free guidance with the people injected, as in the WebUI."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, RoutingMaps, Row, control_sites, find_sites, mark
from lib_portrait.attention.windows import check_window
from lib_portrait.conditioning import Conditioning
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.outcome import check_acted
from lib_portrait.guidance.reference import GuidedStep, ReferenceGuidance
from lib_portrait.methods.base import Rule, with_words
from lib_portrait.standalone.control import Control
from lib_portrait.standalone.host import DiffusersHost, as_pixels, encode_prompts
from lib_portrait.standalone.model import Model

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
LARGEST_SIDE = 4096
DECODED_AT_ONCE = 4


@dataclass(frozen=True)
class Sampling:
    """One picture to make. width, height: pixels, multiples of 8. guidance: of the text, 1 is none."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    guidance: float = 5.0
    seed: int = 0
    sampler: str = "ddim"


@torch.no_grad()
def sample(
    model: Model,
    samplings: Sequence[Sampling],
    conditioning: Conditioning | None = None,
    routing: RoutingMaps | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
    guided: Callable[[Sequence[GuidedStep], Sequence[Notice]], None] = lambda steps, notices: None,
    control: Control | None = None,
    must_act: bool = True,
) -> list[np.ndarray]:
    """The pictures, (height, width, 3) uint8 RGB, made as one batch with the same people in each.

    Size, steps and sampler must be the same for all; a row's noise depends on its seed alone. routing collects where
    the people went in each picture. on_step: told after every step how many of how many are done. guided: told what
    reference guidance did, and what the user should know of that. control: a ControlNet, whose picture has the people's
    circles where it was trained with their adapter. must_act: whether it is an error where reference guidance found
    somebody in none of the pictures; what it did is told in any case.
    Raises PortraitError for samplings that cannot be made, when the people do not fit the model, when it answers with
    infinities or NaN, and where reference guidance was asked for and did not act, see `check_acted`.
    """
    check(samplings)
    first = samplings[0]
    for i, person in enumerate(conditioning.people if conditioning is not None else ()):
        if person.strength > 0:
            steps = [step / first.steps for step in range(first.steps)]
            check_window(f"identities[{i}]", person.start, person.end, steps)
    # Guidance of 1 is the prediction with the prompt; the other half of the batch would not be looked at.
    two_halves = any(one.guidance != 1 for one in samplings)
    kinds = {POSITIVE: [one.prompt for one in samplings]}
    if two_halves:
        kinds = {NEGATIVE: [one.negative_prompt for one in samplings], **kinds}
    contexts = {kind: encode_prompts(model, prompts) for kind, prompts in kinds.items()}
    for context in contexts.values():
        _check_finite(context, "the text encoder", "of the prompt")
    rows = [Row(kind, picture) for kind in kinds for picture in range(len(samplings))]
    rule = conditioning.rule(routing) if conditioning is not None else None
    if rule is not None and rule.reads_words:
        rows[-len(samplings) :] = _rows_with_words(rule, DiffusersHost(model), kinds[POSITIVE])
    context = torch.cat(list(contexts.values()))
    if conditioning is not None:
        context = mark(context, range(len(rows)))
    cfg = torch.tensor([one.guidance for one in samplings], device=model.device)[:, None, None, None]

    scheduler_class, options = SAMPLERS[first.sampler]
    scheduler = scheduler_class(**model.schedule, steps_offset=1, **options)
    scheduler.set_timesteps(first.steps, device=model.device)
    latents = _noise(model, samplings) * scheduler.init_noise_sigma
    with _injected(model, conditioning, rule, rows, control) as (injections, guidance):
        for step, t in enumerate(scheduler.timesteps):
            for injection in injections:
                injection.progress = step / first.steps
            x = scheduler.scale_model_input(latents, t).repeat(len(kinds), 1, 1, 1).to(model.unet.dtype)
            added = control(x, t, context) if control is not None else {}
            predicted = model.unet(x, t, context, **added).sample.float()
            if two_halves:
                eps_uncond, eps_cond = predicted.chunk(2)
                predicted = eps_uncond + cfg * (eps_cond - eps_uncond)
            latents = scheduler.step(predicted, t, latents).prev_sample
            _check_finite(latents, "the UNet", f"at step {step + 1} of {first.steps}")
            on_step(step + 1, first.steps)
    if guidance is not None:
        guided(guidance.record, check_acted(guidance, len(samplings), must_act))
    return _decode(model, latents)


def check(samplings: Sequence[Sampling]) -> None:
    """Raises PortraitError for samplings that cannot be made, or not in one batch."""
    if not samplings:
        raise PortraitError("prompt", "there is nothing to draw", "Give at least one prompt.")
    first = samplings[0]
    if first.sampler not in SAMPLERS:
        raise PortraitError("sampler", f"{first.sampler!r} is not a sampler", f"Use one of: {', '.join(SAMPLERS)}.")
    if not 1 <= first.steps <= 1000:
        raise PortraitError("steps", f"{first.steps} is out of range", "Give a whole number from 1 to 1000.")
    for side in (first.width, first.height):
        if side % 8 or not 64 <= side <= LARGEST_SIDE:
            raise PortraitError(
                "size",
                f"{first.width}x{first.height} is not possible",
                f"Give multiples of 8 from 64 to {LARGEST_SIDE}, such as 512x512.",
            )
    common = {(one.width, one.height, one.steps, one.sampler) for one in samplings}
    if len(common) > 1:
        raise PortraitError("samplings", f"one batch cannot have {sorted(common)}", "Draw them one after the other.")
    for one in samplings:
        if not 0 <= one.guidance <= 100:
            raise PortraitError("cfg", f"{one.guidance} is out of range", "Give a number from 0 to 100.")
        if not 0 <= one.seed < 2**63:
            raise PortraitError("seed", f"{one.seed} is out of range", "Give a whole number from 0 to 2^63 - 1.")


def _noise(model: Model, samplings: Sequence[Sampling]) -> Tensor:
    """The starting noise (B, 4, h, w), drawn on the CPU, so that a seed means the same on every device."""
    first = samplings[0]
    shape = (model.unet.config.in_channels, first.height // 8, first.width // 8)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(one.seed)) for one in samplings]
    return torch.stack(rows).to(model.device)


@contextlib.contextmanager
def _injected(
    model: Model,
    conditioning: Conditioning | None,
    rule: Rule[Any] | None,
    rows: Sequence[Row],
    control: Control | None,
) -> Iterator[tuple[list[Injection], ReferenceGuidance | None]]:
    """The people in the UNet while this lasts, and in a ControlNet that knows them, and what guides it; nothing where
    there are none, None where nothing does."""
    if conditioning is None or rule is None:
        yield [], None
        return
    conditioning.check_fits(find_sites(model.unet))
    guidance = conditioning.guidance(rule)
    host = DiffusersHost(model)
    if guidance is not None:
        guidance.begin()
    rule.prepare(host)
    if guidance is not None:
        guidance.prepare(host)
    table = dict(enumerate(rows))
    injections = [Injection(model.unet, rule, rows=table, guidance=guidance)]
    if control is not None:
        # A ControlNet that was not trained with the adapter sees the text alone; the marks are taken off all the same.
        knows = rule.in_control and control.trained
        sites = control_sites(control.network, model.unet)
        injections.append(Injection(control.network, *([rule] if knows else []), rows=table, sites=sites))
    with contextlib.ExitStack() as stack:
        for injection in injections:
            stack.enter_context(injection)
        yield injections, guidance


def _rows_with_words(rule: Rule[Any], host: DiffusersHost, prompts: Sequence[str]) -> list[Row]:
    """The positive rows of these prompts. Raises PortraitError where one does not name somebody who is drawn there."""
    rows = []
    for picture, prompt in enumerate(prompts):
        rule.check_words([rule.words(host, [prompt])])
        rows += with_words(rule, host, [Row(POSITIVE, picture)], [(prompt, len(host.emphasis(prompt)))])
    return rows


def _check_finite(values: Tensor, network: str, where: str) -> None:
    """Raises PortraitError (500) for infinities and NaN, which would become a black picture."""
    if not bool(values.isfinite().all()):
        raise PortraitError(
            "model",
            f"{network} gives infinite or undefined numbers {where}",
            "Use another checkpoint or adapter, or lower the guidance and the people's scales.",
            500,
        )


def _decode(model: Model, latents: Tensor) -> list[np.ndarray]:
    scaled = latents / model.vae.config.scaling_factor
    # A few at a time: at full size the decoder takes more memory than the UNet.
    decoded = torch.cat([model.vae.decode(part).sample for part in scaled.split(DECODED_AT_ONCE)])
    _check_finite(decoded, "the VAE", "of the finished picture")
    return as_pixels(decoded)
