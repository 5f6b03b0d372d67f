"""Turn a weight file into the format that the target's suffix names (.safetensors, or .bin .pt .pth .ckpt).

portrait.py convert uniportrait-faceid_sd15.bin uniportrait-faceid_sd15.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

REQUIREMENTS = "standalone"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="the weight file to read")
    parser.add_argument("target", type=Path, metavar="DST", help="the file to write; an existing one is not replaced")


def run(options: argparse.Namespace) -> int:
    from lib_portrait.checkpoints import convert

    print(f"Reading {options.source}", flush=True)
    made = convert(options.source, options.target)
    dtypes = ", ".join(made.dtypes)
    print(
        f"Wrote {made.path}: {made.role or 'tensors'}, {made.tensors} tensors of {dtypes}, {made.size / 2**20:.1f} MiB"
    )
    return 0
