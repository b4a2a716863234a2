"""The geometry of a NIfTI header: sform, qform and pixdim, and contradictions between them.

The three methods: https://nifti.nimh.nih.gov/nifti-1/documentation/nifti1fields/nifti1fields_pages/qsform.html
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ctclip.preprocessing.geometry_check import Geometry, differ, is_blank, reading

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Bits 0 to 2 of xyzt_units: unknown (taken as mm), metre, mm, micron.
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
LARGEST_CODE = 5
# Tolerance for b2 + c2 + d2 of a quaternion above 1, from rounding in single precision.
ROUNDING = 1e-3


def geometry_of(header: Any, choice: Geometry) -> tuple[np.ndarray, str | None, list[str]]:
    """The affine (4, 4) from [i, j, k] to LPS+ mm, the reason to doubt it (or None), and warnings."""
    with np.errstate(all="ignore"):
        unit = int(header["xyzt_units"]) & 7
        scale = np.diag([MM_PER_UNIT.get(unit, 1.0)] * 3 + [1.0])
        sform, qform, pixdim = (RAS_TO_LPS @ scale @ form for form in (_sform(header), _qform(header), _pixdim(header)))
        if choice in ("sform", "qform"):
            return (sform if choice == "sform" else qform), None, []
        affine, doubt, warnings = _best(header, sform, qform, pixdim)
        if unit not in MM_PER_UNIT:
            doubt = f"its header's unit of length has code {unit}, which NIfTI does not know"
        if doubt is None and is_blank(affine):
            doubt = "its affine is exactly the identity (1 mm, straight axes, origin 0): no geometry was ever stated"
        return affine, doubt, warnings


def _best(
    header: Any, sform: np.ndarray, qform: np.ndarray, pixdim: np.ndarray
) -> tuple[np.ndarray, str | None, list[str]]:
    codes = {"sform": int(header["sform_code"]), "qform": int(header["qform_code"])}
    for name, code in codes.items():
        if not 0 <= code <= LARGEST_CODE:
            return (sform if _usable(sform) else qform), f"its {name} code is {code}, which NIfTI does not know", []
    states_sform = codes["sform"] > 0 and bool(header["srow"][:, :3].any())
    states_qform = codes["qform"] > 0
    if not states_sform and not states_qform:
        blank = "its sform is empty and its qform code 0" if codes["sform"] else "its sform and qform codes are both 0"
        return pixdim, f"{blank}: its header states no orientation ({reading(pixdim).split(',')[0]} by pixdim)", []
    if not states_sform:
        return qform, None if _usable(qform) else "its qform is damaged, and it has no sform", []
    if not _usable(sform):
        return sform, f"its sform is damaged (its qform says {reading(qform)})", []
    if states_qform:
        if not _usable(qform):
            return sform, f"its qform is damaged (its sform says {reading(sform)})", []
        if differ(sform, qform):
            return sform, f"its header contradicts itself: {_readings('sform', sform, 'qform', qform)}", []
        return sform, None, _origins(sform, qform)
    return sform, *_against_pixdim(header, sform, pixdim)


def _against_pixdim(header: Any, sform: np.ndarray, pixdim: np.ndarray) -> tuple[str | None, list[str]]:
    """Compare the sform with pixdim, the only other statement of spacing without a qform."""
    steps, stated = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (sform, pixdim))
    if (np.abs(steps - stated) <= 0.01 * steps).all():
        return None, []
    if not stated.any() or np.array_equal(np.abs(header["pixdim"][1:4]), [1, 1, 1]):
        return None, [f"pixdim was left at its default; the sform's spacing is taken ({reading(sform)})"]
    return f"its header contradicts itself: {_readings('sform', sform, 'pixdim (qform)', pixdim)}", []


def _origins(sform: np.ndarray, qform: np.ndarray) -> list[str]:
    apart = float(np.linalg.norm(sform[:3, 3] - qform[:3, 3]))
    step = float(np.linalg.norm(sform[:3, :3], axis=0).max())
    return [f"origins of sform and qform lie {apart:.1f} mm apart: the sform's is taken"] if apart > 2 * step else []


def _readings(one: str, affine: np.ndarray, other: str, against: np.ndarray) -> str:
    stated, instead = reading(affine), reading(against)
    if stated == instead:
        degrees = max(_angles(affine, against))
        instead += f" and turned by {degrees:.1f} degrees against it"
    return f"{one} says {stated}; {other} says {instead}"


def _angles(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    directions = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (one, other)]
    return np.degrees(np.arccos(np.clip((directions[0] * directions[1]).sum(axis=0), -1, 1)))


def _usable(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]) != 0)


def _sform(header: Any) -> np.ndarray:
    return np.vstack([header["srow"].astype(np.float64), [0.0, 0.0, 0.0, 1.0]])


def _pixdim(header: Any) -> np.ndarray:
    """The default of nibabel if no orientation is stated: x runs to the left, and the origin is the volume's centre."""
    affine = np.diag([*np.abs(header["pixdim"][1:4].astype(np.float64)), 1.0]) * [-1.0, 1.0, 1.0, 1.0]
    affine[:3, 3] = -affine[:3, :3] @ ((header["dim"][1:4].astype(np.float64) - 1) / 2)
    return affine


def _qform(header: Any) -> np.ndarray:
    """Method 2 of the standard. A qfac (pixdim[0]) of 0 counts as 1; nothing usable is NaN."""
    b, c, d = (float(value) for value in header["quatern"])
    qfac, *steps = (float(value) for value in header["pixdim"][:4])
    squares = b * b + c * c + d * d
    affine = np.full((4, 4), np.nan)
    if qfac not in (-1.0, 0.0, 1.0) or not squares <= 1 + ROUNDING or not min(steps) > 0:
        return affine
    if squares > 1:
        b, c, d = (value / np.sqrt(squares) for value in (b, c, d))
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turn = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    affine[:3, :3] = np.array(turn) * [steps[0], steps[1], steps[2] * (qfac or 1.0)]
    affine[:3, 3] = header["qoffset"]
    affine[3] = 0, 0, 0, 1
    return affine
