"""Write a self-contained HTML page with embedded figures, which loads no other files."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ctclip.preprocessing.files import write_text

UNTRUSTED = " (!)"
UNTRUSTED_MEANS = "(!): fewer than ten positive or negative patients; the interval is unreliable"
# Cells of numeric columns, which are right-aligned.
FIGURES = re.compile(
    r"[-+<\d.,%\s]*|(undefined|[-+]?[\d.]+) to (undefined|[-+]?[\d.]+)( \(!\))?|undefined|[+-]?\d+ (of|and) \d+"
)

# Marks pages of this kind, which may be replaced.
MARK = b'<div class="headline">'
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title>
<style>
:root { --ink: #222; --dim: #555; --paper: #fff; --panel: #f6f6f4; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --dim: #aab; --paper: #15181b; --panel: #1f2428; --line: #3a4046 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
figure { margin: 1rem 0 } figure button { border: 0; padding: 0; background: #fff; cursor: zoom-in; max-width: 100% } img { max-width: 100%; height: auto; display: block } figcaption { color: var(--dim); font-size: .87rem }
dialog { padding: 0; border: 0; max-width: 100vw; max-height: 100vh; background: #fff; overflow: auto; cursor: zoom-out } dialog img { max-width: none } dialog::backdrop { background: #000c }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem } td, th { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer } th button::after { content: " \\2195"; color: var(--dim) } th[aria-sort=ascending] button::after { content: " \\2191" } th[aria-sort=descending] button::after { content: " \\2193" }
:focus-visible { outline: 3px solid #3b82c4; outline-offset: 1px }
td { white-space: nowrap }
td:first-child, th:first-child, td.words, th.words { text-align: left; white-space: normal } pre { font-size: .78rem; background: var(--panel); padding: .8rem; overflow: auto }
.headline { display: flex; flex-wrap: wrap; gap: 1.4rem } .headline div { min-width: 8rem } .headline b { display: block; font-size: 1.5rem }
td.words + td.words { font-size: .82rem; line-height: 1.35; min-width: 12rem } td { vertical-align: top }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
.note { color: var(--dim); font-size: .87rem }
@media print { th button::after { content: "" } }
</style></head><body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<div class="headline">{% for value, words in headline %}<div><b>{{ value }}</b>{{ words }}</div>{% endfor %}</div>
{% for section in sections %}<h2>{{ section.title }}</h2>{% if section.words %}<p>{{ section.words }}</p>{% endif %}
{% if section.beside %}<div class="beside">{% endif %}{% for caption, data in section.figures %}<figure><button type="button" title="Enlarge"><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}"></button><figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% if section.beside %}</div>{% endif %}
{% if section.table %}<div class="scroll" tabindex="0" role="region" aria-label="{{ section.title }}"><table><thead><tr>{% for head in section.table[0] %}<th scope="col"{% if section.table[1:] and section.table[1][loop.index0] is words %} class="words"{% endif %}>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.table[1:] %}<tr>{% for cell in row %}<td{% if cell is words %} class="words"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endif %}
{% if section.pre %}<pre tabindex="0">{{ section.pre }}</pre>{% endif %}{% endfor %}
<dialog aria-label="Figure"><img alt=""></dialog>
<script>
for (const head of document.querySelectorAll("thead th")) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, button = document.createElement("button");
  if (body.rows.length < 3 || !head.textContent.trim()) continue;
  button.type = "button"; button.textContent = head.textContent; head.replaceChildren(button);
  button.onclick = () => {
    const down = head.getAttribute("aria-sort") !== "descending", number = (row) => parseFloat(row.cells[column].textContent.replace(/[,<]/g, ""));
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [number(a), number(b)];
      const order = isNaN(x) || isNaN(y) ? (isNaN(x) - isNaN(y)) * (down ? 1 : -1) || b.cells[column].textContent.localeCompare(a.cells[column].textContent) : y - x;
      return down ? order : -order;
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending"); body.append(...rows);
  };
}
const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
for (const button of document.querySelectorAll("figure button")) button.onclick = () => { const small = button.querySelector("img"); large.src = small.src; large.alt = small.alt; dialog.showModal(); };
dialog.onclick = () => dialog.close();
</script>
</body></html>
"""


