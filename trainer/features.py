"""Features that frozen networks compute of a shard, once: latents, token ids of the captions, features of faces.

Beside NAME.tar stands NAME.features.safetensors:
latents (n, 4, h, w) fp16, the posterior's means, not scaled; tokens (n, 77) int32; size (n, 2) int32, the pictures'
width and height; and with face networks, for all F faces of the shard in order, intrinsic (F, m, d) and structure
(F, g^2, d') fp16, sample (F) int32 the picture in the shard, face (F) int32 its number in the picture; zero_structure
(g^2, d'), the structure features of no face. Where references are asked for, of all R faces that are not much smaller:
references (R, 4, s, s) fp16, the latents of the square about each, in which by chance only the face is seen, and as
above reference_sample and reference_face (R) int32. With an image encoder, of all G faces in usable pictures: image
(G, E) fp16, its embedding of the aligned face, mask (G, h, w) fp16, the part of each latent position that is this face,
and image_sample and image_face (G) int32. The metadata names the networks by their hashes, and the references' side in
pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTokenizer

from lib_portrait.checkpoints.formats import write_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.alignment import portrait
from lib_portrait.faces.features import FaceEncoder, PictureEncoder
from lib_portrait.faces.parsing import ParseNet, face_mask
from lib_portrait.faces.recognition import Backbone
from trainer.faces import aligned
from trainer.shards import Shards

SUFFIX = ".features.safetensors"
# References' faces are at least this share of the square's side wide: smaller ones would be little but enlarged.
SMALLEST_REFERENCE = 0.2
# The share of references in which only the face is seen.
FACE_ONLY = 0.5
START, END = 49406, 49407  # CLIP's first and last token; the last one also fills up


@dataclass(frozen=True)
class FrozenNetworks:
    """The networks that compute features. encode: pictures (b, 3, H, W) in [-1, 1] to latents (b, 4, h, w).

    faces: the face encoder, or None for latents and tokens alone. hashes: SHA-256 of the networks by role.
    references: side in pixels of the squares about faces that latents are wanted of, or 0. images: the image encoder
    whose embeddings of faces are wanted, or None. parser: says where those faces are in pictures without masks, None
    for the oval of their landmarks.
    """

    encode: LatentEncoder
    tokenizer: CLIPTokenizer
    faces: FaceEncoder | None
    hashes: dict[str, str]
    references: int = 0
    images: PictureEncoder | None = None
    parser: ParseNet | None = None


class LatentEncoder:
    """A VAE's encoder as a function of pictures."""

    def __init__(self, vae: AutoencoderKL, device: torch.device | str = "cpu"):
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.vae.encode(pictures.to(self.device)).latent_dist.mean.cpu()


def features_path(shard: Path) -> Path:
    return shard.with_suffix("").with_name(shard.stem + SUFFIX)


def precompute(paths: Sequence[Path], frozen: FrozenNetworks, batch: int = 32, seed: int = 0) -> dict[str, int]:
    """Writes the features of each shard that does not have those of these networks yet; counts what was done.

    Where only the networks of faces are new, latents and tokens stay; where none are given, so do faces. Pictures that
    cannot be used get empty rows, counted in "unusable"; training passes them over.
    """
    counts = {"shards": 0, "pictures": 0, "faces": 0, "unusable": 0}
    for path in tqdm(sorted(paths), unit="shard"):
        target = features_path(path)
        before = _hashes(target) if target.exists() else {}
        wanted = frozen.hashes | ({"references": str(frozen.references)} if frozen.references else {})
        if wanted.items() <= before.items():
            continue
        shards = Shards([path])
        if before.get("vae") == wanted["vae"]:
            with safe_open(target, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        else:
            before, tensors = {}, _picture_features(shards, frozen, batch)
        usable = tensors["latents"].flatten(1).isfinite().all(dim=1).nonzero().flatten().tolist()
        if frozen.faces is not None:
            tensors |= _face_features(shards, usable, frozen.faces, batch, seed)
        if frozen.references:
            tensors |= _reference_features(shards, usable, frozen, batch, seed)
        if frozen.images is not None:
            shape = (tensors["latents"].shape[-2], tensors["latents"].shape[-1])
            tensors |= _image_features(shards, usable, frozen.images, frozen.parser, shape, batch, seed)
        write_tensors(target, tensors, before | wanted)
        counts["shards"] += 1
        counts["pictures"] += len(shards)
        counts["faces"] += len(tensors.get("face", ()))
        counts["unusable"] += len(shards) - len(usable)
    return counts


def _hashes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        # "format" is what the file's writer says of itself.
        return {name: text for name, text in (file.metadata() or {}).items() if name != "format"}


def _picture_features(shards: Shards, frozen: FrozenNetworks, batch: int) -> dict[str, Tensor]:
    """ "latents", "tokens" and "size" of a shard's pictures."""
    latents: list[Tensor | None] = [None] * len(shards)
    tokens, sizes = [], []
    shape: tuple[int, ...] = ()
    for numbers in _batches(len(shards), batch):
        pictures = {}
        for number in numbers:
            try:
                sample = shards[number]
                shape = shape or sample.image.shape
                if sample.image.shape != shape:
                    raise ValueError("the pictures of a shard have one size")
            except ValueError:
                tokens.append(torch.zeros(77, dtype=torch.int32))
                sizes.append((0, 0))
                continue
            pictures[number] = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1).float() / 127.5 - 1
            tokens.append(_caption_ids(frozen.tokenizer, sample.record.caption))
            sizes.append((sample.image.shape[1], sample.image.shape[0]))
        if pictures:
            for number, latent in zip(pictures, frozen.encode(torch.stack(list(pictures.values()))).half()):
                latents[number] = latent
    some = next((latent for latent in latents if latent is not None), None)
    if some is None:
        raise PortraitError("data", f"{shards.paths[0].name} holds no picture that can be used", "Make it again.")
    empty = torch.full_like(some, torch.nan)
    return {
        "latents": torch.stack([empty if latent is None else latent for latent in latents]),
        "tokens": torch.stack(tokens),
        "size": torch.tensor(sizes, dtype=torch.int32),
    }


