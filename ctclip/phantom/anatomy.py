"""Normal anatomy: body wall, ribs, spine, lungs with vessels and airways, heart, great vessels, diaphragm."""

from __future__ import annotations

import numpy as np

from ctclip.phantom.canvas import ADD, IN_LUNG, Canvas, ball, ellipsoid, path, tube
from ctclip.phantom.patient import SIDES, Patient

SOFT, FAT, WATER, BONE = 45.0, -100.0, 5.0, 420.0
LUMEN = -985.0


def draw_body(canvas: Canvas, patient: Patient) -> None:
    """Skin, fat, muscle, breasts: superellipses in the axial plane, narrowing towards the neck."""
    z, y, x = canvas.grid.axes
    top = patient.lung_height * 0.5
    narrow = 1 - 0.30 * np.clip((z - top + 25) / 70, 0, 1)
    edge = max(canvas.grid.spacing[1:])
    for inset, value in ((0.0, 20.0), (2.0, FAT), (patient.fat, SOFT)):
        a, b = patient.half_width - inset, patient.half_depth - inset * 0.8
        # Slices differ only in size, so powers are computed for one slice instead of the volume.
        outline = ((np.abs(x) / a) ** 2.5 + (np.abs(y) / b) ** 2.5) ** 0.4
        canvas.extrude(outline[0], narrow.ravel(), value, steep=b / edge)
    if patient.breasts:
        size = patient.breasts
        depth = -patient.half_depth + 4
        shapes = [
            ellipsoid((s * patient.half_width * 0.45, depth, -10), (size * 1.5, size, size * 1.4)) for s in (-1, 1)
        ]
        canvas.draw(shapes, -85.0, softness=1.0)


def draw_lungs(canvas: Canvas, patient: Patient) -> None:
    """Aerated lungs, denser in dependent regions; the diaphragm cuts their bases later."""
    edge = sum(canvas.grid.spacing) / 3
    for side in SIDES:
        (cx, cy, cz), (rx, ry, rz) = patient.lung_centre(side), patient.lung_radii(side)
        box = canvas.grid.box((cx, cy, cz), (rx * 1.2, ry * 1.2, rz * 1.2))
        z, y, x = canvas.grid.axes_of(box)
        taper = 1 - 0.34 * np.clip((z - cz) / rz, 0, 1) ** 2
        radius = (
            np.abs((x - cx * taper) / (rx * taper)) ** 2.3
            + (np.abs((y - cy) / (ry * taper)) ** 2.3 + np.abs((z - cz) / rz) ** 3.0)
        ) ** (1 / 2.4)
        cover = np.clip(0.5 - (radius - 1) * (rx / edge), 0, 1)
        density = patient.lung_density + patient.dependent_gradient * np.clip((y - cy) / ry, -1, 1) * 0.5
        canvas.hu[box] += (density - canvas.hu[box]) * cover
        canvas.lung[box] = np.maximum(canvas.lung[box], cover)


def draw_skeleton(canvas: Canvas, patient: Patient, random: np.random.Generator) -> None:
    """Spine, ribs, sternum, and the scapulae's edges."""
    width, depth = patient.cavity
    back = depth + 14
    height = patient.lung_height
    vertebrae, discs, processes = [], [], []
    for level in np.arange(-height * 0.75, height * 0.75, 24.0):
        vertebrae.append(ellipsoid((0, back - 6, level), (19, 15, 10.5)))
        discs.append(ellipsoid((0, back - 6, level + 12), (16, 13, 3)))
        processes += [tube((0, back + 10, level), (0, back + 30, level - 10), 4.0)]
    canvas.draw(vertebrae, patient.trabecular + 130)
    canvas.draw([ellipsoid(v[1:4], v[4:7] - 2.5) for v in vertebrae], patient.trabecular)
    canvas.draw(discs, 80.0)
    canvas.draw(processes, BONE)
    canvas.draw([tube((0, back + 11, -height), (0, back + 11, height), 7.0)], 20.0)
    ribs = []
    for level in np.linspace(-height * 0.46, height * 0.46, 10):
        shrink = 1 - 0.36 * max(0.0, level / (height * 0.5)) ** 2
        angles = np.linspace(0.12, 0.86, 9) * np.pi
        for sign in (-1, 1):
            # Ribs slope forwards: the anterior end is lower than the end at the spine.
            points = [
                (
                    sign * (width + 5) * shrink * np.sin(a),
                    (depth + 5) * shrink * np.cos(a),
                    level - 26 * (a / np.pi),
                )
                for a in angles
            ]
            ribs += path(points, 4.2)
    canvas.draw(ribs, BONE)
    canvas.draw(path([(0, -depth - 7, height * 0.32), (0, -depth - 9, -height * 0.18)], 7.0), 260.0)
    for sign in (-1, 1):
        canvas.draw([tube((sign * width * 0.72, depth * 0.95, 70), (sign * width * 0.88, depth * 0.8, 25), 4.0)], BONE)


