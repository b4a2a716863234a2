"""A self-contained HTML page of a run: figures embedded, nothing fetched."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment

from preprocessing.files import write_text

# Mean zero-shot AUROC as published. Label sets, splits and thresholds differ: each line says how.
PUBLISHED = (
    ("CT-CLIP", 0.731, "CT-RATE validation, 18 labels, all reconstructions; reports only"),
    ("BIUD", 0.713, "CT-RATE validation, 18 labels, as rerun by others"),
    ("Merlin", 0.728, "CT-RATE validation; 0.595 to 0.728 depending on who ran it"),
    ("fVLM", 0.778, "CT-RATE validation, 16 labels (no Medical material, no Lymphadenopathy)"),
    ("MedVista3D", 0.782, "CT-RATE validation"),
    ("ViSD-Boost", 0.790, "CT-RATE validation"),
    ("COLIPRI", 0.798, "CT-RATE validation"),
    ("MPS-CT", 0.838, "CT-RATE validation; trained on labels derived from the reports"),
    ("GreenRFM", 0.848, "CT-RATE validation; trained on labels derived from the reports, 3-D ResNet-18"),
)

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #555; font-size: .87rem }
table { border-collapse: collapse; font-size: .87rem } td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child, td.words { text-align: left } pre { font-size: .78rem; background: #f6f6f4; padding: .8rem; overflow: auto }
.headline { display: flex; flex-wrap: wrap; gap: 1.4rem } .headline div { min-width: 8rem } .headline b { display: block; font-size: 1.5rem }
.note { color: #555; font-size: .87rem }
</style></head><body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<div class="headline">{% for value, words in headline %}<div><b>{{ value }}</b>{{ words }}</div>{% endfor %}</div>
{% for section in sections %}<h2>{{ section.title }}</h2>{% if section.words %}<p>{{ section.words }}</p>{% endif %}
{% for caption, data in section.figures %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}"><figcaption>{{ caption }}</figcaption></figure>{% endfor %}
{% if section.table %}<table><tr>{% for head in section.table[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in section.table[1:] %}<tr>{% for cell in row %}<td{% if cell is string %} class="words"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% if section.pre %}<pre>{{ section.pre }}</pre>{% endif %}{% endfor %}
</body></html>
"""


def write_page(
    path: Path, *, title: str, subtitle: str, headline: list[tuple[str, str]], sections: list[dict[str, Any]]
) -> None:
    """Write one page. A section has a title and, each optional, words, figures [(caption, png path)], table (rows,
    the first its head), pre (text as it stands)."""
    ready = []
    for section in sections:
        figures = [
            (caption, base64.b64encode(Path(png).read_bytes()).decode()) for caption, png in section.get("figures", [])
        ]
        ready.append({"words": "", "table": None, "pre": "", **section, "figures": figures})
    page = Environment(autoescape=True).from_string(TEMPLATE)
    write_text(path, page.render(title=title, subtitle=subtitle, headline=headline, sections=ready))


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or "undefined"."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def label_table(per_label: dict[str, Any], histogram: dict[str, float | None] | None) -> list[list[str]]:
    """Rows of the AUROC table, best first."""
    rows = [["abnormality", "AUROC", "95 % interval", "positives", "average precision", "histogram control"]]
    order = sorted(per_label, key=lambda name: -(per_label[name]["value"] or 0))
    for name in order:
        entry = per_label[name]
        limits = f"{number(entry['lower'])} to {number(entry['upper'])}"
        control = number((histogram or {}).get(name)) if histogram else ""
        rows.append(
            [
                name,
                number(entry["value"]),
                limits,
                str(entry["positives"]),
                number(entry["average_precision"]),
                control,
            ]
        )
    return rows


def published_table(mean: float | None) -> list[list[str]]:
    """This run's mean beside the published ones, each with its protocol."""
    ours = [
        "this run",
        number(mean),
        "this cohort and protocol: not comparable with the lines below unless it is CT-RATE's",
    ]
    return [
        ["model", "mean AUROC", "protocol"],
        ours,
        *[[name, number(value), words] for name, value, words in PUBLISHED],
    ]


def comparison_table(first: str, ours: dict[str, Any], second: str, theirs: dict[str, Any]) -> list[list[str]]:
    """AUROC of two evaluations by label, the largest difference first."""
    names = [name for name in ours["auroc"] if name in theirs["auroc"]]
    difference = {name: (ours["auroc"][name]["value"] or 0) - (theirs["auroc"][name]["value"] or 0) for name in names}
    rows = [["abnormality", first, second, "difference"]]
    means = [ours["mean_auroc"], theirs["mean_auroc"]]
    both = all(value is not None for value in means)
    rows.append(["mean", *map(number, means), f"{means[0] - means[1]:+.3f}" if both else ""])
    for name in sorted(names, key=lambda name: -abs(difference[name])):
        values = [side["auroc"][name]["value"] for side in (ours, theirs)]
        rows.append([name, *map(number, values), "" if None in values else f"{difference[name]:+.3f}"])
    return rows