def _face_features(
    shards: Shards, usable: Sequence[int], faces: FaceEncoder, batch: int, seed: int
) -> dict[str, Tensor]:
    """The features of the faces of usable pictures; nothing where there are none."""
    intrinsic, structure, where = [], [], []
    for numbers in _batches(len(usable), batch):
        crops = []
        for number in (usable[place] for place in numbers):
            sample = shards[number]
            for face, record in enumerate(sample.record.faces):
                crops.append(aligned(sample.image, record, 224, np.random.default_rng([seed, number, face])))
                where.append((number, face))
        for features in faces.encode(crops) if crops else ():
            intrinsic.append(features.intrinsic.half())
            structure.append(features.structure.half())
    if not where:
        return {}
    rows = torch.tensor(where, dtype=torch.int32)
    return {
        "intrinsic": torch.stack(intrinsic),
        "structure": torch.stack(structure),
        "sample": rows[:, 0].contiguous(),
        "face": rows[:, 1].contiguous(),
        "zero_structure": faces.zero().structure.half().contiguous(),
    }


def _reference_features(
    shards: Shards, usable: Sequence[int], frozen: FrozenNetworks, batch: int, seed: int
) -> dict[str, Tensor]:
    """The latents of the squares about the faces of usable pictures; nothing where there are no faces."""
    side, where = frozen.references, []
    for number in usable:
        for face, record in enumerate(shards.record(number).faces):
            if record.box[2] - record.box[0] >= SMALLEST_REFERENCE * side:
                where.append((number, face, record))
    latents = []
    for rows in _batches(len(where), batch):
        squares = []
        for number, face, record in (where[row] for row in rows):
            face_only = np.random.default_rng([seed, number, face]).random() < FACE_ONLY
            landmarks = np.array(record.landmarks, np.float32)
            squares.append(portrait(shards.picture(number), landmarks, side, face_only))
        pictures = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(frozen.encode(pictures).half())
    if not where:
        return {}
    return {
        "references": torch.cat(latents),
        "reference_sample": torch.tensor([number for number, _, _ in where], dtype=torch.int32),
        "reference_face": torch.tensor([face for _, face, _ in where], dtype=torch.int32),
    }


def _image_features(
    shards: Shards,
    usable: Sequence[int],
    images: PictureEncoder,
    parser: ParseNet | None,
    shape: tuple[int, int],
    batch: int,
    seed: int,
) -> dict[str, Tensor]:
    """The image encoder's embeddings of the faces of usable pictures, and where these are; nothing without faces.

    shape: (h, w) of the latents.
    """
    embeddings, masks, where = [], [], []
    for numbers in _batches(len(usable), batch):
        crops = []
        for number in (usable[place] for place in numbers):
            sample = shards[number]
            for face, record in enumerate(sample.record.faces):
                crops.append(aligned(sample.image, record, 224, np.random.default_rng([seed, number, face])))
                if sample.labels is not None:
                    mask = sample.labels == face + 1
                else:
                    mask = face_mask(sample.image, np.array(record.landmarks, np.float32), parser)
                covered = torch.from_numpy(mask)[None, None].float()
                masks.append(functional.adaptive_avg_pool2d(covered, shape)[0, 0].half())
                where.append((number, face))
        embeddings += [features.image.half() for features in images.encode(crops)]
    if not where:
        return {}
    rows = torch.tensor(where, dtype=torch.int32)
    return {
        "image": torch.stack(embeddings),
        "mask": torch.stack(masks),
        "image_sample": rows[:, 0].contiguous(),
        "image_face": rows[:, 1].contiguous(),
    }


