"""The text encoder that a checkpoint's .yaml tells the sizes of, made with a stand-in for ldm's class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lib_portrait.checkpoints.text_encoder import SD1_TEXT, VOCABULARY_FILES
from lib_portrait.errors import PortraitError
from lib_portrait.webui import text_encoder, world

DESCRIPTION = Path(__file__).resolve().parents[2] / "models" / "world" / "world.yaml"


class Embedder:
    """What ldm's FrozenCLIPEmbedder reads of its folder."""

    def __init__(self, version: str):
        self.files = sorted(path.name for path in Path(version).iterdir())
        self.config = json.loads((Path(version) / "config.json").read_text("utf-8"))


@pytest.fixture(autouse=True)
def ldm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("ldm.modules.encoders.modules")
    module.FrozenCLIPEmbedder = Embedder
    monkeypatch.setitem(sys.modules, "ldm.modules.encoders.modules", module)


def test_it_has_the_sizes_of_the_yaml_and_clips_vocabulary() -> None:
    described = yaml.safe_load(DESCRIPTION.read_text("utf-8"))["model"]["params"]["cond_stage_config"]
    made: Any = text_encoder.text_encoder(**described["params"])
    assert made.config == {"model_type": "clip_text_model", **described["params"]}
    assert made.files == sorted([*VOCABULARY_FILES, "config.json"])
    assert described["target"] == f"{text_encoder.__name__}.text_encoder"


def test_what_a_yaml_of_before_names_is_of_the_same_sizes() -> None:
    described = yaml.safe_load(DESCRIPTION.read_text("utf-8"))["model"]["params"]["cond_stage_config"]
    former: Any = world.text_encoder()
    assert former.config == {"model_type": "clip_text_model", **described["params"]}


def test_sizes_that_are_none_and_a_missing_vocabulary_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PortraitError, match=r"no text encoder's sizes \(layers: 2\)"):
        text_encoder.text_encoder(layers=2)
    made: Any = text_encoder.text_encoder(hidden_size=96)
    assert made.config["num_hidden_layers"] == SD1_TEXT["num_hidden_layers"]
    monkeypatch.setattr(text_encoder, "VOCABULARY", tmp_path)
    with pytest.raises(PortraitError, match=r"cannot be read.*Install this extension again") as caught:
        text_encoder.text_encoder()
    assert caught.value.status_code == 500
