"""The networks that measure pictures: face detector, recogniser and CLIP, each chosen by its file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import DETECTORS, Detector, Face, detect_faces
from lib_portrait.faces.features import clip_view, pixels_of, recognition_view
from lib_portrait.faces.recognition import backbone_from_state_dict
from lib_portrait.faces.weights import beside, check_finite, fill
from trainer.evaluation.metrics import Floats
from trainer.evaluation.populations import SubjectPhoto
from trainer.world.render import Image

# Faces of smaller pictures are sought in an enlarged one: detectors for photographs look for 20 pixels and more.
ENLARGED_BELOW = 256
CROP, FACENET_CROP = 224, 160


# --------------------------------------------------------------------------------------------------------------- faces


def find_faces(image: Image, detector: Detector) -> list[Face]:
    """The faces of a picture (H, W, 3) uint8, in its pixels, from left to right."""
    scale = 2 if detector.name in DETECTORS and min(image.shape[:2]) < ENLARGED_BELOW else 1
    enlarged = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else image
    faces = detect_faces(np.asarray(enlarged, np.uint8), detector)
    return [Face(face.box / scale, face.landmarks / scale, face.score) for face in faces]


@dataclass(frozen=True)
class Recogniser:
    """A face recognition network. embed: faces of a picture to embeddings (n, d) of unit length. weights: their
    `fingerprint`."""

    name: str
    weights: str
    embed: Callable[[Image, Sequence[Face]], Floats]


def open_recogniser(path: Path, device: torch.device | str = "cpu") -> Recogniser:
    """The recogniser in a file: a network of the IR layout, or FaceNet, which the papers measure with.

    FaceNet is facenet-pytorch's 20180402-114759-vggface2.pt (or -casia-webface), a file of tensors.
    Raises PortraitError for anything else.
    """
    tensors = read_tensors(_file(path, "recogniser", "a recognition network's file")).tensors
    if any(name.startswith("repeat_1.") for name in tensors):
        return _facenet(path, tensors, device)
    network = backbone_from_state_dict(tensors, path.name).float().to(device)

    @torch.no_grad()
    def embed(image: Image, faces: Sequence[Face]) -> Floats:
        crops = [align_face(image, face.landmarks, CROP) for face in faces]
        return _unit_length(network(recognition_view(pixels_of(crops), network.image_size).to(device))[0])

    return Recogniser(path.stem, fingerprint(tensors), embed)


def _facenet(path: Path, tensors: dict[str, Tensor], device: torch.device | str) -> Recogniser:
    from facenet_pytorch import InceptionResnetV1

    network = InceptionResnetV1(pretrained=None)
    # Its classifier of the training's people is of no use here.
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("logits.")}
    fill(network, own, path.name)
    network = network.float().to(device)

    @torch.no_grad()
    def embed(image: Image, faces: Sequence[Face]) -> Floats:
        crops = pixels_of([_box_crop(image, face) for face in faces]) * 255
        return _unit_length(network(((crops - 127.5) / 128).to(device)))

    return Recogniser(path.stem, fingerprint(tensors), embed)


def _box_crop(image: Image, face: Face) -> Image:
    """The face's box stretched to a square, as facenet-pytorch cuts faces out."""
    height, width = image.shape[:2]
    left, top, right, bottom = (int(value) for value in face.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    cut = image[top : max(bottom, top + 1), left : max(right, left + 1)]
    return np.asarray(cv2.resize(cut, (FACENET_CROP, FACENET_CROP), interpolation=cv2.INTER_AREA), np.uint8)


def _unit_length(embeddings: Tensor) -> Floats:
    return functional.normalize(embeddings.float(), dim=-1).cpu().numpy().astype(np.float64)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """The same for the same weights, whatever file they are in: half precision, any prefix of the names, any format."""
    named = beside(tensors, "input_layer.0.weight") or tensors
    sha = hashlib.sha256()
    for name in sorted(named):
        if named[name].is_floating_point():
            sha.update(name.encode())
            sha.update(named[name].half().contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def refuse_conditioning_network(measuring: Recogniser, conditioning: Path) -> None:
    """Raises PortraitError when the recogniser that measures is the one that conditions, under whatever name.

    An adapter is fitted to the network it was trained with: similarities measured by that say little.
    """
    if fingerprint(read_tensors(conditioning).tensors) == measuring.weights:
        raise PortraitError(
            "recogniser",
            f"{measuring.name} holds the very network that the adapter is conditioned by ({conditioning.name})",
            "Measure with another network, such as FaceNet or models/world/world-measuring.safetensors.",
        )


def embedding_of(picture: SubjectPhoto, recogniser: Recogniser, detector: Detector) -> Floats | None:
    """The embedding (d) of a photo's person: of the face at its known landmarks, or of the largest that is found.

    None where none is found.
    """
    if picture.landmarks is not None:
        # Only the landmarks are known, and a recogniser that wants a box gets the one they would have.
        corners = np.concatenate([picture.landmarks.min(axis=0), picture.landmarks.max(axis=0)])
        middle, reach = corners.reshape(2, 2).mean(axis=0), np.ptp(corners.reshape(2, 2), axis=0).max()
        box = np.concatenate([middle - reach, middle + reach]).astype(np.float32)
        faces = [Face(box, picture.landmarks, 1.0)]
    else:
        found = find_faces(picture.image, detector)
        faces = [max(found, key=lambda face: face.area)] if found else []
    return recogniser.embed(picture.image, faces)[0] if faces else None


# ---------------------------------------------------------------------------------------------------------------- CLIP


@dataclass(frozen=True)
class Clip:
    """Compares pictures with texts. encode_text: to embeddings (n, d) of unit length; encode_image: to those, and to
    features (n, d') for FID, which are pooled but not projected."""

    name: str
    encode_text: Callable[[Sequence[str]], Floats]
    encode_image: Callable[[Sequence[Image]], tuple[Floats, Floats]]


def load_clip(
    choice: str, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device | str = "cpu"
) -> Clip:
    """CLIP by "NAME:FILE", open_clip's name of a model and its weights ("ViT-L-14:ViT-L-14.pt"), or by the path of a
    world's vision file, whose text tower is the evaluated model's own text encoder.

    Raises PortraitError for a file that is not there, or does not belong to that text encoder.
    """
    name, colon, place = choice.partition(":")
    if colon and not Path(choice).is_file():
        return _open_clip(name, _file(place, "clip", "NAME:FILE"), device)
    return _world_clip(_file(choice, "clip", "NAME:FILE or a file"), text_encoder, tokenizer, device)


def _world_clip(path: Path, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device | str) -> Clip:
    checkpoint = read_tensors(path, "vision")
    tower, tensors = _tower(checkpoint.tensors, checkpoint.metadata, path).to(device), checkpoint.tensors
    projections = {name: tensors.get(f"{name}_projection.weight") for name in ("visual", "text")}
    visual, text = projections["visual"], projections["text"]
    if visual is None or text is None:
        raise PortraitError("clip", f"{path.name} has no projections", "Use the export of the recipe vision.")
    if text.shape[1] != text_encoder.config.hidden_size:
        raise PortraitError(
            "clip",
            f"{path.name} was trained with a text encoder of width {text.shape[1]}, the model's has "
            f"{text_encoder.config.hidden_size}",
            "Use the vision tower of the same world, or an open_clip model.",
        )
    visual, text = visual.float().to(device), text.float().to(device)
    last = tokenizer.eos_token_id

    @torch.no_grad()
    def encode_text(captions: Sequence[str]) -> Floats:
        ids = tokenizer(
            list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = text_encoder(ids.to(text_encoder.device)).last_hidden_state.float().to(device)
        ends = (ids == last).int().argmax(dim=1).to(device)
        return _unit_length(states[torch.arange(len(ends)), ends] @ text.T)

    @torch.no_grad()
    def encode_image(images: Sequence[Image]) -> tuple[Floats, Floats]:
        side = tower.config.image_size
        # As the tower was trained: plain bilinear, without anti-aliasing.
        small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in images]
        pooled = tower(pixel_values=clip_view(pixels_of(small)).to(device)).pooler_output.float()
        return _unit_length(pooled @ visual.T), pooled.cpu().numpy().astype(np.float64)

    return Clip(path.stem, encode_text, encode_image)


def _tower(tensors: dict[str, Tensor], settings: dict[str, str], path: Path) -> CLIPVisionModel:
    """The whole tower of a world's vision file, last layer and pooling included; its sizes are read off the tensors."""
    named = beside(tensors, "embeddings.class_embedding")
    try:
        patches = named["embeddings.patch_embedding.weight"]
        grid = round((len(named["embeddings.position_embedding.weight"]) - 1) ** 0.5)
        config = CLIPVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=len(named["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in named),
            num_attention_heads=int(settings["heads"]),
            image_size=grid * patches.shape[-1],
            patch_size=patches.shape[-1],
            hidden_act=settings["activation"],
        )
    except (KeyError, ValueError) as error:
        raise PortraitError(
            "clip", f"{path.name} is no vision tower of a world ({error!r})", "Use the export of the recipe vision."
        ) from None
    tower = CLIPVisionModel(config)
    # transformers 5 has the layers in the model itself, earlier ones in `vision_model` within it.
    fill(getattr(tower, "vision_model", tower), named, path.name)
    return tower.float().eval()


def _open_clip(name: str, path: Path, device: torch.device | str) -> Clip:
    try:
        import open_clip
    except ImportError:
        raise PortraitError(
            "clip", "open_clip is not installed", "Run: pip install open_clip_torch, or use the world's own."
        ) from None
    if name not in open_clip.list_models():
        raise PortraitError("clip", f"open_clip knows no model {name!r}", "Use one of its names, such as ViT-L-14.")
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None, device=device)
    # Read here, for open_clip would also take pickles that run code.
    tensors = read_tensors(path).tensors
    check_finite(tensors, path.name)
    missing, _ = model.load_state_dict(tensors, strict=False)
    if missing:
        raise PortraitError("clip", f"{path.name} lacks {missing[0]}", f"Give the weights of {name}.")
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode_text(captions: Sequence[str]) -> Floats:
        return _unit_length(model.encode_text(tokenizer(list(captions)).to(device)))

    @torch.no_grad()
    def encode_image(images: Sequence[Image]) -> tuple[Floats, Floats]:
        batch = torch.stack([preprocess(PILImage.fromarray(image)) for image in images]).to(device)
        features = model.encode_image(batch).float()
        return _unit_length(features), features.cpu().numpy().astype(np.float64)

    return Clip(f"{name} ({path.stem})", encode_text, encode_image)


def _file(text: str | Path, field: str, wanted: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise PortraitError(field, f"there is no file {path}", f"Give {wanted}.")
    return path
