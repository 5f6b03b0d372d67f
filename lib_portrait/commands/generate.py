"""Draw people into pictures without the WebUI; without arguments, the sample people of the embedded kit.

portrait.py generate
portrait.py generate --checkpoint model.safetensors --prompt "a man in a spacesuit" --face bob.jpg,bob-2.jpg
portrait.py generate --checkpoint model.safetensors --prompt "two women in a café" \\
    --face eve.jpg --region 0,0,0.5,1 --face ada.jpg --structure 0.3 --show-routing

--face takes a photo of a person, or several with spaces or commas between them; a folder, or a pattern such as
"bob/*.jpg", stands for its pictures. photo.jpg#1 is the second face from the left of that photo (otherwise the largest
is taken), photo.jpg#aligned an aligned crop. The options of a person stand behind that person's --face.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods import declarations
from lib_portrait.options import Choice, Number, Option, Switch, Word
from lib_portrait.picture_files import SUFFIXES, picture_files
from lib_portrait.request import END, START, Limits, PortraitRequest, parse_request

REQUIREMENTS = "standalone"
ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(identities=16, photos=64)
FILE = "file:"
# Where an error lies, by the request's own names: a photo of a person, or of one mixed in.
PHOTO = re.compile(r"identities\[(\d+)\](?:\.mix\[(\d+)\])?\.photos\[(\d+)\]")
SAMPLERS = ("ddim", "euler", "dpm++2m")
# In characters: what file systems allow, and #aligned behind it.
LONGEST_NAME = 255 + len("#aligned")


def configure(parser: argparse.ArgumentParser) -> None:
    people = parser.add_argument_group("people")
    people.add_argument(
        "--face", dest="faces", action=_Face, nargs="+", metavar="PHOTO", help="photos of a person; repeatable"
    )
    people.add_argument("--region", action=_OfFace, metavar="BOX|MASK", help="left,top,right,bottom (0 to 1) or a file")
    people.add_argument("--mix", action=_OfFace, metavar="PHOTO[,PHOTO]=WEIGHT", help="blends a person in; repeatable")
    methods = declarations.declarations()
    for_all = _methods_options((one.title, one.options) for one in methods)
    for_each = _methods_options([*((one.title, one.identity_options) for one in methods), ("", (START, END, GUIDED))])
    for name, declared in for_each.items():
        # The picture as a whole has a scale, too.
        flag = f"--face-{name}" if name in for_all else f"--{name}"
        _add(people, flag.replace("_", "-"), declared, dest=name, action=_OfFace)

    whole = parser.add_argument_group("all people together")
    for name, declared in for_all.items():
        _add(whole, f"--{name.replace('_', '-')}", declared, dest=f"{_ALL}{name}")
    whole.add_argument(
        "--layout", metavar="PICTURE", help="its faces, from the left, say where people without a --region belong"
    )
    whole.add_argument(
        "--pose",
        type=Path,
        metavar="PICTURE",
        help="a skeleton of the picture's size for the ControlNet of the adapter's kit; circles are added",
    )
    whole.add_argument("--method", choices=declarations.NAMES, help=f"default: {declarations.NAMES[0]}")
    whole.add_argument("--adapter", metavar="NAME", help="of the adapter's files; default: the one there is")
    whole.add_argument(
        "--filter-crops", action="store_true", help="smooth faces larger than 224 pixels when they are cut out"
    )
    whole.add_argument(
        "--request", type=Path, metavar="FILE.json", help=f"all of it as the API takes it; {FILE}PATH is a photo"
    )

    guidance = parser.add_argument_group("reference guidance, which brings more of the photos into the picture")
    guidance.add_argument(
        "--guidance", dest=f"{_GUIDANCE}enabled", action="store_const", const=True, help="switches it on, as these do"
    )
    for option in OPTIONS:
        flag = f"--guidance-{option.name.replace('_', '-')}"
        _add(guidance, flag, [("", option)], dest=f"{_GUIDANCE}{option.name}")

    picture = parser.add_argument_group("pictures")
    picture.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeatable")
    picture.add_argument("--negative-prompt", metavar="TEXT")
    picture.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="SD 1.x, .safetensors or .ckpt; default: the embedded kit's"
    )
    picture.add_argument("--size", type=_size, metavar="WxH", help="default: what the checkpoint was trained on")
    picture.add_argument("--steps", type=int, metavar="N", help="default: 20")
    picture.add_argument("--cfg", dest="guidance", type=float, metavar="X", help="guidance of the prompt; default: 5")
    picture.add_argument("--sampler", choices=SAMPLERS, help=f"default: {SAMPLERS[0]}")
    picture.add_argument(
        "--seed", type=int, metavar="N", help="of the first picture; the next have the next; default: 0"
    )
    picture.add_argument("--count", type=int, metavar="N", help="pictures of each prompt; default: 1")

    place = parser.add_argument_group("places")
    place.add_argument("--output", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="default: outputs/ here")
    place.add_argument(
        "--models", type=Path, action="append", default=[], metavar="FOLDER", help="further one with weights"
    )
    place.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    parser.set_defaults(complain=parser.error)


def run(options: argparse.Namespace) -> int:
    demonstration = not (options.prompts or options.faces or options.request or options.checkpoint)
    if not demonstration and not options.prompts:
        options.complain("a --prompt is needed")
    if demonstration and options.count is not None:
        options.complain("--count needs a --prompt")
    if options.count is not None and not 1 <= options.count <= 1000:
        options.complain("--count: give a number from 1 to 1000")
    with _photos_by_name(options.faces or []):
        request = None if demonstration else request_of(options)

    from lib_portrait.standalone import generation

    width, height = options.size or (None, None)
    asked = {name: getattr(options, name) for name in ("negative_prompt", "steps", "guidance", "sampler", "seed")}
    asked |= {"width": width, "height": height}
    settings = {name: value for name, value in asked.items() if value is not None}
    folders = [*options.models, ROOT / "models"]

    def tell(notice: Notice) -> None:
        field = _by_name(notice.field, options.faces or []) or notice.field
        generation.say(str(dataclasses.replace(notice, field=field)))

    with generation.Results.begin(options.output) as results, _photos_by_name(options.faces or []):
        checkpoint = options.checkpoint or generation.bundled_checkpoint(folders)
        pipeline = generation.PortraitPipeline(checkpoint, folders, options.device, tell, options.filter_crops)
        if options.pose is not None:
            pipeline.show_pose(options.pose)
        if demonstration:
            changes = _changes(options)
            generation.generate_samples(
                pipeline, results, settings, lambda identities: _request({"identities": identities, **changes})
            )
        else:
            generation.generate_prompts(pipeline, results, settings, request, options.prompts, options.count or 1)
    return 0


@contextlib.contextmanager
def _photos_by_name(faces: Sequence[dict[str, Any]]) -> Iterator[None]:
    """What is wrong with photo 1 of identity 0 is told about the file that it came from."""
    try:
        yield
    except PortraitError as error:
        name = _by_name(error.field, faces)
        if name is None:
            raise
        remedy = error.remedy + " FILE#1 is the second face of a photo, FILE#aligned an aligned crop."
        raise PortraitError(name, error.problem, remedy, error.status_code) from error


def _by_name(field: str, faces: Sequence[dict[str, Any]]) -> str | None:
    """The option and file of the photo that a field of the request is about; None for other fields."""
    match = PHOTO.match(field)
    if match is None or not faces:
        return None
    face, mix, photo = faces[int(match[1])], match[2], int(match[3])
    files = face["photos"] if mix is None else [face["mix"][int(mix)].rpartition("=")[0]]
    return f"{'--face' if mix is None else '--mix'} {_names(files)[photo]}"


# ------------------------------------------------------------------------------------------------------------- request


def request_of(options: argparse.Namespace) -> PortraitRequest | None:
    """The checked request of the options, or None where nobody is asked for. Raises PortraitError."""
    changes = _changes(options)
    if options.request is not None:
        if options.faces:
            raise PortraitError("--face", "the people come from the request file", "Give --request or --face.")
        read = _read(options.request)
        if "guidance" in changes and isinstance(read.get("guidance"), dict):
            changes["guidance"] = {**read["guidance"], **changes["guidance"]}
        request = _request({**read, **changes})
        return request if request.enabled else None
    if not options.faces:
        if changes:
            name = "adapter" if "checkpoint" in changes else next(iter(changes)).replace("_", "-")
            raise PortraitError(f"--{name}", "there is nobody it could be about", "Add a --face.")
        return None
    return _request({"identities": [identity_of(face) for face in options.faces], **changes})


def identity_of(face: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of one person from the texts of the command line; photos are read."""
    identity = {name: value for name, value in face.items() if name not in ("photos", "region", "mix")}
    identity["photos"] = photos_of(face["photos"], "--face")
    if "region" in face:
        identity["region"] = _region(face["region"])
    if "mix" in face:
        identity["mix"] = [_mix(text) for text in face["mix"]]
    return identity


