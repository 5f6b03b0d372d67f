"""The networks that features come from, read from their files."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import FaceEncoder, PictureEncoder
from lib_portrait.faces.parsing import parser_from_state_dict
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.faces.vision import VisionTower, image_tower_from_state_dict, vision_from_state_dict
from lib_portrait.faces.weights import check_finite
from lib_portrait.standalone.model import load_model, load_tokenizer
from trainer.architectures import vae_like
from trainer.engines import Engine, LocalEngine, Step, ordered_map
from trainer.features import FrozenNetworks, LatentEncoder, precompute


@dataclass(frozen=True)
class NetworkFiles:
    """Where the networks lie that features come from, see `frozen_networks`."""

    checkpoint: Path | None = None
    vae: Path | None = None
    backbone: Path | None = None
    vision: Path | None = None
    image: Path | None = None
    parser: Path | None = None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def precompute_shards(
    paths: Sequence[Path],
    files: NetworkFiles,
    device: str,
    references: int = 0,
    batch: int = 32,
    engine: Engine | None = None,
) -> Counter[str]:
    """`features.precompute` by an engine: each process with networks of its own and every so-manieth shard, each of
    Ray's actors, which keep their networks, one shard after the other.

    Most of the work is to cut out and turn faces, which the processor does, also where a GPU computes the features.
    """
    engine = engine or LocalEngine()
    options: dict[str, Any] = {"device": device, "references": references, "batch": batch}
    # Anything that is wrong with the networks is told here, and once.
    if engine != LocalEngine(1) and len(paths) > 1:
        frozen_networks(files, "cpu", references)
    if isinstance(engine, LocalEngine):
        parts = [paths[place :: engine.processes] for place in range(min(engine.processes, len(paths)))]
        results = ordered_map(functools.partial(_precompute_part, files=files, **options), parts, len(parts))
    else:
        # Its workers may have begun in another folder.
        files = NetworkFiles(*(file and file.absolute() for file in vars(files).values()))
        work = Step(functools.partial(_precompute_one, files=files, **options), network=True)
        results = engine.map([work], [path.absolute() for path in paths])
    counts: Counter[str] = Counter()
    for one in results:
        counts.update(one)
    return counts


def _precompute_part(
    paths: Sequence[Path], files: NetworkFiles, device: str, references: int, batch: int
) -> dict[str, int]:
    return precompute(paths, frozen_networks(files, device, references), batch)


def _precompute_one(path: Path, files: NetworkFiles, device: str, references: int, batch: int) -> dict[str, int]:
    return precompute([path], _kept_networks(files, device, references), batch)


@functools.lru_cache(maxsize=1)
def _kept_networks(files: NetworkFiles, device: str, references: int) -> FrozenNetworks:
    """For workers that end with the command: elsewhere a file may hold other weights by the next call."""
    return frozen_networks(files, device, references)


def frozen_networks(files: NetworkFiles, device: str, references: int = 0) -> FrozenNetworks:
    """The VAE of a single-file model, or the recipe vae's own export; and, given both, the two networks of faces; and
    the whole image encoder, and the parser for the masks that its faces get.

    Raises PortraitError unless exactly one of checkpoint and vae, and both or none of backbone and vision are given.
    """
    if (files.checkpoint is None) == (files.vae is None):
        raise PortraitError("vae", "latents come from one VAE", "Give either --checkpoint or --vae.")
    if (files.backbone is None) != (files.vision is None):
        raise PortraitError(
            "vision", "features of faces come from two networks", "Give --backbone and --vision, or none."
        )
    if files.checkpoint is not None:
        network, source = load_model(files.checkpoint).vae, files.checkpoint
    else:
        assert files.vae is not None
        tensors = read_tensors(files.vae).tensors
        check_finite(tensors, files.vae.name)
        network, source = vae_like(tensors, files.vae.name), files.vae
        try:
            network.load_state_dict(tensors)
        except RuntimeError:
            raise PortraitError(
                "vae", f"{files.vae.name} does not hold the world's VAE", "Use the export of the recipe vae."
            ) from None
    hashes, faces = {"vae": file_sha256(source)}, None
    if files.backbone is not None and files.vision is not None:
        networks = _backbone(files.backbone), _vision(files.vision)
        hashes |= {"backbone": file_sha256(files.backbone), "vision": file_sha256(files.vision)}
        faces = FaceEncoder(lambda: networks, f"{hashes['backbone']}-{hashes['vision']}", torch.device(device))
    images = None
    if files.image is not None:
        file = read_tensors(files.image, "vision")
        tower = image_tower_from_state_dict(file.tensors, file.metadata, files.image.name)
        hashes["image"] = file_sha256(files.image)
        images = PictureEncoder(lambda: tower, hashes["image"], torch.device(device))
    parsed = None
    if files.parser is not None:
        if files.image is None:
            raise PortraitError("parser", "nothing here reads it", "Leave it away, or give --image.")
        hashes["parser"] = file_sha256(files.parser)
        parsed = parser_from_state_dict(read_tensors(files.parser, "parser").tensors, files.parser.name)
    encode = LatentEncoder(network, device)
    return FrozenNetworks(encode, load_tokenizer(), faces, hashes, references, images, parsed)


def _backbone(path: Path) -> Backbone:
    return backbone_from_state_dict(read_tensors(path, "backbone").tensors, path.name)


def _vision(path: Path) -> VisionTower:
    checkpoint = read_tensors(path, "vision")
    return vision_from_state_dict(checkpoint.tensors, checkpoint.metadata, path.name)
