"""Write the page and the tables of a search for duplicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ctclip.audit.doubles import Doubles, find_doubles
from ctclip.audit.pictures import PICTURES
from ctclip.evaluation.pages import write_page
from ctclip.inference.run import run_key
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import claimed_folder, made_by_us
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.store import VolumeStore

TABLES = ("doubles.csv", "recurring_reports.csv", "doubles.html")
COMMAND = "audit doubles"
SHOWN_PAIRS, SHOWN_ROWS = 12, 200
WINDOW = (-1000.0, 400.0)
# Height in pixels of the caption above an image.
BANNER = 18


def write_doubles(
    store: VolumeStore,
    output: Path,
    *,
    split: str | None = None,
    embed: Callable[[], dict[str, np.ndarray]] | None = None,
    cache: Path | None = None,
    force: bool = False,
) -> Doubles:
    """Look for duplicates in a store and write ``TABLES`` to ``output``. ``embed``: returns the unit vector of each
    volume; ``cache``: a folder of embeddings and measures that commands share."""
    key = run_key(str(store.path.resolve()), split, embed is not None)
    with claimed_folder(output, COMMAND, key, TABLES, lambda folder: made_by_us(folder), force=force):
        embeddings = embed() if embed is not None else None
        doubles = find_doubles(store, (cache or output / "embeddings") / PICTURES, split=split, embeddings=embeddings)
        for name, table in (("doubles.csv", doubles.pairs), ("recurring_reports.csv", doubles.reports)):
            with written_beside(output / name) as partial:
                write_csv(partial, table)
        _write_page(output / "doubles.html", store, doubles)
    return doubles


def _write_page(path: Path, store: VolumeStore, doubles: Doubles) -> None:
    pairs, reports = doubles.pairs, doubles.reports
    across = int((pairs["first_split"] != pairs["second_split"]).sum())
    names = int((pairs["first_patient"] != pairs["second_patient"]).sum())
    with scratch_folder("ctclip-audit-") as scratch:
        figures = []
        for number, pair in enumerate(pairs.head(SHOWN_PAIRS).itertuples()):
            png = scratch / f"{number}.png"
            _picture(store, str(pair.first), str(pair.second), bool(pair.reversed)).save(png)
            caption = f"{pair.first} and {pair.second}: correlation {pair.correlation:.2f}"
            figures.append((caption + ", slices reversed" * bool(pair.reversed), png))
        sections: list[dict[str, Any]] = [
            {
                "title": "Possible copies", "figures": figures, "beside": True,
                "words": "Pairs of volumes from different scans whose fingerprints correlate, despite differences in "
                         "spacing, noise, cropping or slice order, the likeliest first. Most copies have a correlation of "
                         "0.85 or more, cropped ones 0.8; scans of similar patients, and phantoms, which share "
                         "their anatomy, can reach 0.90, so compare the slices shown: the middle coronal and axial slice of each volume.",
                "table": _table(pairs) if len(pairs) else None,
            },
            {
                "title": "Reports that recur", "words": "Identical reports under different patients. Template reports "
                                                        "that recur are harmless.",
                "table": _table(reports) if len(reports) else None,
            },
        ]  # fmt: skip
        headline = [
            (f"{len(pairs):,}", "possible copies"), (f"{across:,}", "pairs across splits"),
            (f"{names:,}", "under two patients"), (f"{len(reports):,}", "reports that recur"),
        ]  # fmt: skip
        subtitle = f"{doubles.volumes:,} volumes of {store.path.name}; {doubles.compared:,} pairs compared closely"
        write_page(path, title="Doubles", subtitle=subtitle, headline=headline, sections=sections)


def _table(table: Any) -> list[list[str]]:
    top = table.head(SHOWN_ROWS)
    return [list(map(str, top.columns)), *([str(cell) for cell in row] for row in top.itertuples(index=False))]


def _picture(store: VolumeStore, first: str, second: str, is_reversed: bool) -> Image.Image:
    """Draw two volumes, one below the other; reversed slices of the second are put in order."""
    rows = [slices_of(store, first), slices_of(store, second, is_reversed=is_reversed)]
    return Image.fromarray(np.concatenate([np.asarray(row) for row in rows]))


def slices_of(store: VolumeStore, name: str, *, is_reversed: bool = False) -> Image.Image:
    """Draw the middle coronal (head up) and axial slices of a stored volume, the patient's right on the left, each
    marked with its slice number, window, R and L."""
    hu = store.read(name)
    if store.spec.published_geometry:
        hu = hu.transpose(0, 2, 1)
    hu = hu[::-1] if is_reversed else hu
    depth, height, _ = hu.shape
    dz, dy, dx = store.spec.spacing
    number = depth - 1 - depth // 2 if is_reversed else depth // 2
    window = "{:.0f} to {:.0f} HU".format(*WINDOW)
    planes = [
        (hu[::-1, height // 2], dz / dx, f"coronal {height // 2 + 1} of {height}, {window}"),
        (hu[depth // 2], dy / dx, f"axial {number + 1} of {depth}, {window}"),
    ]
    return Image.fromarray(
        np.concatenate([_marked(_grey(plane, aspect), words) for plane, aspect, words in planes], axis=1)
    )


def _marked(grey: np.ndarray, words: str) -> np.ndarray:
    """Add a caption above an image and the letters R and L at its sides."""
    height, width = grey.shape
    picture = Image.new("L", (width, height + BANNER))
    picture.paste(Image.fromarray(grey), (0, BANNER))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((4, 2), words, fill=255, font=font)
    for letter, x, anchor in (("R", 4, "lm"), ("L", width - 4, "rm")):
        draw.text((x, BANNER + height // 2), letter, fill=255, font=font, anchor=anchor, stroke_width=1, stroke_fill=0)
    return np.asarray(picture)


def _grey(plane: np.ndarray, aspect: float, size: int = 240) -> np.ndarray:
    low, high = WINDOW
    grey = np.clip((plane.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    tall = grey.shape[0] * aspect
    scale = size / max(tall, grey.shape[1])
    fitted = Image.fromarray(grey).resize((max(1, round(grey.shape[1] * scale)), max(1, round(tall * scale))))
    canvas = Image.new("L", (size, size))
    canvas.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return np.asarray(canvas)
