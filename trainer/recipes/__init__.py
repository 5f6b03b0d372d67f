"""What can be trained: a module each, with its options and its `Recipe`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lib_portrait.methods.declarations import ADAPTED

if TYPE_CHECKING:
    from trainer.loop import Settings

# Those of the world's own networks, and one for each method, of its name.
RECIPES = ("vae", "recognition", "vision", "base", *ADAPTED, "attributes", "detector")


def recipe_module(name: str) -> ModuleType:
    """The module of a recipe: `configure(parser)` adds its options, `build(options)` makes its Recipe.

    A method's may have WORLD_RUNS, how its adapter of the embedded world is trained, see `trainer.world_stages`.
    """
    return importlib.import_module(f"trainer.recipes.{name}")


def read_options(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """The options of a recipe as `portrait.py train` takes them, and the run's settings among them.

    Raises SystemExit for a command line that makes no sense, and PortraitError for settings that do not.
    """
    from trainer.loop import Settings

    module = recipe_module(name)
    parser = argparse.ArgumentParser(
        prog=f"portrait.py train {name}",
        description=module.__doc__,
        epilog=Settings.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, help="a shard (.tar), or a folder of shards")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str, "Path": Path}[str(field.type)]
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            parser.add_argument(flag, type=kind, required=required, default=default, help=f"default: {default}")
    module.configure(parser)
    options = parser.parse_args(arguments)
    return options, Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})


def train_recipe(name: str, arguments: Sequence[str]) -> Settings:
    """Trains a recipe as `portrait.py train NAME` does with these arguments; returns the run's settings."""
    from trainer.loop import seeded, train

    options, settings = read_options(name, arguments)
    train(seeded(lambda: recipe_module(name).build(options), settings), settings)
    return settings
