"""A person's scale is local, in negative rows too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_portrait.attention.injection import Call
from lib_portrait.attention.rows import POSITIVE


class LocalScales:
    """The scale that each position of one site had in positive rows when these last ran, by the row's number."""

    def __init__(self) -> None:
        self._of_row: dict[int, Tensor] = {}

    def clear(self) -> None:
        self._of_row.clear()

    def keep(self, numbers: Sequence[int], scales: Tensor) -> None:
        """scales (R, n, 1) of positive rows with these numbers; rows with one number have the mean of theirs."""
        for number in dict.fromkeys(numbers):
            own = [row for row, other in enumerate(numbers) if other == number]
            self._of_row[number] = scales[own].mean(dim=0)

    def of(self, call: Call, numbers: Sequence[int], own: Tensor, positions: int) -> Tensor:
        """The scale that each person's share of each position has, for rows of one kind: (R, n, A); own: (A).

        In positive rows it is the person's own. The tokens of negative rows cannot be routed, for they are the same for
        all; but guidance pushes away from what a negative row shows at a position, so it must show there as much of a
        face as the positive row does: every share of the position has the scale of whom the positive row of the same
        picture gave it to, at this site, when it last ran (the mean over several). In one call, and where a host runs
        the positive rows first, as the WebUI does, that is in the same step; where it runs them later, in the step
        before. Before any has run, and where it had another size, everybody has their own scale, which with equal
        tokens comes to the mean of all.
        """
        everywhere = own.expand(positions, -1)
        found = []
        for row in (call.table[number] for number in numbers):
            known = [
                self._of_row[other]
                for other, positive in call.table.items()
                if row.kind != POSITIVE
                and positive.kind == POSITIVE
                and row.picture == positive.picture
                and len(self._of_row.get(other, ())) == positions
            ]
            found.append(torch.stack(known).mean(dim=0).expand_as(everywhere) if known else everywhere)
        return torch.stack(found)
