"""Faces: from the bytes of a photo to the features that a method's identity embedding reads.

`FaceService` is the door: it decodes, finds, aligns, encodes and caches. What it is made of, in the order a photo
passes through: `images`, `detection`, `alignment`, `recognition` and `vision`, `features`; `cache` beside them.
Importing this package costs nothing; the names below bring in torch and OpenCV when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_portrait.faces.service import FaceService, FoundFace

__all__ = ["FaceService", "FoundFace"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lib_portrait.faces import service

        return getattr(service, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
