"""Downloads of the page: a table, a printable page, DICOM objects."""

from __future__ import annotations

import csv
import io
import tempfile
import textwrap
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

from ctclip import __version__
from ctclip.explanation.explain import Explanation
from ctclip.explanation.picture import rendered
from ctclip.explanation.place import Place
from ctclip.preprocessing.csv_files import guarded
from ctclip.preprocessing.files import written_beside

A4_INCHES = (8.27, 11.69)
MOST_FINDINGS = 30


def table(result: dict[str, Any]) -> str:
    """The findings of a scan as CSV, safe to open in a spreadsheet."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["finding", "probability", "lower", "upper", "margin", "threshold", "model"])
    for entry in result["findings"]:
        numbers = [entry["probability"], *(entry["interval"] or ("", "")), entry["margin"], entry["threshold"]]
        writer.writerow([guarded(entry["name"]), *numbers, result["model"]])
    return lines.getvalue()


def write_dicom(explanation: Explanation, path: Path) -> None:
    """Write a zip of the DICOM objects of an explanation, readable only by the owner."""
    from ctclip.explanation.dicom.save import PRIVATE, save_dicom

    with (
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
        written_beside(path, suffix=".zip", mode=PRIVATE) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for dicom_file in save_dicom(explanation, folder):
            archive.write(dicom_file, dicom_file.name)


def write_sheet(path: Path, result: dict[str, Any], place: Place | None, *, name: str, trained_on: str) -> None:
    """Write one A4 page as PDF: the findings, three slices through the peak of ``place`` with its map, the model and
    its training data (``trained_on``), and the note that it is for research. ``name``: name of the scan, if it is to be
    shown."""
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    figure = Figure(figsize=A4_INCHES)
    FigureCanvasPdf(figure)
    figure.text(0.07, 0.955, "Findings of a CT scan" + f": {name}" * bool(name), fontsize=15, fontweight="bold")
    figure.text(0.07, 0.932, result["notice"], fontsize=10, color="#a8201a", fontweight="bold")
    top = 0.915
    if place is not None:
        picture = rendered(place)
        high = 0.88 * picture.shape[0] / picture.shape[1] * A4_INCHES[0] / A4_INCHES[1]
        axes = figure.add_axes((0.06, top - high, 0.88, high))
        axes.imshow(picture, interpolation="lanczos")
        axes.axis("off")
        top -= high + 0.02
    top = _findings(figure, result, top)
    made_by = f"Model {result['model']}, spec {result['spec']}, ctclip {__version__}, {date.today()}."
    words = [*(f"{warning[:1].upper()}{warning[1:]}." for warning in result["warnings"]), trained_on, made_by]
    lines = [line for one in words for line in textwrap.wrap(one, 120)]
    figure.text(0.07, 0.04, "\n".join(lines), fontsize=7.5, color="#444444", va="bottom", linespacing=1.35)
    with written_beside(path, suffix=".pdf") as partial:
        figure.savefig(
            partial, format="pdf", metadata={"Title": "Findings of a CT scan (research)", "Creator": "ctclip"}
        )


def _findings(figure: Any, result: dict[str, Any], top: float) -> float:
    """Draw the table from ``top`` downwards, in fractions of the page height; return the position of its end."""
    every = result["findings"]
    entries = every[:MOST_FINDINGS]
    step = min(0.021, (top - 0.2) / (len(entries) + 2))
    columns = (0.07, 0.45, 0.56, 0.71, 0.82)
    for x, head in zip(columns, ("finding", "probability", "95 % interval", "threshold", ""), strict=True):
        figure.text(x, top - step, head, fontsize=8.5, color="#444444")
    y = top - step
    for entry in entries:
        y -= step
        weight = "bold" if entry["above"] else "normal"
        threshold = "not calibrated" if entry["threshold"] is None else f"{100 * entry['threshold']:.1f} %"
        cells = (
            entry["name"][:60],
            f"{100 * entry['probability']:.1f} %",
            "{:.1f} to {:.1f} %".format(*(100 * limit for limit in entry["interval"])) if entry["interval"] else "",
            threshold,
            "above threshold" if entry["above"] else "",
        )
        for x, cell in zip(columns, cells, strict=True):
            figure.text(x, y, cell, fontsize=9, fontweight=weight, parse_math=False)
    if len(every) > len(entries):
        y -= step
        figure.text(columns[0], y, f"and {len(every) - len(entries)} more", fontsize=9)
    return y
