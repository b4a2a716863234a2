"""Splitting reports into sentences.

Reports are dictated, typed and exported: lists, lines without full stops, wrapped lines, missing spaces, abbreviations.
Libraries for prose (pysbd) take 20 ms a report of CT-RATE's length, and split "approx. 5 mm".
"""

from __future__ import annotations

import re

STOP = re.compile(r"[.!?]+([\"'”’)\]]*)|[。！？]+")
# Behind a stop whose space was forgotten: a capitalised word.
CAPITALISED = re.compile(r"[A-ZÀ-ÖØ-ÞĞİŞŒ][^\W\d_A-ZÀ-ÖØ-ÞĞİŞŒ]")
# What an item of a list begins with: a dash or dot, "1.", "(2)", "b)".
MARKER = re.compile(r"(?:[-–—•*·▪●○◦‣⁃➢]+(?=\s|[^\W\d_])|\(\d{1,2}\)|\d{1,2}[.)](?=\s|[^\W\d_])|\(?[a-h]\)(?=\s))\s*")
# A sign that begins an item wherever it stands.
BULLET = re.compile(r"(?<=\s)[•·▪●○◦‣⁃➢](?=\s*[^\W\d_])")
NUMBERED = re.compile(r"(\d{1,2})([.)])\s*(?=[^\W\d_])")
# After these a stop ends nothing; after the others only where a capital follows.
NEVER = frozenset({
    "dr", "mr", "mrs", "ms", "prof", "approx", "e.g", "i.e", "eg", "ie", "i.v", "i.m", "s.c", "p.o", "iv", "vs", "cf", "fig", "figs",
    "incl", "excl", "resp", "z.b", "bzw", "ggf", "v.a",
})  # fmt: skip
BEFORE_SMALL = frozenset({
    "lt", "rt", "l", "r", "sup", "inf", "ant", "post", "lat", "med", "bilat", "min", "max", "mod", "seg", "segm", "nos", "nr", "st",
    "al", "etc", "ca", "diam", "avg", "a.m", "p.m", "vol", "ser", "im", "img", "pt", "pts", "hx", "dx", "w", "s", "p", "c", "d", "v", "n", "m", "t",
})  # fmt: skip
# "No. 5" is a number, "no." an answer.
BEFORE_NUMBER = frozenset(
    {"no", "nos", "nr", "ca", "ser", "se", "im", "img", "fig", "seg", "max", "min", "st", "vol", "p"}
)
# A number with a stop before these is an ordinal, as in "the 4. rib".
ORDINAL = re.compile(
    r"(?:ribs?|costa|kosta|vertebra|segments?|intercostal|thoracic|lumbar|cervical|metacarpal|day)\b", re.I
)
# A number behind these belongs to them, and is no item of a list.
COUNTED = re.compile(
    r"(?:segments?|ribs?|lobes?|grade|stage|type|levels?|stations?|category|series|image|figure|and|or|of|[,x&+/-])$",
    re.I,
)
TITLED = re.compile(r"\b(?:Dr|Prof|Mr|Mrs|Ms)\.\s*(?:[A-Z]\.\s*)*[A-Z]$")
WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$")
# Characters on either side of a stop that are looked at.
NEAR = 40
# Lines are wrapped where the longest has so many characters, and those that were cut by it are nearly as long.
WRAPPED, FULL = 50, 0.75


def sentences(text: str) -> list[str]:
    """The sentences of a section, without empty ones, and of lists without their numbers and dashes."""
    parts = (_unmarked(part) for item in _items(text) for piece in _numbered(item) for part in _stopped(piece))
    return [part for part in parts if any(character.isalnum() for character in part)]


def _items(text: str) -> list[str]:
    """Lines, of which wrapped ones are joined again."""
    lines = [" ".join(line.split()) for line in BULLET.sub(r"\n\g<0>", text).splitlines()]
    longest = max(map(len, lines), default=0)
    items: list[str] = []
    last = ""
    for line in lines:
        if line and last and not MARKER.match(line) and _continues(last, line, longest):
            items[-1] += f" {line}"
        elif line and last.endswith(":"):
            items[-1] += f" {_unmarked(line)}"
        elif line:
            items.append(line)
        last = line
    return items


def _continues(line: str, following: str, longest: int) -> bool:
    """Whether ``following`` goes on with the sentence of ``line``: nothing ended, or the line was full."""
    if line[-1] in ".!?:,;":
        return True
    full = longest >= WRAPPED and len(line) >= FULL * longest
    return full and not following[0].isupper()


def _numbered(item: str) -> list[str]:
    """A list in one line ("1) Nodule 2) Effusion") cut into its points, without their numbers."""
    begins = NUMBERED.match(item)
    if begins is None:
        return [item]
    parts, number, style, start = [], int(begins[1]), begins[2], begins.end()
    for marker in NUMBERED.finditer(item, start):
        before = item[start : marker.start()]
        apart = before.endswith(" ") and (style == ")" or item[marker.end()].isupper())
        if int(marker[1]) == number + 1 and marker[2] == style and apart and not COUNTED.search(before.rstrip()):
            parts.append(before.strip())
            number, start = number + 1, marker.end()
    return [*parts, item[start:].strip()]


def _stopped(item: str) -> list[str]:
    """An item cut at its stops."""
    pieces, start = [], 0
    for stop in STOP.finditer(item):
        if _ends(item, start, stop):
            pieces.append(item[start : stop.end()].strip())
            start = stop.end()
    return [*pieces, item[start:].strip()]


def _ends(item: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence that began at ``start`` ends at ``stop``."""
    after = item[stop.end() : stop.end() + NEAR]
    if not after or stop[0][0] in "。！？":
        return True
    # What stands before, as far back as an abbreviation or a title reaches.
    before = item[max(start, stop.start() - NEAR) : stop.start()]
    if not after[0].isspace():
        spaced = before[-2:].isalpha() or before[-1:] in tuple(")]%0123456789")
        return not stop[1] and spaced and CAPITALISED.match(after) is not None
    following = after.lstrip()
    if stop[1]:
        # "(mediastinitis?) in both" goes on.
        return "?" not in stop[0] and not following[:1].islower()
    return stop[0] != "." or not _abbreviated(before.strip(), following)


def _abbreviated(before: str, following: str) -> bool:
    """Whether a full stop between the two belongs to a number or an abbreviation."""
    if MARKER.fullmatch(f"{before}. "):
        return True
    if before[-1:].isdigit():
        return ORDINAL.match(following) is not None
    word = WORD.search(before)
    if word is None:
        return False
    name, first = word[0].lower(), following[:1]
    if name in NEVER or TITLED.search(before):
        return True
    return (first.islower() and name in BEFORE_SMALL) or (first.isdigit() and name in BEFORE_NUMBER)


def _unmarked(piece: str) -> str:
    marker = MARKER.match(piece)
    return piece[marker.end() :].strip() if marker else piece
