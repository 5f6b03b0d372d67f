"""The weights that are published, and where.

Sizes and hashes stand here only where several independent sources agree on them. A weight without a hash is checked
against the one its publisher announces for that very file (see `download`).
"""

from __future__ import annotations

from dataclasses import dataclass

from lib_portrait.checkpoints.kit import CLIP_L, Manifest, StoredFile

ROLES = ("faceid", "router", "backbone", "vision", "detector")

UNIPORTRAIT = "https://huggingface.co/Junjie96/UniPortrait/resolve/main/"


@dataclass(frozen=True)
class Member:
    """The one file wanted out of a downloaded zip archive."""

    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KnownWeight:
    """One published file.

    role: what it is for, one of ROLES.
    filename: the name it gets here.
    url: where it is downloaded; size (bytes) and sha256 are those of the file at that address.
    licence, what: for people.
    aliases: other names under which people already have the same content; a name stands here only if it belongs to
        no other model.
    generic: names that several models share (``model.safetensors``), trusted only in folders that hold nothing else.
    member: where `url` is a zip archive, the file to take out of it.
    """

    role: str
    filename: str
    url: str
    size: int | None
    sha256: str | None
    licence: str
    what: str
    aliases: tuple[str, ...] = ()
    generic: tuple[str, ...] = ()
    member: Member | None = None


KNOWN: tuple[KnownWeight, ...] = (
    KnownWeight(
        role="faceid",
        filename="uniportrait-faceid_sd15.bin",
        url=UNIPORTRAIT + "uniportrait-faceid_sd15.bin",
        size=None,
        sha256=None,
        licence="see the publisher's page (the code is Apache-2.0)",
        what="UniPortrait for Stable Diffusion 1.5: ID embedding, attention adapter, LoRA for one person",
        aliases=("uniportrait-faceid_sd15.safetensors",),
    ),
    KnownWeight(
        role="router",
        filename="uniportrait-router_sd15.bin",
        url=UNIPORTRAIT + "uniportrait-router_sd15.bin",
        size=None,
        sha256=None,
        licence="see the publisher's page (the code is Apache-2.0)",
        what="UniPortrait for Stable Diffusion 1.5: ID router and LoRA for several people",
        aliases=("uniportrait-router_sd15.safetensors",),
    ),
    KnownWeight(
        role="backbone",
        filename="glint360k_curricular_face_r101_backbone.bin",
        url=UNIPORTRAIT + "glint360k_curricular_face_r101_backbone.bin",
        size=None,
        sha256=None,
        licence="see the publisher's page",
        what="face recognition network IR-101 (CurricularFace, trained on Glint360K)",
        aliases=("glint360k_curricular_face_r101_backbone.safetensors",),
    ),
    KnownWeight(
        role="vision",
        filename="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
        url="https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        size=2_528_373_448,
        sha256="6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
        licence="Apache-2.0 (IP-Adapter's copy of OpenCLIP's MIT-licensed weights)",
        what="CLIP ViT-H/14 image encoder (LAION-2B), the one IP-Adapter uses",
        aliases=("CLIP-ViT-H-14-laion2B-s32B-b79K.bin", "CLIP-ViT-H-14.safetensors", "clip_h.pth"),
        generic=(
            "model.safetensors",
            "pytorch_model.bin",
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.bin",
        ),
    ),
    KnownWeight(
        role="detector",
        filename="det_10g.onnx",
        url="https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip",
        size=288_621_354,
        sha256="80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
        licence="non-commercial research only (InsightFace model zoo)",
        what="SCRFD-10G face detector of InsightFace's buffalo_l; without it MTCNN finds the faces",
        member=Member(
            filename="det_10g.onnx",
            size=16_923_827,
            sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
        ),
    ),
)

GROUPS: dict[str, tuple[str, ...]] = {
    "uniportrait": ("faceid", "router", "backbone", "vision"),
    "insightface": ("detector",),
}

# The manifests of published adapters, by name. They come without default sampler settings: any of the WebUI's do.
PUBLISHED_KITS: dict[str, Manifest] = {
    "sd15": Manifest(
        name="sd15",
        method="uniportrait",
        adapter={weight.role: weight.filename for weight in KNOWN if weight.role in ("faceid", "router")},
        encoders={
            weight.role: StoredFile(weight.filename, weight.sha256, weight.size)
            for weight in KNOWN
            if weight.role in ("backbone", "vision")
        },
        text_encoder=CLIP_L,
        picture=(512, 512),
        licence="see the publisher's page (the code is Apache-2.0)",
    )
}


def choices() -> list[str]:
    """What can be asked for by name: groups, then file names."""
    return [*GROUPS, *(weight.filename for weight in KNOWN)]


def select(name_or_group: str) -> list[KnownWeight]:
    """The published files of a group, a role or a file name (aliases included); empty when the name is not known."""
    roles = GROUPS.get(name_or_group, (name_or_group,))
    return [weight for weight in KNOWN if weight.role in roles or name_or_group in (weight.filename, *weight.aliases)]


def by_role(role: str) -> KnownWeight:
    """The published file for a role. Raises KeyError for a name that is no role."""
    for weight in KNOWN:
        if weight.role == role:
            return weight
    raise KeyError(role)


def download_command(weight: KnownWeight) -> str:
    """The command that fetches this file, with those it is useless without."""
    group = next(group for group, roles in GROUPS.items() if weight.role in roles)
    return f"portrait.py download {group}"
