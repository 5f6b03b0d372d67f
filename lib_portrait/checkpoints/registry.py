"""What can be downloaded: the published files of all methods, the face detector and the face parser."""

from __future__ import annotations

from collections.abc import Sequence

from lib_portrait.checkpoints.files import AdapterFiles, KnownWeight, Member

DETECTOR = KnownWeight(
    role="detector",
    filename="det_10g.onnx",
    url="https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip",
    size=288_621_354,
    sha256="80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
    licence="non-commercial research only (InsightFace model zoo)",
    what="SCRFD-10G face detector of InsightFace's buffalo_l; without it MTCNN finds the faces",
    group="insightface",
    member=Member(
        filename="det_10g.onnx",
        size=16_923_827,
        sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    ),
)

PARSER = KnownWeight(
    role="parser",
    filename="parsing_parsenet.pth",
    url="https://github.com/xinntao/facexlib/releases/download/v0.2.2/parsing_parsenet.pth",
    size=85_331_193,
    sha256="3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2",
    licence="see the publisher's page (the code is MIT; trained on CelebAMask-HQ, which is non-commercial)",
    what="face parser ParseNet of facexlib, which the WebUI fetches for face restoration; without it the mask of a "
    "reference comes from the face's landmarks",
    group="facexlib",
)

# What the networks are for that are no parts of adapters.
USES = {
    "backbone": "face recognition network",
    "vision": "CLIP image encoder",
    "detector": "face detector of insightface; without it MTCNN is used",
    "parser": "face parser of facexlib; without it the landmarks give the mask of a reference",
}


class Registry:
    """The published files of these methods, and those that belong to none."""

    def __init__(self, methods: Sequence[AdapterFiles]):
        published = (weight for files in methods for weight in files.published)
        # Where two methods read the same network, it is one file.
        self.known: tuple[KnownWeight, ...] = tuple(dict.fromkeys([*published, DETECTOR, PARSER]))

    @property
    def groups(self) -> list[str]:
        """The words that fetch several files, or all of one publisher."""
        return list(dict.fromkeys(weight.group for weight in self.known))

    def choices(self) -> list[str]:
        """What can be asked for by name: groups, then file names."""
        return [*self.groups, *(weight.filename for weight in self.known)]

    def select(self, name: str) -> list[KnownWeight]:
        """The published files of a group, a role or a file name (aliases included); empty where none is known."""
        return [one for one in self.known if name in (one.group, one.role, one.filename, *one.aliases)]

    def by_role(self, role: str) -> KnownWeight | None:
        """The published file of a role, or None; of several methods' the first one's."""
        return next((weight for weight in self.known if weight.role == role), None)