def write_page(
    path: Path, *, title: str, subtitle: str, headline: list[tuple[str, str]], sections: list[dict[str, Any]]
) -> None:
    """Write one page. A section has a ``title`` and optionally ``words``, ``figures`` [(caption, png path)] (in two
    columns if ``beside``), ``table`` (rows, the first is the header) and ``pre`` (preformatted text)."""
    ready = []
    for section in sections:
        figures = [
            (caption, base64.b64encode(Path(png).read_bytes()).decode()) for caption, png in section.get("figures", [])
        ]
        ready.append({"words": "", "table": None, "pre": "", "beside": False, **section, "figures": figures})
    environment = Environment(autoescape=True)
    environment.tests["words"] = lambda cell: not FIGURES.fullmatch(str(cell))
    page = environment.from_string(TEMPLATE)
    write_text(path, page.render(title=title, subtitle=subtitle, headline=headline, sections=ready))


def number(value: float | None, digits: int = 3) -> str:
    """A number as text; "undefined" for None and NaN."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval_words(lower: float | None, upper: float | None, trusted: bool = True) -> str:
    """The limits as text, marked if the interval is unreliable."""
    return f"{number(lower)} to {number(upper)}" + ("" if trusted else UNTRUSTED)


def split_note(metrics: dict[str, Any]) -> str:
    """A sentence about the volumes of a split that were not scored; "" if all were, or without a store."""
    split = metrics.get("split")
    if not split or not split["missing"]:
        return ""
    names, unit = ", ".join(split["names"]), split["unit"]
    words = (
        f"{split['missing']:,} of the {split['expected']:,} {unit}s of the split {names} are not among the predictions"
    )
    return f"{words} ({split['in_store']:,} of them are in the store: `ctclip zero-shot` can score them)"


def label_table(per_label: dict[str, Any], histogram: dict[str, float | None] | None) -> list[list[str]]:
    """The rows of the table of abnormalities, the highest AUROC first."""
    columns = ("average_precision", "f1", "sensitivity", "specificity", "calibration_error")
    rows = [
        [
            "abnormality",
            "AUROC",
            "95 % interval",
            "positives",
            *[metric.replace("_", " ").replace("f1", "F1") for metric in columns],
        ]
    ]
    if histogram:
        rows[0].append("histogram control")
    for name in sorted(per_label, key=lambda name: -(per_label[name]["value"] or 0)):
        entry = per_label[name]
        trusted = entry.get("interval_trusted", True)
        limits = "" if entry["value"] is None else interval_words(entry["lower"], entry["upper"], trusted)
        row = [name, number(entry["value"]), limits, f"{entry['positives']} of {entry['n']}"]
        row += [number(entry.get(metric)) for metric in columns]
        rows.append([*row, number(histogram.get(name))] if histogram else row)
    return rows


def comparison_table(first: str, ours: dict[str, Any], second: str, theirs: dict[str, Any]) -> list[list[str]]:
    """AUROC of two evaluations by label with intervals, the largest difference first, preceded by the mean of each
    evaluation and over the common labels."""
    sides = (ours["auroc"], theirs["auroc"])
    shared = [name for name in sides[0] if name in sides[1]]
    pairs = {name: [side[name]["value"] for side in sides] for name in shared}
    defined = {name: pair for name, pair in pairs.items() if None not in pair}
    rows = [["abnormality", first, "95 % interval", second, "95 % interval", "difference"]]

    def row(name: str, values: Sequence[float | None], limits: Sequence[Sequence[Any]]) -> list[str]:
        cells = [name]
        for value, pair in zip(values, limits, strict=True):
            cells += [
                number(value),
                interval_words(*pair) if len(pair) and value is not None else "",
            ]
        first, second = values
        return [*cells, "" if first is None or second is None else f"{first - second:+.3f}"]

    means = [ours["mean_auroc"], theirs["mean_auroc"]]
    same = set(sides[0]) == set(sides[1])
    rows.append(row("mean" if same else "mean over each one's own labels", means, [ours["mean_auroc_interval"], theirs["mean_auroc_interval"]]))  # fmt: skip
    if not same and defined:
        over = [sum(pair[side] for pair in defined.values()) / len(defined) for side in (0, 1)]
        rows[-1][-1] = ""
        rows.append(row(f"mean over the {len(defined)} common labels", over, [[], []]))
    for name in sorted(shared, key=lambda name: -abs(pairs[name][0] - pairs[name][1]) if name in defined else 0):
        rows.append(row(name, pairs[name], [_limits(side[name]) for side in sides]))
    return rows


def _limits(entry: dict[str, Any]) -> list[Any]:
    return [entry["lower"], entry["upper"], entry.get("interval_trusted", True)]