def _names(texts: Sequence[str]) -> list[str]:
    """The photos of texts ``PHOTO[,PHOTO...]``, each ``FILE``, ``FILE#NUMBER`` or ``FILE#aligned``.

    Names may hold commas: the longest piece of a text that is there is taken, then the longest of what is left. What is
    not there is a piece up to the next comma.
    """
    names = []
    for text in texts:
        parts = text.split(",")
        while parts:
            for count in range(_parts_of_a_name(parts), 0, -1):
                found = _there(",".join(parts[:count]))
                if found:
                    break
            names += found or parts[:1]
            del parts[:count]
    return names


def _parts_of_a_name(parts: Sequence[str]) -> int:
    """How many of the parts between commas, from the first on, one name can have: of a thousand photos not all.

    A pattern may be of any length, a name only as long as file systems allow.
    """
    if glob.has_magic(",".join(parts)):
        return len(parts)
    length = 0
    for count, part in enumerate(parts):
        first, *others = re.split(r"[/\\]", part)
        length += len(first) + 1
        if length > LONGEST_NAME:
            return max(count, 1)
        if others:
            length = len(others[-1])
    return len(parts)


def _there(text: str) -> list[str]:
    """The photos that a text without commas between them stands for, as far as they are there."""
    found = picture_files(text)
    file, mark, which = text.rpartition("#")
    # Beyond a comma begins another photo.
    return found or ([f"{name}#{which}" for name in picture_files(file)] if mark and "," not in which else [])


