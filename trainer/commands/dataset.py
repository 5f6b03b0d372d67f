"""Make shards to train on, from photos or from the world, and check them.

portrait.py dataset photos FOLDER --output SHARDS   photos of people, in a folder for each person or in any others
portrait.py dataset world --output SHARDS --number 64000
portrait.py dataset features SHARDS --checkpoint MODEL --backbone FILE --vision FILE
                                                    what frozen networks make of them, which training reads
portrait.py dataset check SHARDS                    what shards hold, and which samples cannot be used

Started again, a command that was broken off goes on with the first shard that is missing.
With --engine ray, photos and features are made by Ray, on this machine or a cluster; the shards are the same.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

REQUIREMENTS = "train"
RAY_REQUIREMENTS = "ray"


class Engine(argparse.Action):
    """What is asked for also says what must be installed."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.engine = values
        namespace.requirements = RAY_REQUIREMENTS if values == "ray" else REQUIREMENTS


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="dataset", metavar="KIND", required=True)
    photos = _kind(kinds, "photos", _photos, "shards of a folder of photos")
    photos.add_argument("folder", type=Path, metavar="FOLDER", help="photos at any depth; FOLDER/alice/*.jpg are alice")
    photos.add_argument("--size", type=int, default=512, help="side of the written pictures, default 512")
    photos.add_argument(
        "--caption",
        default="a photo of a {word}",
        help="where there is no PHOTO.txt beside PHOTO.jpg; {word} becomes woman, man, person or group of people",
    )
    photos.add_argument("--kind", choices=("jpg", "webp", "png"), default="jpg", help="default jpg")
    photos.add_argument("--quality", type=int, default=95, help="of jpg and webp, 1 to 100, default 95")
    photos.add_argument("--smallest-face", type=int, default=48, help="width in the written picture, default 48 pixels")
    photos.add_argument("--no-identities", action="store_true", help="the folders are not named after people")
    photos.add_argument(
        "--detector", metavar="NAME|FILE", help="insightface, mtcnn or a kit's detector; default: the best there is"
    )
    photos.add_argument("--keypoints", type=Path, metavar="FILE", help="Keypoint R-CNN, for poses")
    photos.add_argument("--parser", type=Path, metavar="FILE", help="face parser; for masks of the faces")
    photos.add_argument("--device", default="cpu", help="of kits' detectors and --keypoints, default cpu")
    filters = photos.add_argument_group("filters", "photos that do not pass are counted in NAME-report.md")
    filters.add_argument("--least-side", type=int, default=0, metavar="PIXELS", help="of the photo; default: --size")
    filters.add_argument("--least-faces", type=int, default=1, metavar="N", help="default 1")
    filters.add_argument("--most-faces", type=int, default=8, metavar="N", help="default 8; both alike: exactly N")
    filters.add_argument(
        "--face-share",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LEAST", "MOST"),
        help="part of the photo's area that its largest face covers, default 0 1",
    )
    filters.add_argument(
        "--sharpness", type=float, default=0.0, metavar="LEAST", help="of the largest face, such as 0.05; default 0"
    )
    filters.add_argument("--nouns", action="store_true", help="only photos whose caption has a word for a person")
    world = _kind(kinds, "world", _world, "shards of the drawn world")
    world.add_argument("--number", type=int, required=True, help="of pictures")
    world.add_argument("--first", type=int, default=0, help="number of the first scene, a multiple of --shard")
    world.add_argument("--identities", type=int, default=6000, help="people that appear, default 6000")
    world.add_argument("--size", type=int, default=128, help="side of the pictures, default 128")
    world.add_argument("--poses", action="store_true", help="with everybody's pose, for methods with a ControlNet")
    world.add_argument("--kind", choices=("png", "bmp"), default="png", help="bmp is larger, and read faster")
    for name, parser in (("photos", photos), ("world", world)):
        parser.add_argument("--output", type=Path, required=True, metavar="SHARDS", help="folder for the shards")
        parser.add_argument("--name", default=name, help=f"of the shards, NAME-00000.tar; default {name}")
        parser.add_argument("--shard", type=int, default=1000, help="samples in a shard, default 1000")
    features = _kind(kinds, "features", _features, "latents, tokens and face features, computed once")
    features.add_argument("data", type=Path, metavar="SHARDS", help="a shard, or a folder of shards")
    features.add_argument("--checkpoint", type=Path, help="single-file model that the adapter is for; gives the VAE")
    features.add_argument("--vae", type=Path, help="instead: vae.safetensors, as exported by the recipe vae")
    features.add_argument("--backbone", type=Path, help="recognition network; with --vision, for faces")
    features.add_argument("--vision", type=Path, help="image encoder")
    features.add_argument(
        "--references",
        type=int,
        default=0,
        metavar="SIZE",
        help="also the latents of the square about each face, of so many pixels; default: none",
    )
    features.add_argument(
        "--image", type=Path, metavar="FILE", help="image encoder whose embedding of each whole face is wanted"
    )
    features.add_argument(
        "--parser",
        type=Path,
        metavar="FILE",
        help="face parser that says where --image's faces are in pictures without masks; default: their landmarks",
    )
    features.add_argument("--batch", type=int, default=16, help="pictures at once, default 16")
    features.add_argument("--device", help="default: cuda where there is one")
    features.add_argument("--processes", type=int, help="shards at once, each with its networks; default 1")
    check = _kind(kinds, "check", _check, "what shards hold")
    check.add_argument("data", type=Path, metavar="SHARDS", help="a shard, or a folder of shards")
    check.add_argument("--list", type=Path, metavar="FILE", help="where to write a line for each fault")
    for parser in (world, check):
        parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    photos.add_argument("--processes", type=int, help="default: one for each core")
    for parser in (photos, features):
        parser.add_argument("--engine", choices=("local", "ray"), default="local", action=Engine, help="default local")
        parser.add_argument(
            "--ray-address", metavar="HOST:PORT", help="head of a Ray cluster, or auto; default: this machine alone"
        )