def _batches(number: int, batch: int) -> Iterator[range]:
    return (range(start, min(start + batch, number)) for start in range(0, number, batch))


def _caption_ids(tokenizer: CLIPTokenizer, text: str) -> Tensor:
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    return torch.tensor(ids, dtype=torch.int32)


def uncaptioned(caption_ids: Tensor) -> Tensor:
    """Token ids (B, 77) of the empty caption, the unconditional one, in place of these."""
    empty = torch.full_like(caption_ids, END)
    empty[:, 0] = START
    return empty


@torch.no_grad()
def global_feature(backbone: Backbone, intrinsic: Tensor) -> Tensor:
    """A recognition network's embeddings (B, e), of its last tap's positions (B, m, d): it is made of nothing else."""
    side = math.isqrt(intrinsic.shape[1])
    embedding: Tensor = backbone.output_layer(intrinsic.float().transpose(1, 2).unflatten(2, (side, side)))
    return embedding


class Features:
    """The features beside shards, by sample number; what is not asked for stays on disk."""

    def __init__(self, shards: Shards):
        """Raises PortraitError for a shard without features, or features of different networks."""
        self.files = []
        hashes: dict[str, str] | None = None
        for path in shards.paths:
            beside = features_path(path)
            if not beside.is_file():
                raise PortraitError(
                    "data", f"{path.name} has no features", "Make them: portrait.py dataset features --help"
                )
            own = _hashes(beside)
            if hashes is not None and own != hashes:
                raise PortraitError(
                    "data", f"the features of {path.name} come from other networks", "Make all features again."
                )
            hashes = own
            self.files.append(safe_open(beside, "pt"))
        self.hashes = hashes or {}
        self.starts = shards.starts
        self.latents = torch.cat([file.get_tensor("latents") for file in self.files])
        self.tokens = torch.cat([file.get_tensor("tokens") for file in self.files])
        self.sizes = torch.cat([file.get_tensor("size") for file in self.files])
        self.usable = self.latents.flatten(1).isfinite().all(dim=1)
        self.faces: dict[tuple[int, int], tuple[int, int]] = {}
        for number, (file, start) in enumerate(zip(self.files, self.starts)):
            if "sample" in file.keys():  # noqa: SIM118 - it is no dictionary
                pairs = zip(file.get_tensor("sample").tolist(), file.get_tensor("face").tolist())
                self.faces |= {(start + sample, face): (number, row) for row, (sample, face) in enumerate(pairs)}

    @functools.cached_property
    def references(self) -> dict[tuple[int, int], Tensor]:
        """By sample and face: the latent (4, s, s) fp16, not scaled, of the square about it.

        Raises PortraitError where the features hold none.
        """
        found: dict[tuple[int, int], Tensor] = {}
        for file, start in zip(self.files, self.starts):
            if "references" in file.keys():  # noqa: SIM118 - it is no dictionary
                samples, faces = (file.get_tensor(f"reference_{name}") for name in ("sample", "face"))
                found |= zip(zip((samples + start).tolist(), faces.tolist()), file.get_tensor("references"))
        if not found:
            raise PortraitError(
                "data",
                "its features hold no references",
                "Make them: portrait.py dataset features --references SIZE, SIZE the side of the model's pictures.",
            )
        return found

    @functools.cached_property
    def images(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """By sample and face: the image encoder's embedding (E) fp16, and the part (h, w) fp16 of each latent position
        that is this face.

        Raises PortraitError where the features hold none.
        """
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for file, start in zip(self.files, self.starts):
            if "image" in file.keys():  # noqa: SIM118 - it is no dictionary
                samples, faces = (file.get_tensor(f"image_{name}") for name in ("sample", "face"))
                own = zip(file.get_tensor("image"), file.get_tensor("mask"))
                found |= zip(zip((samples + start).tolist(), faces.tolist()), own)
        if not found:
            raise PortraitError(
                "data",
                "its features hold no embeddings of an image encoder",
                "Make them: portrait.py dataset features --image FILE.",
            )
        return found

    def face(self, sample: int, face: int) -> tuple[Tensor, Tensor]:
        """intrinsic (m, d) and structure (g^2, d') of a face, fp16. Raises ValueError for one that has none."""
        if (sample, face) not in self.faces:
            raise ValueError(f"face {face} of sample {sample} has no features")
        number, row = self.faces[sample, face]
        file = self.files[number]
        return file.get_slice("intrinsic")[row], file.get_slice("structure")[row]

    @functools.cached_property
    def zero_structure(self) -> Tensor:
        """The structure features of no face (g^2, d'). Raises PortraitError where faces have no features."""
        holders = (file for file in self.files if "zero_structure" in file.keys())  # noqa: SIM118 - it is no dictionary
        file = next(holders, None)
        if file is None:
            raise PortraitError(
                "data",
                "the shards' faces have no features",
                "Make them with face networks: portrait.py dataset features.",
            )
        return file.get_tensor("zero_structure").float()
