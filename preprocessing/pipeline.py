"""Preprocessing of one scan: read, check, orient, resample. A scan that cannot be trusted is refused."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from ctclip.preprocessing.anatomy import Lungs, find_lungs, no_chest, orientation_doubt
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import TableFacts, placed
from ctclip.preprocessing.files import as_path, written_beside
from ctclip.preprocessing.geometry import Centre, bounds, orient, resample, resampled_affine
from ctclip.preprocessing.geometry_check import Geometry
from ctclip.preprocessing.hounsfield import Trust, to_hu
from ctclip.preprocessing.readers import LARGEST_GB, read
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import FileGrid, Volume

# ``chest`` refuses scans without a chest, ``auto`` warns of them, ``any`` does not check.
Expect = Literal["auto", "chest", "any"]
# Slices this many times further apart than those of the spec lose structures that a model has learned.
COARSER = 2.5
# A smaller fraction of the lungs outside the grid is within the precision of its edge.
LUNG_CUT = 0.01
# Minimum fraction of the lungs in the grid with ``--expect chest``.
LEAST_LUNG = 0.9


@dataclass
class Prepared:
    """One scan, ready for a model of ``spec``.

    ``scan``: the scan after reading, checks and orientation, in HU on its own grid. ``affine`` (4, 4): from voxel index
    (of ``voxels`` and ``hu``) to LPS+ mm of the scan's own space. ``centre``: the voxel index of the scan at the centre
    of the grid, if that is not the centre of the scan. ``file_grid``: the grid of the file itself, before orientation.
    ``headers``: headers of the images of a DICOM series, in the slice order of ``file_grid``, if ``prepare`` was called
    with ``headers``.
    """

    scan: Volume
    spec: PreprocessingSpec
    affine: np.ndarray
    file_grid: FileGrid
    centre: Centre | None = None
    headers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @cached_property
    def voxels(self) -> np.ndarray:
        """The input of a model: float32 in [-1, 1], with the spec's shape."""
        return resample(self.scan, self.spec, "voxels", self.centre)

    @cached_property
    def hu(self) -> np.ndarray:
        """The same grid in HU, float32."""
        return resample(self.scan, self.spec, "hu", self.centre)

    @cached_property
    def lungs(self) -> Lungs:
        """The lungs of the oriented scan, or the region most similar to lungs."""
        return find_lungs(self.scan)

    @property
    def stored(self) -> np.ndarray:
        """The same grid in HU, int16, as saved in a store."""
        return resample(self.scan, self.spec, "stored", self.centre)

    @property
    def affine_lps(self) -> np.ndarray:
        """``affine`` under its convention's name: voxel index to LPS+ mm, as in DICOM and SimpleITK."""
        return self.affine

    @property
    def affine_ras(self) -> np.ndarray:
        """The affine (4, 4) from voxel index to RAS+ mm, as in NIfTI and nibabel."""
        ras: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        return ras

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``hu`` as NIfTI (int16) in the space of the scan, so that viewers overlay it on the scan.

        Raises PreprocessingError unless the name ends in .nii or .nii.gz.
        """
        import nibabel as nib

        name = str(path)
        if not name.endswith((".nii", ".nii.gz")):
            raise PreprocessingError(f"{path}: end the name in .nii.gz (or .nii)")
        # NIfTI files store columns first.
        image = nib.Nifti1Image(self.stored.transpose(2, 1, 0), self.affine_ras[:, [2, 1, 0, 3]])
        image.header.set_xyzt_units("mm")
        image.set_qform(image.affine, 1)
        image.set_sform(image.affine, 1)
        with written_beside(path, suffix=".nii.gz" if name.endswith(".gz") else ".nii") as partial:
            nib.save(image, partial)

    def token_affine(self, affine: np.ndarray) -> np.ndarray:
        """``Encoded.affine`` (token index to mm of the prepared volume) -> (4, 4) from token index to LPS+ mm of the
        scan's own space."""
        depth, row, column = self.spec.spacing
        along = (depth, column, row) if self.spec.published_geometry else (depth, row, column)
        to_voxels: np.ndarray = np.diag([*(1 / step for step in along), 1.0])
        leads: np.ndarray = self.affine @ to_voxels @ affine
        return leads

    @property
    def warnings(self) -> list[str]:
        return self.scan.warnings

    @property
    def source_spacing(self) -> tuple[float, float, float]:
        """Spacing in mm along [slice, row, column] of the original scan."""
        return self.scan.spacing

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.scan.array.shape


class Reading(TypedDict, total=False):
    """Options for reading scans, as on the command line: ``hu``: source of Hounsfield units; ``expect``: expected body
    part; ``series``: UID of a series in a DICOM folder; ``geometry``: geometry to use if statements contradict each
    other; ``largest_gb``: limit of voxels, or of the contents of an archive. ``headers``: keep the headers of a DICOM
    series' images, which identify the patient.
    """

    hu: Trust
    expect: Expect
    series: str | None
    geometry: Geometry
    largest_gb: float
    headers: bool


