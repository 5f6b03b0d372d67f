"""What a world's autoencoder keeps of a photo: sharpness, moles, freckles, whose face it is.

python -m trainer.evaluation.autoencoder runs/world/kit/world.safetensors --output runs/world/autoencoder.png
python -m trainer.evaluation.autoencoder runs/world/autoencoder/export/vae.safetensors

No method can draw what is lost here. People are held out; their first photo is the reference, the second one goes
through the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image as PILImage

from lib_portrait.checkpoints.formats import read_header, read_tensors
from lib_portrait.faces.weights import fitting
from lib_portrait.standalone.model import load_model
from trainer.architectures import vae_like
from trainer.evaluation.details import contrast_kept, share_kept, spots_of, visible_moles
from trainer.evaluation.instruments import Recogniser, embedding_of, open_recogniser
from trainer.evaluation.populations import HELD_OUT, SubjectPhoto, WorldPopulation, photograph
from trainer.world import render
from trainer.world.raster import OVERSAMPLING
from trainer.world.render import Image, person_renderers

MEASURING = Path(__file__).resolve().parents[2] / "models" / "world" / "world-measuring.safetensors"
# Pairs on the picture that shows some.
SHOWN = 6
Reconstruct = Callable[[Image], Image]


@dataclass(frozen=True)
class Kept:
    """Means over people. psnr in dB. moles: how many were seen, and the shares that are still there, and that are there
    where the photo had none. freckles: the contrast they have left, None where nobody has any.

    Cosines of embeddings: of the photo and of its reconstruction to the reference, and of one to the other.
    """

    people: int
    size: int
    psnr: float
    moles: int
    moles_kept: float
    moles_made_up: float
    freckles: float | None
    photo_to_reference: float | None
    after_to_reference: float | None
    photo_to_after: float | None


def measure_autoencoder(
    reconstruct: Reconstruct, size: int, people: int = 50, recogniser: Recogniser | None = None
) -> tuple[Kept, Image]:
    """What is kept, and a picture of the first photos, each beside what became of it.

    reconstruct: a picture (H, W, 3) uint8 to the same after encoding and decoding. size: of the pictures.
    """
    population = WorldPopulation(HELD_OUT, people, size)
    squared, kept, made_up, freckles, cosines = [], [], [], [], []
    pairs: list[Image] = []
    for person, index in enumerate(population.numbers):
        scene = photograph(index, 1)
        photo, bare, moles = visible_moles(scene, size)
        after = reconstruct(photo)
        squared.append(float(np.square(after.astype(float) - photo).mean()))
        kept += share_kept(photo, after, moles)
        if moles:
            made_up += share_kept(photo, reconstruct(bare), moles)
        (renderer,) = person_renderers(scene, size)
        left = contrast_kept(photo, after, spots_of(renderer, "freckles", 1 / OVERSAMPLING))
        freckles += [left] if left is not None else []
        if recogniser is not None:
            landmarks = render(scene, size).faces[0].landmarks
            shown = [population.photo(person, 0), SubjectPhoto(photo, landmarks), SubjectPhoto(after, landmarks)]
            # With known landmarks no detector is asked.
            one, two, three = (embedding_of(each, recogniser, None) for each in shown)  # type: ignore[arg-type]
            cosines.append([float(a @ b) for a, b in ((two, one), (three, one), (two, three))])  # type: ignore[operator]
        if len(pairs) < SHOWN:
            pairs.append(np.concatenate([photo, after], axis=1))
    likeness = np.array(cosines).mean(axis=0).tolist() if cosines else [None] * 3
    return Kept(
        people,
        size,
        10 * math.log10(255**2 / max(float(np.mean(squared)), 1e-9)),
        len(kept),
        float(np.mean(kept)) if kept else math.nan,
        float(np.mean(made_up)) if made_up else math.nan,
        float(np.mean(freckles)) if freckles else None,
        *likeness,
    ), np.concatenate([np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, len(pairs) - 1, 2)])


def through(vae: AutoencoderKL, device: str = "cpu") -> Reconstruct:
    """Encoding to the posterior's mean, and decoding."""
    vae = vae.to(device).eval()

    @torch.no_grad()
    def reconstruct(image: Image) -> Image:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1
        made = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0]
        whole = ((made + 1) * 127.5).round().clamp(0, 255).byte()
        return np.ascontiguousarray(whole.permute(1, 2, 0).cpu().numpy())

    return reconstruct


def open_autoencoder(file: Path) -> AutoencoderKL:
    """Of a world's checkpoint, or the export of the recipe vae, whose metadata hold a scaling_factor."""
    if "scaling_factor" not in read_header(file)[1]:
        return load_model(file).vae
    tensors = read_tensors(file).tensors
    vae = vae_like(tensors, file.name)
    vae.load_state_dict(fitting(vae, tensors, file.name))
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.autoencoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a world's checkpoint, or vae.safetensors of a run")
    parser.add_argument("--output", type=Path, help="picture of photos and what becomes of them")
    parser.add_argument("--size", type=int, default=256, help="of the pictures, default 256")
    parser.add_argument("--people", type=int, default=50, help="default 50")
    parser.add_argument("--recogniser", type=Path, default=MEASURING, help="default: the shipped world's")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    recogniser = open_recogniser(options.recogniser, options.device)
    reconstruct = through(open_autoencoder(options.file), options.device)
    kept, shown = measure_autoencoder(reconstruct, options.size, options.people, recogniser)
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(kept).items()}))
    if options.output is not None:
        PILImage.fromarray(shown).save(options.output)


if __name__ == "__main__":
    main()
