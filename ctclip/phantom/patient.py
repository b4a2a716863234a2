"""A patient: habitus and organ sizes in mm, drawn at random from realistic ranges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES = ("right", "left")
LOBES = {"right": ("upper", "middle", "lower"), "left": ("upper", "lower")}


@dataclass(frozen=True)
class Patient:
    """Sizes in mm, densities in HU. Right is x < 0 (the frame is LPS)."""

    sex: str
    age: int
    half_width: float
    half_depth: float
    fat: float
    lung_height: float
    lung_density: float
    dependent_gradient: float
    heart: float
    aorta: float
    calcium: float
    trabecular: float
    breasts: float

    @property
    def cavity(self) -> tuple[float, float]:
        """Half-width and half-depth of the rib cage's inside."""
        return self.half_width - self.fat - 22, self.half_depth - self.fat * 0.8 - 20

    def lung_centre(self, side: str) -> tuple[float, float, float]:
        width, _ = self.cavity
        sign = -1 if side == "right" else 1
        return sign * width * 0.53, -2.0, 0.0

    def lung_radii(self, side: str) -> tuple[float, float, float]:
        width, depth = self.cavity
        return width * (0.45 if side == "right" else 0.43), depth * 0.97, self.lung_height * 0.5

    def heart_centre(self) -> tuple[float, float, float]:
        _, depth = self.cavity
        return 16.0 * self.heart, -depth * 0.36, -self.lung_height * 0.19

    def heart_radii(self) -> tuple[float, float, float]:
        return 52.0 * self.heart, 40.0 * self.heart, 46.0 * self.heart


def draw_patient(random: np.random.Generator) -> Patient:
    """A patient before any abnormality."""
    sex = "F" if random.random() < 0.45 else "M"
    build = random.normal(0, 1)
    scale = 0.94 if sex == "F" else 1.03
    fat = float(np.clip(16 + 6 * build + random.normal(0, 4), 6, 38))
    return Patient(
        sex=sex,
        age=int(np.clip(random.normal(52, 16), 18, 92)),
        half_width=float(scale * (158 + 5 * build + random.normal(0, 7)) + 0.5 * fat),
        half_depth=float(scale * (106 + 5 * build + random.normal(0, 5)) + 0.4 * fat),
        fat=fat,
        lung_height=float(np.clip(scale * random.normal(238, 20), 180, 295)),
        lung_density=float(np.clip(random.normal(-845, 28), -900, -770)),
        dependent_gradient=float(random.uniform(10, 80)),
        heart=float(scale * np.clip(random.normal(0.95, 0.055), 0.82, 1.07)),
        aorta=float(np.clip(random.normal(13.0, 1.4), 10, 17)),
        calcium=float(random.uniform(350, 900)),
        trabecular=float(random.uniform(90, 230)),
        breasts=float(random.uniform(15, 40)) if sex == "F" else 0.0,
    )


def lung_point(
    patient: Patient, side: str, lobe: str, random: np.random.Generator, *, peripheral: bool = False
) -> np.ndarray:
    """A point (x, y, z) in mm inside a lobe, at least a few mm from the lung's edge.

    Lobes are approximated by height and depth: the fissures run from high behind to low in front.
    """
    centre, radii = np.array(patient.lung_centre(side)), np.array(patient.lung_radii(side))
    heart, heart_radii = np.array(patient.heart_centre()), np.array(patient.heart_radii())
    for _ in range(400):
        unit = random.uniform(-1, 1, size=3)
        reach = float(np.linalg.norm(unit))
        if not (0.6 if peripheral else 0.0) < reach < 0.86 or unit[2] < -0.72:
            continue
        # Above the fissure is the upper lobe; below it, in front and on the right, is the middle lobe.
        above = unit[2] - 0.45 * unit[1] > 0.12
        here = "upper" if above else ("middle" if side == "right" and unit[1] < -0.1 else "lower")
        point = centre + unit * radii
        if here == lobe and np.linalg.norm((point - heart) / (heart_radii + 6)) > 1:
            return point
    return centre + np.array([0.0, 0.35, 0.35 if lobe == "upper" else -0.35]) * radii
