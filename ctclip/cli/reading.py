"""Options that several commands share: how scan files are read, the source of labels, how volumes are encoded, and what is
cached or overwritten."""

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
    auto = "auto"
    chest = "chest"
    any = "any"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


BATCH = typer.Option(8, min=1, help="Number of volumes in a batch.")
EMBEDDINGS = typer.Option(
    None, help="Folder of embeddings and measures that commands share. Default: the folder embeddings in the output."
)
FORCE = typer.Option(False, "--force", help="Overwrite the tables of another run.")
PRECISION = typer.Option(
    Precision.auto,
    help="Numerical precision of the volume encoder. auto: the fastest that `ctclip check-precision` found to agree with float32 "
    "on this device; float32 if it was not run.",
)
HU = typer.Option(
    Trusted.auto,
    help="Source of the conversion to Hounsfield units if the file and the metadata table disagree; auto decides from "
    "the voxel values.",
)
GEOMETRY = typer.Option(
    Geometry.auto,
    help="Which geometry to use if the header contradicts the metadata table, or if the sform and qform of a NIfTI header differ.",
)
EXPECT = typer.Option(
    Expected.auto,
    help="auto: warn of scans that show no chest; chest: refuse them, and scans whose lungs do not fit into the grid; any: do "
    "not check.",
)
SERIES = typer.Option(
    None,
    help="SeriesInstanceUID of the series to read, if a DICOM folder holds several. Default: the original axial series "
    "with the most slices.",
)
LINKAGE = typer.Option(
    None,
    help="Also write a private table that links each id to its path and DICOM study. It identifies patients; only its owner can "
    "read it.",
)
LABEL_TABLE = typer.Option(
    None,
    "--labels",
    help="Your own labels: a CSV with a column 'volume' and columns of 0 and 1. Default: the labels in the store.",
)
LARGEST_GB = typer.Option(
    4.0, min=0.001, help="Refuse scans and archives that need more than this many GB when decompressed."
)


def reading_of(hu: Trusted, geometry: Geometry, expect: Expected, series: str | None, largest_gb: float) -> Reading:
    """The options as arguments of ``ctclip.preprocessing.prepare``."""
    return {
        "hu": hu.value, "geometry": geometry.value, "expect": expect.value, "series": series, "largest_gb": largest_gb,
    }  # fmt: skip
