"""Telling the rows of a UNet call apart by something they carry.

A host builds a batch out of positive and negative rows, and may then pad, cut, slice or drop them before the UNet sees
it; a row's place says nothing for certain. So each row's context is given one extra token in front that holds a number
into a table of rows. It is put there where the row is known, travels through whatever the host does (padding and
cutting happen at the end of a context), and is taken off again at the UNet's door.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

POSITIVE = 1
NEGATIVE = 2
# A rule's own row: a picture of somebody that the UNet looks at, no row of the host's batch.
REFERENCE = 3

# Whole numbers up to 256 are exact in bf16 (and fp16), and no text encoder emits a token of two large whole numbers.
_BASE = 192
_DIGITS = 64
MOST_ROWS = _DIGITS**2


@dataclass(frozen=True)
class Row:
    """What one row of a UNet call is.

    kind: POSITIVE, NEGATIVE or REFERENCE. picture: its number in the batch; a picture has several positive rows
    where its prompt is composed of several. words: of each identity the positions of its words in the row's text, where
    a method reads them. weights: how much each of these positions is emphasised. ahead: how many tokens of others stand
    in front of the text at the UNet's door (ControlNet's mark, which its own forward takes off); attention layers see
    none of them.
    """

    kind: int
    picture: int = 0
    words: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    ahead: int = 0


# The table of one picture and no words: there a row's number is its kind. Nothing is marked with 0.
ONE_PICTURE = {kind: Row(kind) for kind in (POSITIVE, NEGATIVE)}


def mark(context: torch.Tensor, numbers: int | Sequence[int]) -> torch.Tensor:
    """(B, n, D) -> (B, 1 + n, D): a token in front with each row's number, or the same number for all.

    numbers: 0 to MOST_ROWS - 1; D at least 2. The token's even channels hold the number's high digit, its odd ones the
    low digit: a token that is no mark would have to agree in all of them. Raises ValueError for other numbers, or when
    there are not as many as rows.
    """
    numbers = [numbers] * len(context) if isinstance(numbers, int) else list(numbers)
    if len(numbers) != len(context):
        raise ValueError(f"{len(context)} rows cannot be marked with {len(numbers)} numbers")
    if not all(0 <= number < MOST_ROWS for number in numbers):
        raise ValueError(f"rows are numbered from 0 to {MOST_ROWS - 1}, not {min(numbers)} to {max(numbers)}")
    digits = context.new_tensor([divmod(number, _DIGITS) for number in numbers]).reshape(-1, 2) + _BASE
    token = digits.repeat(1, -(-context.shape[2] // 2))[:, : context.shape[2]]
    return torch.cat([token[:, None], context], dim=1)


# A context, or a host's mapping of a context under "crossattn" and further inputs of the UNet (SDXL).
Conditions = TypeVar("Conditions", torch.Tensor, "MutableMapping[str, torch.Tensor]")


def mark_conditions(conditions: Conditions, numbers: int | Sequence[int]) -> Conditions:
    """`mark` for either form of a host's conditions. What is given is not written to."""
    if isinstance(conditions, torch.Tensor):
        return mark(conditions, numbers)
    # The host's mapping type carries a shape that others read; its other entries stay shared.
    marked = copy.copy(conditions)
    marked["crossattn"] = mark(conditions["crossattn"], numbers)
    return marked


# What stands for a person in a text, where they have no word of their own.
PERSON_WORDS = ("woman", "man", "girl", "boy", "person", "women", "men", "girls", "boys", "persons", "people")


def word_positions(tokens: Sequence[int], word: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Where the tokens of a word stand among those of a prompt: their positions, for every time that it is there."""
    length = len(word)
    starts = range(len(tokens) - length + 1) if length else ()
    found = [start for start in starts if [*tokens[start : start + length]] == [*word]]
    return tuple(tuple(range(start, start + length)) for start in found)


def unmark(context: torch.Tensor) -> tuple[list[int] | None, torch.Tensor]:
    """The numbers of the rows of a marked (B, 1 + n, D) context, and the (B, n, D) context without its marks.

    A context whose rows carry no mark gives None and is returned as it is. Raises ValueError when some rows are marked
    and some are not: then rows of different makers were mixed in one call.
    """
    first = context[:, 0].float()
    digits = (first[:, :2] - _BASE).round()
    expected = (digits + _BASE).repeat(1, -(-first.shape[1] // 2))[:, : first.shape[1]]
    marked = (first == expected).all(dim=1) & (digits >= 0).all(dim=1) & (digits < _DIGITS).all(dim=1)
    # One transfer from the device for both tensors.
    flags, numbers = torch.stack([marked.float(), digits[:, 0] * _DIGITS + digits[:, 1]]).tolist()
    if not any(flags):
        return None, context
    if not all(flags):
        raise ValueError("some rows of this UNet call are marked and some are not")
    return [int(number) for number in numbers], context[:, 1:]
