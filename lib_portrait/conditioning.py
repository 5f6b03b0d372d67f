"""From a checked request to what a UNet is conditioned on: photos and weight files in, people and a rule out.

Both hosts come through here, so that a request means the same in the WebUI and outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lib_portrait.attention import RoutingMaps, Site, regions
from lib_portrait.checkpoints.store import AUTOMATIC, Kit, Store
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.faces.features import Encoder, FaceEncoder, PictureEncoder
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.faces.references import IdentityFaces, Mixed, Reference
from lib_portrait.faces.service import FaceService
from lib_portrait.faces.vision import (
    ImageTower,
    VisionTower,
    image_tower_from_state_dict,
    vision_from_state_dict,
)
from lib_portrait.guidance.options import OPTIONS, STRENGTH
from lib_portrait.guidance.reference import GuidedPerson, Locate, ReferenceGuidance
from lib_portrait.methods.base import Method, Person, Placement, Rule, method
from lib_portrait.options import defaults
from lib_portrait.request import Guidance, Identity, Photo, PortraitRequest, Region

# How far a mask's aspect ratio may be from the picture's: pictures are rounded to multiples of 8.
ASPECT_TOLERANCE = 0.04


# References are squares of multiples of so many pixels: all of a UNet's levels are whole then.
GRID = 64

# Which network gives which features of a face.
NETWORK_OF = {"intrinsic": "backbone", "embedding": "backbone", "structure": "vision", "image": "vision"}


@dataclass(frozen=True)
class Conditioning:
    """A request made ready: the method's adapter, and what its rule needs of each identity, in the request's order.

    kit: the files it is made with. notices: what the user should know of it. guided: for reference guidance, where it
    is switched on, what it needs of each identity. locate: finds faces in a picture that is drawn, see
    `guidance.reference.Locate`.
    """

    request: PortraitRequest
    kit: Kit
    method: Method
    adapter: Any
    people: tuple[Person, ...]
    notices: tuple[Notice, ...] = ()
    guided: tuple[GuidedPerson, ...] = ()
    locate: Locate | None = None

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the adapter was made for a UNet with these attention sites."""
        self.method.check_fits(self.adapter, sites)

    def text_attentions(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """See `Method.text_attentions`."""
        return self.method.text_attentions(self.adapter)

    def rule(self, routing: RoutingMaps | None = None) -> Rule[Any]:
        """The request's rule for one UNet (`attention.Injection`)."""
        rule = self.method.rule(self.adapter, self.people, self.request.options)
        rule.routing = routing
        return rule

    def guidance(self, rule: Rule[Any]) -> ReferenceGuidance | None:
        """The request's reference guidance beside its rule for the same UNet; None where it has none."""
        wanted = self.request.guidance
        if not wanted.enabled:
            return None
        return ReferenceGuidance(self.guided, wanted.values({}), rule, self.locate)


class Conditioner:
    """Makes requests ready. Keeps the weights of the last kit used, on the CPU, and nothing on the accelerator."""

    def __init__(self, faces: FaceService, store: Store):
        self.faces = faces
        self.store = store
        self._adapter: tuple[object, Any] | None = None
        self._networks: tuple[object, tuple[torch.nn.Module | None, ...]] | None = None

    def drop(self) -> None:
        """Forgets loaded weights."""
        self._adapter = self._networks = None

    def check(self, request: PortraitRequest) -> Kit:
        """The request's weight files, once they are known to be there and its photos to have the faces asked for.

        Raises PortraitError, and loads nothing but the face detector.
        """
        kit = self.kit(request)
        kit.check_people(len(request.identities))
        for i, identity in enumerate(request.identities):
            for field, photo in _photos(identity, f"identities[{i}]"):
                self.faces.crop(photo, field)
        return kit

    def kit(self, request: PortraitRequest) -> Kit:
        """The request's weight files: none, under the name "automatic", where its method has no adapter. Raises
        PortraitError as `Store.kit` does."""
        if not request.declaration.has_adapter:
            return Kit(AUTOMATIC, request.method, {})
        return self.store.kit(request.checkpoint, request.method)

    def resolved(self, request: PortraitRequest, base: Path | None) -> PortraitRequest:
        """The request with all that a kit says of reference guidance where the request leaves it open.

        base: the checkpoint's file. Of its other options those are named that are not the defaults. Raises
        PortraitError as `check` does for weight files.
        """
        if not request.guidance.enabled:
            return request
        kit = self.store.guidance(self.kit(request).manifest, base)
        values, plain = request.guidance.values(kit), defaults(OPTIONS)
        said = {name: value for name, value in values.items() if name in kit or value != plain[name]}
        return replace(request, guidance=Guidance(True, said))

    # Networks are made with random weights before their own are read, and a host draws from the same random numbers.
    @torch.random.fork_rng(devices=())
    @torch.no_grad()
    def prepare(
        self,
        request: PortraitRequest,
        size: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        report: Callable[[str], None] = lambda text: None,
        sampled: tuple[int, int] | None = None,
        base: Path | None = None,
    ) -> Conditioning:
        """The request's conditioning for finished pictures of `size` (width, height) pixels, or of that proportion.

        sampled: width and height in pixels of what is sampled, None where it is the same. base: the checkpoint's file.
        device, dtype: where and in what the face networks run. report: told what is being done, before it takes long.
        Raises PortraitError naming the photo, mask or file at fault: no face, unknown hash, missing or foreign weights,
        weights that do not belong together.
        """
        # The cheap checks of the whole request come before the networks are loaded.
        report("finding faces")
        kit = self.check(request)
        request, told = self.placed(self.resolved(request, base), size)
        places = [
            self._region(identity.region, f"identities[{i}].region", size)
            for i, identity in enumerate(request.identities)
        ]
        used = method(request.method)
        notices = [*told, *used.notices(request.options, [identity.options for identity in request.identities])]
        notices += regions.overlaps(places, used.declaration.overlap)
        for i, identity in enumerate(request.identities):
            for field, photo in _photos(identity, f"identities[{i}]"):
                notices += self.faces.notices(photo, field)
        guided: tuple[GuidedPerson, ...] = ()
        if request.guidance.enabled:
            guided, told = self._guided(request, places, min(sampled or size))
            notices += told
        adapter = self._load_adapter(used, kit, report)
        encoder = self._encoder(kit, device, dtype, report) if used.declaration.encoders else None
        try:
            people = []
            for i, identity in enumerate(request.identities):
                faces = self._faces(identity, f"identities[{i}]", encoder)
                if i == 0:
                    _check_widths(kit, faces, used.feature_widths(adapter))
                placement = Placement(places[i], identity.start, identity.end)
                people.append(used.encode(adapter, faces, request.options, identity.options, placement))
        finally:
            # Between requests the accelerator's memory belongs to the host, also after one that failed.
            if self._networks is not None:
                for network in self._networks[1]:
                    if network is not None:
                        network.to("cpu")
        return Conditioning(request, kit, used, adapter, tuple(people), tuple(notices), guided, self.faces.ovals)

    def _guided(
        self, request: PortraitRequest, places: Sequence[regions.Region | None], side: int
    ) -> tuple[tuple[GuidedPerson, ...], list[Notice]]:
        """Everybody for reference guidance, with references about as large as what is sampled; and what the user should
        know of it. side: its shorter one, in pixels."""
        side = max(side // GRID, 1) * GRID
        people, notices = [], []
        for i, (identity, place) in enumerate(zip(request.identities, places, strict=True)):
            found = [
                self.faces.reference(photo, f"identities[{i}].photos[{j}]", side)
                for j, photo in enumerate(identity.photos if identity.guided else ())
            ]
            notices += [Notice("guidance", one.how) for one in found if not one.parsed]
            pictures, masks = tuple(one.picture for one in found), tuple(one.mask for one in found)
            people.append(GuidedPerson(pictures, masks, place, identity.guided, identity.start, identity.end))
        if request.guidance.values({})[STRENGTH.name] == 0:
            notices.append(Notice(f"guidance.{STRENGTH.name}", "a strength of 0 leaves reference guidance out"))
        return tuple(people), list(dict.fromkeys(notices))

    def placed(self, request: PortraitRequest, size: tuple[int, int]) -> tuple[PortraitRequest, list[Notice]]:
        """The request with boxes in place of its layout, and what the user should know of it.

        size: width and height of the finished picture. Raises PortraitError where the layout has another shape, no
        faces, or fewer than there are people without a region.
        """
        if request.layout is None:
            return request, []
        faces, (width, height) = self.faces.places(request.layout, "layout")
        if abs((width / height) / (size[0] / size[1]) - 1) > ASPECT_TOLERANCE:
            raise PortraitError(
                "layout",
                f"it is {width}x{height}, the picture {size[0]}x{size[1]}: their shapes differ",
                "Cut it to the picture's shape, or draw a picture of its shape.",
            )
        homeless = [i for i, identity in enumerate(request.identities) if identity.region is None]
        if len(homeless) > len(faces):
            people = ", ".join(f"identities[{i}]" for i in homeless)
            raise PortraitError(
                "layout",
                f"it shows {len(faces)} faces, and {len(homeless)} people have no region of their own: {people}",
                "Use a picture with as many faces, give regions to the others, or leave them out.",
            )
        notices = []
        if len(faces) > len(homeless):
            text = f"it shows {len(faces)} faces, of which the first {len(homeless)} from the left are taken"
            notices.append(Notice("layout", text))
        boxes = dict(zip(homeless, faces))
        identities = tuple(
            replace(identity, region=Region(box=_inside(boxes[i]))) if i in boxes else identity
            for i, identity in enumerate(request.identities)
        )
        return replace(request, identities=identities, layout=None), notices

    def _faces(self, identity: Identity, path: str, encoder: Encoder | None) -> IdentityFaces:
        def references(photos: Sequence[Photo], field: str) -> tuple[Reference, ...]:
            return tuple(Reference(self.faces, one, f"{field}[{j}]", encoder) for j, one in enumerate(photos))

        mixed = (
            Mixed(references(mix.photos, f"{path}.mix[{m}].photos"), mix.weight) for m, mix in enumerate(identity.mix)
        )
        return IdentityFaces(references(identity.photos, f"{path}.photos"), tuple(mixed))

    def _region(self, region: Region | None, field: str, size: tuple[int, int]) -> regions.Region | None:
        """A region as the rule needs it. Raises PortraitError: a mask of another shape, or nobody would fit in."""
        if region is None:
            return None
        latent = (-(-size[1] // 8), -(-size[0] // 8))
        if region.box is not None:
            regions.check_takes_part(region.box, field, torch.ones(latent))
            return region.box
        assert region.mask is not None
        field = f"{field}.mask"
        mask = torch.from_numpy(self.faces.mask(region.mask, field))
        height, width = mask.shape
        if abs((width / height) / (size[0] / size[1]) - 1) > ASPECT_TOLERANCE:
            raise PortraitError(
                field,
                f"the mask is {width}x{height}, the picture {size[0]}x{size[1]}: their shapes differ",
                "Draw the mask on a canvas of the picture's width and height (or any multiple of both).",
            )
        regions.check_takes_part(mask, field, torch.ones(latent))
        return mask

    def _load_adapter(self, used: Method, kit: Kit, report: Callable[[str], None]) -> Any:
        roles = [part.role for part in used.declaration.files.parts if part.role in kit.files]
        files = {role: kit.files[role] for role in roles}
        key = (used.name, *_stamp(*files.values()))
        if self._adapter is None or self._adapter[0] != key:
            report(_loading("the adapter", *files.values()))
            read = {role: self.store.read(path, role) for role, path in files.items()}
            self._adapter = (key, used.load(read, {role: path.name for role, path in files.items()}))
        return self._adapter[1]

    def _encoder(
        self, kit: Kit, device: torch.device | str, dtype: torch.dtype, report: Callable[[str], None]
    ) -> Encoder:
        if "backbone" not in kit.files:
            return self._picture_encoder(kit.files["vision"], device, dtype, report)
        files = [kit.files[role] for role in ("backbone", "vision") if role in kit.files]

        def networks() -> tuple[Backbone, VisionTower | None]:
            key = _stamp(*files)
            if self._networks is None or self._networks[0] != key:
                report(_loading("the face networks", *files))
                recognition, *clip = files
                backbone = backbone_from_state_dict(self.store.read(recognition, "backbone").tensors, recognition.name)
                vision = None
                for path in clip:
                    checkpoint = self.store.read(path, "vision")
                    vision = vision_from_state_dict(checkpoint.tensors, checkpoint.metadata, path.name)
                self._networks = (key, (backbone, vision))
            return cast("tuple[Backbone, VisionTower]", self._networks[1])

        weights_hash = "-".join(self.store.sha256(path) for path in files)
        return FaceEncoder(networks, weights_hash, device, dtype)

    def _picture_encoder(
        self, path: Path, device: torch.device | str, dtype: torch.dtype, report: Callable[[str], None]
    ) -> PictureEncoder:
        """That of a method that reads no more than what a CLIP image encoder makes of a face."""

        def network() -> ImageTower:
            key = ("image", *_stamp(path))
            if self._networks is None or self._networks[0] != key:
                report(_loading("the image encoder", path))
                checkpoint = self.store.read(path, "vision")
                tower = image_tower_from_state_dict(checkpoint.tensors, checkpoint.metadata, path.name)
                self._networks = (key, (tower,))
            return cast(ImageTower, self._networks[1][0])

        return PictureEncoder(network, self.store.sha256(path), device, dtype)


def _inside(box: regions.Box) -> regions.Box:
    """The box as far as it lies in the picture, in whole thousandths, as infotexts have it."""
    left, top, right, bottom = (round(min(max(edge, 0.0), 1.0), 3) for edge in box)
    return left, top, right, bottom


def _check_widths(kit: Kit, faces: IdentityFaces, wanted: Mapping[str, int]) -> None:
    """Raises PortraitError unless the features of faces have the widths that the adapter reads."""
    for name, width in wanted.items():
        found = getattr(faces.no_face, name).shape[-1]
        if found != width:
            adapter, network = next(iter(kit.files.values())), kit.files[NETWORK_OF[name]]
            raise PortraitError(
                "checkpoint",
                f"{adapter.name} wants {name} features of width {width}, {network.name} gives {found}",
                "Use the recognition backbone and image encoder that the adapter was trained with.",
            )


def _photos(identity: Identity, path: str) -> list[tuple[str, Photo]]:
    named = [(f"{path}.photos[{j}]", photo) for j, photo in enumerate(identity.photos)]
    for m, mix in enumerate(identity.mix):
        named += [(f"{path}.mix[{m}].photos[{j}]", photo) for j, photo in enumerate(mix.photos)]
    return named


def _stamp(*paths: Path) -> tuple[object, ...]:
    """Changes when one of the files does."""
    return tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths)


def _loading(what: str, *paths: Path) -> str:
    size = sum(path.stat().st_size for path in paths)
    return f"loading {what} ({size / 2**30:.1f} GiB)" if size >= 2**29 else f"loading {what}"
