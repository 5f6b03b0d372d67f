"""What came of reference guidance: a request for it that changed nothing must not look like one that did."""

from __future__ import annotations

from collections.abc import Sequence

from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.reference import GuidedPerson, GuidedStep, ReferenceGuidance


def check_acted(guidance: ReferenceGuidance, pictures: int, must_act: bool = True) -> list[Notice]:
    """After a sampling of so many pictures: in which of them it acted on somebody at no step, though it did in others;
    and once what it says of the host.

    Raises PortraitError where no step could be guided, and, with must_act, where it acted on somebody in none of the
    pictures. A strength of 0 acts on nobody by intention.
    """
    if not float(guidance.options["strength"]):
        return []
    if not guidance.reached:
        begin = float(guidance.options["begin"])
        raise PortraitError(
            "guidance.begin",
            f"no step of the sampling lies in the last {begin:.0%} of the timesteps, so nothing would be guided",
            "Raise it, or take more steps.",
        )
    missed = _missed(guidance.people, guidance.record, pictures)
    for number in {number for _, number in missed}:
        if must_act and all((picture, number) in missed for picture in range(pictures)):
            raise PortraitError(
                f"identities[{number}]",
                "reference guidance acted on this person at no step: it found them nowhere in the picture",
                "Give this person a region, let guidance begin later (a face must be there to be found), widen their "
                "window, or let it not act on them.",
            )
    told, guidance.notices = guidance.notices, []
    text = "reference guidance found this person at no step in picture {} of the batch"
    return told + [Notice(f"identities[{number}]", text.format(picture + 1)) for picture, number in missed]


def _missed(people: Sequence[GuidedPerson], record: Sequence[GuidedStep], pictures: int) -> list[tuple[int, int]]:
    """Where a guided person was not: (number of the picture, of the person)."""
    wanted = [number for number, person in enumerate(people) if person.guided]
    acted = {(step.picture, number) for step in record for number in wanted if step.similarity[number] is not None}
    return [(picture, number) for picture in range(pictures) for number in wanted if (picture, number) not in acted]
