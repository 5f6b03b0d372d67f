"""What a freshly trained world can do: the evaluation at the end of `portrait.py train world`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image as PILImage

from lib_portrait.standalone.model import load_model
from trainer.evaluation.autoencoder import measure_autoencoder, open_autoencoder, through
from trainer.evaluation.instruments import open_recogniser
from trainer.evaluation.plans import ProtocolSettings
from trainer.evaluation.run import EvaluationSettings, evaluate

# How little is measured where it is only to be seen that it goes through.
FEW = ProtocolSettings(number=2, prompts=1, pictures=1)


def evaluate_world(kit: Path, output: Path, adapters: Sequence[str], device: str, brief: bool) -> None:
    """Identity and prompt of each adapter, for one person and for pairs, into OUTPUT: see `run.evaluate`; and what the
    autoencoder keeps.

    kit: the folder of the world's kit. adapters: their names in it. brief: two people and one prompt.
    """
    settings = EvaluationSettings(
        output,
        ("single",) if brief else ("single", "multi"),
        checkpoint=kit / "world.safetensors",
        adapters=tuple(adapters),
        kit=kit,
        device=device,
    )
    if brief:
        settings = EvaluationSettings(
            **{**vars(settings), "protocol_settings": FEW, "gallery": 2, "steps": 2, "processes": 1}
        )
    evaluate(settings)
    size = load_model(settings.checkpoint).size
    own = open_recogniser(kit / "world-measuring.safetensors", device)
    reconstruct = through(open_autoencoder(settings.checkpoint), device)
    kept, shown = measure_autoencoder(reconstruct, size, 3 if brief else 50, own)
    (output / "autoencoder.json").write_text(json.dumps(asdict(kept), indent=1) + "\n", "utf-8")
    PILImage.fromarray(shown).save(output / "autoencoder.png")
