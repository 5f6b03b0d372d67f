"""`python -m trainer.world`: contact sheets of the world, and how fast it is rendered."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from .bench import bench
from .contact_sheet import contact_sheet


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="write a contact sheet")
    sheet.add_argument("--out", type=Path, required=True, help="the picture file to write")
    sheet.add_argument("--identities", type=int, default=8)
    sheet.add_argument("--situations", type=int, default=6)
    sheet.add_argument("--groups", type=int, default=1, help="rows with 2 to 4 people a picture")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--size", type=int, default=256)
    sheet.add_argument("--truth", action="store_true", help="draw masks, boxes and landmarks")
    speed = commands.add_parser("bench", help="print pictures a second as a line of JSON")
    speed.add_argument("--size", type=int, default=128)
    speed.add_argument("--pictures", type=int, default=400)
    speed.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        print(json.dumps(bench(options.size, options.pictures, options.processes)))
        return 0
    image = contact_sheet(
        options.identities, options.situations, options.seed, options.size, options.groups, options.truth
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
