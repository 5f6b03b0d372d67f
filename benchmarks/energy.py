"""`portrait.py bench energy`: whether RB-Guidance does to the energy what it is for, in the embedded world.

Seeded runs over the world's people, without a method: one photo each, the face found in the first guided step's
prediction. A run is drawn twice, with the guidance asked for and with as good as none of it. One line a run with the
mean over the pairs of eq. 8 at each guided step, of which the energy is a falling function; and a last line with the
shares of runs in which the energy fell from the first guided step to the last ("falls"), and in which it is lower at
the last step than without guidance ("lower"): it changes along the steps by itself, too.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.reference import GuidedStep
from lib_portrait.methods.declarations import declarations
from lib_portrait.request import parse_request
from lib_portrait.standalone.generation import PortraitPipeline
from lib_portrait.standalone.sampling import sample

WORLD = Path(__file__).resolve().parents[1] / "models" / "world"
# The method that draws nobody by itself.
BARE = next(one.name for one in declarations() if not one.has_adapter)
PROMPT = "a photo of a {} in a park"
# A gradient of this strength changes no digit that counts.
NOTHING = 1e-6


def drawn(
    pipeline: PortraitPipeline, photo: Path, guidance: Mapping[str, Any], seed: int, steps: int
) -> list[GuidedStep]:
    """What guidance did while a picture of the person on a photo was drawn; nothing where it found no face."""
    person = {"photos": [base64.b64encode(photo.read_bytes()).decode()]}
    request = parse_request({"method": BARE, "identities": [person], "guidance": {"enabled": True, **guidance}})
    word = photo.stem.partition("-")[0]
    sampling = pipeline.sampling(PROMPT.format(word), {"seed": seed, "steps": steps})
    size = (sampling.width, sampling.height)
    conditioning = pipeline.conditioner.prepare(request, size, pipeline.device, pipeline.dtype)
    done: list[GuidedStep] = []
    try:
        sample(pipeline.model, [sampling], conditioning, guided=lambda steps, notices: done.extend(steps))
    except PortraitError as error:
        print(error, file=sys.stderr)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="portrait.py bench energy", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="default 100")
    parser.add_argument("--steps", type=int, default=20, help="of a sampling, default 20")
    parser.add_argument("--guidance", type=json.loads, default={}, help="as in a request: an object of its options")
    options = parser.parse_args(argv)
    pipeline = PortraitPipeline(WORLD / "world.safetensors", [WORLD], "cpu")
    photos = sorted((WORLD / "faces").glob("*-0.png"))
    falls, lower = [], []
    for seed in range(options.runs):
        photo = photos[seed % len(photos)]
        both = [
            drawn(pipeline, photo, {**options.guidance, **strength}, seed, options.steps)
            for strength in ({}, {"strength": NOTHING})
        ]
        guided, without = ([round(float(step.similarity[0] or 0), 5) for step in own] for own in both)
        if not guided or not without:
            continue
        falls.append(guided[-1] > guided[0])
        lower.append(guided[-1] > without[-1])
        print(json.dumps({"name": "energy", "seed": seed, "guided": guided, "without": without}), flush=True)
    runs = len(falls)
    shares = {"falls": sum(falls) / runs, "lower": sum(lower) / runs} if runs else {}
    print(json.dumps({"name": "energy", "runs": runs, "guidance": options.guidance, **shares}))
    return 0 if runs else 1


if __name__ == "__main__":
    sys.exit(main())
