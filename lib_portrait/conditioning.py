"""From a checked request to what a UNet is conditioned on: photos and weight files in, `Person`s and a rule out.

Both hosts come through here, so that a request means the same in the WebUI and outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib_portrait.attention import NEGATIVE, POSITIVE, RoutingMaps, regions
from lib_portrait.checkpoints.store import Kit, Store
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.faces.features import FaceEncoder, FaceFeatures
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.faces.service import FaceService
from lib_portrait.faces.vision import VisionTower, vision_from_state_dict
from lib_portrait.methods.uniportrait import Adapter, Person, UniPortraitRule, interpolate
from lib_portrait.request import Identity, Photo, PortraitRequest, Region

# How far a mask's aspect ratio may be from the picture's: pictures are rounded to multiples of 8.
ASPECT_TOLERANCE = 0.04


@dataclass(frozen=True)
class Conditioning:
    """A request made ready: the adapter, and one `Person` for each identity in the request's order.

    kit: the files it is made with. notices: what the user should know of it.
    """

    request: PortraitRequest
    kit: Kit
    adapter: Adapter
    people: tuple[Person, ...]
    notices: tuple[Notice, ...] = ()

    def rule(self, routing: RoutingMaps | None = None) -> UniPortraitRule:
        """The request's rule for one UNet (`attention.Injection`)."""
        return UniPortraitRule(self.adapter, self.people, self.request.lora_scale, routing)


class Conditioner:
    """Makes requests ready. Keeps the weights of the last kit used, on the CPU, and nothing on the accelerator."""

    def __init__(self, faces: FaceService, store: Store):
        self.faces = faces
        self.store = store
        self._adapter: tuple[object, Adapter] | None = None
        self._networks: tuple[object, tuple[Backbone, VisionTower]] | None = None

    def drop(self) -> None:
        """Forgets loaded weights."""
        self._adapter = self._networks = None

    def check(self, request: PortraitRequest) -> Kit:
        """The request's weight files, once they are known to be there and its photos to have the faces asked for.

        Raises PortraitError, and loads nothing but the face detector.
        """
        kit = self.store.kit(request.checkpoint, request.method)
        kit.check_people(len(request.identities))
        for i, identity in enumerate(request.identities):
            for field, photo in _photos(identity, f"identities[{i}]"):
                self.faces.crop(photo, field)
        return kit

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
    ) -> Conditioning:
        """The request's conditioning for finished pictures of `size` (width, height) pixels, or of that proportion.

        device, dtype: where and in what the face networks run. report: told what is being done, before it takes long.
        Raises PortraitError naming the photo, mask or file at fault: no face, unknown hash, missing or foreign weights,
        weights that do not belong together.
        """
        # The cheap checks of the whole request come before the networks are loaded.
        report("finding faces")
        kit = self.check(request)
        places = [
            self._region(identity.region, f"identities[{i}].region", size)
            for i, identity in enumerate(request.identities)
        ]
        notices = [*_left_out(request), *regions.overlaps(places)]
        for i, identity in enumerate(request.identities):
            for field, photo in _photos(identity, f"identities[{i}]"):
                notices += self.faces.notices(photo, field)
        adapter = self._load_adapter(kit, report)
        encoder = self._encoder(kit, device, dtype, report)
        try:
            zero = self.faces.zero(encoder)
            self._check_widths(kit, adapter, zero)
            people = []
            for i, identity in enumerate(request.identities):
                tokens = {
                    POSITIVE: self._identity_tokens(adapter, encoder, identity, f"identities[{i}]"),
                    NEGATIVE: _embed(adapter, [zero], identity.structure),
                }
                scale = request.scale * identity.scale
                people.append(Person(tokens, scale, identity.start, identity.end, places[i]))
        finally:
            # Between requests the accelerator's memory belongs to the host, also after one that failed.
            if self._networks is not None:
                for network in self._networks[1]:
                    network.to("cpu")
        return Conditioning(request, kit, adapter, tuple(people), tuple(notices))

    def _identity_tokens(self, adapter: Adapter, encoder: FaceEncoder, identity: Identity, path: str) -> Tensor:
        """F_id of one identity, people mixed into it included: (T, D)."""

        def tokens(photos: Sequence[Photo], field: str) -> Tensor:
            features = [self.faces.features(photo, f"{field}[{j}]", encoder) for j, photo in enumerate(photos)]
            return _embed(adapter, features, identity.structure)

        master = tokens(identity.photos, f"{path}.photos")
        others = [tokens(mix.photos, f"{path}.mix[{j}].photos") for j, mix in enumerate(identity.mix)]
        return interpolate(master, others, [mix.weight for mix in identity.mix])

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

    def _load_adapter(self, kit: Kit, report: Callable[[str], None]) -> Adapter:
        files = kit.files["faceid"], kit.files.get("router")
        key = _stamp(*files)
        if self._adapter is None or self._adapter[0] != key:
            report(_loading("the adapter", *files))
            faceid, router = files
            names = faceid.name, router.name if router is not None else "router"
            tensors = self.store.read(router, "router").tensors if router is not None else None
            self._adapter = (key, Adapter.from_tensors(self.store.read(faceid, "faceid").tensors, tensors, names))
        return self._adapter[1]

    def _encoder(
        self, kit: Kit, device: torch.device | str, dtype: torch.dtype, report: Callable[[str], None]
    ) -> FaceEncoder:
        files = kit.files["backbone"], kit.files["vision"]

        def networks() -> tuple[Backbone, VisionTower]:
            key = _stamp(*files)
            if self._networks is None or self._networks[0] != key:
                report(_loading("the face networks", *files))
                recognition, clip = files
                backbone = backbone_from_state_dict(self.store.read(recognition, "backbone").tensors, recognition.name)
                checkpoint = self.store.read(clip, "vision")
                vision = vision_from_state_dict(checkpoint.tensors, checkpoint.metadata, clip.name)
                self._networks = (key, (backbone, vision))
            return self._networks[1]

        weights_hash = "-".join(self.store.sha256(path) for path in files)
        return FaceEncoder(networks, weights_hash, device, dtype)

    def _check_widths(self, kit: Kit, adapter: Adapter, features: FaceFeatures) -> None:
        for name, found, wanted, file in (
            ("intrinsic", features.intrinsic.shape[-1], adapter.embedding.intrinsic_width, kit.files["backbone"]),
            ("structure", features.structure.shape[-1], adapter.embedding.structure_width, kit.files["vision"]),
        ):
            if found != wanted:
                raise PortraitError(
                    "checkpoint",
                    f"{kit.files['faceid'].name} wants {name} features of width {wanted}, {file.name} gives {found}",
                    "Use the recognition backbone and image encoder that the adapter was trained with.",
                )


