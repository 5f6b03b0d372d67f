"""The checkpoint that the WebUI has loaded: of which family it is, and which kit was made on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_portrait.checkpoints.kit import Manifest, TextEncoder
from lib_portrait.webui import instances

SD15 = "SD1.5"
# The host's controls that a kit's default sampler settings go to, see `controls`.
CONTROLS = ("sampling", "scheduler", "steps", "width", "height", "cfg_scale")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as far as it is known here.

    family: SD15 or another's name, None where no checkpoint is loaded. file: its own. text_encoder: its sizes.
    """

    family: str | None = None
    file: Path | None = None
    text_encoder: TextEncoder | None = None

    @staticmethod
    def of(model: Any) -> Loaded:
        """What is known of one of the host's models, or of None."""
        if model is None:
            return Loaded()
        # modules/sd_models.py: set_model_type.
        families = {"is_sd1": SD15, "is_sd2": "SD2", "is_sdxl": "SDXL", "is_sd3": "SD3"}
        family = next((name for mark, name in families.items() if getattr(model, mark, False)), type(model).__name__)
        filename = getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
        return Loaded(family, Path(filename) if filename is not None else None, _text_encoder(model))

    def automatic(self, method: str | None = None) -> str:
        """The adapter of a method (None: the first) that *automatic* means with it. Raises PortraitError as
        `Store.automatic` does."""
        return instances.store().automatic(self.file, self.text_encoder, method)

    def manifest(self) -> Manifest | None:
        """The kit that was made on this very file and tells settings for it, or None."""
        manifest = instances.store().trained_on(self.file) if self.file is not None else None
        return manifest if manifest is not None and manifest.picture and manifest.sampling else None


def loaded() -> Loaded:
    """The loaded checkpoint. Waits for the one that the host loads when it starts, and has it load none."""
    from modules import sd_models

    with sd_models.model_data.lock:
        return Loaded.of(sd_models.model_data.sd_model)


def controls(manifest: Manifest) -> dict[str, Any]:
    """The values of `CONTROLS` that a kit was trained for and is measured with. manifest: of `Loaded.manifest`."""
    assert manifest.picture is not None and manifest.sampling is not None
    width, height = manifest.picture
    sampling = manifest.sampling
    return dict(zip(CONTROLS, (sampling.sampler, "Automatic", sampling.steps, width, height, sampling.cfg)))


def _text_encoder(model: Any) -> TextEncoder | None:
    encoder = getattr(model, "cond_stage_model", None)
    # The WebUI wraps it in a class of its own.
    transformer = getattr(getattr(encoder, "wrapped", encoder), "transformer", None)
    config = getattr(transformer, "config", None)
    names = TextEncoder.__dataclass_fields__
    return TextEncoder(**{name: getattr(config, name) for name in names}) if hasattr(config, "hidden_size") else None
