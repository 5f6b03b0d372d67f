"""Puts the trained networks of a world together in the form in which they are used: `python -m trainer.release --help`.

The folder then holds what `portrait.py generate` and the WebUI read: one Stable Diffusion checkpoint with its .yaml,
the adapter's files, the face networks, and photos of people that no training has seen. Its kit.json is brought up to
date with what lies there.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import ALONE, StoredFile, read_manifest, write_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import check_finite, fitting
from lib_portrait.standalone.model import load_model, make_model, save_model, text_encoder_of
from trainer.architectures import unet_like, vae_like, world_text_encoder
from trainer.companions import stored_file
from trainer.low_rank import of_rank
from trainer.recipes.base import latent_scale
from trainer.shards import encode_png
from trainer.world import Scene, render, sample_scene, world_person
from trainer.world.people import HELD_OUT_EVERY

# Photos of one person: the first is the reference of examples, the others are for several references.
PHOTOS = 4
PHOTO_SIZE = 256


def write_checkpoint(vae: Path, base: Path, target: Path) -> None:
    """The exports of the recipes `vae` and `base` as one file with ldm's names, and its .yaml."""
    stored = read_tensors(base)
    parts = {"vae": read_tensors(vae).tensors}
    for name in ("unet", "text_encoder"):
        parts[name] = {k.removeprefix(f"{name}."): t for k, t in stored.tensors.items() if k.startswith(f"{name}.")}
    networks = {
        "unet": unet_like(parts["unet"], stored.metadata, base.name),
        "text_encoder": world_text_encoder(),
        "vae": vae_like(parts["vae"], vae.name),
    }
    for name, network in networks.items():
        network.load_state_dict(fitting(network, parts[name], (vae if name == "vae" else base).name))
    networks["vae"].register_to_config(scaling_factor=latent_scale(vae))
    save_model(make_model(**networks), target)


def interpolate_adapters(first: Path, second: Path, share: float, target: Path) -> None:
    """The weights of an adapter file on the way from one to another that was trained on from it, at `share` of it.

    WiSE-FT (arXiv 2109.01903): what such a run has forgotten comes back sooner than what it has learned is lost. The
    metadata are the second's. Raises PortraitError for files of other layers, and a share that is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise PortraitError("between", f"a share of {share} was given", "Give one of 0 to 1.")
    begin, end = read_tensors(first), read_tensors(second)
    for one in (begin, end):
        check_finite(one.tensors, one.path.name)
    sizes = [{name: tensor.shape for name, tensor in one.tensors.items()} for one in (begin, end)]
    if sizes[0] != sizes[1]:
        raise PortraitError("between", f"{first} and {second} hold other layers", "Give two files of one lineage.")
    tensors = {
        name: torch.lerp(begin.tensors[name].float(), t.float(), share).half() for name, t in end.tensors.items()
    }
    write_tensors(target, tensors, {**end.metadata, "between": f"{share:g} of the way from another run"})


def reduce_rank(file: Path, rank: int, target: Path) -> None:
    """An adapter file with LoRAs of that rank, the nearest to its own, in the precision that it has.

    Raises PortraitError for a file that has none of a greater rank, and for a rank below 1.
    """
    if rank < 1:
        raise PortraitError("rank", f"{rank} was given", "Give a whole number of 1 or more.")
    stored = read_tensors(file)
    check_finite(stored.tensors, file.name)
    tensors = of_rank(stored.tensors, rank)
    if all(tensor is tensors[name] for name, tensor in stored.tensors.items()):
        raise PortraitError("rank", f"{file.name} has no LoRA of a rank above {rank}", "Take the file as it is.")
    stated = {name: tensors[name].to(tensor.dtype).contiguous() for name, tensor in stored.tensors.items()}
    write_tensors(target, stated, {**stored.metadata, "reduced": f"LoRA reduced to rank {rank}"})


def renew_manifest(folder: Path) -> None:
    """Brings the kit.json in `folder` up to date with the files it names there: their content, the checkpoint's sizes.

    What it says of files that are not there stays. Raises PortraitError for a manifest or checkpoint that is refused.
    """
    kit = read_manifest(folder / ALONE)

    def renewed(file: StoredFile) -> StoredFile:
        path = folder / file.name
        return stored_file(path) if path.is_file() else file

    kit = dataclasses.replace(
        kit,
        encoders={role: renewed(file) for role, file in kit.encoders.items()},
        detector=kit.detector and renewed(kit.detector),
        measuring=kit.measuring and renewed(kit.measuring),
        attributes=kit.attributes and renewed(kit.attributes),
        base=kit.base and renewed(kit.base),
    )
    if kit.base is not None and (folder / kit.base.name).is_file():
        model = load_model(folder / kit.base.name)
        text_encoder = text_encoder_of(model.text_encoder)
        kit = dataclasses.replace(kit, text_encoder=text_encoder, picture=(model.size, model.size))
    write_manifest(folder / ALONE, kit)


def write_photos(folder: Path, people: int) -> None:
    """WORD-NUMBER-K.png: photo K of held-out person NUMBER, a plain photograph of one person."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(people):
        number = place * HELD_OUT_EVERY + HELD_OUT_EVERY - 1
        for k in range(PHOTOS):
            picture = render(_plain_scene(number, k), PHOTO_SIZE)
            (folder / f"{world_person(number).word}-{number:04d}-{k}.png").write_bytes(encode_png(picture.image, 9))


def _plain_scene(number: int, k: int) -> Scene:
    """The k-th scene of a person, in seed order, that is a clear photograph: no art style, age, hat or large turn."""
    found = -1
    for seed in range(number * 1000, number * 1000 + 1000):
        scene = sample_scene(seed, [world_person(number)])
        situation = scene.people[0].situation
        plain = scene.style == "photo" and scene.blur == scene.noise == scene.fade == 0 and situation.hat is None
        if plain and abs(situation.yaw) < 25:
            found += 1
        if found == k:
            return scene
    raise ValueError(f"person {number} has no {k + 1} plain photographs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.release", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models/world"))
    parser.add_argument("--vae", type=Path, help="vae.safetensors")
    parser.add_argument("--base", type=Path, help="base.safetensors")
    parser.add_argument("--photos", type=int, default=0, help="of how many held-out people to draw photos")
    parser.add_argument(
        "--between",
        nargs=3,
        metavar=("ADAPTER", "ADAPTER", "SHARE"),
        help="an adapter between two, the second trained on from the first, at that share of the way",
    )
    parser.add_argument("--rank", type=int, help="the files are adapters whose LoRA is to be brought down to this rank")
    parser.add_argument("files", type=Path, nargs="*", help="files to take as they are: adapters, face networks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.vae and options.base:
        write_checkpoint(options.vae, options.base, options.output / "world.safetensors")
    if options.photos:
        write_photos(options.output / "faces", options.photos)
    if options.between:
        first, second = map(Path, options.between[:2])
        interpolate_adapters(first, second, float(options.between[2]), options.output / second.name)
    for file in options.files:
        if options.rank is None:
            shutil.copyfile(file, options.output / file.name)
        else:
            reduce_rank(file, options.rank, options.output / file.name)
    if (options.output / ALONE).is_file():
        renew_manifest(options.output)


if __name__ == "__main__":
    main()
