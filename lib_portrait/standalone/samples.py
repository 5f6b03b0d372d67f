"""The sample people that a kit brings, and what is drawn of them where nothing else is asked for.

In the kit's folder ``faces/`` holds their photos, and ``samples.json`` says what is drawn: ``title`` of the sheet,
``people``, how many of them at most, ``one`` and ``two``: prompts for one person and for two, with ``{word}`` and
``{both}`` in the place of who they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError

FILE, FACES = "samples.json", "faces"
BYTES = 2**16
PHOTO = re.compile(r"(?:(woman|man)-)?(\d+)-(\d+)")
PLURALS = {"woman": "women", "man": "men", "person": "people"}


@dataclass(frozen=True)
class SamplePerson:
    """One of a kit's sample people. word: "woman" or "man" in captions, or "person" where the file does not say.

    photos: the reference, then others.
    """

    name: str
    word: str
    photos: tuple[Path, ...]


@dataclass(frozen=True)
class Samples:
    """What a kit's folder says of its sample people, see the module."""

    title: str
    people: tuple[SamplePerson, ...]
    one: tuple[str, ...]
    two: tuple[str, ...]


def read_samples(home: Path) -> Samples:
    """The samples in the folder of a kit. Raises PortraitError where there is nobody (404), or what the file says is of
    no use."""
    people = sample_people(home / FACES)
    path = home / FILE
    try:
        with path.open("rb") as stream:
            stored = json.loads(stream.read(BYTES))
    except OSError as error:
        raise PortraitError(FILE, f"{path} cannot be read ({error.strerror})", _OWN, 404) from None
    except (ValueError, RecursionError):
        raise PortraitError(FILE, f"{path} is no JSON", _OWN) from None
    entries: dict[str, Any] = stored if isinstance(stored, dict) else {}
    title, count = entries.get("title"), entries.get("people")
    prompts = {}
    for name, place in (("one", "{word}"), ("two", "{both}")):
        listed = entries.get(name)
        if not isinstance(listed, list) or not listed or not all(isinstance(p, str) and place in p for p in listed):
            raise PortraitError(FILE, f"{name} lists no prompts with {place} in them", _OWN)
        prompts[name] = tuple(listed)
    if not isinstance(title, str) or type(count) is not int or count < 1:
        raise PortraitError(FILE, "it tells no title, or no number of people", _OWN)
    return Samples(title, tuple(people[:count]), prompts["one"], prompts["two"])


def sample_people(folder: Path) -> list[SamplePerson]:
    """Those of ``woman-0009-0.png``: word and number of the person, number of the photo; other names are a person each.

    Ordered by number. Raises PortraitError (404) when there is nobody.
    """
    photos: dict[tuple[int, str, str], list[Path]] = {}
    for file in sorted(folder.glob("*.png")):
        match = PHOTO.fullmatch(file.stem)
        who = (int(match[2]), match[2], match[1] or "person") if match else (-1, file.stem, _word_of(file))
        photos.setdefault(who, []).append(file)
    if not photos:
        raise PortraitError("faces", f"there are no pictures in {folder}", _OWN, 404)
    people = []
    for (number, name, word), files in sorted(photos.items()):
        people.append(SamplePerson(name if number < 0 else f"{word} {name}", word, tuple(files)))
    return people


def both_words(first: str, second: str, each: bool = False) -> str:
    """Two people in the words of a caption: "two women", "a woman and a man". each: never by one word for both."""
    return f"two {PLURALS[first]}" if first == second and not each else f"a {first} and a {second}"


def _word_of(file: Path) -> str:
    """The class word with which a file's name begins ("woman-07.png"), or "person"."""
    word = re.split(r"[^a-z]", file.stem)[0]
    return word if word in PLURALS else "person"


_OWN = "Give a --face and a --prompt; or get the kit anew: `git checkout models`."
