"""The position of the lungs in an oriented CT in HU: whether the scan shows a chest, and whether it is upside down.

All steps work at a resolution of about 6 mm, at which edges between air and tissue do not look like lung.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numba
import numpy as np

from ctclip.preprocessing.volume import Volume

NOT_A_CHEST = "not a chest"
COARSE_MM = 6.0
SMALLEST_LUNG_ML = 150.0
SHORTEST_LUNG_MM = 100.0
THINNEST_LUNG_MM = 45.0
# Lungs destroyed by emphysema are at -960 HU, the air around a patient near -1000.
AIR_NOT_LUNG = -975.0
# HU between the air around a patient and skin, at 6 mm.
AIR_OUTSIDE = -500.0
# Criteria for the second lung, if no airway joins the two at this resolution: at least a fifth of the volume of the
# first, thicker than the foam of a table, and beside the first over half of its height.
OTHER_LUNG, OTHER_LUNG_MM, BESIDE = 0.2, 35.0, 0.5
LARGEST_SPACES, LARGEST_SLICES = 8, 8
# Scores range from -1 to 1. The limits are well below the minimum of 300 phantoms (see ``orientation_doubt``).
SPINE_BAR, UPRIGHT_BAR = -0.3, -0.15
HEART_BAR, LUNGS_BAR, LIVER_BAR = -0.25, -0.05, -0.05


@dataclass(frozen=True)
class Lungs:
    """``mask`` (d, h, w) of both lungs on ``coarse`` HU; a coarse voxel measures ``size`` mm and covers ``step`` voxels
    of the scan. ``millilitres``, ``height`` and ``thickness`` (mm) are those of the largest connected lung region."""

    coarse: np.ndarray
    mask: np.ndarray
    step: tuple[int, ...]
    size: tuple[float, ...]
    millilitres: float = 0.0
    height: float = 0.0
    thickness: float = 0.0

    @property
    def is_chest(self) -> bool:
        """Whether the largest lung region has at least 150 ml, is at least 100 mm high and contains a disc of 45 mm in
        one axial slice. The lung bases of an abdominal scan are not high enough; the foam of a table or head rest is
        too thin."""
        return (
            self.millilitres >= SMALLEST_LUNG_ML
            and self.height >= SHORTEST_LUNG_MM
            and self.thickness >= THINNEST_LUNG_MM
        )

    @cached_property
    def box(self) -> list[tuple[int, int]]:
        """First and last + 1 coarse voxel of lung along each axis."""
        counts = (self.mask.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
        # Ignore one or two stray voxels at the end of a lung.
        planes = (np.flatnonzero(count > min(2, count.max() - 1)) for count in counts)
        return [(int(where[0]), int(where[-1]) + 1) for where in planes]

    def middle(self, axis: int) -> float:
        """The centre of the lungs along an axis, as a voxel index of the scan."""
        first, end = self.box[axis]
        return (first + end) / 2 * self.step[axis] - 0.5

    def midline(self) -> float:
        """The midline of the body at the level of the lungs, as a column index of the scan: the median over rows of the
        centre between the first and the last voxel of the body. Unlike ``middle(2)``, it is not shifted by a lung that
        is full of fluid or not recognised."""
        (low, high), (front, back) = self.box[0], self.box[1]
        body = self.coarse[low:high, front:back] > AIR_OUTSIDE
        rows = body.any(axis=2)
        if not rows.any():
            return self.middle(2)
        first, last = body.argmax(axis=2)[rows], body.shape[2] - 1 - body[:, :, ::-1].argmax(axis=2)[rows]
        return float(np.median(first + last) / 2 + 0.5) * self.step[2] - 0.5

    def share_within(self, bounds: list[tuple[float, float]]) -> float:
        """The fraction of the lungs between two voxel indices of the scan along each axis."""
        inside = []
        for axis, (low, high) in enumerate(bounds):
            place = (np.arange(self.mask.shape[axis]) + 0.5) * self.step[axis] - 0.5
            inside.append((place >= low) & (place <= high))
        return float(self.mask[np.ix_(*inside)].sum() / max(1, self.mask.sum()))


def find_lungs(volume: Volume) -> Lungs:
    """Find the lungs of an oriented volume in HU, or the region most similar to lungs."""
    # A volume thinner than 6 mm is one coarse voxel thick.
    sides = zip(volume.spacing, volume.array.shape, strict=True)
    step = tuple(max(1, min(round(COARSE_MM / spacing), count)) for spacing, count in sides)
    coarse = _coarse(volume.array, *step)
    size = tuple(spacing * s for spacing, s in zip(volume.spacing, step, strict=True))
    nothing = Lungs(coarse, np.zeros(coarse.shape, bool), step, size)
    best = nothing
    # Healthy lung is denser than air. Lung destroyed by emphysema is not; it is recognised by its separation from the
    # outside air.
    for mask in ((coarse > -950) & (coarse < -550), coarse < -550):
        best = _spaces(nothing, mask)
        if best.is_chest:
            break
    return best


def no_chest(lungs: Lungs) -> str | None:
    """The reason why these cannot be the lungs of a chest, or None."""
    if lungs.is_chest:
        return None
    return (
        f"its largest region of lung density measures {lungs.millilitres:.0f} ml, {lungs.height:.0f} mm high, "
        f"{lungs.thickness:.0f} mm thick: {NOT_A_CHEST}"
    )


@numba.njit(cache=True, fastmath=True, nogil=True)
def _coarse(array, i, j, k):  # type: ignore[no-untyped-def]
    """Means over blocks of (i, j, k) voxels; incomplete blocks are dropped. Every third row and slice is enough,
    because noise averages out, and most of the memory is not read."""
    d, h, w = array.shape[0] // i, array.shape[1] // j, array.shape[2] // k
    coarse = np.zeros((d, h, w), np.float32)
    for a in range(d):
        slices = 0
        for s in range(a * i, a * i + i, 3):
            slices += 1
            for b in range(h):
                for r in range(b * j, b * j + j, 3):
                    line = array[s, r]
                    for c in range(w):
                        total = np.float32(0)
                        for x in range(c * k, c * k + k):
                            total += np.float32(line[x])
                        coarse[a, b, c] += total
        coarse[a] /= np.float32(slices * ((j + 2) // 3) * k)
    return coarse


def _spaces(scan: Lungs, mask: np.ndarray) -> Lungs:
    """The largest connected region of a mask whose median is not air, and the other lung beside it."""
    from scipy import ndimage

    # Erosion by a 2 x 2 square (as in scipy) removes bridges of one voxel between lungs and outside air.
    eroded = np.zeros_like(mask)
    eroded[:, 1:, 1:] = mask[:, 1:, 1:] & mask[:, :-1, 1:] & mask[:, 1:, :-1] & mask[:, :-1, :-1]
    regions, _ = ndimage.label(eroded)
    counts = np.bincount(regions.ravel())
    order = [int(label) for label in np.argsort(counts)[::-1] if label > 0 and counts[label] > 0]
    # In the mask of emphysema, the air around the patient is the largest region.
    spaces: list[np.ndarray] = []
    least = 0.0
    for n in order[:LARGEST_SPACES]:
        if counts[n] < least:
            break
        space = regions == n
        if np.median(scan.coarse[space]) > AIR_NOT_LUNG:
            spaces.append(space)
            least = max(least, OTHER_LUNG * counts[n])
    if not spaces:
        return scan
    measured = [_measured(scan, space) for space in spaces]
    # The foam of a table extends to the sides of the image, and may be larger than a lung.
    inner = (one for one in measured if one.is_chest and not _at_sides(one.mask))
    first = next(inner, measured[0])
    both = first.mask.copy()
    for other in measured:
        cut = _at_sides(other.mask) and not _at_sides(first.mask)
        if other is not first and not cut and other.thickness >= OTHER_LUNG_MM and _beside(other.mask, first.mask):
            both |= other.mask
    return replace(first, mask=both)


def _measured(scan: Lungs, space: np.ndarray) -> Lungs:
    slices = np.flatnonzero(space.any(axis=(1, 2)))
    millilitres = float(np.count_nonzero(space) * np.prod(scan.size) / 1000)
    height = float((slices[-1] - slices[0] + 1) * scan.size[0])
    return Lungs(scan.coarse, space, scan.step, scan.size, millilitres, height, _thickness(space, scan.size))


def _beside(space: np.ndarray, other: np.ndarray) -> bool:
    tall, heights = space.any(axis=(1, 2)), other.any(axis=(1, 2))
    return bool((tall & heights).sum() >= BESIDE * tall.sum())


def _at_sides(space: np.ndarray) -> bool:
    return bool(space[:, [0, -1]].any() or space[:, :, [0, -1]].any())


def _thickness(space: np.ndarray, size: tuple[float, ...]) -> float:
    """Diameter in mm of the largest disc in the largest axial slices of a region."""
    from scipy import ndimage

    widest = np.argsort(space.sum(axis=(1, 2)))[-LARGEST_SLICES:]
    return max(2 * float(ndimage.distance_transform_edt(space[n], sampling=size[1:]).max()) for n in widest)


def orientation_doubt(lungs: Lungs) -> str | None:
    """A warning if the anatomy contradicts the axes of an oriented volume, or None.

    The spine lies behind the lungs; lungs are pointed at the top and concave at the bottom; the trachea lies between
    their upper parts; the heart takes space from the left lung, and the liver lies below the right. A header that is
    wrong by 180 degrees reverses two of the three. The heart alone is weak evidence, because a collapsed lung displaces
    it: it counts only if lungs and liver agree. There is no warning for scans that do not show a chest, or that cut off
    the lungs in front, behind or at the sides.
    """
    (_, _), (front, back), (right, left) = lungs.box if lungs.is_chest else [(0, 0)] * 3
    _, height, width = lungs.mask.shape
    if not lungs.is_chest or front < 1 or right < 1 or back >= height or left >= width:
        return None
    faults = []
    if _spine_behind(lungs) < SPINE_BAR:
        faults.append("the spine lies in front of the lungs")
    if _upright(lungs) < UPRIGHT_BAR:
        faults.append("the lung apices and the trachea lie below, the domes of the diaphragm above")
    if not faults and _heart_left(lungs):
        faults.append("the heart lies on the right and the liver on the left (a mirrored header, or situs inversus)")
    return f"orientation doubtful: {', and '.join(faults)}" if faults else None


def _spine_behind(lungs: Lungs) -> float:
    """1 if midline bone lies behind the lungs, in most slices and in total; -1 if it lies in front of them.

    Bone is searched behind and in front of the lungs, not between them, where contrast medium is as dense as bone.
    """
    (_, _), (front, back), (right, left) = lungs.box
    reach = max(1, round(30 / lungs.size[2]))
    middle = (right + left - 1) / 2
    columns = slice(max(0, int(middle - reach)), int(middle + reach) + 1)
    bone = np.clip(lungs.coarse[:, :, columns], 100, 400) - 100
    height = lungs.coarse.shape[1]
    behind = bone[:, _part(front, back, 0.92, 1.35, height)].sum(axis=(1, 2))
    before = bone[:, _part(front, back, -0.35, 0.08, height)].sum(axis=(1, 2))
    bony = behind + before > 50
    vote = float(np.sign(behind - before)[bony].mean()) if bony.sum() > 3 else 0.0
    return (_balance(behind.sum(), before.sum()) + vote) / 2


def _upright(lungs: Lungs) -> float:
    """1 if the lungs taper upwards and air (the trachea) lies between their upper parts, -1 if it is the other way
    round."""
    from scipy import ndimage

    (low, high), (front, back), (right, left) = lungs.box
    mask, depth = lungs.mask, lungs.mask.shape[0]
    outline = mask.any(axis=0)
    inset = ndimage.distance_transform_edt(outline, sampling=lungs.size[1:])
    core, rim = outline & (inset > 0.6 * inset.max()), outline & (inset < 0.3 * inset.max())
    bottom, top = mask.argmax(axis=0), depth - 1 - mask[::-1].argmax(axis=0)
    if not core.any() or not rim.any():
        return 0.0
    # The dome of the diaphragm raises the centre of the lower surface; the apex raises the centre of the upper surface.
    taper = sum(surface[core].mean() - surface[rim].mean() for surface in (bottom, top)) / (high - low)
    reach = max(1, round(25 / lungs.size[2]))
    middle = (right + left - 1) / 2
    columns = slice(max(0, int(middle - reach)), int(middle + reach) + 1)
    rows = _part(front, back, 0.15, 0.85, mask.shape[1])
    air = (lungs.coarse[:, rows, columns] < -500) & ~ndimage.binary_dilation(mask[:, rows, columns])
    airway = air.any(axis=(1, 2))
    upper, lower = airway[_part(low, high, 0.65, 1.15, depth)], airway[_part(low, high, -0.15, 0.35, depth)]
    windpipe = float(upper.mean() - lower.mean()) if len(upper) and len(lower) else 0.0
    return float(np.clip(3 * taper + windpipe, -2, 2) / 2)


def _heart_left(lungs: Lungs) -> bool:
    """Whether heart, lungs and liver all indicate exchanged sides."""
    (low, high), (front, back), (right, left) = lungs.box
    depth, height, _ = lungs.mask.shape
    reach = max(1, round(30 / lungs.size[2]))
    middle = (right + left - 1) / 2
    first = max(0, int(middle - reach))
    bone = np.clip(
        lungs.coarse[low:high, _part(front, back, 0.75, 1.3, height), first : int(middle + reach) + 1], 150, 400
    )
    weight = (bone - 150).sum(axis=(0, 1))
    spine = round(first + float(weight @ np.arange(len(weight)) / weight.sum())) if weight.sum() > 0 else int(middle)

    def towards_left(mask: np.ndarray, millimetres: float) -> float:
        columns, near = mask.sum(axis=(0, 1)), round(millimetres / lungs.size[2])
        return _balance(columns[spine + 1 : spine + 1 + near].sum(), columns[max(0, spine - near) : spine].sum())

    zone = _part(low, high, 0.15, 0.5, depth)
    heart = towards_left(lungs.coarse[zone, _part(front, back, 0.0, 0.65, height)] > -20, 80)
    lung = -towards_left(lungs.mask[zone], 1000)
    below = lungs.coarse[_part(low, high, -0.05, 0.15, depth), front:back]
    liver = -towards_left((below > -20) & (below < 250), 120)
    return heart < HEART_BAR and lung < LUNGS_BAR and liver < LIVER_BAR


def _part(first: int, end: int, begin: float, until: float, limit: int) -> slice:
    """From ``begin`` to ``until`` of the way from ``first`` to ``end``, within an axis of ``limit``."""
    length = end - first
    return slice(*(min(limit, max(0, round(first + share * length))) for share in (begin, until)))


def _balance(one: float, other: float) -> float:
    return float((one - other) / max(1e-6, one + other))
