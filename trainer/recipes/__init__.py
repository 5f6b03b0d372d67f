"""What can be trained: a module each, with its options and its `Recipe`."""

from __future__ import annotations

import importlib
from types import ModuleType

from lib_portrait.methods.declarations import ADAPTED

# Those of the world's own networks, and one for each method, of its name.
RECIPES = ("vae", "recognition", "vision", "base", *ADAPTED, "attributes", "detector")


def recipe_module(name: str) -> ModuleType:
    """The module of a recipe: `configure(parser)` adds its options, `build(options)` makes its Recipe."""
    return importlib.import_module(f"trainer.recipes.{name}")
