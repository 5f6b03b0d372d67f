"""Options as methods declare them: what is accepted, and what is read back of an infotext."""

from __future__ import annotations

import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_portrait import options
from lib_portrait.errors import PortraitError
from lib_portrait.methods import declarations
from lib_portrait.options import Choice, Number, Switch, Word

DEPTH = Number(name="depth", title="Depth", help="how deep", default=1.0, low=0.0, high=3.0, unit="layers")
ROUNDS = Number(name="rounds", title="Rounds", help="how many", default=3, low=0, high=9, whole=True)
SIDE = Choice(name="side", title="Side", help="which", default="left", choices={"left": "Left", "right": "Right"})
ON = Switch(name="on", title="On", help="whether", default=True)
WORD = Word(name="word", title="Word", help="which one")
OFF = Switch(name="off", title="Off", help="whether")


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        (DEPTH, 3.01, "from 0 to 3"),
        (DEPTH, math.nan, "from 0 to 3"),
        (DEPTH, 10**400, "from 0 to 3"),
        (DEPTH, True, "from 0 to 3"),
        (DEPTH, "1", "from 0 to 3"),
        (ROUNDS, 2.5, "whole number from 0 to 9"),
        (ROUNDS, 10, "from 0 to 9"),
        (SIDE, "up", "left, right"),
        (SIDE, ["left"], "left, right"),
        (ON, 1, "true or false"),
        (ON, None, "true or false"),
        (WORD, 3, "as it stands in the prompt"),
        (WORD, "x" * 41, "up to 40"),
        (WORD, "(woman:1.2)", "without brackets"),
        (WORD, "wo;man", "without brackets"),
        (WORD, "wo\nman", "without brackets"),
        (WORD, "wo\\man", "without brackets"),
    ],
)
def test_what_is_no_value_of_an_option_is_refused_by_its_path(option, value, remedy):
    with pytest.raises(PortraitError, match=remedy) as caught:
        option.check(value, "identities[0].x")
    assert caught.value.field == "identities[0].x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value if value == value else "NaN", option.schema())


@pytest.mark.parametrize("option", [DEPTH, ROUNDS, SIDE, ON, OFF, WORD])
def test_a_default_is_a_value_by_check_and_by_schema(option):
    assert option.check(option.default, "x") == option.default == option.schema()["default"]
    jsonschema.validate(option.default, option.schema())


@given(
    st.one_of(
        *(st.tuples(st.just(option), st.booleans()) for option in (ON, OFF)),
        st.tuples(st.just(DEPTH), st.floats(0, 3)),
        st.tuples(st.just(SIDE), st.sampled_from(["left", "right"])),
        st.tuples(st.just(WORD), st.sampled_from(["woman", "red-haired Zoë", "l'enfant", "woman of 80 %"])),
    )
)
def test_an_infotexts_clause_says_the_value_exactly(pair):
    option, value = pair
    clause = option.to_text(value)
    name, _, text = clause.partition(" ")
    assert name == option.name and option.from_text(text) == value
    # What divides an infotext, or has the host put it in quotation marks.
    assert not set(clause) & set('|;,:"\n')


@pytest.mark.parametrize(("option", "text"), [(DEPTH, "deep"), (ON, "perhaps")])
def test_a_clause_that_says_nothing_is_refused(option, text):
    with pytest.raises(ValueError):
        option.from_text(text)


def test_a_switch_may_be_said_to_be_on():
    assert ON.from_text("on") is ON.from_text("") is True and ON.from_text("off") is False


def test_spaces_around_a_word_do_not_count():
    assert WORD.check(" old  man ", "x") == "old  man"


def test_what_could_not_be_written_down_cannot_be_declared():
    with pytest.raises(ValueError, match="'Two words' cannot be"):
        Switch(name="Two words", title="", help="")
    with pytest.raises(ValueError, match="cannot choose"):
        Choice(name="side", title="", help="", default="up", choices={"left": "Left"})
    with pytest.raises(ValueError, match="cannot choose"):
        Choice(name="side", title="", help="", default="a;b", choices={"a;b": "Both"})


@pytest.mark.parametrize("one", declarations.declarations(), ids=lambda one: one.name)
def test_methods_declare_each_option_once(one):
    for declared in (one.options, one.identity_options):
        names = [option.name for option in declared]
        assert len(names) == len(set(names))
        assert list(options.defaults(declared)) == names
    maps = options.by_name(one.options, one.maps)
    assert isinstance(maps, Switch) if one.maps else maps is None


def test_no_method_of_another_name():
    with pytest.raises(PortraitError, match="'nobody' is not a method") as caught:
        declarations.declaration("nobody")
    assert caught.value.field == "method"
