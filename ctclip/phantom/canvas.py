"""Drawing in millimetres with partial volume: ellipsoids and tapered tubes onto a CT grid.

Patient frame, in mm: x to the left, y to the back, z to the head; the origin lies between the lungs. Arrays are [slice,
row, column]. A voxel half covered by a shape gets half of its value, as on a scanner.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

Point = Sequence[float] | np.ndarray

ELLIPSOID, TUBE = 0.0, 1.0
REPLACE, ADD = 0, 1
ANYWHERE, IN_LUNG = 0, 1


@dataclass(frozen=True)
class Grid:
    """``shape`` voxels of ``spacing`` mm along [slice, row, column]; ``origin`` the centre of voxel (0, 0, 0)."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, y and x in mm of the voxel centres, shaped to broadcast over a volume."""
        z, y, x = (
            (start + step * np.arange(count)).astype(np.float32)
            for start, step, count in zip(self.origin, self.spacing, self.shape, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def box(self, centre: Point, reach: Point) -> tuple[slice, slice, slice]:
        """The voxels [slice, row, column] within ``reach`` mm of ``centre`` along each axis (both x, y, z)."""
        parts = []
        for start, step, count, middle, far in zip(
            self.origin, self.spacing, self.shape, centre[::-1], reach[::-1], strict=True
        ):
            first, last = (middle - far - start) / step, (middle + far - start) / step
            parts.append(slice(max(0, int(np.floor(first))), min(count, max(0, int(np.ceil(last)) + 1))))
        return parts[0], parts[1], parts[2]

    def axes_of(self, box: tuple[slice, slice, slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``axes`` of the voxels in ``box``."""
        z, y, x = self.axes
        return z[box[0]], y[:, box[1]], x[:, :, box[2]]


def ellipsoid(centre: Point, radii: Point) -> np.ndarray:
    """A shape: centre and radii (x, y, z) in mm."""
    return np.array([ELLIPSOID, *centre, *radii, 0.0, 0.0], dtype=np.float64)


def ball(centre: Point, radius: float) -> np.ndarray:
    """A sphere."""
    return ellipsoid(centre, (radius, radius, radius))


def tube(start: Point, end: Point, radius: float, end_radius: float | None = None) -> np.ndarray:
    """A round rod between two points, tapering from ``radius`` to ``end_radius``."""
    return np.array([TUBE, *start, *end, radius, radius if end_radius is None else end_radius], dtype=np.float64)


def path(points: Sequence[Point], radius: float) -> list[np.ndarray]:
    """Tubes along a polyline."""
    return [tube(a, b, radius) for a, b in itertools.pairwise(points)]


class Canvas:
    """The HU image, the fraction of lung in each voxel, and one mask bit per finding."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hu = np.full(grid.shape, -1000.0, dtype=np.float32)
        self.lung = np.zeros(grid.shape, dtype=np.float32)
        self.findings = np.zeros(grid.shape, dtype=np.uint32)

    def draw(
        self,
        shapes: Sequence[np.ndarray] | np.ndarray,
        value: float | Point,
        *,
        within: int = ANYWHERE,
        how: int = REPLACE,
        softness: float = 0.0,
        finding: int | None = None,
    ) -> None:
        """Draw shapes of ``value`` HU (``how=ADD``: add it).

        ``within=IN_LUNG`` draws only in lung and keeps it lung; otherwise lung is displaced. ``softness`` mm widens the
        edge. ``finding`` marks the covered voxels with that finding's bit.
        """
        if len(shapes) == 0:
            return
        stacked = np.stack(list(shapes))
        values = np.broadcast_to(np.asarray(value, dtype=np.float32), (len(stacked),)).copy()
        bit = np.uint32(0) if finding is None else np.uint32(1 << finding)
        _draw(
            self.hu, self.lung, self.findings, stacked, values, np.array(self.grid.origin), np.array(self.grid.spacing),
            within, how, float(softness), bit,
        )  # fmt: skip

    def extrude(self, outline: np.ndarray, size: np.ndarray, value: float, steep: float) -> None:
        """Draw ``value`` HU where ``outline`` [row, column] is below ``size`` [slice], overwriting earlier values.

        ``steep``: decrease of the cover from inside to outside per unit of outline / size.
        """
        _extrude(self.hu, outline, size, np.float32(value), np.float32(steep))

    def pour(self, cover: np.ndarray, value: float, finding: int | None = None) -> None:
        """Displace lung by ``value`` HU in proportion to ``cover`` (0 to 1, broadcast to the volume)."""
        share = np.broadcast_to(np.asarray(cover, dtype=np.float32), self.hu.shape) * self.lung
        self.hu += (value - self.hu) * share
        self.lung -= share
        if finding is not None:
            self.findings[share > 0.25] |= np.uint32(1 << finding)

    def unmark(self, shape: np.ndarray, finding: int) -> None:
        """Remove a finding's mark inside an ellipsoid."""
        z, y, x = self.grid.axes
        (cx, cy, cz), (rx, ry, rz) = shape[1:4], shape[4:7]
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1
        self.findings[inside] &= ~np.uint32(1 << finding)


@numba.njit(cache=True, nogil=True)
def _extrude(hu, outline, size, value, steep):  # type: ignore[no-untyped-def]
    for i in range(hu.shape[0]):
        for j in range(hu.shape[1]):
            for k in range(hu.shape[2]):
                cover = np.float32(0.5) - (outline[j, k] / size[i] - np.float32(1)) * steep
                cover = min(np.float32(1), max(np.float32(0), cover))
                hu[i, j, k] += (value - hu[i, j, k]) * cover


@numba.njit(cache=True, nogil=True)
def _draw(hu, lung, findings, shapes, values, origin, spacing, within, how, softness, bit):  # type: ignore[no-untyped-def]
    # Half the width of an edge, over which a voxel goes from empty to full.
    voxel = (spacing[0] + spacing[1] + spacing[2]) / 3
    half = 0.5 * voxel + softness
    low, high = np.empty(3), np.empty(3)
    first, last = np.empty(3, np.int64), np.empty(3, np.int64)
    for s in range(shapes.shape[0]):
        shape, value = shapes[s], values[s]
        for axis in range(3):
            if shape[0] == 0.0:
                low[axis], high[axis] = shape[1 + axis] - shape[4 + axis], shape[1 + axis] + shape[4 + axis]
            else:
                reach = max(shape[7], shape[8])
                low[axis] = min(shape[1 + axis], shape[4 + axis]) - reach
                high[axis] = max(shape[1 + axis], shape[4 + axis]) + reach
        for axis in range(3):
            # Array axes run z, y, x; shapes hold x, y, z.
            world = 2 - axis
            first[axis] = max(0, int(np.ceil((low[world] - half - origin[axis]) / spacing[axis])))
            last[axis] = min(hu.shape[axis] - 1, int(np.floor((high[world] + half - origin[axis]) / spacing[axis])))
        for i in range(first[0], last[0] + 1):
            z = origin[0] + i * spacing[0]
            for j in range(first[1], last[1] + 1):
                y = origin[1] + j * spacing[1]
                for k in range(first[2], last[2] + 1):
                    if within == 1 and lung[i, j, k] <= 0.0:
                        continue
                    x = origin[2] + k * spacing[2]
                    thin = 1.0
                    if shape[0] == 0.0:
                        u, v, w = (x - shape[1]) / shape[4], (y - shape[2]) / shape[5], (z - shape[3]) / shape[6]
                        f = np.sqrt(u * u + v * v + w * w)
                        g = np.sqrt((u / shape[4]) ** 2 + (v / shape[5]) ** 2 + (w / shape[6]) ** 2)
                        smallest = min(shape[4], shape[5], shape[6])
                        distance = -smallest if g == 0.0 else max(-smallest, f * (f - 1.0) / g)
                        thin = min(1.0, 2 * smallest / voxel)
                    else:
                        dx, dy, dz = shape[4] - shape[1], shape[5] - shape[2], shape[6] - shape[3]
                        length = dx * dx + dy * dy + dz * dz
                        t = 0.0
                        if length > 0.0:
                            t = ((x - shape[1]) * dx + (y - shape[2]) * dy + (z - shape[3]) * dz) / length
                            t = min(1.0, max(0.0, t))
                        radius = shape[7] + t * (shape[8] - shape[7])
                        px, py, pz = x - shape[1] - t * dx, y - shape[2] - t * dy, z - shape[3] - t * dz
                        distance = np.sqrt(px * px + py * py + pz * pz) - radius
                        # A tube thinner than a voxel fills only a fraction of it.
                        thin = min(1.0, 2 * radius / voxel)
                    cover = min(1.0, max(0.0, 0.5 - distance / (2 * half))) * thin
                    if cover <= 0.0:
                        continue
                    if bit != 0 and cover > 0.25:
                        findings[i, j, k] |= bit
                    if within == 1:
                        cover *= lung[i, j, k]
                    if how == 1:
                        hu[i, j, k] += value * cover
                    else:
                        hu[i, j, k] += (value - hu[i, j, k]) * cover
                    if within == 0:
                        lung[i, j, k] *= 1.0 - cover
