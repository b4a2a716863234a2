"""Write a quality-control page of a store with slices, HU histogram, spacing and warnings."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont

from ctclip.preprocessing.anatomy import NOT_A_CHEST, find_lungs, no_chest
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.hounsfield import ALREADY_HU
from ctclip.preprocessing.outcomes import Outcome, outcome_table, read_outcomes
from ctclip.preprocessing.outputs import check_file, claimed_file, file_holds
from ctclip.preprocessing.pipeline import Expect
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume

# Size of a slice on the page in pixels. Enlarged, it has the size at which it was drawn, which depends on the number of
# volumes.
SHOWN, LARGEST, SMALLEST = 170, 420, 100
# Maximum size of a page, so that it can be sent by mail.
MOST_BYTES = 2_900_000
# Size of the text and histogram of a volume.
WORDS_BYTES = 3_000
QUALITY, LEAST_QUALITY = 60, 20
GAP = 6
WINDOWS = {"lung window": (-1350.0, 150.0), "soft-tissue window": (-160.0, 240.0)}
BINS = np.arange(-1050, 1051, 50)

# Marks pages of this kind, which may be replaced.
MARK = b"<title>Quality control: "
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title><style>
body { font: 13px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff } h1 { font-size: 1.2rem }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #15181b } }
.scan button { border: 0; padding: 0; background: none; cursor: zoom-in; display: block } :focus-visible { outline: 3px solid #3b82c4; outline-offset: 1px }
dialog { padding: 0; border: 0; background: #111; max-width: 100vw; max-height: 100vh; cursor: zoom-out } dialog img { display: block; width: min(96vw, 150vh) } dialog::backdrop { background: #000c }
.sheet { display: flex; flex-wrap: wrap; gap: 10px } .scan { background: #111; color: #ddd; padding: 6px; width: {{ width + 12 }}px; max-width: 100%; box-sizing: border-box }
.scan.warned { outline: 3px solid #d08020 } .scan img { display: block; width: {{ width }}px; max-width: 100%; height: auto } .scan p { margin: .2rem 0 }
.scan b { color: #fff } .warning { color: #ffb95e } .note { color: #999 } svg { background: #1c1c1c; display: block }
</style></head><body><h1>{{ title }}</h1><p>{{ subtitle }}</p>
{% if refused %}<h2>Refused</h2><ul>{% for name, reason in refused %}<li><b>{{ name }}</b>: {{ reason }}</li>{% endfor %}</ul>{% endif %}
<div class="sheet">{% for s in scans %}<div class="scan{% if s.warnings %} warned{% endif %}">
<p><b>{{ s.volume }}</b> {{ s.split }}</p><button type="button" title="Enlarge"><img alt="{{ s.volume }}: axial and coronal slice through the middle, sagittal slice through the left lung; {{ windows }}" src="data:image/webp;base64,{{ s.picture }}"></button>
<p>{% if s.spacing %}scan {{ s.shape }} voxels of {{ s.spacing }} mm{% endif %}</p>
<svg role="img" aria-label="Histogram of HU" width="100%" height="44" viewBox="0 0 {{ bins }} 44" preserveAspectRatio="none">{% for h in s.bars %}<rect x="{{ loop.index0 }}" y="{{ 44 - h }}" width="1" height="{{ h }}" fill="#7fb2d9"/>{% endfor %}</svg>
<p>HU -1050 to 1050; {{ s.range }}</p>{% if s.note %}<p class="note">{{ s.note }}</p>{% endif %}{% for w in s.warnings %}<p class="warning">{{ w }}</p>{% endfor %}</div>{% endfor %}</div>
<dialog aria-label="Slices"><img alt=""></dialog><script>
const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
for (const button of document.querySelectorAll(".scan button")) button.onclick = () => { const small = button.querySelector("img"); large.src = small.src; large.alt = small.alt; dialog.showModal(); };
dialog.onclick = () => dialog.close();
</script></body></html>
"""


@dataclass
class Card:
    """One volume of the sheet."""

    volume: str
    split: str
    picture: str
    shape: str
    spacing: str
    bars: list[float]
    range: str
    warnings: list[str]
    note: str


