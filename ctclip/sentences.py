"""Split reports into sentences.

Reports are dictated, typed and exported: lists, lines without full stops, wrapped lines, missing spaces,
abbreviations. Libraries for prose (pysbd) take 20 ms per report of CT-RATE's length, and split "approx. 5 mm".
"""

from __future__ import annotations

import re

STOP = re.compile(r"[.!?…]+([\"'”’)\]]*)|[。．｡！？।؟]+")
# A word after a full stop with a missing space.
WORD_AFTER = re.compile(r"[^\W\d_]{2}")
# The beginning of a list item: a dash or dot, "1.", "(2)", "[3]", "#4", "5 -", "6:", "b)", "C.", "iv)", "IV.".
MARKER = re.compile(
    r"(?:[-–—•*·▪■●○◦‣⁃➢►→✓]+(?=\s|[^\W\d_])|[+>](?=\s)|[①-⑳]|\(\d{1,2}\)|\[\d{1,2}\]|#\d{1,2}[.):]?(?=\s)"
    r"|\d{1,2}[.)．、）](?=\s|[^\W\d_])|\d{1,2}\s?[-–:](?=\s+[^\W\d_])|\(?[a-h]\)(?=\s)|\(?[ivx]{1,4}\)(?=\s)"
    r"|(?:[A-H]|I{1,3}|I?V|VI{1,3}|I?X)[.)](?=\s+[A-ZÀ-ÖØ-ÞĞİŞŒ]))\s*"
)
# A sign that always begins an item; a dash does so only if the first item has one.
BULLET = re.compile(r"(?<=\s)[•·▪■●○◦‣⁃➢►](?=\s*[^\W\d_])|(?<=\S)\s*[①-⑳](?=\s*[^\W\d_])")
DASHED = re.compile(r"(?<=\s)-(?=[^\W\d_])")
# A list in one line, with numbers or letters.
NUMBERED = re.compile(r"(?<![^\W_])(\d{1,2}|[A-Ha-h])([.)．、])\s*(?=[^\W\d_])")
# A full stop after these never ends a sentence; after the others, only before a capital letter.
NEVER = frozenset({
    "dr", "mr", "mrs", "ms", "prof", "approx", "e.g", "i.e", "eg", "ie", "i.v", "i.m", "s.c", "p.o", "iv", "vs", "cf", "fig", "figs",
    "incl", "excl", "resp", "z.b", "bzw", "ggf", "v.a", "z.n", "st.p", "u.a", "d.h", "www",
})  # fmt: skip
BEFORE_SMALL = frozenset({
    "lt", "rt", "l", "r", "sup", "inf", "ant", "post", "lat", "med", "bilat", "min", "max", "mod", "seg", "segm", "nos", "nr", "st",
    "al", "etc", "ca", "diam", "avg", "a.m", "p.m", "vol", "ser", "im", "img", "pt", "pts", "hx", "dx", "w", "s", "p", "c", "d", "v", "n", "m", "t",
    "calc", "mo", "mos", "wk", "wks", "yr", "yrs", "hr", "hrs", "cont", "susp", "poss", "prob", "neg", "pos", "th", "vert", "op", "postop", "preop",
})  # fmt: skip
# "No. 5" is a number, "no." an answer.
BEFORE_NUMBER = frozenset(
    {
        "no",
        "nos",
        "nr",
        "ca",
        "ser",
        "se",
        "im",
        "img",
        "fig",
        "seg",
        "max",
        "min",
        "st",
        "vol",
        "p",
        "diam",
        "avg",
        "th",
        "vert",
    }
)
# A number with a full stop before these is an ordinal, as in "the 4. rib".
ORDINAL = re.compile(
    r"(?:ribs?|costa|kosta|vertebra|segments?|intercostal|thoracic|lumbar|cervical|metacarpal|day)\b", re.I
)
# A number after these belongs to them, and does not begin a list item.
COUNTED = re.compile(
    r"(?:segments?|ribs?|lobes?|grade|stage|type|levels?|stations?|category|series|image|figure|and|or|of|[,x&+/-])$",
    re.I,
)
TITLED = re.compile(r"\b(?:Dr|Prof|Mr|Mrs|Ms)\.\s*(?:[A-Z]\.\s*)*[A-Z]$")
WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$")
# No sentence begins after these full stops: "image.dcm", "example.com".
FILE_ENDING = re.compile(r"(?:dcm|nii|nrrd|mha|gz|zip|csv|txt|pdf|jpe?g|png|com|org|net|edu)\b")
# Number of characters considered on either side of a full stop.
NEAR = 40
# A text is wrapped if its longest line has at least this many characters; lines that were wrapped are nearly as long.
WRAPPED, FULL = 50, 0.75


