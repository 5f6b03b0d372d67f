"""What users are meant to read: the one exception of a request that cannot be honoured, and notices on one that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Notice:
    """What a user should know of a request that is honoured all the same.

    `field` is where in the request it lies, as in `PortraitError`; `text` says it in a clause without a full stop.
    """

    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.field}: {self.text}."


class PortraitError(Exception):
    """A request that cannot be honoured.

    `field` is where in the request the fault lies (``identities[0].photos[1]``, or the name of a file or setting),
    `problem` says what is wrong with the value found, `remedy` what to do about it.

    The WebUI's API answers with an exception's own `status_code` and `detail` when it has them
    (`modules/api/api.py: handle_exception`), so both are attributes here: 4xx when the request is at fault,
    5xx when this installation is.
    """

    def __init__(self, field: str, problem: str, remedy: str, status_code: int = 422):
        self.field = field
        self.problem = problem.rstrip(".")
        self.remedy = remedy
        self.status_code = status_code
        self.detail = f"{self.field}: {self.problem}. {self.remedy}"
        super().__init__(self.detail)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without it, one raised in another process could not come back: `args` is not what the class is made of."""
        return _again, (type(self), self.__dict__)


def _again(kind: type[PortraitError], facts: dict[str, Any]) -> PortraitError:
    error = kind.__new__(kind, facts["detail"])
    error.__dict__.update(facts)
    return error


class NoSuchFace(PortraitError):
    """A photo has fewer faces than the request counts. face: the index asked for, from 0. found: how many there are."""

    def __init__(self, field: str, face: int, found: int):
        self.face = face
        self.found = found
        super().__init__(
            field,
            f"face {face} was asked for, but {found} {'was' if found == 1 else 'were'} found",
            f'Give an index from 0 to {found - 1}, counted from the left, bystanders last, or "largest".',
        )
