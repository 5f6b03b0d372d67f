"""What the .yaml of a checkpoint names that people copied into their WebUI before such files told sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_portrait.checkpoints.text_encoder import FORMER_SIZES
from lib_portrait.webui import text_encoder as sized

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder


def text_encoder() -> FrozenCLIPEmbedder:
    """`text_encoder.text_encoder` of the sizes that such a .yaml means (`checkpoints.text_encoder.FORMER_SIZES`)."""
    return sized.text_encoder(**FORMER_SIZES)
