"""Train: adapters for Stable Diffusion, or the networks of the embedded world.

portrait.py train uniportrait --data SHARDS --output RUN ...
portrait.py train RECIPE --help                           all options of a recipe
portrait.py train world --output RUNS                     the embedded world from nothing: all of its recipes in turn

Started again with the same options, a run goes on where it stopped. Several GPUs, or several processes on the CPU:
.venv/bin/accelerate launch --multi_gpu --num_processes 2 portrait.py train ...
"""

from __future__ import annotations

import argparse

from lib_portrait.methods.declarations import ADAPTED

REQUIREMENTS = "train"
WORLD = "world"


def configure(parser: argparse.ArgumentParser) -> None:
    worlds = "vae, recognition, vision, base, attributes, detector"
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(ADAPTED)}; of the world: {worlds}; all: {WORLD}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the recipe; --help after its name")


def run(options: argparse.Namespace) -> int:
    from trainer.recipes import RECIPES, train_recipe

    if options.recipe == WORLD:
        from trainer import world_stages
        from trainer.evaluation.world import evaluate_world

        return world_stages.main(options.arguments, evaluate_world)
    if options.recipe not in RECIPES:
        there = ", ".join((*RECIPES, WORLD))
        print(f"portrait.py train: there is no recipe {options.recipe!r}; there are: {there}")
        return 2
    train_recipe(options.recipe, options.arguments)
    return 0