def quality_page(
    store: VolumeStore,
    output: Path,
    *,
    split: str | None = None,
    first: int = 0,
    count: int = 150,
    expect: Expect = "any",
    windows: Mapping[str, tuple[float, float]] | None = None,
) -> int:
    """Write the page of ``count`` stored volumes, starting at ``first``; return the number of volumes with warnings.

    ``windows``: HU windows by name, one row of slices each; by default two for a chest. ``expect``: ``chest`` warns of
    volumes that show no chest.
    """
    check_file(output, file_holds(MARK))
    windows = windows or WINDOWS
    cohort = store.cohort.set_index("volume")
    names = [name for name in store.volumes if name in cohort.index and split in (None, cohort.at[name, "split"])]
    page_names = names[first : first + count]
    outcomes = read_outcomes(store)
    refused = _refused(store)

    # Base64 encodes three bytes as four.
    most = 3 * (MOST_BYTES // max(1, len(page_names)) - WORDS_BYTES) // 4

    def card(name: str) -> Card:
        return _card(store, name, str(cohort.at[name, "split"]), outcomes.get(name), expect, windows, most)

    with ThreadPoolExecutor() as pool:
        cards = list(track(pool.map(card, page_names), len(page_names), "drawing"))
    warned = sum(bool(card.warnings) for card in cards)
    page = Environment(autoescape=True).from_string(TEMPLATE)
    title = f"Quality control: {store.path.name}"
    drawn = ", ".join(f"{name} ({low:.0f} to {high:.0f} HU)" for name, (low, high) in windows.items())
    subtitle = (
        f"Volumes {first + 1} to {first + len(cards)} of {len(names)}, spec {store.spec.name} "
        f"({' x '.join(f'{s:g}' for s in store.spec.spacing)} mm). Rows from top to bottom: {drawn}; the patient's "
        f"right is on the left. {warned} have warnings."
    )
    with claimed_file(output):
        write_text(
            output,
            page.render(
                title=title,
                subtitle=subtitle,
                scans=cards,
                refused=refused,
                width=3 * SHOWN,
                bins=len(BINS) - 1,
                windows=drawn,
            ),
        )
    return warned


def _refused(store: VolumeStore) -> list[tuple[str, str]]:
    path = store.path / "outcomes.csv"
    if not path.exists():
        return []
    table = outcome_table(path)
    rows = table[table["outcome"] == "refused"]
    return list(zip(rows["volume"], rows["reason"], strict=True))


def _card(
    store: VolumeStore,
    name: str,
    split: str,
    outcome: Outcome | None,
    expect: Expect,
    windows: Mapping[str, tuple[float, float]],
    most: int,
) -> Card:
    hu = store.read(name)
    if store.spec.published_geometry:
        hu = hu.transpose(0, 2, 1)
    recorded = outcome.warnings if outcome else ()
    warnings = [warning for warning in recorded if warning != ALREADY_HU]
    affine = np.diag([*store.spec.spacing, 1.0])
    # The warnings of the scan include this, except in stores of earlier versions.
    asked = expect == "chest" and not any(NOT_A_CHEST in warning for warning in recorded)
    if asked and (reason := no_chest(find_lungs(Volume(hu, affine, name)))):
        warnings.append(reason)
    if hu.max() < 100:
        warnings.append(f"no voxel above {hu.max()} HU: does it contain bone?")
    counted = np.histogram(hu, BINS)[0]
    bars = np.sqrt(counted / max(1, counted.max())) * 42
    return Card(
        volume=name, split=split, picture=_picture(hu, store.spec.spacing, windows, most), shape=outcome.source_shape if outcome else "",
        spacing=outcome.source_spacing if outcome else "", bars=[round(float(h), 1) for h in bars],
        range=f"{hu.min()} to {hu.max()}", warnings=warnings, note=ALREADY_HU if ALREADY_HU in recorded else "",
    )  # fmt: skip


def _picture(
    hu: np.ndarray, spacing: tuple[float, float, float], windows: Mapping[str, tuple[float, float]], most: int
) -> str:
    """Slices as one base64 WebP, as large as ``most`` bytes allow."""
    # A size at which slices of a phantom fit; noisy slices need more bytes, and several attempts.
    height = min(LARGEST, round(SHOWN * (most / 11_000) ** 0.5))
    while True:
        stream = io.BytesIO()
        height = max(height, SMALLEST)
        _slices(hu, spacing, windows, height).save(
            stream, "WEBP", quality=QUALITY if height > SMALLEST else LEAST_QUALITY
        )
        if stream.tell() <= most or height == SMALLEST:
            return base64.b64encode(stream.getvalue()).decode()
        # The file size grows slightly more slowly than the area.
        height = min(round(height * (most / stream.tell()) ** 0.55), round(0.95 * height))


def _slices(
    hu: np.ndarray, spacing: tuple[float, float, float], windows: Mapping[str, tuple[float, float]], height: int
) -> Image.Image:
    """Axial and coronal slices through the middle and a sagittal one through the left lung, one row per window. Each is
    labelled with its slice number, window and sides."""
    dz, dy, dx = spacing
    d, h, w = hu.shape
    z, y, x = d // 2, h // 2, int(w * 0.66)
    views = (
        (hu[z], dy / dx, "RL", f"axial {z + 1} of {d}"),
        (hu[::-1, y], dz / dx, "RL", f"coronal {y + 1} of {h}"),
        (hu[::-1, :, x], dz / dy, "AP", f"sagittal {x + 1} of {w}"),
    )
    sheet = Image.new("L", (3 * height + 2 * GAP, len(windows) * (height + GAP) - GAP))
    for row, (low, high) in enumerate(windows.values()):
        for column, (plane, aspect, sides, words) in enumerate(views):
            grey = np.clip((plane.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
            tall = grey.shape[0] * aspect
            scale = height / max(tall, grey.shape[1])
            size = (max(1, round(grey.shape[1] * scale)), max(1, round(tall * scale)))
            canvas = Image.new("L", (height, height))
            resized = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)
            canvas.paste(resized, ((height - size[0]) // 2, (height - size[1]) // 2))
            _write_on(canvas, sides, words, f"{low:.0f} to {high:.0f} HU")
            sheet.paste(canvas, (column * (height + GAP), row * (height + GAP)))
    return sheet


def _write_on(canvas: Image.Image, sides: str, words: str, window: str) -> None:
    """Write the letters of both sides, the window at the top and the slice number at the bottom, legibly on air and on
    bone."""
    size = canvas.width
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size * 11 / SHOWN)
    for text, place, anchor in (
        (sides[0], (3, size // 2), "lm"), (sides[1], (size - 3, size // 2), "rm"),
        (window, (size // 2, 2), "mt"), (words, (size // 2, size - 2), "mb"),
    ):  # fmt: skip
        draw.text(place, text, fill=255, font=font, anchor=anchor, stroke_width=round(size * 2 / SHOWN), stroke_fill=0)