def photos_of(texts: Sequence[str], option: str) -> list[dict[str, Any]]:
    """The photos that `_names` finds, read. option: what an error is about."""
    photos = []
    for name in _names(texts):
        # A file's own name may hold a #.
        file, mark, which = (name, "", "") if os.path.isfile(name) else name.rpartition("#")
        if not mark:
            file = name
        photo: dict[str, Any] = {"image": _base64(Path(file), option)}
        if which == "aligned":
            photo["aligned"] = True
        elif which.isdecimal():
            photo["face"] = int(which)
        elif mark:
            raise PortraitError(
                option, f"{name!r} is no file and #{which} no face of one", "Write #0, #1, … or #aligned."
            )
        photos.append(photo)
    return photos


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say about all people together, by the request's names."""
    named = {name.removeprefix(_ALL): value for name, value in vars(options).items() if name.startswith(_ALL)}
    named |= {"method": options.method, "checkpoint": options.adapter}
    guidance = {
        name.removeprefix(_GUIDANCE): value for name, value in vars(options).items() if name.startswith(_GUIDANCE)
    }
    named |= {"guidance": {name: value for name, value in guidance.items() if value is not None} or None}
    named["layout"] = _base64(Path(options.layout), "--layout") if options.layout is not None else None
    return {name: value for name, value in named.items() if value is not None}


def _region(text: str) -> dict[str, Any]:
    numbers = text.split(",")
    if len(numbers) == 4 and not Path(text).is_file():
        try:
            return {"box": [float(number) for number in numbers]}
        except ValueError:
            pass
    return {"mask": _base64(Path(text), "--region")}


