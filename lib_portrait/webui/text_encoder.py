"""The text encoder of a checkpoint whose .yaml tells its sizes (see `checkpoints.text_encoder`).

Such a checkpoint is like any other: it is copied with its .yaml into the WebUI's folder of checkpoints, or named with
--ckpt.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lib_portrait.checkpoints.text_encoder import VOCABULARY, VOCABULARY_FILES, text_sizes
from lib_portrait.errors import PortraitError

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder


def text_encoder(**sizes: Any) -> FrozenCLIPEmbedder:
    """What a .yaml names: ldm's own class, which is the one the WebUI knows how to take over.

    sizes: see `text_sizes`. Raises PortraitError: sizes that are none, CLIP's vocabulary is not there (500).
    """
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    config = {"model_type": "clip_text_model", **text_sizes(sizes, "checkpoint")}
    with TemporaryDirectory() as folder:
        try:
            for name in VOCABULARY_FILES:
                shutil.copyfile(VOCABULARY / name, Path(folder) / name)
        except OSError as error:
            problem = f"{VOCABULARY} cannot be read ({error.strerror})"
            raise PortraitError("checkpoint", problem, "Install this extension again.", 500) from None
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        # It reads the folder and does not come back to it.
        return FrozenCLIPEmbedder(version=folder)
