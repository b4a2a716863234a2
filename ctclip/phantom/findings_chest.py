"""Abnormalities of heart, vessels, mediastinum and chest wall, and implants."""

from __future__ import annotations

import numpy as np

from ctclip.phantom.anatomy import aortic_arch, descending_aorta
from ctclip.phantom.canvas import Canvas, ball, ellipsoid, path, tube
from ctclip.phantom.findings_lung import Detail, bit, draw_severity
from ctclip.phantom.patient import Patient

METAL = 3071.0


def enlarged_heart(random: np.random.Generator) -> tuple[float, Detail]:
    """The factor by which the heart is enlarged; it is drawn with the anatomy."""
    severity, factor = draw_severity(random)
    return 1.16 + 0.13 * factor, Detail("Cardiomegaly", severity=severity)


def mark_heart(canvas: Canvas, patient: Patient) -> None:
    """Cardiomegaly's mask is the heart itself."""
    _mark(canvas, ellipsoid(patient.heart_centre(), patient.heart_radii()), bit("Cardiomegaly"))


def pericardial_effusion(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """A shell of fluid around the heart, thicker behind and below; drawn before the heart fills its inside."""
    severity, factor = draw_severity(random)
    centre, radii = np.array(patient.heart_centre()), np.array(patient.heart_radii())
    thickness = 5.0 + 6.5 * factor
    sunk = centre + np.array([0.0, 0.25, -0.2]) * thickness
    canvas.draw(
        [ellipsoid(sunk, radii + 4 + thickness)],
        float(random.uniform(4, 18)),
        finding=bit("Pericardial effusion"),
    )
    canvas.unmark(ellipsoid(centre, radii + 3), bit("Pericardial effusion"))
    return Detail("Pericardial effusion", size_mm=round(thickness), severity=severity)


def arterial_calcification(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Plaques in the wall of the arch and the descending aorta."""
    severity, factor = draw_severity(random)
    shapes = []
    centreline = [np.array(point) for point in (*aortic_arch(patient), *descending_aorta(patient)[1:])]
    for _ in range(int(9 * factor) + 3):
        index = int(random.integers(len(centreline) - 1))
        a, b = centreline[index], centreline[index + 1]
        along = (b - a) / np.linalg.norm(b - a)
        across = np.cross(along, random.normal(0, 1, size=3))
        across /= np.linalg.norm(across)
        point = a + (b - a) * random.random() + across * patient.aorta * 0.95
        length = float(random.uniform(2, 7))
        shapes.append(tube(point, point + along * length, float(random.uniform(1.4, 2.6))))
    canvas.draw(shapes, patient.calcium, finding=bit("Arterial wall calcification"))
    return Detail("Arterial wall calcification", severity=severity)


def coronary_calcification(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Beads on the heart's surface along the left anterior descending, circumflex and right coronary artery."""
    severity, factor = draw_severity(random)
    centre, radii = np.array(patient.heart_centre()), np.array(patient.heart_radii()) + 1.5
    shapes = []
    for _ in range(int(4 * factor) + 3):
        artery = int(random.choice(3, p=(0.55, 0.2, 0.25)))
        t = float(random.uniform(0.05, 0.75))
        start, end = coronary(artery, t), coronary(artery, t + float(random.uniform(0.04, 0.16)))
        shapes.append(tube(centre + start * radii, centre + end * radii, float(random.uniform(1.2, 2.1))))
    canvas.draw(shapes, patient.calcium, finding=bit("Coronary artery wall calcification"))
    return Detail("Coronary artery wall calcification", severity=severity)


def coronary(artery: int, t: float) -> np.ndarray:
    """A point on the unit sphere of the heart's surface: 0 LAD, 1 circumflex, 2 right; t from origin to end."""
    origin = np.array([-0.05, -0.62, 0.78])
    end = (np.array([0.72, -0.62, -0.32]), np.array([0.86, 0.45, 0.2]), np.array([-0.8, -0.35, -0.48]))[artery]
    point = origin * (1 - t) + end * t
    return point / np.linalg.norm(point)


def hiatal_hernia(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Stomach behind the heart, in front of the spine: a wall, contents, often air above a fluid level."""
    severity, factor = draw_severity(random)
    _, depth = patient.cavity
    radius = 16.0 + 9.0 * factor
    centre = np.array([random.uniform(-4, 8), depth * 0.40, -patient.lung_height * 0.36])
    radii = radius * np.array([1.1, 0.85, 1.0])
    canvas.draw([ellipsoid(centre, radii)], 40.0, finding=bit("Hiatal hernia"))
    canvas.draw([ellipsoid(centre, radii - 4)], float(random.uniform(5, 35)))
    if random.random() < 0.75:
        # The patient is supine, so air rises to the front.
        canvas.draw(
            [ellipsoid(centre - np.array([0, radii[1] * 0.35, 0]), (radii - 4) * np.array([0.75, 0.5, 0.75]))],
            -900.0,
        )
    return Detail("Hiatal hernia", severity=severity)


def lymphadenopathy(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Nodes above 10 mm in short axis: paratracheal, subcarinal, aortopulmonary, hilar, axillary."""
    severity, factor = draw_severity(random)
    _, depth = patient.cavity
    height = patient.lung_height
    stations = {
        "paratracheal": (-17, -4, height * 0.25), "prevascular": (4, -depth * 0.42, height * 0.24),
        "subcarinal": (2, 12, height * 0.03), "aortopulmonary": (22, -4, height * 0.11),
        "hilar": (-38, 4, height * 0.02), "axillary": (-patient.half_width * 0.86, -depth * 0.2, height * 0.36),
    }  # fmt: skip
    names = list(stations)
    chosen = [names[i] for i in random.permutation(len(names))[: int(2 + 2 * factor)]]
    largest = 0.0
    for name in chosen:
        for _ in range(1 + int(random.integers(0, 3))):
            radius = float(random.uniform(5.5, 8.5)) * factor**0.45
            largest = max(largest, 2 * radius)
            sign = -1 if name in ("hilar", "axillary") and random.random() < 0.5 else 1
            at = np.array(stations[name]) * np.array([sign, 1, 1]) + random.normal(0, 5, size=3)
            canvas.draw(
                [ellipsoid(at, radius * random.uniform(0.9, 1.35, size=3))],
                48.0,
                finding=bit("Lymphadenopathy"),
            )
    kind = "axillary" if chosen == ["axillary"] else "mediastinal"
    return Detail("Lymphadenopathy", size_mm=round(largest), severity=severity, count=len(chosen), kind=kind)


def medical_material(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """A pacemaker with its lead, sternotomy wires, a port with its catheter, or a stent."""
    kind = ("pacemaker", "sternotomy", "port", "stent")[int(random.choice(4, p=(0.3, 0.3, 0.3, 0.1)))]
    _, depth = patient.cavity
    height, heart = patient.lung_height, np.array(patient.heart_centre())
    shapes: list[np.ndarray] = []
    front = -patient.half_depth * 0.86
    if kind == "pacemaker":
        pocket = np.array([patient.half_width * 0.5, front, height * 0.33])
        shapes += [ellipsoid(pocket, (22, 6, 19))]
        shapes += path(
            [
                pocket,
                (0, -depth * 0.55, height * 0.42),
                (-23, -depth * 0.15, height * 0.25),
                (-20, -depth * 0.3, -height * 0.1),
                heart + np.array([4.0, -8.0, -18.0]),
            ],
            1.6,
        )
    elif kind == "sternotomy":
        for level in np.linspace(height * 0.27, -height * 0.12, 6):
            ring = [(10 * np.cos(a), -depth - 8 + 9 * np.sin(a), level) for a in np.linspace(0, 2 * np.pi, 9)]
            shapes += path(ring, 1.1)
    elif kind == "port":
        chamber = np.array([-patient.half_width * 0.48, front, height * 0.3])
        shapes += [ellipsoid(chamber, (12, 7, 12))]
        shapes += path(
            [
                chamber,
                (-30, -depth * 0.5, height * 0.42),
                (-24, -depth * 0.16, height * 0.3),
                (-22, -depth * 0.14, -height * 0.04),
            ],
            1.5,
        )
    else:
        a, b = np.array(descending_aorta(patient)[1]), np.array(descending_aorta(patient)[2])
        for t in np.linspace(0.1, 0.5, 8):
            ring = [
                a + (b - a) * t + patient.aorta * 0.8 * np.array([np.cos(c), np.sin(c), 0])
                for c in np.linspace(0, 2 * np.pi, 11)
            ]
            shapes += path(ring, 1.0)
    canvas.draw(shapes, METAL, finding=bit("Medical material"))
    return Detail("Medical material", kind=kind)


def distractors(canvas: Canvas, patient: Patient, random: np.random.Generator) -> None:
    """Harmless structures: electrodes on the skin, bowel gas, small nodes, calcified cartilage, spurs."""
    width, depth = patient.cavity
    height = patient.lung_height
    if random.random() < 0.5:
        # Electrodes and their leads lie on the skin: metal, but not in the patient.
        for _ in range(int(random.integers(2, 6))):
            x, z = random.uniform(-0.7, 0.7) * patient.half_width, random.uniform(-0.4, 0.45) * height
            front = -patient.half_depth * (1 - (abs(x) / patient.half_width) ** 2.5) ** 0.4 - 3
            canvas.draw([ellipsoid((x, front, z), (random.uniform(4, 9), 3, random.uniform(4, 9)))], METAL)
            canvas.draw([tube((x, front, z), (x + random.uniform(-40, 40), front - 6, z + 60), 1.3)], METAL)
    for _ in range(int(random.integers(0, 5))):
        # Gas in stomach and colon under the left dome.
        at = (
            random.uniform(0.15, 0.7) * width,
            random.uniform(-0.6, 0.3) * depth,
            -height * 0.5 - random.uniform(0, 30),
        )
        canvas.draw([ellipsoid(at, random.uniform(8, 26, size=3))], -960.0)
    nodes = [
        ball(
            (random.uniform(-25, 25), random.uniform(-30, 10), random.uniform(-0.1, 0.3) * height),
            random.uniform(1.8, 3.4),
        )
        for _ in range(5)
    ]
    canvas.draw(nodes, 40.0)
    if random.random() < 0.4:
        sides = [
            ball((s * random.uniform(18, 30), -depth - 4, random.uniform(-0.2, 0.2) * height), 2.4) for s in (-1, 1)
        ]
        canvas.draw(sides, 350.0)
    if random.random() < 0.25:
        spine = ball((random.uniform(-14, 14), depth - 2, random.uniform(-0.3, 0.3) * height), random.uniform(2, 4))
        canvas.draw([spine], 450.0)


def _mark(canvas: Canvas, shape: np.ndarray, finding: int) -> None:
    z, y, x = canvas.grid.axes
    (cx, cy, cz), (rx, ry, rz) = shape[1:4], shape[4:7]
    inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1
    canvas.findings[inside] |= np.uint32(1 << finding)
