"""Train: adapters for Stable Diffusion, or the networks of the embedded world.

portrait.py train uniportrait --data SHARDS --output RUN ...
portrait.py train RECIPE --help                           all options of a recipe

Started again with the same options, a run goes on where it stopped. Several GPUs, or several processes on the CPU:
.venv/bin/accelerate launch --multi_gpu --num_processes 2 portrait.py train ...
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from lib_portrait.methods.declarations import ADAPTED

REQUIREMENTS = "train"


def configure(parser: argparse.ArgumentParser) -> None:
    worlds = "vae, recognition, vision, base, attributes, detector"
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(ADAPTED)}; of the world: {worlds}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the recipe; --help after its name")


def run(options: argparse.Namespace) -> int:
    from trainer.loop import Settings, seeded, train
    from trainer.recipes import RECIPES, recipe_module

    if options.recipe not in RECIPES:
        print(f"portrait.py train: there is no recipe {options.recipe!r}; there are: {', '.join(RECIPES)}")
        return 2
    module = recipe_module(options.recipe)
    parser = argparse.ArgumentParser(
        prog=f"portrait.py train {options.recipe}",
        description=module.__doc__,
        epilog=Settings.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, help="a shard (.tar), or a folder of shards")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(name, action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str, "Path": Path}[str(field.type)]
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            parser.add_argument(name, type=kind, required=required, default=default, help="default: %(default)s")
    module.configure(parser)
    chosen = parser.parse_args(options.arguments)
    settings = Settings(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Settings)})
    train(seeded(lambda: module.build(chosen), settings), settings)
    return 0
