"""Check whether a volume's geometry can be trusted. Every volume, of any format, passes this check after reading.

A reader never refuses a geometry. It returns the best interpretation of the header, and the reason to doubt it in
``Volume.geometry_doubt``. Here the doubt is resolved by a metadata table, by an option of the user, or by refusing the
scan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.volume import Volume

Geometry = Literal["auto", "sform", "qform", "header", "table"]
TOLERANCE = 0.01
SMALLEST_MM, LARGEST_MM = 0.1, 20.0
# Scanners and converters write directions in single precision, and gantry tilt shears them by up to 30 degrees.
LEAST_INDEPENDENT = 0.5


def settle(volume: Volume, table: np.ndarray | None = None, choice: Geometry = "auto") -> Volume:
    """The volume with a trusted geometry. Raises PreprocessingError that names the fault.

    ``table`` (4, 4) is the geometry of a metadata table: from index along the axes of ``volume.array`` to LPS+ mm.
    With ``auto`` the header's geometry is kept, unless it is in doubt, differs from the table by more than 1 % or
    lacks the table's origin (then the table decides, with a warning). ``table`` always uses the table; ``header``,
    ``sform`` and ``qform`` use the header's geometry even if it is in doubt.
    """
    if table is not None and choice in ("auto", "table"):
        volume = _by_table(volume, table, choice)
    elif choice == "table":
        raise PreprocessingError(
            f"{volume.source}: --geometry table, but no metadata table states its geometry; use --geometry header to "
            f"use the header's geometry"
        )
    elif volume.geometry_doubt is not None:
        if choice == "auto":
            raise PreprocessingError(
                f"{volume.source}: {volume.geometry_doubt}; convert it from DICOM again, or use --geometry {_remedy(volume)} "
                f"if you know that it is correct"
            )
        warning = f"geometry taken from the header at --geometry {choice}, though {volume.geometry_doubt}"
        volume = replace(volume, geometry_doubt=None, warnings=[*volume.warnings, warning])
    if reason := unusable(volume.affine):
        raise PreprocessingError(f"{volume.source}: {reason}; convert it from DICOM again")
    return volume


def unusable(affine: np.ndarray) -> str | None:
    """The reason why this geometry is impossible for a CT, or None."""
    steps = affine[:3, :3]
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e6:
        return "its header's geometry holds values that are not finite or far too large"
    spacing = np.linalg.norm(steps, axis=0)
    if spacing.min() < SMALLEST_MM or spacing.max() > LARGEST_MM:
        return (
            f"its header states voxels of {millimetres(affine)}, but those of a CT measure {SMALLEST_MM:g} to "
            f"{LARGEST_MM:g} mm (another unit?)"
        )
    if abs(np.linalg.det(steps / spacing)) < LEAST_INDEPENDENT:
        return "its header's orientation is degenerate (its axes do not span a volume)"
    return None


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the steps of two affines differ by more than 1 % of a step, in length or in direction; origins may
    differ."""
    steps, others = one[:3, :3], other[:3, :3]
    scale = np.maximum(np.linalg.norm(steps, axis=0), np.linalg.norm(others, axis=0))
    distance = np.linalg.norm(steps - others, axis=0)
    return not bool((distance <= TOLERANCE * scale).all())


def millimetres(affine: np.ndarray) -> str:
    """The spacing along the array's axes for a message, such as ``0.7 x 0.7 x 5 mm``."""
    return " x ".join(f"{step:.4g}" for step in np.linalg.norm(affine[:3, :3], axis=0)) + " mm"


def reading(affine: np.ndarray) -> str:
    """Spacing and directions of an affine (to LPS+ mm) for a message: ``5 x 0.7 x 0.7 mm, axes towards S, P, L``."""
    steps = affine[:3, :3]
    if not np.isfinite(steps).all() or not steps.any(axis=0).all():
        return "no usable geometry"
    towards = []
    for axis in range(3):
        world = int(np.abs(steps[:, axis]).argmax())
        towards.append(("LPS" if steps[world, axis] > 0 else "RAI")[world])
    return f"{millimetres(affine)}, axes towards {', '.join(towards)}"


def is_blank(affine: np.ndarray) -> bool:
    """Whether an affine is the default of writers without a geometry: 1 mm along straight axes, origin 0."""
    steps = np.abs(affine[:3, :3]).round(7)
    permutes = bool(
        np.isin(steps, (0.0, 1.0)).all() and (steps.sum(axis=0) == 1).all() and (steps.sum(axis=1) == 1).all()
    )
    return permutes and not affine[:3, 3].any()


def _by_table(volume: Volume, table: np.ndarray, choice: Geometry) -> Volume:
    if reason := unusable(table):
        raise PreprocessingError(
            f"{volume.source}: {reason.replace('its header', 'the metadata table')}; correct the table"
        )
    doubt = volume.geometry_doubt
    if doubt is None and choice == "auto":
        if differ(volume.affine, table):
            doubt = f"its header says {reading(volume.affine)}"
        elif not volume.affine[:3, 3].any() and table[:3, 3].any():
            doubt = "the origin of its header is 0: no position was ever stated"
        else:
            return volume
    warnings = list(volume.warnings)
    if doubt is not None:
        warnings.append(f"geometry taken from the metadata table ({reading(table)}): {doubt}")
    return replace(volume, affine=np.array(table, dtype=np.float64), warnings=warnings, geometry_doubt=None)


def _remedy(volume: Volume) -> str:
    # If the two geometries of a NIfTI header differ, the user can select one.
    return "sform|qform|header" if "qform" in str(volume.geometry_doubt) else "header"
