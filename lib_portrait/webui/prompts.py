"""What the prompts of a sampling say at each of its steps, as the host reads them: AND, prompt editing, hires fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from modules import prompt_parser, sd_samplers, shared

from lib_portrait.errors import PortraitError

# The texts of one prompt, each with the step that it ends at.
Schedule = Sequence[tuple[int, str]]


def at_step(denoiser: Any) -> list[list[tuple[str, int]]]:
    """Of each picture the texts that its prompt is composed of at the step that the denoiser (`CFGDenoiser`) is at, and
    the length of the context that the host has made of each.

    Raises PortraitError where the conditions are not those of the prompts.
    """
    composed = denoiser.sampler.sampler_extra_args["cond"].batch
    schedules = _schedules(denoiser.p)
    if [len(own) for own in schedules] != [len(own) for own in composed]:
        raise _changed()
    found = []
    for conditions, texts in zip(composed, schedules):
        own = []
        for condition, schedule in zip(conditions, texts):
            ends = [entry.end_at_step for entry in condition.schedules]
            if ends != [end for end, _ in schedule]:
                raise _changed()
            # As the host does: prompt_parser.reconstruct_multicond_batch.
            now = next((number for number, end in enumerate(ends) if denoiser.step <= end), 0)
            context = condition.schedules[now].cond
            own.append((schedule[now][1], len(context["crossattn"] if isinstance(context, dict) else context)))
        found.append(own)
    return found


def of_all_steps(p: Any) -> Iterator[list[list[str]]]:
    """Of each picture of `p.sample`'s first pass the texts that its prompt is composed of, at each part of it."""
    for texts in _schedules(p):
        ends = sorted({end for schedule in texts for end, _ in schedule})
        yield [[next(text for end, text in schedule if at <= end) for schedule in texts] for at in ends]


def _schedules(p: Any) -> list[list[Schedule]]:
    """Of each picture, of each part of its prompt between ANDs."""
    hires = getattr(p, "is_hr_pass", False)
    later = None
    if hires:
        steps = p.hr_second_pass_steps or p.steps
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        later = config.total_steps(steps) if config else steps
    prompts = tuple(p.hr_prompts if hires else p.prompts)
    return _parsed(prompts, p.firstpass_steps, later, shared.opts.use_old_scheduling)


@lru_cache(8)
def _parsed(prompts: tuple[str, ...], steps: int, later: int | None, old: bool) -> list[list[Schedule]]:
    indexes, flat, _ = prompt_parser.get_multicond_prompt_list(list(prompts))
    schedules = prompt_parser.get_learned_conditioning_prompt_schedules(flat, steps, later, old)
    return [[[tuple(part) for part in schedules[index]] for index, _ in own] for own in indexes]


def _changed() -> PortraitError:
    return PortraitError(
        "prompt",
        "what is drawn is not what the prompts say, so it is not known where people's words are",
        "Switch off extensions that change the prompts or their conditions.",
        500,
    )
