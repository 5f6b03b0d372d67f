"""What the WebUI needs for the checkpoint of the embedded kit, models/world/world.safetensors.

It is a checkpoint like any other: it is copied with its .yaml into the WebUI's folder of checkpoints, or named with
--ckpt. It does not enter the list by itself, where it would come first when the user's own is not found. Only its text
encoder is special: it is smaller than CLIP ViT-L/14, and its sizes stand in this extension's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_portrait.checkpoints.kit import ALONE, Manifest, read_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.webui import services, settings

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

HOME = settings.EXTENSION / "models" / "world"
TEXT_FOLDER = HOME / "text"

WORLD, SD15 = "world", "SD1.5"
# The host's controls that a kit's default sampler settings go to, see `controls`.
CONTROLS = ("sampling", "scheduler", "steps", "width", "height", "cfg_scale")

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


def controls(manifest: Manifest | None = None) -> dict[str, Any]:
    """The values of `CONTROLS` that a kit was trained for and is measured with.

    manifest: the kit's, None for the embedded one's. Raises PortraitError where that cannot be read, and where the
    manifest tells none.
    """
    manifest = manifest or read_manifest(HOME / ALONE)
    if manifest.picture is None or manifest.sampling is None:
        raise PortraitError("checkpoint", f"the kit {manifest.name!r} tells no settings", "Choose them yourself.")
    width, height = manifest.picture
    sampling = manifest.sampling
    return dict(zip(CONTROLS, (sampling.sampler, "Automatic", sampling.steps, width, height, sampling.cfg)))


def automatic(model: Any) -> str:
    """The adapter that *automatic* means with a loaded checkpoint."""
    return adapter_for(is_world(model), file_of(model))


def adapter_for(of_world: bool, file: Path | None) -> str:
    """The adapter that *automatic* means. of_world: see `is_world`. file: the checkpoint's, None where not known."""
    text_encoder = read_manifest(HOME / ALONE).text_encoder if of_world else None
    return services.store().automatic(file, text_encoder)


def file_of(model: Any) -> Path | None:
    """The file of a loaded checkpoint, None where that is not known."""
    filename = getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
    return Path(filename) if filename is not None else None


def is_world(model: Any) -> bool:
    """Whether a loaded checkpoint is the world's."""
    encoder = getattr(model, "cond_stage_model", None)
    # The WebUI wraps it in a class of its own.
    return getattr(getattr(encoder, "wrapped", encoder), _MARK, False) is True


def loaded_family() -> str | None:
    """The family of the loaded checkpoint: WORLD, SD15 or another's name; None where none is loaded."""
    model = _loaded()
    if model is None:
        return None
    if is_world(model):
        return WORLD
    # modules/sd_models.py: set_model_type.
    families = {"is_sd1": SD15, "is_sd2": "SD2", "is_sdxl": "SDXL", "is_sd3": "SD3"}
    return next((name for mark, name in families.items() if getattr(model, mark, False)), type(model).__name__)


def loaded_file() -> Path | None:
    """The file of the loaded checkpoint, None where none is loaded."""
    return file_of(_loaded())


def _loaded() -> Any:
    """The loaded checkpoint or None. Waits for the one that the host loads when it starts, and has it load none."""
    from modules import sd_models

    with sd_models.model_data.lock:
        return sd_models.model_data.sd_model
