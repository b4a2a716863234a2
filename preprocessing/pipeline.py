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

# ``chest`` refuses what shows none, ``auto`` warns of it, ``any`` does not look.
Expect = Literal["auto", "chest", "any"]
# Slices so many times further apart than the spec's leave out what a model has learned to see.
COARSER = 2.5
# Less than this of the lungs outside of the grid is the thickness of its edge.
LUNG_CUT = 0.01
# Under ``--expect chest``.
LEAST_LUNG = 0.9


@dataclass
class Prepared:
    """One scan, ready for a model of ``spec``.

    ``scan`` is what was read and checked, oriented and in HU, on its own grid. ``affine`` (4, 4) leads from voxel index
    (of ``voxels`` and ``hu``) to LPS+ mm of the scan's own space. ``centre``: the voxel index of the scan that the grid is
    laid about, where that is not its middle. ``file_grid``: the grid of the file itself, before it was oriented.
    ``headers``: those of the images of a DICOM series, in the order of slices of ``file_grid``, if ``prepare`` was asked for
    them.
    """

    scan: Volume
    spec: PreprocessingSpec
    affine: np.ndarray
    file_grid: FileGrid
    centre: Centre | None = None
    headers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @cached_property
    def voxels(self) -> np.ndarray:
        """What a model is given: float32 in [-1, 1], of the spec's shape."""
        return resample(self.scan, self.spec, "voxels", self.centre)

    @cached_property
    def hu(self) -> np.ndarray:
        """The same grid in HU, float32."""
        return resample(self.scan, self.spec, "hu", self.centre)

    @cached_property
    def lungs(self) -> Lungs:
        """The lungs of the oriented scan, or what comes nearest to them."""
        return find_lungs(self.scan)

    @property
    def stored(self) -> np.ndarray:
        """The same grid in HU, int16, as a store keeps it."""
        return resample(self.scan, self.spec, "stored", self.centre)

    @property
    def affine_lps(self) -> np.ndarray:
        """``affine`` by its convention's name: voxel index to LPS+ mm, as DICOM and SimpleITK count."""
        return self.affine

    @property
    def affine_ras(self) -> np.ndarray:
        """(4, 4) from voxel index to RAS+ mm, as NIfTI and nibabel count."""
        ras: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        return ras

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``hu`` as NIfTI (int16) that lies where the scan lies: it opens over the scan in any viewer.

        Raises PreprocessingError unless the name ends in .nii or .nii.gz.
        """
        import nibabel as nib

        name = str(path)
        if not name.endswith((".nii", ".nii.gz")):
            raise PreprocessingError(f"{path}: end the name in .nii.gz (or .nii)")
        # Files count columns first.
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
        """mm along [slice, row, column] of the scan itself."""
        return self.scan.spacing

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.scan.array.shape


class Reading(TypedDict, total=False):
    """How scans are read, as the options of the command line: ``hu``, where Hounsfield units come from; what to ``expect`` of
    scans; which ``series`` (UID) of a DICOM folder; which ``geometry`` if statements contradict each other; ``largest_gb`` of
    voxels, or of the contents of an archive.
    ``headers``: keep the headers of a DICOM series' images, which identify the patient.
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
    """Read one scan and bring it to ``spec``: exactly what made the training set.

    ``table``: what a metadata table states of it; the other options are those of ``Reading``. The grid is laid about the
    scan's middle, or where that would cut lung, about the lungs (never under the published geometry, which only warns). Raises PreprocessingError with one line that
    names the file, what is wrong and what to do.
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
        volume.warnings.append(f"{reason}: what a model of chests says of it means nothing")
    apart, step = max(zip(volume.spacing, spec.spacing, strict=True), key=lambda pair: pair[0] / pair[1])
    if apart > COARSER * step:
        volume.warnings.append(
            f"slices {apart:.1f} mm apart, for a grid of {step:g} mm: what is smaller may not be seen"
        )
    if doubt := orientation_doubt(lungs):
        volume.warnings.append(doubt)
    centre, kept = _about_the_lungs(volume, lungs, spec)
    if expect == "chest" and kept < LEAST_LUNG:
        raise PreprocessingError(
            f"{volume.source}: only {kept:.0%} of the lungs fit into the grid of spec {spec.name!r}; --expect any takes it "
            f"all the same"
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
    """Raise PreprocessingError for a value that is none of an option's (see ``Reading``): it would be taken for the
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
    """Where to lay the grid, if not about the scan's middle, and the share of the lungs in it; warns where lung is cut."""
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
        f"{1 - kept:.0%} of the lungs would lie outside a grid centred on the scan: it is centred on the lungs instead, of which "
        f"{better:.0%} are in it"
    )
    return centre, better
