"""The networks that features come from, read from their files."""

from __future__ import annotations

from pathlib import Path

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
from trainer.architectures import world_vae
from trainer.features import FrozenNetworks, LatentEncoder


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def frozen_networks(
    checkpoint: Path | None,
    vae: Path | None,
    backbone: Path | None,
    vision: Path | None,
    device: str,
    references: int = 0,
    image: Path | None = None,
    parser: Path | None = None,
) -> FrozenNetworks:
    """The VAE of a single-file model, or the recipe vae's own export; and, given both, the two networks of faces; and
    the whole image encoder, and the parser for the masks that its faces get.

    Raises PortraitError unless exactly one of checkpoint and vae, and both or none of backbone and vision are given.
    """
    if (checkpoint is None) == (vae is None):
        raise PortraitError("vae", "latents come from one VAE", "Give either --checkpoint or --vae.")
    if (backbone is None) != (vision is None):
        raise PortraitError(
            "vision", "features of faces come from two networks", "Give --backbone and --vision, or none."
        )
    if checkpoint is not None:
        network, source = load_model(checkpoint).vae, checkpoint
    else:
        assert vae is not None
        network, source = world_vae(), vae
        tensors = read_tensors(vae).tensors
        check_finite(tensors, vae.name)
        try:
            network.load_state_dict(tensors)
        except RuntimeError:
            raise PortraitError(
                "vae", f"{vae.name} does not hold the world's VAE", "Use the export of the recipe vae."
            ) from None
    hashes, faces = {"vae": file_sha256(source)}, None
    if backbone is not None and vision is not None:
        networks = _backbone(backbone), _vision(vision)
        hashes |= {"backbone": file_sha256(backbone), "vision": file_sha256(vision)}
        faces = FaceEncoder(lambda: networks, f"{hashes['backbone']}-{hashes['vision']}", torch.device(device))
    images = None
    if image is not None:
        file = read_tensors(image, "vision")
        tower = image_tower_from_state_dict(file.tensors, file.metadata, image.name)
        hashes["image"] = file_sha256(image)
        images = PictureEncoder(lambda: tower, hashes["image"], torch.device(device))
    parsed = None
    if parser is not None:
        if image is None:
            raise PortraitError("parser", "nothing here reads it", "Leave it away, or give --image.")
        hashes["parser"] = file_sha256(parser)
        parsed = parser_from_state_dict(read_tensors(parser, "parser").tensors, parser.name)
    encode = LatentEncoder(network, device)
    return FrozenNetworks(encode, load_tokenizer(), faces, hashes, references, images, parsed)


def _backbone(path: Path) -> Backbone:
    return backbone_from_state_dict(read_tensors(path, "backbone").tensors, path.name)


def _vision(path: Path) -> VisionTower:
    checkpoint = read_tensors(path, "vision")
    return vision_from_state_dict(checkpoint.tensors, checkpoint.metadata, path.name)
