"""Where on the finished picture the host samples.

Regions, masks and routing maps lie on the finished picture. That is `p.width` x `p.height`, but for two ways of
generating: inpainting of the masked area only, where the sampled crop is pasted into the whole init image, and hires
fix to another shape, whose second pass cuts off a part of the first. Some scripts draw pieces of a larger picture
without telling which.
"""

from __future__ import annotations

from typing import Any

import torch
from modules import processing, shared
from PIL import Image, ImageOps

from lib_portrait.attention.regions import WHOLE, Box
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.options import SHOW
from lib_portrait.request import PortraitRequest
from lib_portrait.webui import jobs

# The host's scripts that process pieces of a picture, which p does not place in it.
PIECEMEAL = ("sd upscale", "outpainting mk2", "poor man's outpainting")
# The one that hands on all pictures it gets; the others take the first, or make one picture out of all.
HANDING_ON = ("prompts from file or textbox",)
LATENT = processing.opt_f


def picture_size(p: Any) -> tuple[int, int]:
    """Width and height of the finished picture, or numbers of that proportion, before the host's `p.init`."""
    if _masked_only(p):
        return p.init_images[0].size
    if getattr(p, "enable_hr", False) and p.hr_resize_x and p.hr_resize_y:
        return p.hr_resize_x, p.hr_resize_y
    return p.width, p.height


def _masked_only(p: Any) -> bool:
    """Whether the host is going to crop to the inpaint mask; it does not if that is blank."""
    mask = getattr(p, "image_mask", None)
    if mask is None or not p.inpaint_full_res:
        return False
    mask = processing.create_binary_mask(mask, round=p.mask_round)
    return (ImageOps.invert(mask) if p.inpainting_mask_invert else mask).getbbox() is not None


def sampled(p: Any) -> Box:
    """The part of the finished picture that is being sampled, after the host's `p.init`."""
    if getattr(p, "image_mask", None) is not None and p.inpaint_full_res and p.paste_to is not None:
        return _crop(p.paste_to, p.init_images[0].size, (p.width, p.height))
    if getattr(p, "enable_hr", False) and not p.is_hr_pass:
        left, right = _uncut(p.hr_upscale_to_x // LATENT, p.truncate_x)
        top, bottom = _uncut(p.hr_upscale_to_y // LATENT, p.truncate_y)
        return left, top, right, bottom
    return WHOLE


def _crop(paste_to: tuple[int, int, int, int], picture: tuple[int, int], size: tuple[int, int]) -> Box:
    """The part of a picture that a crop of it, (left, top, width, height), resized with filling, shows in `size`."""
    # The host's images.resize_image(2, ...): as large as fits, in the middle, what is left filled up from the edges.
    across, down = size[0] * paste_to[3], size[1] * paste_to[2]
    inner = (
        size[0] if across < down else paste_to[2] * size[1] // paste_to[3],
        size[1] if across >= down else paste_to[3] * size[0] // paste_to[2],
    )
    box = []
    for axis in (0, 1):
        pixel = paste_to[2 + axis] / inner[axis]
        begin = paste_to[axis] - (size[axis] // 2 - inner[axis] // 2) * pixel
        box.append((begin / picture[axis], (begin + size[axis] * pixel) / picture[axis]))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def _uncut(length: int, cut: int) -> tuple[float, float]:
    """From where to where `length` positions reach, in units of what is left when `cut` of them are cut off evenly."""
    begin = -(cut // 2)
    return begin / (length - cut), (begin + length) / (length - cut)


def painted(p: Any) -> torch.Tensor:
    """How much of each position of what is sampled goes into the picture, (h, w) in [0, 1], after `p.init`."""
    mask = getattr(p, "nmask", None)
    if mask is None:
        return torch.ones(p.height // LATENT, p.width // LATENT)
    return mask[0].float().cpu()


def is_detail(p: Any) -> bool:
    """Whether this is a pass of ADetailer, which repaints one face after the other: not everybody is in each."""
    return bool(getattr(p, "_ad_inner", False))


def script_title(p: Any) -> str:
    """The title of the script that was chosen below the panels, or ""."""
    script = jobs.chosen_script(p)
    return str(script.title()) if script is not None else ""


def check_script(p: Any, request: PortraitRequest) -> None:
    """Raises PortraitError for regions together with a script under which they would lie elsewhere."""
    title = script_title(p)
    field = next((f"identities[{i}].region" for i, one in enumerate(request.identities) if one.region is not None), "")
    field = field or ("layout" if request.layout is not None else "")
    if field and title.lower() in PIECEMEAL:
        raise PortraitError(
            field,
            f"the script {title} draws the picture in pieces and does not tell where they lie",
            "Leave the regions out, so that routing places the people in each piece, or do without the script.",
        )


def shows_maps(p: Any) -> bool:
    """Whether a routing map appended to the results would be shown, and not be taken for a picture by a script."""
    return script_title(p).lower() in ("", *HANDING_ON)


def pictures(p: Any, processed: Any) -> list[Image.Image]:
    """The finished pictures among the results, which may begin with a grid and hold each one's inpaint mask."""
    masked = getattr(p, "mask_for_overlay", None) is not None
    each = 1 + masked * (bool(shared.opts.return_mask) + bool(shared.opts.return_mask_composite))
    return processed.images[processed.index_of_first_image :: each][: len(processed.all_prompts)]


def notices(p: Any, request: PortraitRequest) -> list[Notice]:
    if shows_maps(p):
        return []
    wanted = []
    if request.shows_maps:
        wanted.append((request.declaration.maps, "routing maps"))
    if request.guidance.options.get(SHOW.name):
        wanted.append((f"guidance.{SHOW.name}", "pictures of reference guidance"))
    return [
        Notice(field, f"the script {script_title(p)} has no place for {what}, so none is shown")
        for field, what in wanted
    ]