def draw_mediastinum(canvas: Canvas, patient: Patient, blood: float) -> None:
    """Fat and soft tissue between the lungs, great vessels, oesophagus. ``blood`` HU, higher with contrast."""
    _, depth = patient.cavity
    height = patient.lung_height
    canvas.draw([ellipsoid((0, -8, 20), (27, depth * 0.78, height * 0.58))], -70.0, softness=2.0)
    canvas.draw([ellipsoid((0, depth * 0.55, 0), (18, depth * 0.35, height * 0.6))], 10.0, softness=2.0)
    r = patient.aorta
    ascending = [(-12, -depth * 0.2, -height * 0.12), (-14, -depth * 0.24, height * 0.10)]
    canvas.draw(
        [
            *path(ascending, r * 1.15),
            *path(aortic_arch(patient), r),
            *path(descending_aorta(patient), r * 0.9),
        ],
        blood,
    )
    canvas.draw(path([(14, -depth * 0.3, -height * 0.08), (10, -depth * 0.12, height * 0.04)], 13.0), blood)
    canvas.draw([tube((-24, -depth * 0.16, height * 0.34), (-22, -depth * 0.14, -height * 0.08), 8.0)], blood + 15)
    canvas.draw([tube((6, depth * 0.42, height * 0.5), (9, depth * 0.46, -height * 0.45), 7.5)], 35.0)
    canvas.draw([tube((6, depth * 0.42, height * 0.5), (9, depth * 0.46, -height * 0.45), 1.5)], -300.0)


def aortic_arch(patient: Patient) -> list[tuple[float, float, float]]:
    """Centre line of the arch, from the ascending to the descending aorta."""
    _, depth = patient.cavity
    height = patient.lung_height
    return [
        (-14, -depth * 0.24, height * 0.10), (-6, -depth * 0.16, height * 0.19),
        (10, depth * 0.06, height * 0.20), (19, depth * 0.36, height * 0.11),
    ]  # fmt: skip


def descending_aorta(patient: Patient) -> list[tuple[float, float, float]]:
    """Centre line of the descending aorta, left of the spine."""
    _, depth = patient.cavity
    height = patient.lung_height
    return [
        (19, depth * 0.36, height * 0.11),
        (22, depth * 0.58, -height * 0.1),
        (16, depth * 0.6, -height * 0.62),
    ]


def draw_heart(canvas: Canvas, patient: Patient, blood: float) -> None:
    """Myocardium with four chambers, epicardial fat around it."""
    centre, radii = np.array(patient.heart_centre()), np.array(patient.heart_radii())
    canvas.draw([ellipsoid(centre, radii + 4)], -85.0)
    canvas.draw([ellipsoid(centre, radii)], 50.0)
    chambers = [
        ((0.38, 0.0, -0.1), 0.42),
        ((-0.05, -0.35, -0.15), 0.4),
        ((-0.45, -0.05, 0.1), 0.36),
        ((0.05, 0.45, 0.3), 0.36),
    ]
    shapes = [ellipsoid(centre + np.array(at) * radii, radii * size) for at, size in chambers]
    canvas.draw(shapes, blood)


