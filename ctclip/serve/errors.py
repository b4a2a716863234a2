"""Errors of requests."""

from __future__ import annotations

from ctclip.errors import CtclipError


class Unavailable(CtclipError):
    """The service cannot answer now; the same request may succeed later."""


class Refused(CtclipError):
    """The scan, or the question, cannot be answered; the message states the reason."""


class Unknown(CtclipError):
    """There is no such scan."""
