"""Weights: their files (`formats`), where they are published (`registry`), where they lie (`store`), how they get there
(`download`).

Importing this package imports no torch; the functions that read tensors import it when they are called.
"""

from lib_portrait.checkpoints.formats import Checkpoint, Description, convert, describe, read_tensors, write_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.registry import KNOWN, KnownWeight
from lib_portrait.checkpoints.store import Folders, Kit, KitStatus, Missing, Store

__all__ = [
    "KNOWN",
    "Checkpoint",
    "Description",
    "Folders",
    "Kit",
    "KitStatus",
    "KnownWeight",
    "Missing",
    "Store",
    "convert",
    "describe",
    "file_sha256",
    "read_tensors",
    "write_tensors",
]
