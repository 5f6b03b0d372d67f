"""What the WebUI needs for the checkpoint of the embedded world, models/world/world.safetensors.

It is a checkpoint like any other: it is copied with its .yaml into the WebUI's folder of checkpoints, or named with
--ckpt. It does not enter the list by itself, where it would come first when the user's own is not found. Only its text
encoder is special: it is smaller than CLIP ViT-L/14, and its sizes stand in this extension's folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_portrait.errors import PortraitError
from lib_portrait.webui import settings

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

TEXT_FOLDER = settings.EXTENSION / "models" / "world" / "text"

WORLD, SD15 = "world", "SD1.5"
# What it was trained for and is measured with; the names are those of the host's controls.
SETTINGS: dict[str, Any] = {
    "sampling": "DDIM",
    "scheduler": "Automatic",
    "steps": 20,
    "width": 128,
    "height": 128,
    "cfg_scale": 5,
}

_MARK = "portrait_world"


def text_encoder() -> FrozenCLIPEmbedder:
    """What world.yaml names as its text encoder: ldm's own class, which is the one the WebUI knows how to take over.

    Raises PortraitError (500) when models/world/text is not there.
    """
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    if not (TEXT_FOLDER / "config.json").is_file():
        remedy = "Install this extension again, with its folder models/world."
        raise PortraitError("checkpoint", f"{TEXT_FOLDER} is not there", remedy, 500)
    encoder = FrozenCLIPEmbedder(version=str(TEXT_FOLDER))
    setattr(encoder, _MARK, True)
    return encoder


def is_world(model: Any) -> bool:
    """Whether a loaded checkpoint is the world's."""
    encoder = getattr(model, "cond_stage_model", None)
    # The WebUI wraps it in a class of its own.
    return getattr(getattr(encoder, "wrapped", encoder), _MARK, False) is True


def loaded_family() -> str | None:
    """The family of the loaded checkpoint: WORLD, SD15 or another's name; None where none is loaded.

    Waits for the one that the host loads when it starts, and has it load none.
    """
    from modules import sd_models

    with sd_models.model_data.lock:
        model = sd_models.model_data.sd_model
    if model is None:
        return None
    if is_world(model):
        return WORLD
    # modules/sd_models.py: set_model_type.
    families = {"is_sd1": SD15, "is_sd2": "SD2", "is_sdxl": "SDXL", "is_sd3": "SD3"}
    return next((name for mark, name in families.items() if getattr(model, mark, False)), type(model).__name__)
