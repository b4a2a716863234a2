"""Read DICOM series as volumes: choose files, series and acquisition, order slices, and convert values to HU."""

from __future__ import annotations

from pathlib import Path

from ctclip.preprocessing.volume import Volume


def read_series(
    folder: Path, series: str | None = None, only: Path | None = None, name: Path | None = None, *, largest: int
) -> Volume:
    """The CT volume [slice, row, column] in HU of a DICOM series below ``folder``; see ``dicom.series`` for which one.

    ``series`` selects one by its SeriesInstanceUID, ``only`` selects the one that contains a file, and ``name`` is the
    name of the input in messages (a zip, instead of the folder it was unpacked to). ``largest`` bounds the bytes of the
    voxels. Raises PreprocessingError.
    """
    # Imported here: ``identifiers`` imports ``dicom.headers``, and the series imports ``identifiers``.
    from ctclip.preprocessing.dicom.series import read

    return read(folder, series, only, name, largest)
