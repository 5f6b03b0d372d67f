"""The embedded world as it ships carries identity: held-out people are known again in their pictures.

The thresholds are far below what was measured when the weights were made (models/world/README.md), and far above what
a system reaches that moves noise.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from trainer.evaluation.plans import BASE, ProtocolSettings
from trainer.evaluation.report import Table, TableRow
from trainer.evaluation.run import WORLD, EvaluationSettings, evaluate

NEEDED = (
    "world.safetensors",
    "uniportrait-faceid_world.safetensors",
    "uniportrait-router_world.safetensors",
    "world-recognition.safetensors",
    "world-vision.safetensors",
    "world-measuring.safetensors",
    "world-attributes.safetensors",
)
MISSING = [name for name in NEEDED if not (WORLD / name).is_file()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"models/world lacks trained weights: {', '.join(MISSING)}"),
]

# 24 pictures: 12 people, 2 prompts each; chance is 1 % among 100 references.
SINGLE = ProtocolSettings(number=12, prompts=2, pictures=1)
# All six pairs of 4 people, 4 prompts each.
PAIRS = ProtocolSettings(number=4, prompts=4, pictures=1)
STEPS = 6


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def single(output: Path) -> Table:
    return evaluate(EvaluationSettings(output, ("single",), protocol_settings=SINGLE, steps=STEPS, processes=1))[0]


@pytest.fixture(scope="module")
def pairs(output: Path) -> Table:
    return evaluate(EvaluationSettings(output, ("multi",), protocol_settings=PAIRS, steps=STEPS, processes=1))[0]


def row_of(table: Table, name: str) -> TableRow:
    return next(row for row in table.rows if row.variant.name == name)


def mean(table: Table, variant: str, column: str) -> float:
    estimate = row_of(table, variant).numbers[column]
    assert estimate is not None
    return estimate.value


def test_held_out_people_are_known_again_among_a_hundred(single: Table) -> None:
    assert mean(single, "world", "top-1") >= 0.55
    assert mean(single, "world", "top-5") >= 0.75
    assert mean(single, BASE, "top-5") <= 0.2


def test_similarity_is_above_the_text_only_floor(single: Table) -> None:
    (difference,) = single.differences
    similarity = difference.numbers["similarity"]
    assert similarity is not None and similarity.error is not None
    assert similarity.value > max(0.3, 3 * similarity.error)


def test_the_prompt_keeps_its_say(single: Table) -> None:
    assert mean(single, "world", "face found") >= 0.8
    assert mean(single, "world", "prompt accuracy") >= 0.5
    assert mean(single, "world", "prompt accuracy") >= 0.7 * mean(single, BASE, "prompt accuracy")


def test_two_people_in_one_picture_are_both_themselves(pairs: Table) -> None:
    """By the face that is less alike: giving both the looks of one of them does not pass."""
    (difference,) = pairs.differences
    lowest = difference.numbers["lowest similarity"]
    assert lowest is not None
    assert lowest.value > 0.05
    assert mean(pairs, "world", "top-5") > mean(pairs, BASE, "top-5")


def test_the_world_is_small_enough_to_travel_with_the_code() -> None:
    assert sum(file.stat().st_size for file in WORLD.rglob("*") if file.is_file()) <= 60e6