def _kind(kinds: argparse._SubParsersAction, name: str, run, summary: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(make=run)
    return parser


def run(options: argparse.Namespace) -> int:
    return int(options.make(options))


def _photos(options: argparse.Namespace) -> int:
    from trainer.engines import engine_of
    from trainer.photos import PhotoSettings, make_photos

    photos = PhotoSettings(
        size=options.size,
        caption=options.caption,
        kind=options.kind,
        quality=options.quality,
        smallest_face=options.smallest_face,
        most_faces=options.most_faces,
        identities=not options.no_identities,
        detector=options.detector,
        shard=options.shard,
        least_side=options.least_side,
        least_faces=options.least_faces,
        face_share=tuple(options.face_share),
        sharpness=options.sharpness,
        nouns=options.nouns,
        keypoints=options.keypoints,
        parser=options.parser,
        device=options.device,
    )
    processes = options.processes if options.processes is not None or options.engine == "ray" else os.cpu_count() or 1
    engine = engine_of(options.engine, options.device, processes, options.ray_address)
    made = make_photos(options.folder, options.output, photos, options.name, engine)
    print(f"{made.samples} samples in {options.output} ({options.name}-report.md says what became of all photos)")
    if made.skipped:
        print(f"{len(made.skipped)} photos were skipped ({options.output / f'{options.name}-skipped.txt'} lists them):")
        _print_counts(Counter(one.reason for one in made.skipped))
    if made.notices:
        print(f"Of others there is something to say ({options.output / f'{options.name}-notices.txt'} lists them):")
        _print_counts(Counter(line.rpartition(": ")[2] for line in made.notices))
    return 0 if made.samples else 1


def _world(options: argparse.Namespace) -> int:
    from trainer.dataset import WorldSettings, make_world

    world = WorldSettings(
        options.first, options.number, options.identities, options.size, options.shard, options.poses, options.kind
    )
    made = make_world(options.output, world, options.name, options.processes)
    print(f"{made} shards were made, {-(-options.number // options.shard) - made} were there already")
    return 0


def _features(options: argparse.Namespace) -> int:
    from trainer.engines import engine_of
    from trainer.frozen import NetworkFiles, default_device, precompute_shards
    from trainer.shards import Shards

    files = NetworkFiles(
        options.checkpoint, options.vae, options.backbone, options.vision, options.image, options.parser
    )
    device, paths = options.device or default_device(), Shards.under(options.data).paths
    engine = engine_of(options.engine, device, options.processes, options.ray_address)
    counts = precompute_shards(paths, files, device, options.references, options.batch, engine)
    print(f"{counts['shards']} shards: {counts['pictures']} pictures, {counts['faces']} faces")
    if counts["unusable"]:
        print(f"{counts['unusable']} pictures cannot be used; portrait.py dataset check {options.data} says why")
    return 0


def _check(options: argparse.Namespace) -> int:
    """1 when there is something that cannot be used."""
    from trainer.dataset import check_shards

    report = check_shards(options.data, options.processes)
    people = ", ".join(f"{count} with {number}" for number, count in sorted(report.people.items()))
    print(f"{report.samples} samples in {report.shards} shards; by number of faces: {people}")
    print(f"{report.faces} faces, {report.unlabelled} of them of nobody known; {len(report.identities)} people")
    for title, counts in (("cannot be used", report.unusable), ("doubtful", report.doubtful)):
        print(f"{title}: {sum(counts.values())}")
        _print_counts(counts)
    if options.list is not None:
        options.list.write_text("".join(line + "\n" for line in report.list), encoding="utf-8")
    return 1 if report.unusable else 0


def _print_counts(counts: Counter[str]) -> None:
    for reason, count in counts.most_common():
        print(f"  {count:6d}  {reason}")