def draw_diaphragm(canvas: Canvas, patient: Patient, raised: dict[str, float]) -> None:
    """Liver under the right dome, spleen and stomach under the left. ``raised``: mm for each side."""
    width, depth = patient.cavity
    base = -patient.lung_height * 0.5
    for side, sign, value in (("right", -1, 58.0), ("left", 1, 48.0)):
        top = base + 44 + raised[side]
        centre = (sign * width * 0.5, 0.0, top - 105)
        canvas.draw([ellipsoid(centre, (width * 0.56, depth * 1.04, 105))], value)
        canvas.draw([ellipsoid((sign * width * 0.5, 0, base - 60), (width * 0.52, depth, 78))], value)
    canvas.draw([ellipsoid((0, 0, base - 62), (width * 0.8, depth * 0.92, 66))], 45.0)
    canvas.draw([ellipsoid((width * 0.42, -depth * 0.35, base - 28), (24, 18, 14))], -750.0)


def hilum(patient: Patient, side: str) -> np.ndarray:
    """Where bronchi and vessels enter a lung."""
    sign = -1 if side == "right" else 1
    return np.array([sign * 40.0, 6.0, patient.lung_height * 0.02])


def draw_airways(canvas: Canvas, patient: Patient) -> None:
    """Trachea and main bronchi: a thin wall around air."""
    height = patient.lung_height
    carina = (-2.0, 4.0, height * 0.1)
    shapes = [tube((0, -6, height * 0.6), carina, 9.0)]
    shapes += [tube(carina, hilum(patient, side), 7.0, 5.5) for side in SIDES]
    walls = [shape + np.array([0, 0, 0, 0, 0, 0, 0, 1.6, 1.6]) for shape in shapes]
    canvas.draw(walls, 30.0)
    canvas.draw(shapes, LUMEN)


def branches(
    patient: Patient, side: str, random: np.random.Generator, generations: int, length: float
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """A branching tree from the hilum into the lung: (start, end, generation) of each segment."""
    start = hilum(patient, side)
    centre, radii = np.array(patient.lung_centre(side)), np.array(patient.lung_radii(side))
    branches: list[tuple[np.ndarray, np.ndarray, int]] = []
    tips = [(start, (centre + radii * direction - start)) for direction in _lobar_directions()]
    for generation in range(generations):
        grown = []
        for point, heading in tips:
            heading = heading / np.linalg.norm(heading)
            end = point + heading * length * 0.78**generation * random.uniform(0.8, 1.2)
            if np.linalg.norm((end - centre) / radii) > 0.98:
                continue
            branches.append((point, end, generation))
            for _ in range(2):
                outward = (end - start) / (np.linalg.norm(end - start) + 1e-6)
                grown.append((end, heading + 0.4 * outward + random.normal(0, 0.5, size=3)))
        tips = grown
    return branches


def _lobar_directions() -> list[np.ndarray]:
    return [
        np.array(d)
        for d in (
            (0.1, -0.3, 0.75),
            (0.2, 0.45, 0.5),
            (0.45, -0.45, -0.1),
            (0.3, 0.55, -0.35),
            (0.1, 0.2, -0.75),
        )
    ]


def draw_vessels(canvas: Canvas, patient: Patient, random: np.random.Generator, blood: float) -> None:
    """Pulmonary vessels: a tree in each lung, thinner with every generation."""
    shapes = []
    for side in SIDES:
        for start, end, generation in branches(patient, side, random, 6, 42.0):
            thick = 4.6 * 0.72**generation
            shapes.append(tube(start, end, thick, thick * 0.75))
    canvas.draw(shapes, min(blood, 120.0), within=IN_LUNG)
    canvas.draw([ball(hilum(patient, side), 9.0) for side in SIDES], blood, softness=1.0)


def draw_texture(canvas: Canvas, patient: Patient, random: np.random.Generator) -> None:
    """Slow variation of lung density that everyone has: regional perfusion and breath."""
    width, depth = patient.cavity
    reach = np.array([width, depth, patient.lung_height * 0.5])
    shapes = [ellipsoid(random.uniform(-1, 1, size=3) * reach, random.uniform(25, 60, size=3)) for _ in range(24)]
    canvas.draw(shapes, random.normal(0, 14, size=len(shapes)), within=IN_LUNG, how=ADD, softness=8.0)
