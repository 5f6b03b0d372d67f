"""A world trained on a GPU machine that is lent for a quarter of an hour and has no network.

Its Python has torch; what else is needed is carried there in a folder of at most a few ten megabytes. What it makes
comes back in files of at most PART bytes, PARTS of them for each command, the others by further ones:

python3 -m trainer.lent_gpu gather .whl                              here, before: wheels and libraries into a folder
python3 -m trainer.lent_gpu run --carried .whl --minutes 8 --out "$OUT"     there: train, and give the first files
python3 -m trainer.lent_gpu send --first 4 --out "$OUT"              there: the next ones, and so on
python3 -m trainer.lent_gpu take FOLDER... --output runs/world       here: put together, check, put in its place

A `portrait.py train world --output runs/world` then goes on with what is missing: evaluation and sheet, or more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What comes back at once, and with one command.
PART, PARTS = 15 * 2**20, 4
INDEX = "parts.json"
ARCHIVE = "world.tar"
# Characters of each stage's output.
LOG = 6000
# What the machine's Python lacks, of requirements/standalone.txt, and the libraries that skia wants to find.
WHEELS = ("diffusers", "skia-python")
LIBRARIES = "libgl1 libegl1 libglvnd0 libglx0 libx11-6 libxcb1 libxau6 libxdmcp6 libbsd0 libmd0 libexpat1"
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
SITE, LIBRARY_ROOT = Path("/tmp/portrait-site"), Path("/tmp/portrait-libraries")
# Seconds to save after being asked to end; stages have a few less, see `trainer.stages`.
SAVING = 38
KIT, CHECKPOINT = "kit", "kit/world.safetensors"
# Networks that are in the kit as their stages exported them; and stages whose results stay on the machine.
IN_KIT = ("recognition", "measuring", "vision", "detector", "attributes")
LEFT_BEHIND = ("pictures", "latents", "faces")


# ------------------------------------------------------------------------------------------------------------- here


def gather(folder: Path) -> None:
    """Downloads what the machine lacks into a folder that can be carried there."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = (ROOT / "requirements" / "standalone.txt").read_text("utf-8").splitlines()
    wanted = [next(pin.partition(";")[0].strip() for pin in pins if pin.startswith(f"{name}==")) for name in WHEELS]
    platforms = [text for one in PLATFORMS for text in ("--platform", one)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    target = ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*pip, *target, *wanted], check=True)
    subprocess.run(["apt-get", "download", *LIBRARIES.split()], cwd=folder, check=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{len(list(folder.iterdir()))} files, {size / 2**20:.0f} MiB in {folder}")


def take(folders: Sequence[Path], output: Path) -> None:
    """Puts the files that came back together, checks them, and puts what they hold into `output`.

    Raises PortraitError for files that are missing or damaged, and for an output that holds a world already.
    """
    from lib_portrait.errors import PortraitError

    if (output / "stages").exists():
        raise PortraitError("output", f"{output} holds a world already", "Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    archive = output / ARCHIVE
    join(folders, archive)
    with tarfile.open(archive) as tar:
        tar.extractall(output, filter="data")
    archive.unlink()
    for name in LEFT_BEHIND:
        (output / "stages" / f"{name}.json").unlink(missing_ok=True)
    if (output / CHECKPOINT).is_file():
        _exports_of_kit(output)


def join(folders: Sequence[Path], target: Path) -> None:
    """The parts in the folders as the one file they were; each, and all, as the index says.

    Raises PortraitError for no index, several different ones, and parts that are missing or not whole.
    """
    from lib_portrait.errors import PortraitError

    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    indexes = {file.read_text("utf-8") for file in files if file.name == INDEX}
    if len(indexes) != 1:
        raise PortraitError(
            INDEX, f"there are {len(indexes)} different ones", "Give all folders of one run, and no other."
        )
    index = json.loads(indexes.pop())
    there = {file.name: file for file in files}
    lacking = [name for name in index["parts"] if name not in there]
    if lacking:
        raise PortraitError("parts", f"{', '.join(lacking)} did not come back", "Fetch them: `send --first N`.")
    whole = hashlib.sha256()
    part = target.with_suffix(".part")
    with part.open("wb") as out:
        for name, expected in index["parts"].items():
            data = there[name].read_bytes()
            if hashlib.sha256(data).hexdigest() != expected:
                raise PortraitError(name, "it is damaged", "Fetch it once more.")
            whole.update(data)
            out.write(data)
    if whole.hexdigest() != index["sha256"]:
        raise PortraitError(INDEX, "the whole is not what was packed", "Pack it once more.")
    os.replace(part, target)


def _exports_of_kit(output: Path) -> None:
    """The exports that were left out because the kit holds the same: of the networks, of autoencoder and base model."""
    from lib_portrait.checkpoints.formats import write_tensors
    from lib_portrait.standalone.model import load_model

    for name in IN_KIT:
        file, export = f"world-{name}.safetensors", output / name / "export"
        if (output / KIT / file).is_file() and not (export / file).is_file():
            export.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(output / KIT / file, export / file)
    model = load_model(output / CHECKPOINT)
    vae = {name: tensor.contiguous() for name, tensor in model.vae.state_dict().items()}
    # The encoder is the same in both; the decoder is the later one's.
    for stage in ("autoencoder", "decoder"):
        export = output / stage / "export"
        export.mkdir(parents=True, exist_ok=True)
        write_tensors(export / "vae.safetensors", vae, {"scaling_factor": str(model.vae.config.scaling_factor)})
    base = {f"unet.{name}": tensor.contiguous() for name, tensor in model.unet.state_dict().items()}
    base |= {f"text_encoder.{name}": tensor.contiguous() for name, tensor in model.text_encoder.state_dict().items()}
    facts = {"heads": str(model.unet.config.attention_head_dim), "latent": str(model.unet.config.sample_size)}
    export = output / "base" / "export"
    export.mkdir(parents=True, exist_ok=True)
    write_tensors(export / "base.safetensors", base, facts)


# -------------------------------------------------------------------------------------------------------------- there


def run(carried: Path | None, minutes: float, work: Path, out: Path, seconds: float, others: Sequence[str]) -> int:
    """Trains a world for so many minutes, and gives back the first files; its exit status.

    carried: the folder of `gather`. seconds: after which the training is asked to end whatever it does. others: further
    options of `portrait.py train world`.
    """
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    if carried is not None:
        environment |= install(carried)
        # Loaders pass samples on through it, and such a machine's memory looks small until it is used.
        subprocess.run(["mount", "-o", "remount,size=48G", "/dev/shm"], check=False)
    code = "import sys, portrait; sys.exit(portrait.run(portrait.parse(sys.argv[1:])))"
    command = [sys.executable, "-c", code, "train", "world", "--output", str(work), "--minutes", str(minutes)]
    # A GPU that torch does not see is no reason to train on the processor for ten minutes.
    command += [] if "--device" in others else ["--device", "cuda"]
    status = until(
        [*command, "--without", "evaluation", "--without", "sheet", *others],
        started + seconds - SAVING,
        environment,
    )
    print(f"trained for {time.monotonic() - started:.0f} s, exit status {status}", flush=True)
    pack(work, work / "parts")
    send(work / "parts", 0, out)
    # The ends of what the stages printed, for whoever looks for a fault.
    for log in sorted((work / "stages").glob("*.log")):
        with (out / "logs.txt").open("a", encoding="utf-8") as lines:
            lines.write(f"== {log.stem}\n{log.read_text('utf-8', 'replace')[-LOG:]}\n")
    print(f"all done after {time.monotonic() - started:.0f} s", flush=True)
    return status


def install(carried: Path) -> dict[str, str]:
    """Unpacks wheels and libraries, and returns the variables under which they are found."""
    wheels, libraries = sorted(carried.glob("*.whl")), sorted(carried.glob("*.deb"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--no-cache-dir", "--upgrade", "--target", str(SITE), *map(str, wheels)], check=True)
    for library in libraries:
        subprocess.run(["dpkg", "-x", str(library), str(LIBRARY_ROOT)], check=True)
    places = sorted({str(file.parent) for file in LIBRARY_ROOT.rglob("*.so.*")}) if libraries else []
    return {
        "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
        # The machine's own come first.
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH", ""), *places])),
    }


def until(command: Sequence[str], deadline: float, environment: dict[str, str]) -> int:
    """Runs a command, which is asked to end (SIGTERM) when the clock says so, and made to after SAVING seconds more."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        print("the time is over", flush=True)
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(SAVING)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def pack(work: Path, parts: Path) -> dict[str, object]:
    """Everything of a world that others go on with, as numbered parts and an index; returns that.

    Of the kit's files nothing comes twice: the networks are in it, and so are, when it has a checkpoint, autoencoder
    and base model. Without one these come as they were exported, in half precision.
    """
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    names: dict[str, str] = {}
    whole = hashlib.sha256()
    archive = parts / ARCHIVE
    with tarfile.open(archive, "w") as tar:
        for file in to_pack(work):
            tar.add(file, file.relative_to(work).as_posix(), filter=_nobodys)
    with archive.open("rb") as source:
        while data := source.read(PART):
            name = f"{ARCHIVE}.{len(names):03d}"
            (parts / name).write_bytes(data)
            names[name] = hashlib.sha256(data).hexdigest()
            whole.update(data)
    archive.unlink()
    index: dict[str, object] = {"parts": names, "sha256": whole.hexdigest()}
    (parts / INDEX).write_text(json.dumps(index), "utf-8")
    return index


def to_pack(work: Path) -> list[Path]:
    """The files of `pack`, relative to nothing: notes, logs, kit, and exports that are not in it."""
    kit = {file.name: file for file in (work / KIT).glob("*") if file.is_file()}
    found = [*sorted((work / "stages").glob("*.json")), *sorted((work / KIT).rglob("*"))]
    rebuilt = ("autoencoder", "decoder", "base") if (work / CHECKPOINT).is_file() else ()
    for run in sorted(path for path in work.iterdir() if path.is_dir() and path.name not in (KIT, "stages", "parts")):
        found += [file for name in ("losses.jsonl", "run.json") if (file := run / name).is_file()]
        if run.name in rebuilt:
            continue
        for file in sorted((run / "export").glob("*")):
            if file.name not in kit or file.read_bytes() != kit[file.name].read_bytes():
                found.append(_halved(file))
    return [file for file in found if file.is_file()]


def _halved(file: Path) -> Path:
    """An export whose large tensors are in half precision: the file itself, written anew where they were not."""
    if file.suffix != ".safetensors":
        return file
    import torch

    from lib_portrait.checkpoints.formats import read_tensors, write_tensors

    stored = read_tensors(file)
    if any(tensor.dtype == torch.float32 and tensor.ndim > 1 for tensor in stored.tensors.values()):
        halved = {k: t.half().contiguous() if t.dtype == torch.float32 else t for k, t in stored.tensors.items()}
        write_tensors(file, halved, stored.metadata)
    return file


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def send(parts: Path, first: int, out: Path) -> int:
    """Puts up to PARTS parts from number `first` on into `out`, with the index; returns the next one, 0 at the end."""
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((parts / INDEX).read_text("utf-8"))
    names = list(index["parts"])
    for name in (INDEX, *names[first : first + PARTS]):
        shutil.copyfile(parts / name, out / name)
    following = first + PARTS if first + PARTS < len(names) else 0
    says = f"; go on with: send --first {following}" if following else "; that is all"
    print(f"parts {first} to {min(first + PARTS, len(names)) - 1} of {len(names)}{says}", flush=True)
    return following


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m trainer.lent_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("gather", help="wheels and libraries into a folder")
    gathering.add_argument("folder", type=Path)
    running = commands.add_parser("run", help="train, and give the first files back")
    running.add_argument("--carried", type=Path, help="the folder of `gather`; default: nothing is lacking")
    running.add_argument("--minutes", type=float, default=8.0, help="of the training, default 8")
    running.add_argument(
        "--seconds", type=float, default=580.0, help="after which all ends, packing apart; default 580"
    )
    for one in (running, sending := commands.add_parser("send", help="further files")):
        one.add_argument("--work", type=Path, default=Path("/tmp/portrait-world"), help="default /tmp/portrait-world")
        one.add_argument("--out", type=Path, required=True, help="what lies there comes back")
    sending.add_argument("--first", type=int, required=True, help="number of the first part")
    taking = commands.add_parser("take", help="put what came back together")
    taking.add_argument("folders", type=Path, nargs="+", help="where the files came to")
    taking.add_argument("--output", type=Path, required=True, help="runs/world")
    options, others = parser.parse_known_args(arguments)
    if others and options.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.command == "gather":
        gather(options.folder)
    elif options.command == "run":
        return run(options.carried, options.minutes, options.work, options.out, options.seconds, others)
    elif options.command == "send":
        send(options.work / "parts", options.first, options.out)
    else:
        return _told(lambda: take(options.folders, options.output))
    return 0


def _told(work: Callable[[], None]) -> int:
    """What was wrong in one line, as portrait.py tells it."""
    from lib_portrait.errors import PortraitError

    try:
        work()
    except PortraitError as error:
        print(error.detail, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
