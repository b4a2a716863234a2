"""Split a report in one text into sections, by its headings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# The name of the text before the first heading.
REST = "text"
# "## Findings", "**FINDINGS:**", "[Findings]", "1. Findings -", "FINDINGS" with a line of dashes below.
MARKS = r"[#*_=\[\]<>\s]*"
NUMBER = r"(?:\(?(?:\d{1,2}|[IVX]{1,4})[.)]\s*)?"
END = r"\s*(?:[*_\]]*\s*[:：][*_]*|[*_\]]*\s+[-–—]\s|[*_\]#=]*\s*$)"
RULE = re.compile(r"^[\s\-=_*~]{3,}$", re.MULTILINE)


def split_sections(text: str, headings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The sections of ``text`` in order; text without a heading is the section ``text``. Parts of one section are
    joined.

    ``headings``: the headings of each section, in any case. A heading is at the beginning of a line and ends with a
    colon, a dash or the end of the line; in capitals and with a colon it may be anywhere.
    """
    owners = {_key(word): name for name, words in headings.items() for word in words}
    if not owners:
        return {REST: text.strip()} if text.strip() else {}
    words = "|".join(sorted((re.escape(word).replace(r"\ ", r"[ _]+") for word in owners), key=len, reverse=True))
    at_line = re.compile(rf"^{MARKS}{NUMBER}{MARKS}(?P<word>{words}){END}", re.IGNORECASE | re.MULTILINE)
    capitals = re.compile(rf"(?<![^\s*.])(?P<word>{words.upper()})\s*:")
    by_start = {match.start("word"): match for pattern in (at_line, capitals) for match in pattern.finditer(text)}
    places = [by_start[start] for start in sorted(by_start)]
    parts: list[tuple[str, str]] = []
    first = places[0].start() if places else len(text)
    parts.append((REST, text[:first]))
    ends = [*(match.start() for match in places[1:]), len(text)]
    parts += [(owners[_key(match["word"])], text[match.end() : end]) for match, end in zip(places, ends, strict=False)]
    sections: dict[str, str] = {}
    for name, part in parts:
        body = RULE.sub("", part).strip().strip("*_").strip()
        if body:
            sections[name] = f"{sections[name]}\n{body}" if name in sections else body
    return sections


def _key(word: str) -> str:
    return " ".join(re.split(r"[ _]+", word.strip().casefold()))
