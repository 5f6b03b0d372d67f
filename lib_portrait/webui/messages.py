"""What the panel says, as HTML."""

from __future__ import annotations

from html import escape

from lib_portrait.errors import PortraitError


def message_html(text: str, kind: str = "error") -> str:
    """A message for the panel; kind is "error", "warning" or "info"."""
    return f'<div class="portrait-message portrait-{kind}" role="alert">{escape(text)}</div>'


def said(error: Exception) -> PortraitError:
    """What the panel says of an error: of one that no user was meant to see, that it is in the log."""
    if isinstance(error, PortraitError):
        return error
    from modules import errors

    errors.report("Portrait failed", exc_info=True)
    return PortraitError("Portrait", f"it failed with {type(error).__name__}: {error}", "The console says more.", 500)
