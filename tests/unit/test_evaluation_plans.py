"""What the protocols ask for: how many pictures of whom, with which prompts, held against which photo."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from lib_portrait.errors import PortraitError
from trainer.attribute_network import HEADS
from trainer.dataset import person
from trainer.evaluation.people import HELD_OUT, TARGET, TRAINED, Person, World, obeying
from trainer.evaluation.plans import BASE, BRIEF, PROTOCOLS, REAL, Extent, plan
from trainer.evaluation.prompts import MULTI, SINGLE
from trainer.world import held_out, identity, sample_scene
from trainer.world.attributes import attributes_of

PEOPLE = [Person(str(number), "woman" if number % 2 else "man") for number in range(120)]
USUAL = Extent(usual=BRIEF)


def test_the_paper_s_protocols_have_the_paper_s_sizes() -> None:
    single, multi = (plan(name, PEOPLE, ["a"], Extent()) for name in ("single", "multi"))
    assert (len(SINGLE), len(MULTI)) == (40, 21)
    assert len(single.shots) == 15 * 40 * 4
    assert len(multi.shots) == 105 * 21 * 4
    assert Counter(shot.people for shot in single.shots) == {(number,): 160 for number in range(15)}
    pairs = Counter(shot.people for shot in multi.shots)
    assert set(pairs) == {(one, other) for other in range(15) for one in range(other)} and set(pairs.values()) == {84}


def test_the_world_s_protocol_makes_500_pictures_of_100_people_with_all_prompts() -> None:
    shots = plan("single", PEOPLE, ["a"], USUAL).shots
    assert len(shots) >= 500 and len({shot.people for shot in shots}) == 100
    asked = Counter(shot.prompt for shot in shots)
    assert set(asked) == set(SINGLE) and max(asked.values()) <= min(asked.values()) + 1


def test_every_picture_has_a_seed_of_its_own_that_does_not_hang_on_the_rest() -> None:
    for protocol in PROTOCOLS:
        shots = plan(protocol, PEOPLE, ["a"], replace(USUAL, pictures=2)).shots
        assert len({shot.seed for shot in shots}) == len(shots)
    few, many = (plan("single", PEOPLE, ["a"], replace(USUAL, number=number)).shots for number in (3, 9))
    assert few == many[: len(few)]


def test_what_protocols_have_in_common_is_the_same_pictures() -> None:
    """So that the pool draws it once: the rows for one reference and the usual β are those of `single`."""
    single, references, beta = (plan(name, PEOPLE, ["a"], USUAL) for name in ("single", "references", "beta"))
    for shots in (references.shots, beta.shots):
        assert shots == single.shots[: len(shots)]
    settings = {(row.adapter, row.photos, row.structure) for row in single.rows}
    assert ("a", 1, 0.1) in settings & {(row.adapter, row.photos, row.structure) for row in references.rows}
    assert ("a", 1, 0.1) in {(row.adapter, row.photos, row.structure) for row in beta.rows}


def test_adapters_are_rows_between_floor_and_ceiling() -> None:
    for protocol in ("single", "multi"):
        rows = plan(protocol, PEOPLE, ["global", "local", "+ structure"], USUAL).rows
        assert [row.name for row in rows] == [BASE, "global", "local", "+ structure", REAL]
        assert rows[0].adapter is None and rows[-1].real


def test_several_references_are_held_against_another_photo() -> None:
    made = plan("references", PEOPLE, ["a"], USUAL)
    assert made.against == TARGET
    assert [row.photos for row in made.rows[1:-1]] == [1, 2, 4]
    assert plan("single", PEOPLE, ["a"], USUAL).against == 0


def test_beta_is_swept() -> None:
    rows = plan("beta", PEOPLE, ["a"], replace(USUAL, betas=(0.0, 0.5))).rows
    assert [(row.name, row.structure) for row in rows[1:-1]] == [("β = 0", 0.0), ("β = 0.5", 0.5)]


@pytest.mark.parametrize(
    ("protocol", "changes", "field"),
    [
        ("triple", {}, "protocol"),
        ("multi", {"number": 1}, "number"),
        ("single", {"pictures": -1}, "pictures"),
        ("references", {"references": (0, 1)}, "references"),
    ],
)
def test_what_cannot_be_planned_is_refused(protocol: str, changes: dict[str, object], field: str) -> None:
    with pytest.raises(PortraitError) as raised:
        plan(protocol, PEOPLE, ["a"], replace(USUAL, **changes))  # type: ignore[arg-type]
    assert raised.value.field == field


# -------------------------------------------------------------------------------------------------------------- people


def test_nobody_who_is_evaluated_as_held_out_can_be_in_training() -> None:
    """Training draws from `trainer.dataset.person(k)`, evaluation from the others."""
    kept, trained = (set(World(kind, 100, 64).numbers) for kind in (HELD_OUT, TRAINED))
    assert len(kept) == len(trained) == 100
    assert all(held_out(number) for number in kept) and not any(held_out(number) for number in trained)
    assert not kept & {person(k) for k in range(max(kept))}
    assert trained <= {person(k) for k in range(100)}


def test_references_targets_and_real_pictures_are_different_pictures_of_the_same_person() -> None:
    world = World(HELD_OUT, 2, 64)
    photos = [world.photo(0, number) for number in (0, 1, TARGET)]
    real = world.real((0,), SINGLE[0], 1, 64)
    pictures = [*(photo.image for photo in photos), real, world.photo(1, 0).image]
    assert len({picture.tobytes() for picture in pictures}) == 5
    again = World(HELD_OUT, 5, 64).photo(0, 1)
    assert again.landmarks is not None and again.landmarks.shape == (5, 2)
    assert np.array_equal(again.image, photos[1].image)


@pytest.mark.parametrize("number", [9, 19])
def test_real_pictures_show_what_the_prompt_says(number: int) -> None:
    somebody = identity(number)
    for seed, prompt in enumerate(SINGLE):
        stated = prompt.attributes([somebody.word])
        shown = attributes_of(obeying(sample_scene(seed, [somebody]), prompt))
        assert {name: shown[name] for name in stated} == stated, prompt
    pair = [somebody, identity(29)]
    for seed, prompt in enumerate(MULTI):
        stated = prompt.attributes([one.word for one in pair])
        shown = attributes_of(obeying(sample_scene(seed, pair), prompt))
        assert {name: shown[name] for name in stated} == stated, prompt


def test_every_stated_attribute_is_one_that_can_be_told() -> None:
    for prompts, words in ((SINGLE, ["woman"]), (MULTI, ["woman", "man"])):
        for prompt in prompts:
            for name, value in prompt.attributes(words).items():
                assert value in HEADS[name]


def test_captions_count_people_as_the_world_s_do() -> None:
    assert SINGLE[1].text(["woman"]) == "a photo of a smiling woman wearing a red shirt"
    assert SINGLE[2].text(["man"]) == "an oil painting of a man at the beach"
    assert MULTI[0].text(["woman", "woman"]) == "a photo of two women in a park"
    assert MULTI[0].text(["man", "woman"]) == "a photo of a man and a woman in a park"
    assert MULTI[0].text(["person", "person"]) == "a photo of two people in a park"
    assert MULTI[0].attributes(["man", "woman"]) == {
        "people": "2",
        "women": "1",
        "style": "photo",
        "background": "park",
    }
