"""A chart of a page made of text and boxes: it can be read on a phone and in the dark, and each row says its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHANCE = 0.5
STYLE = """
:root { --first: #2f6f9f; --second: #b5651d } @media (prefers-color-scheme: dark) { :root { --first: #6fb1e4; --second: #e9a15b } }
.chart { margin: 1rem 0; max-width: 60rem } .chart .row { display: grid; grid-template-columns: minmax(7.5rem, 28%) minmax(0, 1fr); gap: .7rem; align-items: center; font-size: .87rem; line-height: 1.15; padding: .22rem 0 } .chart .row:hover { background: var(--panel) }
.chart .row > span { text-align: right } .track { position: relative; align-self: stretch; min-height: 1.1rem } .chart.pair .track { min-height: 1.5rem }
.track * { position: absolute } .track u { top: -.22rem; bottom: -.22rem; width: 1px; background: var(--line) } .track u.chance { background: var(--dim) }
.track i { height: .35rem; top: calc(50% - .175rem); opacity: .45; border-radius: 2px } .track b { width: .7rem; height: .7rem; margin-left: -.35rem; top: calc(50% - .35rem); border-radius: 50% }
.pair .track .first { transform: translateY(-.32rem) } .pair .track .second { transform: translateY(.32rem) }
i.first, b.first { background: var(--first) } i.second, b.second { background: var(--second) } b.second { border-radius: 1px; transform: rotate(45deg) scale(.75) } .pair b.second { transform: translateY(.32rem) scale(.85) !important }
b.hollow { background: none !important; border: 2px solid var(--second) } .chart .axis .track { min-height: 1.2rem; color: var(--dim); font-size: .8rem } .axis .track span { transform: translateX(-50%) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .87rem; padding: 0; margin: .4rem 0; list-style: none } .legend .second { border-radius: 1px } .pair .legend .second { transform: none !important } .legend b { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .45rem }
"""
TEMPLATE = """
<div class="chart{% if chart.pair %} pair{% endif %}" role="img" aria-label="{{ chart.words }}"><ul class="legend">{% for kind, name in chart.legend %}<li><b class="{{ kind }}"></b>{{ name }}</li>{% endfor %}</ul>
{% for row in chart.rows %}<div class="row" title="{{ row.words }}"><span>{{ row.name }}</span><div class="track">{% for at in chart.ticks %}<u{% if at.value == chart.chance %} class="chance"{% endif %} style="left:{{ at.left }}%"></u>{% endfor %}{% for mark in row.marks %}{% if mark.width is not none %}<i class="{{ mark.kind }}" style="left:{{ mark.start }}%;width:{{ mark.width }}%"></i>{% endif %}<b class="{{ mark.kind }}" style="left:{{ mark.left }}%"></b>{% endfor %}</div></div>
{% endfor %}<div class="row axis"><span></span><div class="track">{% for at in chart.ticks %}<span style="left:{{ at.left }}%">{{ at.value }}</span>{% endfor %}</div></div></div>
"""


@dataclass(frozen=True)
class Series:
    """One value of each label, from 0 to 1, with its interval where it has one: {label: {"value", "lower", "upper"}}."""

    name: str
    values: Mapping[str, Mapping[str, Any]]


def auroc_chart(first: Series, second: Series | None = None, counts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A section's chart: AUROC of the labels of ``first``, the best first, with that of ``second`` below or, where it has
    no intervals, as an open mark. ``counts`` is written behind the names of labels."""
    both = [series for series in (first, second) if series is not None]
    names = [name for name, entry in first.values.items() if entry["value"] is not None]
    names.sort(key=lambda name: -first.values[name]["value"])
    entries = [series.values.get(name) or {} for series in both for name in names]
    numbers = [entry.get(key) for entry in entries for key in ("value", "lower")]
    lowest = min([CHANCE, *(value for value in numbers if value is not None and math.isfinite(value))])
    low = math.floor(10 * lowest) / 10
    pair = any(entry.get("lower") is not None for entry in (second.values.values() if second else ()))
    kinds = ["first", "second" if pair else "second hollow"]

    def place(value: float) -> float:
        return round(100 * (value - low) / (1 - low), 2)

    rows = []
    for name in names:
        marks, words = [], []
        for kind, series in zip(kinds, both, strict=False):
            entry = series.values.get(name) or {}
            if (value := entry.get("value")) is None:
                continue
            low_limit, high_limit = (_number(entry.get(key)) for key in ("lower", "upper"))
            mark: dict[str, Any] = {"kind": kind, "left": place(value), "start": 0, "width": None}
            figures = f"{series.name} {value:.3f}"
            if low_limit is not None and high_limit is not None:
                start, end = place(low_limit), place(high_limit)
                mark |= {"start": start, "width": round(end - start, 2)}
                figures += f" ({low_limit:.3f} to {high_limit:.3f})"
            marks.append(mark)
            words.append(figures)
        count = f" ({counts[name]})" if counts and name in counts else ""
        rows.append({"name": f"{name}{count}", "marks": marks, "words": f"{name}: {'; '.join(words)}"})
    ticks = [round(low + step / 10, 1) for step in range(round(10 * (1 - low)) + 1)]
    return {
        "pair": pair, "rows": rows, "chance": CHANCE, "ticks": [{"value": tick, "left": place(tick)} for tick in ticks],
        "legend": [(kind, series.name) for kind, series in zip(kinds, both, strict=False)],
        "words": "AUROC of each abnormality; the table below has the same figures.",
    }  # fmt: skip


def _number(value: Any) -> float | None:
    """A limit; None for one that is missing or NaN."""
    return None if value is None or not math.isfinite(value) else float(value)
