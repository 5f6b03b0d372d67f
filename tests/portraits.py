"""Pictures with one real face each, which do not travel with the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("PORTRAIT_FACES") or Path(__file__).resolve().parents[2] / "shared" / "faces")
NAMES = ("newton.jpg", "synthetic-0100.png", "synthetic-0293.png", "synthetic-0381.png")


def portrait(name: str = NAMES[1]) -> Path:
    """The picture's file; the test is skipped where it is missing."""
    file = FOLDER / name
    if not file.is_file():
        pytest.skip(f"set PORTRAIT_FACES to the folder that holds {name} to run this test")
    return file
