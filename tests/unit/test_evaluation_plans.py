"""What the protocols ask for: how many pictures of whom, with which prompts, compared with which photo."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from lib_portrait.errors import PortraitError
from trainer.attribute_network import HEADS
from trainer.dataset import training_person
from trainer.evaluation.layouts import layout_of, scene_of
from trainer.evaluation.plans import BASE, BRIEF, PROTOCOLS, REAL, Adapter, ProtocolSettings, make_plan, make_plans
from trainer.evaluation.populations import HELD_OUT, TRAINED, UNSEEN_PHOTO, Subject, WorldPopulation, scene_following
from trainer.evaluation.prompts import MULTI, SINGLE
from trainer.world import held_out, render, sample_scene, world_person
from trainer.world.attributes import attributes_of
from trainer.world.scenes import APART_ACROSS, APART_DOWN

PEOPLE = [Subject(str(number), "woman" if number % 2 else "man") for number in range(120)]
SETTINGS = ProtocolSettings(defaults=BRIEF)


def test_the_paper_s_protocols_have_the_paper_s_sizes() -> None:
    single, multi = (make_plan(name, PEOPLE, [Adapter("a")], ProtocolSettings()) for name in ("single", "multi"))
    assert (len(SINGLE), len(MULTI)) == (40, 21)
    assert len(single.samples) == 15 * 40 * 4
    assert len(multi.samples) == 105 * 21 * 4
    assert Counter(sample.people for sample in single.samples) == {(number,): 160 for number in range(15)}
    pairs = Counter(sample.people for sample in multi.samples)
    assert set(pairs) == {(one, other) for other in range(15) for one in range(other)} and set(pairs.values()) == {84}


def test_the_world_s_protocol_makes_500_pictures_of_100_people_with_all_prompts() -> None:
    samples = make_plan("single", PEOPLE, [Adapter("a")], SETTINGS).samples
    assert len(samples) >= 500 and len({sample.people for sample in samples}) == 100
    asked = Counter(sample.prompt for sample in samples)
    assert set(asked) == set(SINGLE) and max(asked.values()) <= min(asked.values()) + 1


def test_every_picture_has_a_seed_of_its_own_that_does_not_hang_on_the_rest() -> None:
    for protocol in PROTOCOLS:
        settings = replace(SETTINGS, pictures=2, sweeps=(("begin", (0.5,)),))
        plans = make_plans(protocol, PEOPLE, [Adapter("a")], settings)
        samples = [sample for plan in plans for sample in plan.samples]
        assert len({sample.seed for sample in samples}) == len(samples)
    few, many = (
        make_plan("single", PEOPLE, [Adapter("a")], replace(SETTINGS, number=number)).samples for number in (3, 9)
    )
    assert few == many[: len(few)]


def test_what_protocols_have_in_common_is_the_same_pictures() -> None:
    """So that they are generated once: the variants with one reference and the usual β are those of `single`."""
    single, references, beta = (
        make_plan(name, PEOPLE, [Adapter("a")], SETTINGS) for name in ("single", "references", "beta")
    )
    for samples in (references.samples, beta.samples):
        assert samples == single.samples[: len(samples)]
    settings = {(variant.adapter, variant.photos, variant.structure) for variant in single.variants}
    assert ("a", 1, 0.1) in settings & {
        (variant.adapter, variant.photos, variant.structure) for variant in references.variants
    }
    assert ("a", 1, 0.1) in {(variant.adapter, variant.photos, variant.structure) for variant in beta.variants}


def test_adapters_are_variants_between_floor_and_ceiling() -> None:
    rows = [Adapter(label) for label in ("global", "local", "+ structure")]
    for protocol in ("single", "multi"):
        variants = make_plan(protocol, PEOPLE, rows, SETTINGS).variants
        assert [variant.name for variant in variants] == [BASE, "global", "local", "+ structure", REAL]
        assert variants[0].adapter is None and variants[-1].real


def test_several_references_are_compared_with_another_photo() -> None:
    references = make_plan("references", PEOPLE, [Adapter("a")], SETTINGS)
    assert references.compared_photo == UNSEEN_PHOTO
    assert [variant.photos for variant in references.variants[1:-1]] == [1, 2, 4]
    assert make_plan("single", PEOPLE, [Adapter("a")], SETTINGS).compared_photo == 0


def test_beta_is_swept() -> None:
    variants = make_plan("beta", PEOPLE, [Adapter("a")], replace(SETTINGS, betas=(0.0, 0.5))).variants
    assert [(variant.name, variant.structure) for variant in variants[1:-1]] == [("β = 0", 0.0), ("β = 0.5", 0.5)]


@pytest.mark.parametrize(
    ("protocol", "changes", "field"),
    [
        ("triple", {}, "protocol"),
        ("multi", {"number": 1}, "number"),
        ("single", {"pictures": -1}, "pictures"),
        ("references", {"references": (0, 1)}, "references"),
        ("groups", {"number": 6}, "number"),
        ("groups", {"people_per_picture": ()}, "people_per_picture"),
        ("groups", {"people_per_picture": (1, 2)}, "people_per_picture"),
        ("groups", {"people_per_picture": (2, 11)}, "people_per_picture"),
        ("groups", {"people_per_picture": (3, 3)}, "people_per_picture"),
    ],
)
def test_what_cannot_be_planned_is_refused(protocol: str, changes: dict[str, object], field: str) -> None:
    with pytest.raises(PortraitError) as raised:
        make_plans(protocol, PEOPLE, [Adapter("a")], replace(SETTINGS, **changes))  # type: ignore[arg-type]
    assert raised.value.field == field


# -------------------------------------------------------------------------------------------------------------- people


def test_nobody_who_is_evaluated_as_held_out_can_be_in_training() -> None:
    """Training draws from `trainer.dataset.training_person(k)`, evaluation from the others."""
    kept, trained = (set(WorldPopulation(kind, 100, 64).numbers) for kind in (HELD_OUT, TRAINED))
    assert len(kept) == len(trained) == 100
    assert all(held_out(number) for number in kept) and not any(held_out(number) for number in trained)
    assert not kept & {training_person(k) for k in range(max(kept))}
    assert trained <= {training_person(k) for k in range(100)}


def test_references_targets_and_real_pictures_are_different_pictures_of_the_same_person() -> None:
    world = WorldPopulation(HELD_OUT, 2, 64)
    photos = [world.photo(0, number) for number in (0, 1, UNSEEN_PHOTO)]
    real = world.real((0,), SINGLE[0], 1, 64)
    pictures = [*(photo.image for photo in photos), real, world.photo(1, 0).image]
    assert len({picture.tobytes() for picture in pictures}) == 5
    again = WorldPopulation(HELD_OUT, 5, 64).photo(0, 1)
    assert again.landmarks is not None and again.landmarks.shape == (5, 2)
    assert np.array_equal(again.image, photos[1].image)


@pytest.mark.parametrize("number", [9, 19])
def test_real_pictures_show_what_the_prompt_says(number: int) -> None:
    person = world_person(number)
    for seed, prompt in enumerate(SINGLE):
        stated = prompt.attributes([person.word])
        shown = attributes_of(scene_following(sample_scene(seed, [person]), prompt))
        assert {name: shown[name] for name in stated} == stated, prompt
    group = [person, *(world_person(other) for other in (29, 39, 49, 59, 69, 79))]
    for count in (2, 4, 7):
        people = group[:count]
        for seed, prompt in enumerate(MULTI):
            stated = prompt.attributes([one.word for one in people])
            shown = attributes_of(scene_following(scene_of(seed, count, people), prompt))
            assert {name: shown[name] for name in stated} == stated, prompt
            # The network that looks for it was shown four people at most.
            assert ("people" in stated) == ("women" in stated) == (count < 5)


def test_every_stated_attribute_is_one_that_can_be_predicted() -> None:
    for prompts, words in ((SINGLE, ["woman"]), (MULTI, ["woman", "man"]), (MULTI, ["woman"] * 7)):
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


def test_groups_of_every_size_have_everybody_once_as_far_as_they_come_out_even() -> None:
    plans = make_plans("groups", PEOPLE, [Adapter("a")], replace(SETTINGS, number=20))
    assert [plan.name for plan in plans] == [f"groups-{size}" for size in (2, 3, 4, 5, 6, 7)]
    for size, plan in zip((2, 3, 4, 5, 6, 7), plans):
        groups = list(dict.fromkeys(sample.people for sample in plan.samples))
        assert all(len(group) == size for group in groups) and len(groups) == 20 // size
        assert sorted(person for group in groups for person in group) == list(range(20 // size * size))
        assert len(plan.samples) == 2 * len(groups)
    assert plans[-1].samples[0].text == "a photo of four men and three women in a park"
    assert make_plans("groups", PEOPLE, [Adapter("a")], replace(SETTINGS, number=20)) == plans
    everywhere = replace(SETTINGS, number=20, sides=True, layouts=True, people_per_picture=(3,))
    (three,) = make_plans("groups", PEOPLE, [Adapter("a"), Adapter("b", placed=True)], everywhere)
    names = [BASE, "a", "b", "a, side by side", "a, laid out", REAL]
    assert [variant.name for variant in three.variants] == names


def test_guidance_gives_each_row_a_guided_one_and_stands_alone_where_nothing_else_draws() -> None:
    given = {"strength": 0.3}
    counts = ProtocolSettings(number=4, prompts=1, pictures=1, sides=True, reference_guidance=given)
    adapters = [Adapter("a"), Adapter("b", placed=True), Adapter("alone", draws=False)]
    single = make_plan("single", PEOPLE, adapters, counts)
    assert [row.name for row in single.variants] == [BASE, "a", "a + guidance", "b", "b + guidance", "alone", REAL]
    assert {row.name for row in single.variants if row.guidance.enabled} == {"a + guidance", "b + guidance", "alone"}
    assert all(row.guidance.options == given for row in single.variants if row.guidance.enabled)
    # What is compared differs by the guidance alone.
    assert replace(single.variants[2], name="a", guidance=single.variants[1].guidance) == single.variants[1]
    assert all(row.whole for row in single.variants if row.adapter)
    assert not any(row.whole for row in make_plan("single", PEOPLE, adapters[:2], SETTINGS).variants)
    several = [
        make_plan("multi", PEOPLE, adapters, counts),
        *make_plans("groups", PEOPLE, adapters, replace(counts, number=7)),
    ]
    names = ["a", "b", "alone", "a, side by side", "alone, side by side"]
    for plan in several:
        rows = [row.name for row in plan.variants]
        assert [row for row in rows if not row.endswith("+ guidance")] == [BASE, *names, REAL]
        assert {row for row in rows if row.endswith("+ guidance")} == {
            f"{name} + guidance" for name in names if not name.startswith("alone")
        }
    for protocol in ("references", "beta"):
        rows = make_plan(protocol, PEOPLE, [adapters[2], adapters[0]], counts).variants
        assert {row.adapter for row in rows} == {None, "a"} and not any(row.guidance.enabled for row in rows)
        with pytest.raises(PortraitError, match="nobody is drawn without"):
            make_plan(protocol, PEOPLE, adapters[2:], counts)
    with pytest.raises(PortraitError, match="alone draws nobody by itself"):
        make_plan("single", PEOPLE, adapters, SETTINGS)


def test_a_sweep_has_a_part_for_each_option_and_the_rest_as_it_is_given() -> None:
    sweeps = (("begin", (0.4, 0.6)), ("gradient", ("plain", "share")))
    counts = ProtocolSettings(
        number=4, prompts=1, pictures=1, sweeps=sweeps, reference_guidance={"begin": 1.0, "block": 2}
    )
    begin, gradient = make_plans("guidance", PEOPLE, [Adapter("a"), Adapter("alone", draws=False)], counts)
    assert (begin.name, gradient.name) == ("guidance-begin", "guidance-gradient")
    assert {row.name: dict(row.guidance.options) for row in begin.variants if row.guidance.enabled} == {
        "a, begin = 0.4": {"begin": 0.4, "block": 2},
        "a, begin = 0.6": {"begin": 0.6, "block": 2},
        "alone, begin = 0.4": {"begin": 0.4, "block": 2},
        "alone, begin = 0.6": {"begin": 0.6, "block": 2},
    }
    assert [row.name for row in gradient.variants if row.adapter == "a"] == [
        "a",
        "a, gradient = plain",
        "a, gradient = share",
    ]
    assert begin.samples == make_plan("single", PEOPLE, [Adapter("a")], counts).samples
    with pytest.raises(PortraitError, match="nothing is swept"):
        make_plans("guidance", PEOPLE, [Adapter("a")], replace(counts, sweeps=()))


def test_t0_is_swept_of_a_reference_that_is_noised_to_it() -> None:
    """Whatever a kit says; where it is asked to be noised as each step, all values would give the same pictures."""
    sweeps = (("reference_t", (271.0, 671.0)),)
    counts = ProtocolSettings(number=4, prompts=1, pictures=1, sweeps=sweeps, reference_guidance={"block": 2})
    adapters = [Adapter("a"), Adapter("alone", draws=False)]
    (plan,) = make_plans("guidance", PEOPLE, adapters, counts)
    guided = [dict(row.guidance.options) for row in plan.variants if row.guidance.enabled]
    assert guided == [{"block": 2, "noise": "fixed", "reference_t": t} for _ in adapters for t in (271.0, 671.0)]
    with pytest.raises(PortraitError, match="no say"):
        make_plans("guidance", PEOPLE, adapters, replace(counts, reference_guidance={"noise": "step"}))


def test_with_a_method_that_needs_a_word_for_each_person_all_rows_have_one() -> None:
    people = [Subject(str(number), word) for number, word in enumerate(("woman", "woman", "man"))]
    counts = ProtocolSettings(number=3, prompts=1, pictures=1)
    plain, naming = Adapter("a"), Adapter("b", names_each=True)
    counted = make_plan("multi", people, [plain], counts)
    each = make_plan("multi", people, [plain, naming], counts)
    asked = make_plan("multi", people, [plain], replace(counts, names_each=True))
    assert [plan.names_each for plan in (counted, each, asked)] == [False, True, True]
    of_pairs = [[sample.text for sample in plan.samples] for plan in (counted, each)]
    assert [text.partition(" of ")[2] for text in of_pairs[0]] == [
        "two women in a park",
        "a woman and a man at the beach",
        "a woman and a man in a forest",
    ]
    assert of_pairs[1] == [of_pairs[0][0].replace("two women", "a woman and a woman"), *of_pairs[0][1:]]
    assert asked.samples == each.samples
    # What else makes a picture is the same, and where nobody shared a word the whole picture.
    assert [replace(one, text="") for one in counted.samples] == [replace(one, text="") for one in each.samples]
    single = make_plan("single", people, [naming], counts)
    assert single.samples == make_plan("single", people, [plain], counts).samples and not single.names_each
    three = MULTI[0].text(["woman", "man", "woman"], each=True)
    assert three == "a photo of a woman, a man and a woman in a park"


def test_methods_that_need_places_have_them_in_every_row_and_others_where_asked_for() -> None:
    people = [Subject(str(number), "woman") for number in range(3)]
    counts = ProtocolSettings(number=3, prompts=1, pictures=1, sides=True, layouts=True)
    free, bound = Adapter("free"), Adapter("bound", placed=True)
    rows = {row.name: row for row in make_plan("multi", people, [free, bound], counts).variants}
    assert {name for name, row in rows.items() if row.laid_out} == {"bound", "free, laid out"}
    assert {name for name, row in rows.items() if row.sides} == {"free, side by side"}
    for protocol in ("single", "references", "beta"):
        for adapter in (free, bound):
            plan = make_plan(protocol, people, [adapter], counts)
            assert {row.laid_out for row in plan.variants if row.adapter} == {adapter.placed}


@pytest.mark.parametrize("people", [1, 2, 4, 7])
def test_a_layout_has_faces_from_the_left_with_their_poses(people: int) -> None:
    layout = layout_of(5, people)
    assert len(layout.boxes) == len(layout.poses) == people and layout_of(5, people) == layout
    assert [box[0] for box in layout.boxes] == sorted(box[0] for box in layout.boxes)
    for (left, top, right, bottom), pose in zip(layout.boxes, layout.poses):
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert left < pose[0, 0] < right and top < pose[0, 1] < bottom
    assert layout.picture(64).shape == (64, 64, 3) and layout.picture(64).any()
    assert people == 1 or layout_of(6, people).boxes != layout.boxes


@pytest.mark.parametrize("count", [5, 6, 7, 10])
def test_more_people_than_the_world_s_scenes_have_stand_in_two_rows_apart(count: int) -> None:
    people = [world_person(9 + 10 * number) for number in range(count)]
    size = 256
    heads = set()
    for seed in range(3):
        scene = scene_of(seed, count, people)
        assert {placement.person.number for placement in scene.people} == {person.number for person in people}
        assert scene_of(seed, count, people) == scene
        heads |= {(placement.person.number, round(placement.y, 1) > 0.4) for placement in scene.people}
        for i, one in enumerate(scene.people):
            for other in scene.people[:i]:
                apart = one.size + other.size
                assert abs(one.x - other.x) > APART_ACROSS * apart or abs(one.y - other.y) > APART_DOWN * apart
        # Nobody's face is lost behind another's.
        faces = render(scene, size).faces
        areas = [(face.box[2] - face.box[0]) * (face.box[3] - face.box[1]) for face in faces]
        assert all(face.mask.sum() > 0.25 * area for face, area in zip(faces, areas))
        boxes = layout_of(seed, count).boxes
        assert all(right - left > 0.06 for left, _, right, _ in boxes)
    # Who stands where is as it comes.
    assert len(heads) > count
