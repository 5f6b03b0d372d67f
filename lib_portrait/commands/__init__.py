"""The sub-commands of `portrait.py`: their arguments here and in one module each.

`parse` runs before there is an environment, so these modules import only the standard library at their top; what a
command works with it imports when it runs.
"""

from __future__ import annotations

import argparse
import sys

from lib_portrait.commands import bench, convert, dataset, download, evaluate, generate, test, train
from lib_portrait.errors import PortraitError

COMMANDS = {
    "generate": generate,
    "train": train,
    "evaluate": evaluate,
    "dataset": dataset,
    "test": test,
    "bench": bench,
    "convert": convert,
    "download": download,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line as a namespace: `run` is the command's function, `requirements` what it needs installed.

    Prints and raises SystemExit for --help and for no words at all (0), and for a command line that makes no sense (2).
    """
    parser = argparse.ArgumentParser(
        prog="portrait.py",
        description="Portrait: real people in generated pictures.",
        epilog="portrait.py COMMAND --help tells more.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = names.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.set_defaults(run=module.run, requirements=module.REQUIREMENTS, others=None)
        module.configure(command)
    # Who gives no word at all asks what there is.
    options, others = parser.parse_known_args(arguments or ["--help"])
    if options.others is not None:
        options.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def run(options: argparse.Namespace) -> int:
    """Run a parsed command and return its exit status. What the user did wrong is one line, not a traceback."""
    try:
        return int(options.run(options))
    except PortraitError as error:
        print(f"portrait.py: {error.detail}", file=sys.stderr)
        return 1
