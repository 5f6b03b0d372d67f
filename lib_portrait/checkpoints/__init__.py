"""Weights: their files (`formats`), what methods call them (`files`), what is published (`registry`), where they lie
(`store`, `found`), how they get there (`download`).

Importing this package imports no torch; the functions that read tensors import it when they are called.
"""

from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles, KnownWeight, Member
from lib_portrait.checkpoints.formats import Checkpoint, Description, convert, describe, read_tensors, write_tensors
from lib_portrait.checkpoints.found import Folders, Kit, KitStatus, Missing
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.registry import Registry
from lib_portrait.checkpoints.store import Store

__all__ = [
    "AdapterFile",
    "AdapterFiles",
    "Checkpoint",
    "Description",
    "Folders",
    "Kit",
    "KitStatus",
    "KnownWeight",
    "Member",
    "Missing",
    "Registry",
    "Store",
    "convert",
    "describe",
    "file_sha256",
    "read_tensors",
    "write_tensors",
]
