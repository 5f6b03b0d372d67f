"""The prompts: two fixed lists of captions in the world's wording, and what each of them states, as data.

Like FastComposer's benchmark (UniPortrait, sec. 4.2) the first has 40 prompts for one person, that put the person into
other places, styles, clothes, accessories and moods, and the second 21 for two people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.world.attributes import Attributes
from trainer.world.captions import PLACES, STYLE_PHRASES, counted_people, enumeration, with_article
from trainer.world.scenes import MOST_PEOPLE

BACKGROUND_OF = {phrase: name for name, phrases in PLACES.items() for phrase in phrases}
STYLE_OF = {phrase: name for name, phrases in STYLE_PHRASES.items() for phrase in phrases}


@dataclass(frozen=True)
class Prompt:
    """A caption but for who is in it.

    opening, place: the world's phrases for a style and a background. The others are facts about a single person:
    expression, garment with its colour, hat with its colour, colour of a scarf, glasses.
    """

    opening: str
    place: str = ""
    expression: str = ""
    garment: str = ""
    clothes_colour: str = ""
    hat: str = ""
    hat_colour: str = ""
    scarf_colour: str = ""
    glasses: bool = False

    def text(self, words: Sequence[str], each: bool = False) -> str:
        """The caption for people of these class words, "woman", "man" or, where it is not known, "person".

        each: several people are named one by one, in their order ("a woman and a woman"), not counted ("two women").
        """
        if len(words) == 1:
            who = self._person(words[0])
        else:
            who = enumeration(list(map(with_article, words))) if each else counted_people(Counter(words))
        return " ".join(part for part in (self.opening, who, self.place) if part)

    def _person(self, word: str) -> str:
        wears = [
            *([with_article(f"{self.clothes_colour} {self.garment}")] if self.garment else []),
            *([with_article(f"{self.hat_colour} {self.hat}")] if self.hat else []),
            *([with_article(f"{self.scarf_colour} scarf")] if self.scarf_colour else []),
            *(["glasses"] if self.glasses else []),
        ]
        phrase = with_article(f"{self.expression} {word}".strip())
        return f"{phrase} wearing {enumeration(wears)}" if wears else phrase

    def attributes(self, words: Sequence[str]) -> Attributes:
        """What the caption states, in the words of the attribute network.

        Of a "person" it does not state the sex, and it does not count more people than that network has seen.
        """
        counted = len(words) <= MOST_PEOPLE
        stated = {"people": str(len(words))} if counted else {}
        if counted and "person" not in words:
            stated["women"] = str(list(words).count("woman"))
        # "a portrait of" is an opening for photographs, but does not state that.
        if STYLE_OF[self.opening] != "photo" or "photo" in self.opening:
            stated["style"] = STYLE_OF[self.opening]
        if self.place:
            stated["background"] = BACKGROUND_OF[self.place]
        for name in ("expression", "garment", "clothes_colour", "hat"):
            if getattr(self, name):
                stated[name] = getattr(self, name)
        if self.scarf_colour:
            stated["scarf"] = "yes"
        if self.glasses:
            stated["glasses"] = "yes"
        return stated


# Any eight that follow one another hold places, styles, clothes, accessories and moods: see `assigned_prompts`.
SINGLE = (
    Prompt("a photo of", "in a park"),
    Prompt("a photo of", expression="smiling", garment="shirt", clothes_colour="red"),
    Prompt("an oil painting of", "at the beach"),
    Prompt("a photo of", "in a forest", glasses=True),
    Prompt("a pencil drawing of", expression="laughing"),
    Prompt("a photo of", "on a city street", garment="jacket", clothes_colour="yellow"),
    Prompt("a photograph of", hat="beanie", hat_colour="blue"),
    Prompt("a watercolour of", "in the mountains"),
    Prompt("a photograph of", "at sunset", expression="sad"),
    Prompt("a photo of", garment="sweater", clothes_colour="green"),
    Prompt("a cartoon of", "in a room"),
    Prompt("a photo of", "at night", scarf_colour="red"),
    Prompt("a watercolour painting of", expression="surprised"),
    Prompt("a photo of", "in a studio", garment="shirt", clothes_colour="white"),
    Prompt("a photograph of", "at the beach", hat="sun hat", hat_colour="yellow"),
    Prompt("a painting of", "in a forest"),
    Prompt("a photo of", "in a room", expression="angry"),
    Prompt("a photo of", garment="sweater", clothes_colour="purple", scarf_colour="orange"),
    Prompt("a pencil sketch of", "on a city street"),
    Prompt("a photo of", "in the mountains", glasses=True),
    Prompt("a cartoon picture of", expression="smiling"),
    Prompt("a photograph of", "in a park", garment="shirt", clothes_colour="blue"),
    Prompt("a photo of", expression="laughing", hat="beanie", hat_colour="red"),
    Prompt("a watercolour of", "at sunset"),
    Prompt("a photo of", "at the beach", expression="surprised"),
    Prompt("a photograph of", garment="jacket", clothes_colour="black"),
    Prompt("an oil painting of", "at night"),
    Prompt("a photo of", "in a studio", expression="smiling", glasses=True),
    Prompt("a cartoon of", expression="angry"),
    Prompt("a photo of", "in the woods", garment="sweater", clothes_colour="orange"),
    Prompt("a photograph of", "on a city street", scarf_colour="blue"),
    Prompt("a painting of", "in a studio"),
    Prompt("a photo of", "at night", expression="laughing"),
    Prompt("a photo of", garment="shirt", clothes_colour="pink", glasses=True),
    Prompt("a watercolour of", "in a park"),
    Prompt("a photo of", "in front of mountains", hat="beanie", hat_colour="green"),
    Prompt("a pencil drawing of", expression="surprised"),
    Prompt("a photograph of", "at home", garment="sweater", clothes_colour="grey"),
    Prompt("a photo of", "in the park", hat="sun hat", hat_colour="white"),
    Prompt("a cartoon of", "in front of a sunset"),
)

MULTI = tuple(
    Prompt(opening, place)
    for opening, place in (
        ("a photo of", "in a park"),
        ("a photograph of", "at the beach"),
        ("a painting of", "in a forest"),
        ("a photo of", "on a city street"),
        ("a cartoon of", "in a room"),
        ("a photo of", "in the mountains"),
        ("a watercolour of", "at sunset"),
        ("a photograph of", "at night"),
        ("a pencil drawing of", ""),
        ("a photo of", "in a studio"),
        ("an oil painting of", "on a city street"),
        ("a photo of", "in a room"),
        ("a watercolour painting of", ""),
        ("a photograph of", "in the woods"),
        ("a cartoon picture of", "in the park"),
        ("a photo of", "at sunset"),
        ("a painting of", ""),
        ("a photo of", ""),
        ("a pencil sketch of", "in front of mountains"),
        ("a photograph of", "at home"),
        ("a cartoon of", "at night"),
    )
)


def assigned_prompts(prompts: Sequence[Prompt], place: int, number: int) -> list[int]:
    """Which of the prompts person (or pair) number `place` is assigned, when each gets `number` of them.

    In turn, round the list: where nobody gets all prompts, all prompts are used about equally often.
    """
    return [(place * number + k) % len(prompts) for k in range(min(number, len(prompts)))]
