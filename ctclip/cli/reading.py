"""How scan files are read: the options that every command reading them shares."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Reading


class Trusted(StrEnum):
    auto = "auto"
    file = "trust-file"
    table = "trust-table"


class Geometry(StrEnum):
    auto = "auto"
    sform = "sform"
    qform = "qform"
    header = "header"
    table = "table"


class Expected(StrEnum):
    any = "any"
    chest = "chest"


HU = typer.Option(
    Trusted.auto,
    help="Whether to trust the file or the metadata table about Hounsfield units; auto decides from the values.",
)
GEOMETRY = typer.Option(
    Geometry.auto,
    help="Which geometry to take where header and table, or the two readings of a NIfTI header, contradict each other.",
)
EXPECT = typer.Option(
    Expected.any, help="`chest` refuses scans that show no chest, or whose lungs do not fit into the grid."
)
SERIES = typer.Option(
    None,
    help="SeriesInstanceUID of the series to read from a DICOM folder that holds several; the original axial one with "
    "most slices if not given.",
)
LINKAGE = typer.Option(
    None,
    help="Also write a private table here that leads from each id to its path and DICOM study: it identifies patients, and "
    "only its owner can read it.",
)
LARGEST_GB = typer.Option(
    4.0, min=0.001, help="Refuse scans whose voxels, or archives whose content, take more than this many GB."
)


def reading_of(hu: Trusted, geometry: Geometry, expect: Expected, series: str | None, largest_gb: float) -> Reading:
    """The options as ``ctclip.preprocessing.prepare`` takes them."""
    return {
        "trust": hu.value, "geometry": geometry.value, "expect": expect.value, "series": series, "largest_gb": largest_gb,
    }  # fmt: skip
