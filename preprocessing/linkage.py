"""The private table that links ids to a hospital's own records; written only on request."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from ctclip.preprocessing.csv_files import guarded
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.identifiers import series_header
from ctclip.preprocessing.outputs import check_file, file_holds

COLUMNS = ("volume", "path", "StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber")
MODE = 0o600


def check_linkage(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Raise PreprocessingError unless a linkage table may be written at ``path``: a new name or an existing linkage
    table, outside ``output``, which may be shared."""
    if Path(path).resolve().is_relative_to(Path(output).resolve()):
        raise PreprocessingError(
            f"{path}: lies in {output}, which may be shared with others; keep the linkage table elsewhere"
        )
    check_file(path, file_holds(",".join(COLUMNS).encode()))


def write_linkage(
    path: str | os.PathLike[str], files: Mapping[str, Path], series: Mapping[str, str] | None = None
) -> None:
    """Write one row per volume: its id, its absolute path, and the study attributes of its DICOM header.

    ``series`` names the DICOM series (SeriesInstanceUID) of volumes that share their folder with others. The file
    identifies patients and can be read only by its owner.
    """
    rows = [list(COLUMNS)]
    for volume, file in files.items():
        header = series_header(file, (series or {}).get(volume)) or {}
        known = [str(header.get(name, "") or "").strip() for name in COLUMNS[2:]]
        rows.append([volume, os.path.abspath(file), *known])
    # File names need not be valid text.
    with (
        written_beside(path, mode=MODE) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        csv.writer(stream, lineterminator="\n").writerows([[guarded(cell) for cell in row] for row in rows])
