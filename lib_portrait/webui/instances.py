"""What lives as long as the WebUI's process: faces, weights and their caches, made when first asked for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from lib_portrait.checkpoints.store import Store
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.request import Limits, Photo
from lib_portrait.webui import settings

if TYPE_CHECKING:
    from lib_portrait.conditioning import Conditioner
    from lib_portrait.faces import FaceService

_lock = threading.RLock()
_made: dict[str, tuple[Any, Any]] = {}


def _one(name: str, depends_on: Any, make: Any) -> Any:
    """The single object called `name`, made anew when the settings it depends on have changed."""
    with _lock:
        if name not in _made or _made[name][0] != depends_on:
            _made[name] = (depends_on, make())
        return _made[name][1]


def limits() -> Limits:
    """How much one request may ask for, from the settings page."""
    return settings.limits()


def store() -> Store:
    """The weight files of this machine."""
    folders = settings.folders()
    key = (tuple(folders.own), tuple((role, tuple(paths)) for role, paths in sorted(folders.shared.items())))
    return _one("store", key, lambda: Store(folders, adapter_files(), settings.cache_dir()))


def faces() -> FaceService:
    """The face service, with the detector of the settings page."""

    def make() -> FaceService:
        from lib_portrait.faces import FaceService

        weights = store()
        return FaceService(weights.folders("detector"), *chosen, parser=lambda: weights.published("parser"))

    chosen = (
        settings.cache_dir(),
        limits(),
        settings.detector(),
        settings.cache_bytes(),
        settings.filter_crops(),
    )
    key = (*chosen, store())
    return _one("faces", key, make)


def conditioner() -> Conditioner:
    """What makes requests ready."""

    def make() -> Conditioner:
        from lib_portrait.conditioning import Conditioner

        return Conditioner(faces(), store())

    return _one("conditioner", (faces(), store()), make)


def remember(data: bytes) -> str:
    """Keeps a photo's bytes for later requests that name it by hash; gives the hash."""
    return faces().photos.put(data) if data else Photo.of(data).sha256


def named(photo: Photo) -> Photo:
    """The photo by its whole hash where it is kept; else as it is, for whoever uses it to say so."""
    try:
        return faces().named(photo, "photo")
    except PortraitError:
        return photo


def drop_caches() -> None:
    """Forgets photos, features and loaded weights, in memory and on disk."""
    from lib_portrait.guidance.reference import forget

    forget()
    with _lock:
        if "faces" in _made:
            _made["faces"][1].drop()
        else:
            faces().drop()
        _made.clear()