def _mix(text: str) -> dict[str, Any]:
    names, mark, share = text.rpartition("=")
    try:
        weight = float(share) if mark else None
    except ValueError:
        weight = None
    if weight is None:
        raise PortraitError("--mix", f"{text!r} has no weight", "Write PHOTO=0.3 for a share of 30 %.")
    return {"photos": photos_of([names], "--mix"), "weight": weight}


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a request file, its ``file:`` photos read; they count from the file's own folder."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, str) and value.startswith(FILE):
            return _base64(path.parent / value[len(FILE) :], "--request")
        return value

    try:
        # From bytes: JSON tells UTF-8 and UTF-16, with and without a mark, apart by itself.
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PortraitError(
            "--request", f"{path} cannot be read ({error})", "Give a file of JSON, saved as UTF-8."
        ) from None
    if not isinstance(value, dict):
        raise PortraitError("--request", f"{path} holds no JSON object", "Write it as docs/api.md does.")
    return filled(value)


def _base64(path: Path, option: str) -> str:
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        if option in ("--face", "--mix") and (path.is_dir() or glob.has_magic(str(path))):
            known = ", ".join(sorted(SUFFIXES))
            raise PortraitError(option, f"{path} holds no pictures", f"Their names end in {known}.", 404) from None
        reason = error.strerror or type(error).__name__
        raise PortraitError(option, f"{path} cannot be read ({reason})", "Give the path of a picture.", 404) from None


def _request(value: dict[str, Any]) -> PortraitRequest:
    people = value.get("identities")
    if isinstance(people, list) and len(people) > LIMITS.identities:
        most = LIMITS.identities
        raise PortraitError("--face", f"{len(people)} people, at most {most} fit one picture", "Leave some out.")
    return parse_request(value, LIMITS)


# ------------------------------------------------------------------------------------------------------------- options


# What methods declare has its place in the namespace behind this: they may call an option like one of ours.
_ALL = "all_"
_GUIDANCE = "guidance."
# For each option its method's title, "" where all methods have it.
_Declared = Sequence[tuple[str, Option]]


def _methods_options(options: Iterable[tuple[str, Sequence[Option]]]) -> dict[str, _Declared]:
    """The options of methods, given by their titles, by name: several may have one of the same name."""
    found: dict[str, list[tuple[str, Option]]] = {}
    for title, its in options:
        for option in its:
            found.setdefault(option.name, []).append((title, option))
    return dict(found)


def _add(group: Any, flag: str, declared: _Declared, **how: Any) -> None:
    """The flag for what methods declare under one name."""
    told = [f"{title}: {_told(option)}" if title else _told(option) for title, option in declared]
    first = declared[0][1]
    if isinstance(first, Switch):
        of_face = {"nargs": 0} if "action" in how else {"action": "store_const"}
        flag = f"--no-{flag.removeprefix('--')}" if first.default else flag
        how |= {"const": not first.default, "default": None, **of_face}
    elif isinstance(first, Number):
        how |= {"type": float, "metavar": "X"}
    elif isinstance(first, Word):
        how |= {"metavar": "WORD"}
    else:
        words = [word for _, option in declared if isinstance(option, Choice) for word in option.choices]
        how |= {"choices": list(dict.fromkeys(words))}
    group.add_argument(flag, help="; ".join(told).replace("%", "%%"), **how)


def _told(option: Option) -> str:
    if isinstance(option, Number):
        return f"{option.help}; {option.low:g} to {option.high:g}, default: {option.default:g}"
    return option.help if isinstance(option, (Switch, Word)) else f"{option.help}; default: {option.default}"


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512x768")
    return int(match[1]), int(match[2])


class _Face(argparse.Action):
    """Begins a person."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.faces = [*(namespace.faces or []), {"photos": values}]


class _OfFace(argparse.Action):
    """Tells something about the person begun last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        faces: Sequence[dict[str, Any]] = namespace.faces or []
        if not faces:
            parser.error(f"{option} is about one person: write it behind that person's --face")
        if self.const is not None:
            values = self.const
        if self.dest == "mix":
            values = [*faces[-1].get("mix", []), values]
        elif self.dest in faces[-1]:
            parser.error(f"{option} was given twice for the same --face")
        faces[-1][self.dest] = values
