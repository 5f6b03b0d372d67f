"""What the host is going to do with a processing object: the steps of its samplings, and checkpoints it switches to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules import sd_models, sd_samplers
from modules.processing import StableDiffusionProcessingImg2Img
from modules.sd_samplers_common import setup_img2img_steps

from lib_portrait.errors import PortraitError

# How often these call the UNet their numbers do not say.
UNCOUNTED_SAMPLERS = ("DPM adaptive", "Restart")
_TEXT_KEYS = r"model\.diffusion_model\..*\.attn2\.(to_\w+)\.weight"


def steps(p: Any) -> list[float]:
    """Where the steps of `p.sample` may lie, each as the share of its sampling; none where that is not known before."""
    passes = []
    if isinstance(p, StableDiffusionProcessingImg2Img):
        # The host counts as many steps as this, and one less for the samplers without sigmas.
        passes.append((p.sampler_name, setup_img2img_steps(p)[1] + 1))
    else:
        passes.append((p.sampler_name, p.steps))
    if getattr(p, "enable_hr", False):
        passes.append((p.hr_sampler_name or p.sampler_name, p.hr_second_pass_steps or p.steps))
    found = []
    for name, steps in passes:
        config = sd_samplers.find_sampler_config(name)
        if config is None or config.name in UNCOUNTED_SAMPLERS:
            return []
        total = config.total_steps(steps)
        found += [step / total for step in range(total)]
    return found


def checkpoints(p: Any) -> list[tuple[str, str]]:
    """What the host will switch to in mid-sampling: the field's name in the page, and the checkpoint's."""
    found = []
    # As the host does: process_images_inner in modules/processing.py.
    if p.refiner_checkpoint not in (None, "", "None", "none") and (p.refiner_switch_at or 0.0) < 1.0:
        found.append(("refiner", p.refiner_checkpoint))
    if getattr(p, "enable_hr", False) and getattr(p, "hr_checkpoint_name", None):
        found.append(("hires checkpoint", p.hr_checkpoint_name))
    return found


def check_checkpoint(wanted: Mapping[str, Sequence[tuple[int, int]]], role: str, name: str) -> None:
    """Raises PortraitError if the text attentions in this checkpoint's file are not those that the adapter is for.

    wanted: as `Method.text_attentions` gives them. Looks into the header of safetensors files only; others are found
    out when they are loaded.
    """
    from lib_portrait.checkpoints.formats import read_header

    info = sd_models.get_closet_checkpoint_match(name)
    path = Path(info.filename) if info is not None else None
    if path is None or path.suffix.lower() != ".safetensors":
        return
    found: dict[str, list[tuple[int, ...]]] = {}
    for key, (_, shape) in read_header(path)[0].items():
        if (match := re.fullmatch(_TEXT_KEYS, key)) is not None:
            found.setdefault(match[1], []).append(tuple(shape))
    for projection, shapes in wanted.items():
        theirs, ours = sorted(found.get(projection, [])), sorted(shapes)
        if theirs and theirs != ours:
            what = "contexts" if projection == "to_k" else "hidden states"
            raise PortraitError(
                role,
                f"{path.name} is another kind of model than the adapter is made for: it has {len(theirs)} text "
                f"attentions with {what} of width {theirs[0][1]}, the adapter {len(ours)} with {ours[0][1]}",
                f"Choose a {role} of the same family as the main checkpoint, or none.",
            )
