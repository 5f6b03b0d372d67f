"""Faults of a request as the host's API takes them without a traceback of itself in the console."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import HTTPException
from modules import errors as host

from lib_portrait import errors


class PortraitError(errors.PortraitError, HTTPException):
    """A `PortraitError` that the host knows as an answer: `modules/api/api.py: handle_exception` prints the traceback
    of every other exception. It gives the class's name to the client, so that is the same."""

    def __init__(self, error: errors.PortraitError):
        HTTPException.__init__(self, error.status_code, error.detail)
        self.field, self.problem, self.remedy = error.field, error.problem, error.remedy

    def __str__(self) -> str:
        return self.detail


def refusal(error: errors.PortraitError, p: Any) -> errors.PortraitError:
    """The error to raise while `p` is processed. A request's fault becomes a line in the console where the API is
    asked; in the page the host prints it itself. One of this installation keeps its traceback."""
    if isinstance(error, PortraitError) or not 400 <= error.status_code < 500:
        return error
    if getattr(p, "is_api", False):
        host.report(f"Portrait: {error.detail}")
    return PortraitError(error)
