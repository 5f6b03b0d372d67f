#!/usr/bin/env python3
"""The one command: `python portrait.py COMMAND ...`, on a bare machine with Python 3.10, 3.11 or 3.12.

It needs nothing installed: until it runs in its own environment (`.venv` beside this file, or where PORTRAIT_VENV says)
it is standard library only. The environment is made, and its pinned packages are installed, when a command first needs
them and again when the pins change; otherwise nothing here touches the network.

A command is a module in the package that it drives. It is read before there is an environment, so it imports the
standard library only at its top; what it works with it imports when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 10), (3, 12)
MARK = ".made-by-portrait"
# Each has `configure(parser)`, `run(options) -> exit status` and REQUIREMENTS; the first line of its docstring tells
# what it does.
COMMANDS = {
    "generate": "lib_portrait.commands.generate",
    "train": "trainer.commands.train",
    "evaluate": "trainer.commands.evaluate",
    "dataset": "trainer.commands.dataset",
    "test": "tests.command",
    "bench": "benchmarks.command",
    "convert": "lib_portrait.commands.convert",
    "download": "lib_portrait.commands.download",
}
# What a command may ask for, and the files of requirements/ (each with an optional NAME-no-deps.txt) that make it up.
REQUIREMENTS = {
    "standalone": ("standalone",),
    "train": ("standalone", "train"),
    "ray": ("standalone", "train", "ray"),
    "dev": ("standalone", "train", "dev"),
}


def main(arguments: list[str]) -> int:
    """Run one command; the exit status is 0 for success, 1 for failure, 2 for a command line that makes no sense.

    Without a command it tells which there are, which is a success.
    """
    # Help and mistakes are answered at once, without an environment.
    options = parse(arguments)
    environment = Path(os.environ.get("PORTRAIT_VENV") or ROOT / ".venv").expanduser().absolute()
    try:
        ensure(environment, options.requirements)
        if inside(environment):
            return run(options)
        return hand_over(environment, arguments)
    except KeyboardInterrupt:
        return 130


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
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
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
    from lib_portrait.errors import PortraitError

    try:
        return int(options.run(options))
    except PortraitError as error:
        print(f"portrait.py: {error.detail}", file=sys.stderr)
        return 1


def ensure(environment: Path, wanted: str) -> None:
    """Make the environment and install what is `wanted` (a key of REQUIREMENTS), unless that was done before.

    Two commands that start at once do not get in each other's way: the second waits for the first.
    """
    if fresh(environment, wanted):
        return
    environment.parent.mkdir(parents=True, exist_ok=True)
    with locked(environment.with_name(environment.name + ".lock")):
        if fresh(environment, wanted):
            return
        if not works(environment):
            create(environment)
        install(environment, wanted)


def fresh(environment: Path, wanted: str) -> bool:
    """Whether the environment holds what the requirement files say now. "dev" holds all that others do, but for Ray."""
    if not interpreter(environment).exists():
        return False
    return any(
        stamp(environment, name).is_file() and stamp(environment, name).read_text() == digest(environment, name)
        for name, parts in REQUIREMENTS.items()
        if set(parts) >= set(REQUIREMENTS[wanted])
    )


def stamp(environment: Path, name: str) -> Path:
    return environment / f".portrait-{name}"


def digest(environment: Path, name: str) -> str:
    """Of the requirement files and of the environment's Python, which `pyvenv.cfg` tells without starting it."""
    plain, alone = requirement_files(name)
    sha = hashlib.sha256()
    for file in (*plain, *alone, ROOT / "requirements" / "constraints.txt", environment / "pyvenv.cfg"):
        sha.update(file.read_bytes() + b"\0")
    return sha.hexdigest()


def requirement_files(name: str) -> tuple[list[Path], list[Path]]:
    """Files to install with what they depend on, and files to install with --no-deps."""
    folder = ROOT / "requirements"
    plain = [folder / f"{part}.txt" for part in REQUIREMENTS[name]]
    alone = [folder / f"{part}-no-deps.txt" for part in REQUIREMENTS[name]]
    return plain, [file for file in alone if file.is_file()]


def interpreter(environment: Path) -> Path:
    if sys.platform == "win32":
        return environment / "Scripts" / "python.exe"
    return environment / "bin" / "python"


def inside(environment: Path) -> bool:
    """Whether this very process runs in the environment."""
    return os.path.samefile(sys.prefix, environment)


def works(environment: Path) -> bool:
    """Whether the environment's Python starts, is of a supported version and has pip."""
    probe = f"import pip, sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    try:
        return subprocess.run([str(interpreter(environment)), "-c", probe], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def create(environment: Path) -> None:
    """An empty environment in that folder, in place of a broken one of ours. Nobody else's folder is ever cleared."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SystemExit(
            f"This is Python {version}. Run portrait.py with Python 3.10, 3.11 or 3.12, for example: "
            f"{'py -3.11' if sys.platform == 'win32' else 'python3.11'} portrait.py"
        )
    if environment.is_dir() and any(environment.iterdir()):
        if not (environment / MARK).is_file():
            raise SystemExit(
                f"{environment} is no working environment of Python 3.10-3.12, and this command did not make it. "
                "Move it away, or set PORTRAIT_VENV to another folder."
            )
        shutil.rmtree(environment)
    say(f"Making an environment with Python {version} in {environment}")
    environment.mkdir(exist_ok=True)
    (environment / MARK).touch()
    if subprocess.run([sys.executable, "-m", "venv", str(environment)], stdout=sys.stderr).returncode != 0:
        raise SystemExit(
            "Python could not make the environment (its message is above). "
            "On Debian and Ubuntu the package python3-venv is needed: apt install python3-venv"
        )


def install(environment: Path, wanted: str) -> None:
    """Bring the packages to the pinned versions. The stamp is written last: what was broken off is done again."""
    stamp(environment, wanted).unlink(missing_ok=True)
    plain, alone = requirement_files(wanted)
    say(f"Installing {', '.join(file.stem for file in (*plain, *alone))} into {environment}")
    say("The first time this fetches up to 3 GB, torch most of all, and takes some minutes.")
    options = ["--disable-pip-version-check", "--no-input", "--only-binary=:all:"]
    with_dependencies = ["-c", str(ROOT / "requirements" / "constraints.txt")]
    for files, how in ((plain, with_dependencies), (alone, ["--no-deps"])):
        named = [argument for file in files for argument in ("-r", str(file))]
        pip = [str(interpreter(environment)), "-m", "pip", "install", *options, *how, *named]
        # The command's own output alone goes to stdout: `bench` prints JSON there.
        if named and subprocess.run(pip, stdout=sys.stderr).returncode != 0:
            raise SystemExit(
                "The packages could not be installed (pip's message is above). "
                "Check the connection and the free disk space, then run the same command again."
            )
    unfinished = stamp(environment, wanted).with_suffix(".new")
    unfinished.write_text(digest(environment, wanted))
    unfinished.replace(stamp(environment, wanted))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file. The system gives it up with the process, so that a killed command blocks nobody."""
    with path.open("a+") as file:
        if not try_lock(file.fileno()):
            say(f"Waiting for another portrait.py, which is preparing the environment (it holds {path})")
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def hand_over(environment: Path, arguments: list[str]) -> int:
    """Go on with the same command line in the environment's Python."""
    command = [str(interpreter(environment)), str(ROOT / "portrait.py"), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":
        # There exec starts a second process and ends this one, and the shell does not wait for the second.
        return subprocess.call(command)
    os.execv(command[0], command)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
