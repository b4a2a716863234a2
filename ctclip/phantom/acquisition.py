"""The scanner: grid, table, kernel and noise of one reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from scipy import ndimage

from ctclip.phantom.canvas import Canvas, Grid
from ctclip.phantom.patient import Patient

MAKERS = ("Orpheus Medical", "Lumen Systems", "Northlight Imaging")
KERNELS = ("soft", "medium", "sharp")


@dataclass(frozen=True)
class Acquisition:
    """The parameters of one reconstruction; spacing in mm [slice, row, column], noise and offset in HU."""

    grid: Grid
    kernel: str
    noise: float
    maker: str
    table_height: float
    gain: float
    offset: float


def draw_acquisition(patient: Patient, random: np.random.Generator, scale: float) -> Acquisition:
    """Draw the protocol of a reconstruction. ``scale`` multiplies the in-plane spacing, for small volumes."""
    field = 2 * max(patient.half_width, patient.half_depth) * random.uniform(1.04, 1.28)
    pixel = float(np.clip(field / 512, 0.6, 0.9)) * scale
    thickness = float(random.choice([1.0, 1.5, 2.0, 3.0, 5.0])) if scale < 2 else float(random.choice([3.0, 4.0, 5.0]))
    size = int(round(field / pixel / 4) * 4)
    span = patient.lung_height * random.uniform(1.1, 1.28)
    slices = round(span / thickness)
    centre = (
        -patient.lung_height * random.uniform(0.0, 0.04),
        random.uniform(-12, 12),
        random.uniform(-14, 14),
    )
    shape, spacing = (slices, size, size), (thickness, pixel, pixel)
    origin = tuple(c - (n - 1) / 2 * s for c, n, s in zip(centre, shape, spacing, strict=True))
    return Acquisition(
        grid=Grid(shape, spacing, (origin[0], origin[1], origin[2])),
        kernel=KERNELS[int(random.integers(3))],
        noise=float(random.uniform(10, 40)),
        maker=MAKERS[int(random.integers(3))],
        table_height=float(random.uniform(6, 22)),
        # Scanners drift within the limits of quality assurance.
        gain=float(random.normal(1.0, 0.012)),
        offset=float(random.normal(0, 7)),
    )


def draw_table(canvas: Canvas, patient: Patient, height: float) -> None:
    """The couch behind the back: a thin curved shell of carbon fibre around foam."""
    _, y, x = canvas.grid.axes
    top = patient.half_depth + height + 0.0009 * x**2 * -1 + 4
    for low, high, value in ((0.0, 26.0, -920.0), (0.0, 3.0, -250.0), (23.0, 26.0, -250.0)):
        inside = (y > top + low) & (y < top + high) & (np.abs(x) < 215)
        canvas.hu[np.broadcast_to(inside, canvas.hu.shape)] = value


def scan(canvas: Canvas, acquisition: Acquisition, random: np.random.Generator) -> np.ndarray:
    """Simulate the scan of the drawn patient: int16 HU [slice, row, column] with the noise of the kernel."""
    # A soft kernel blurs the noise and, slightly, the image; a sharp kernel does not.
    blur = {"soft": 0.62, "medium": 0.4, "sharp": 0.0}[acquisition.kernel]
    noise = random.standard_normal(canvas.hu.shape, dtype=np.float32)
    image = canvas.hu
    if blur:
        noise = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(noise, blur, axis=1), blur, axis=2)
        noise /= noise[:: max(1, len(noise) // 8)].std()
    if acquisition.kernel == "soft":
        image = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(image, 0.35, axis=1), 0.35, axis=2)
    # Quantum noise is strongest behind bone and in thick patients, weakest in air.
    return _expose(image, noise, acquisition.gain, acquisition.offset, acquisition.noise)


@numba.njit(cache=True, nogil=True)
def _expose(image, noise, gain, offset, level):  # type: ignore[no-untyped-def]
    out = np.empty(image.shape, np.int16)
    values, grains, written = image.ravel(), noise.ravel(), out.ravel()
    for i in range(values.size):
        value = (values[i] + np.float32(1000)) * np.float32(gain) + np.float32(offset - 1000)
        share = np.float32(0.55) if value < -900 else np.float32(1.0)
        written[i] = np.int16(
            np.rint(min(np.float32(3071), max(np.float32(-1024), value + grains[i] * np.float32(level) * share)))
        )
    return out
