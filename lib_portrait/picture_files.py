"""Picture files by their names alone; standard library only."""

from __future__ import annotations

import glob
import os

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heif", ".heic"))


def picture_files(text: str) -> list[str]:
    """The file of this name, or the pictures of the folder, or pattern (``*.jpg``), of this name, sorted.

    Nothing where there is no such thing. Hidden files are none: file systems keep their own notes in them.
    """
    # Not Path.is_file, which raises OSError for a text too long to be a name.
    if os.path.isfile(text):
        return [text]
    found = [os.path.join(text, name) for name in os.listdir(text)] if os.path.isdir(text) else glob.glob(text)
    return sorted(path for path in found if is_picture(path) and os.path.isfile(path))


def is_picture(path: str) -> bool:
    """Whether the name is one that pictures have."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