def _embed(adapter: Adapter, features: Sequence[FaceFeatures], beta: float) -> Tensor:
    """F_id from the features of one person's photos, concatenated along the tokens (sec. 3.2): (T, D) float32."""
    intrinsic = torch.cat([one.intrinsic for one in features]).float()
    structure = torch.cat([one.structure for one in features]).float()
    return adapter.embedding(intrinsic[None], structure[None], beta)[0]


def _left_out(request: PortraitRequest) -> list[Notice]:
    """What of the adapter a scale of 0 leaves out."""
    if request.scale == 0:
        left_out = [Notice("scale", "it is 0: nobody is drawn")]
    else:
        left_out = [
            Notice(f"identities[{i}].scale", "it is 0: this person is not drawn")
            for i, identity in enumerate(request.identities)
            if identity.scale == 0
        ]
    if request.lora_scale == 0:
        left_out.append(Notice("lora_scale", "it is 0: the adapter's LoRA is left out"))
    return left_out


def _photos(identity: Identity, path: str) -> list[tuple[str, Photo]]:
    named = [(f"{path}.photos[{j}]", photo) for j, photo in enumerate(identity.photos)]
    for m, mix in enumerate(identity.mix):
        named += [(f"{path}.mix[{m}].photos[{j}]", photo) for j, photo in enumerate(mix.photos)]
    return named


def _stamp(*paths: Path | None) -> tuple[object, ...]:
    """Changes when one of the files does."""
    return tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns) if path else None for path in paths)


def _loading(what: str, *paths: Path | None) -> str:
    size = sum(path.stat().st_size for path in paths if path is not None)
    return f"loading {what} ({size / 2**30:.1f} GiB)" if size >= 2**29 else f"loading {what}"