def sentences(text: str) -> list[str]:
    """The non-empty sentences of a section; list items lose their numbers and dashes."""
    parts = (_unmarked(part) for item in _items(text) for piece in _numbered(item) for part in _stopped(piece))
    return [part for part in parts if any(character.isalnum() for character in part)]


def _items(text: str) -> list[str]:
    """Lines, with wrapped lines joined."""
    lines = [" ".join(line.split()) for line in BULLET.sub(lambda sign: f"\n{sign[0].strip()}", text).splitlines()]
    lines = [
        part
        for line in lines
        for part in (DASHED.sub("\n-", line).split("\n") if DASHED.match(f" {line}", 1) else [line])
    ]
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
    """Whether ``following`` continues the sentence of ``line``, because no sentence ended or the line was full."""
    if line[-1] in ".!?:,;":
        return True
    full = longest >= WRAPPED and len(line) >= FULL * longest
    return full and not following[0].isupper()


def _numbered(item: str) -> list[str]:
    """Split a list in one line ("1) Nodule 2) Effusion") into its items, without their numbers."""
    begins = NUMBERED.match(item)
    if begins is None:
        return [item]
    parts, number, style, start = [], _place(begins[1]), begins[2], begins.end()
    if begins[1].isalpha() and style != ")":
        return [item]
    for marker in NUMBERED.finditer(item, start):
        before = item[start : marker.start()]
        apart = before.endswith(" ") and (style in ")、" or item[marker.end()].isupper())
        # "1) Nodule, 2) effusion" is a list; in "segments 1, 2) ..." there is no item between the numbers.
        counted = COUNTED.search(before.rstrip().rstrip(",") if style == ")" else before.rstrip())
        if _place(marker[1]) == number + 1 and marker[2] == style and apart and not counted:
            parts.append(before.strip().rstrip(",;"))
            number, start = number + 1, marker.end()
    return [*parts, item[start:].strip()]


def _place(mark: str) -> int:
    """The number of a list item; for letters, their position in the alphabet."""
    return int(mark) if mark.isdecimal() else ord(mark.lower()) - ord("a") + 1


def _stopped(item: str) -> list[str]:
    """Split an item at its full stops."""
    pieces, start = [], 0
    for stop in STOP.finditer(item):
        if _ends(item, start, stop):
            pieces.append(item[start : stop.end()].strip())
            start = stop.end()
    return [*pieces, item[start:].strip()]


def _ends(item: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence that began at ``start`` ends at ``stop``."""
    after = item[stop.end() : stop.end() + NEAR]
    # The preceding text, as far as the longest abbreviation or title.
    before = item[max(start, stop.start() - NEAR) : stop.start()]
    if not after or stop[0][0] in "。｡！？।؟":
        return True
    if stop[0][0] == "．":
        # A full stop in a number, or after an item number, ends no sentence.
        return not before[-1:].isdecimal()
    if not after[0].isspace():
        return not stop[1] and (stop[0] == "." or after[0].isupper()) and _space_forgotten(before, after)
    following = after.lstrip()
    if stop[1]:
        # "(mediastinitis?) in both" continues.
        return "?" not in stop[0] and not following[:1].islower()
    return stop[0] != "." or not _abbreviated(before.strip(), following)


def _space_forgotten(before: str, after: str) -> bool:
    """Whether a sentence ends at a full stop without a following space: between two words, if the second has a capital
    or the first is not a known abbreviation; and between a number or bracket and a word with a capital."""
    if WORD_AFTER.match(after) is None:
        return False
    if len(before) > 1 and before[-2:].isalpha():
        return not _abbreviated(before, after) and not FILE_ENDING.match(after)
    return after[0].isupper() and before[-1:] in tuple(")]%0123456789")


def _abbreviated(before: str, following: str) -> bool:
    """Whether the full stop between the two belongs to a number or an abbreviation."""
    marker = MARKER.match(f"{before}. {following}")
    if marker is not None and marker.end() == len(before) + 2:
        return True
    if before[-1:].isdigit():
        return ORDINAL.match(following) is not None
    word = WORD.search(before)
    if word is None:
        return False
    name, first = word[0].lower(), following[:1]
    if name in NEVER or TITLED.search(before) or ("." in name and first.islower()):
        return True
    return (first.islower() and name in BEFORE_SMALL) or (first.isdigit() and name in BEFORE_NUMBER)


def _unmarked(piece: str) -> str:
    marker = MARKER.match(piece)
    return piece[marker.end() :].strip() if marker else piece
