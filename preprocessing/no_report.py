"""Recognise placeholder sections: words and sentences that state that there is no report."""

from __future__ import annotations

import re

from ctclip.preprocessing.tables import MISSING, cell_text, stripped

# Sections without content, ignoring case, spaces, full stops and surrounding punctuation.
NO_REPORT = MISSING | frozenset(
    ["not dictated", "no report", "no text", "no data", "no information", "no comment", "no comments", "no impression", "empty",
     "blank", "omitted", "deleted", "removed", "redacted", "ditto", "idem", "same", "same as above", "to follow", "pending", "x",
     "xx", "xxx", "tbd", "tba", "#ref", "#value",
     "ka", "keine angabe", "keine angaben", "siehe oben", "so", "non renseigné", "voir ci-dessus", "sin datos", "no consta",
     "ver arriba", "belirtilmemiş", "bilgi yok", "无", "暂无", "无报告", "未提供", "见上", "同上", "記載なし"]
)  # fmt: skip
# The same in sentences: "clinical information not given", "no report is available", "please see findings above".
ABSENT = re.compile(
    r"(?:(?:the )?(?:clinical |patient )?(?:information|indication|history|technique|comparison|report|text|data|comments?|"
    r"findings?|impressions?|conclusion)(?: is| are| was| were)? )?(?:not|none) (?:yet )?(?:is |was |are |were )?(?:available|given|provided|stated|"
    r"reported|recorded|specified|documented|dictated|described|mentioned|entered|applicable|supplied)"
    r"|no (?:clinical )?(?:information|indication|history|report|text|data|comments?|impressions?|conclusion|findings)"
    r"(?: is| are| was| were)?(?: available| given| provided| stated| recorded| dictated| entered| supplied)"
    r"|(?:please )?(?:see|refer to|cf)(?: the)?(?: (?:above|below|attached|separate|full|body of(?: the)?|findings?|impressions?|"
    r"conclusion|comments?|report|description|text|section|in|and|for|details))+"
    r"|as(?: (?:described|stated|noted|reported|mentioned|given))?(?: (?:above|below|in the report|in findings))+"
    r"|(?:the )?(?:final |full )?(?:report|dictation|addendum|result)(?: is)? (?:to follow|pending)"
)
HEADING = re.compile(
    r"(?:findings?|impressions?|conclusion|technique|comparison|(?:clinical )?(?:information|indication|history))\s*:\s*"
)
AROUND = " .:;!=*[](){}\"'_-–—。"


def report_text(text: object) -> str:
    """A section of a report, or "" if it holds only a placeholder for "no report" (``Not given.``, ``nan``, ``-``)."""
    cell = cell_text(text)
    return "" if is_no_report(cell) else cell


def is_no_report(text: str) -> bool:
    """Whether a section of a report only states that there is no report; also true for empty text and bare numbers."""
    bare = " ".join(stripped(text).split()).strip(AROUND).casefold()
    bare = HEADING.sub("", bare, count=1).strip(AROUND)
    if bare in NO_REPORT or ABSENT.fullmatch(bare) or not re.search(r"[^\W\d_]", bare):
        return True
    # "nan nan" and "None. None." are two sections in one; "N. A." and "n / a" are one word.
    parts = re.split(r"[.;|,\s]+", bare)
    return all(part in NO_REPORT for part in parts) or re.sub(r"[\s./]", "", bare) in ("na", "ka")
