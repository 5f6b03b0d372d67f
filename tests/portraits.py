"""Pictures with one face each: drawn people, who travel with the project, and photos, which may stand beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "models" / "world" / "faces"
PHOTOS = Path(os.environ.get("PORTRAIT_FACES") or ROOT.parent / "shared" / "faces")
# Three people of the world whom MTCNN, which knows photos, is sure of at any size; to the small random networks of the
# WebUI tests the first two are far apart, so that rounding hides from no test who is where.
DRAWN = ("woman-0059-0.png", "man-0049-2.png", "woman-0039-1.png")
NAMES = ("newton.jpg", "synthetic-0100.png", "synthetic-0293.png", "synthetic-0381.png")


def portrait(name: str = DRAWN[0]) -> Path:
    """The picture's file; where it is a photo (NAMES) that is missing, the test is skipped."""
    file = (PHOTOS if name in NAMES else WORLD) / name
    if name in NAMES and not file.is_file():
        pytest.skip(f"{name} does not travel with the project: set PORTRAIT_FACES to the folder that holds it")
    return file
