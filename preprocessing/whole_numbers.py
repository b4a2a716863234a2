"""Whole numbers in untrusted text."""

from __future__ import annotations

import re


def whole_number(text: str) -> int | None:
    """The number that up to 18 of the digits 0 to 9 state; None for other text. ``str.isdigit`` accepts ² too, for which
    ``int`` raises ValueError, as it does for thousands of digits."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