def prepare(
    path: str | os.PathLike[str],
    spec: PreprocessingSpec | str = "ct_224",
    *,
    hu: Trust = "auto",
    expect: Expect = "auto",
    table: TableFacts | None = None,
    series: str | None = None,
    geometry: Geometry = "auto",
    largest_gb: float = LARGEST_GB,
    headers: bool = False,
) -> Prepared:
    """Read one scan and resample it to ``spec``, exactly as for the training set.

    ``table``: values of a metadata table for the scan; the other options are those of ``Reading``. The grid is centred
    on the scan or, if that would cut off lung, on the lungs (except in the published geometry, which only warns).
    Raises PreprocessingError with one line that names the file, the fault and the remedy.
    """
    check_reading(hu=hu, expect=expect, geometry=geometry, series=series, largest_gb=largest_gb)
    path = as_path(path, "the path of one scan")
    spec = spec if isinstance(spec, PreprocessingSpec) else PreprocessingSpec.load(spec)
    raw = read(path, series, geometry, largest_gb=largest_gb)
    taken = to_hu(placed(raw, table, geometry), table, hu)
    file_grid = FileGrid.of(taken.array.shape, taken.affine, raw.columns_first)
    volume = orient(taken)
    lungs = find_lungs(volume)
    if reason := no_chest(lungs) if expect != "any" else None:
        if expect == "chest":
            raise PreprocessingError(f"{volume.source}: {reason}; --expect any accepts it")
        volume.warnings.append(f"{reason}: scores of a chest model are meaningless for it")
    apart, step = max(zip(volume.spacing, spec.spacing, strict=True), key=lambda pair: pair[0] / pair[1])
    if apart > COARSER * step:
        volume.warnings.append(
            f"slices are {apart:.1f} mm apart, for a grid of {step:g} mm: smaller structures may be missed"
        )
    if doubt := orientation_doubt(lungs):
        volume.warnings.append(doubt)
    centre, kept = _about_the_lungs(volume, lungs, spec)
    if expect == "chest" and kept < LEAST_LUNG:
        raise PreprocessingError(
            f"{volume.source}: only {kept:.0%} of the lungs fit into the grid of spec {spec.name!r}; --expect any "
            f"accepts it"
        )
    kept_headers = raw.headers if headers else []
    return Prepared(volume, spec, resampled_affine(volume, spec, centre), file_grid, centre, kept_headers)


def check_reading(
    *,
    hu: object = "auto",
    expect: object = "auto",
    geometry: object = "auto",
    series: object = None,
    largest_gb: object = LARGEST_GB,
    headers: object = False,
) -> None:
    """Raise PreprocessingError for an invalid value of an option (see ``Reading``), which would otherwise act like the
    default."""
    for name, value, choices in (
        ("hu", hu, get_args(Trust)), ("expect", expect, get_args(Expect)), ("geometry", geometry, get_args(Geometry)),
    ):  # fmt: skip
        if not isinstance(value, str) or value not in choices:
            raise PreprocessingError(f"{name}={reprlib.repr(value)}: give one of {', '.join(choices)}")
    if series is not None and not isinstance(series, str):
        raise PreprocessingError(f"series={reprlib.repr(series)}: give a SeriesInstanceUID as text")
    if isinstance(largest_gb, bool) or not isinstance(largest_gb, Real) or not 0 < float(largest_gb) < float("inf"):
        raise PreprocessingError(f"largest_gb={reprlib.repr(largest_gb)}: give a positive number of gigabytes")


def _about_the_lungs(volume: Volume, lungs: Lungs, spec: PreprocessingSpec) -> tuple[Centre | None, float]:
    """The centre of the grid, if not that of the scan, and the fraction of the lungs in it; warns if lung is cut
    off."""
    if not lungs.is_chest:
        return None, 1.0
    ends = bounds(volume, spec)
    kept = lungs.share_within(ends)
    if kept >= 1 - LUNG_CUT:
        return None, kept
    if spec.published_geometry:
        volume.warnings.append(f"{1 - kept:.0%} of the lungs lie outside the grid, which is centred on the scan")
        return None, kept
    middle = [(size - 1) / 2 for size in volume.array.shape]
    for axis, (low, high) in enumerate(ends):
        first, end = lungs.box[axis]
        if first * lungs.step[axis] < low or end * lungs.step[axis] > high:
            middle[axis] = lungs.middle(axis)
    centre = (middle[0], middle[1], middle[2])
    better = lungs.share_within(bounds(volume, spec, centre))
    if better <= kept:
        volume.warnings.append(f"{1 - kept:.0%} of the lungs lie outside the grid, which is too small for them")
        return None, kept
    volume.warnings.append(
        f"{1 - kept:.0%} of the lungs would lie outside a grid centred on the scan: it is centred on the lungs "
        f"instead, and contains {better:.0%} of them"
    )
    return centre, better
