"""How a checkpoint's .yaml tells a text encoder that is smaller than Stable Diffusion 1's, and CLIP's vocabulary.

ldm makes what the .yaml names, with what it has under ``params``: so the WebUI calls `TARGET` with the encoder's sizes,
under the names that transformers' CLIPTextConfig has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError

VOCABULARY = Path(__file__).resolve().parents[2] / "models" / "text"
"""The folder with the files of CLIP's tokenizer, which all these text encoders share."""
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")

TARGET = "lib_portrait.webui.text_encoder.text_encoder"
FORMER_TARGET = "lib_portrait.webui.world.text_encoder"
"""What a .yaml names that was written before they told sizes: always those of `FORMER_SIZES`."""

SD1_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
"""The text transformer of CLIP ViT-L/14, as transformers' CLIPTextConfig."""

FORMER_SIZES: dict[str, Any] = {
    **SD1_TEXT,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}

LARGEST = 2**17
ACTIVATIONS = ("quick_gelu", "gelu")


def text_sizes(params: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A text encoder's sizes from the ``params`` of `TARGET`; what they leave unsaid is as in Stable Diffusion 1.

    Raises PortraitError naming `field` for what is no size of a text encoder.
    """
    for name, value in params.items():
        known = value in ACTIVATIONS if name == "hidden_act" else type(value) is int and 1 <= value <= LARGEST
        if name not in SD1_TEXT or not known:
            shown = f"{str(name)[:40]}: {str(value)[:40]}"
            raise PortraitError(
                field, f"its .yaml tells no text encoder's sizes ({shown})", "Use the .yaml that belongs to the file."
            )
    return {**SD1_TEXT, **params}
