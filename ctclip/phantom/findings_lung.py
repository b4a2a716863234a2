"""Abnormalities of lung and pleura, drawn as they look on CT. Each function returns the details that a radiologist
would report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctclip.phantom.anatomy import branches
from ctclip.phantom.canvas import ADD, IN_LUNG, Canvas, ball, ellipsoid, tube
from ctclip.phantom.patient import LOBES, SIDES, Patient, lung_point
from ctclip.phantom.prevalence import FINDINGS

SEVERITIES = ("mild", "moderate", "severe")


@dataclass(frozen=True)
class Detail:
    """The details of a finding for a report; empty strings and zeros for details that do not apply."""

    finding: str
    side: str = ""
    lobe: str = ""
    size_mm: float = 0.0
    severity: str = ""
    count: int = 0
    kind: str = ""


def bit(name: str) -> int:
    """The bit of a finding in the masks: its index in the published order."""
    return FINDINGS.index(name)


def draw_severity(random: np.random.Generator) -> tuple[str, float]:
    """A severity and its factor."""
    index = int(random.choice(3, p=(0.35, 0.4, 0.25)))
    return SEVERITIES[index], (0.6, 1.0, 1.6)[index] * float(random.uniform(0.9, 1.1))


def _place(random: np.random.Generator, lobes: tuple[str, ...] = ()) -> tuple[str, str]:
    side = SIDES[int(random.integers(2))]
    choices = [lobe for lobe in LOBES[side] if not lobes or lobe in lobes]
    return side, choices[int(random.integers(len(choices)))]


def emphysema(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Centrilobular: clusters of near-air holes without walls, upper lobes first."""
    severity, factor = draw_severity(random)
    shapes = []
    for side in SIDES:
        for lobe, share in (("upper", 0.75), ("lower", 0.25)):
            for _ in range(int(110 * factor * share)):
                shapes.append(ball(lung_point(patient, side, lobe, random), float(random.uniform(3.0, 8.5))))
    canvas.draw(shapes, -975.0, within=IN_LUNG, softness=0.5, finding=bit("Emphysema"))
    return Detail("Emphysema", "both", "upper", severity=severity)


def atelectasis(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Plates and bands of collapsed lung near the bases, some with a wedge against the pleura."""
    severity, factor = draw_severity(random)
    side, lobe = _place(random, ("lower", "middle"))
    both = random.random() < 0.35
    shapes, values = [], []
    for where in SIDES if both else (side,):
        for _ in range(1 + int(random.integers(1, 3) * factor)):
            x, y, z = lung_point(patient, where, "lower" if both else lobe, random)
            z = max(z, -patient.lung_height * 0.34)
            shapes.append(
                ellipsoid((x, y, z), (random.uniform(18, 34), random.uniform(14, 26), random.uniform(2.2, 4.5)))
            )
            values.append(random.uniform(-20, 50))
        if random.random() < 0.4 * factor:
            x, y, z = lung_point(patient, where, "lower", random, peripheral=True)
            shapes.append(ellipsoid((x, y, z), (random.uniform(10, 17), random.uniform(10, 17), random.uniform(5, 8))))
            values.append(40.0)
    canvas.draw(shapes, values, within=IN_LUNG, softness=0.5, finding=bit("Atelectasis"))
    return Detail("Atelectasis", "both" if both else side, "lower" if both else lobe, severity=severity)


def lung_nodule(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """One to five nodules of 5 to 26 mm, solid or part-solid, some lobulated."""
    count = int(random.choice([1, 1, 1, 2, 3, 5]))
    side, lobe = _place(random)
    solid = random.random() < 0.8
    largest = 0.0
    for index in range(count):
        where = (side, lobe) if index == 0 else _place(random)
        radius = float(np.clip(random.lognormal(1.65, 0.42), 2.6, 13.0))
        radius = radius if index == 0 else radius * 0.8
        largest = max(largest, 2 * radius)
        centre = lung_point(patient, *where, random)
        shapes = [ball(centre, radius)]
        shapes += [ball(centre + random.normal(0, 0.55, size=3) * radius, radius * 0.5) for _ in range(3)]
        canvas.draw(shapes, 40.0 if solid else -350.0, within=IN_LUNG, finding=bit("Lung nodule"))
    return Detail("Lung nodule", side, lobe, round(largest), count=count, kind="solid" if solid else "subsolid")


def lung_opacity(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Ground glass: hazy patches through which vessels still show."""
    severity, factor = draw_severity(random)
    side, lobe = _place(random)
    both = random.random() < 0.5
    shapes = []
    for where in SIDES if both else (side,):
        for _ in range(int(np.ceil(3.2 * factor))):
            zone = lobe if lobe in LOBES[where] else "lower"
            centre = lung_point(patient, where, zone, random, peripheral=bool(random.random() < 0.6))
            shapes.append(ellipsoid(centre, random.uniform(11, 26, size=3)))
            for _ in range(2):
                shapes.append(ellipsoid(centre + random.normal(0, 12, size=3), random.uniform(6, 15, size=3)))
    added = random.uniform(110, 230, size=len(shapes))
    canvas.draw(shapes, added, within=IN_LUNG, how=ADD, softness=3.0, finding=bit("Lung opacity"))
    return Detail("Lung opacity", "both" if both else side, lobe, severity=severity)


def fibrotic_sequela(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Irregular bands and strands, mostly apical, drawn to the pleura, with small calcified spots."""
    severity, factor = draw_severity(random)
    side, lobe = _place(random, ("upper",) if random.random() < 0.7 else ("lower", "middle"))
    both = random.random() < 0.4
    shapes, spots = [], []
    for where in SIDES if both else (side,):
        zone = lobe if lobe in LOBES[where] else "lower"
        knot = lung_point(patient, where, zone, random, peripheral=True)
        for _ in range(int(4 + 6 * factor)):
            heading = random.normal(0, 1, size=3)
            heading /= np.linalg.norm(heading)
            bend = knot + heading * random.uniform(8, 18)
            end = bend + (heading + random.normal(0, 0.4, size=3)) * random.uniform(8, 20)
            thick = float(random.uniform(1.0, 2.3))
            shapes += [tube(knot, bend, thick * 1.3, thick), tube(bend, end, thick, 0.6)]
        shapes.append(ellipsoid(knot, random.uniform(4, 9, size=3) * factor**0.5))
        if random.random() < 0.35:
            spots.append(ball(knot, float(random.uniform(1.2, 2.2))))
    canvas.draw(shapes, 0.0, within=IN_LUNG, finding=bit("Pulmonary fibrotic sequela"))
    canvas.draw(spots, 400.0, finding=bit("Pulmonary fibrotic sequela"))
    return Detail("Pulmonary fibrotic sequela", "both" if both else side, lobe, severity=severity)


def pleural_effusion(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Dependent fluid, behind and below, with a meniscus that climbs along the wall."""
    severity, factor = draw_severity(random)
    side = (*SIDES, "both")[int(random.choice(3, p=(0.3, 0.25, 0.45)))]
    z, y, x = canvas.grid.axes
    edge = sum(canvas.grid.spacing) / 3
    for where in SIDES if side == "both" else (side,):
        (cx, cy, cz), (rx, ry, rz) = patient.lung_centre(where), patient.lung_radii(where)
        depth = (14.0 + 26.0 * factor) * float(random.uniform(0.85, 1.15))
        climb = 0.30 * (z - (cz - rz * 0.55))
        meniscus = 10.0 * ((x - cx) / rx) ** 2
        level = cy + ry - depth + np.clip(climb, -12, 400) - meniscus
        near = (np.sign(x) == np.sign(cx)) * np.clip(0.5 + (y - level) / edge, 0, 1)
        canvas.pour(near, float(random.uniform(2, 16)), bit("Pleural effusion"))
        # Lung above the fluid is compressed.
        canvas.draw(
            [ellipsoid((cx, cy + ry - depth - 4, cz - rz * 0.5), (rx * 0.5, 8, 26))],
            180.0,
            within=IN_LUNG,
            how=ADD,
            softness=4.0,
        )
    return Detail("Pleural effusion", side, severity=severity)


def mosaic_attenuation(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """A patchwork of lobules of unequal density with sharp borders, in both lungs."""
    severity, factor = draw_severity(random)
    shapes, values = [], []
    for side in SIDES:
        for lobe in LOBES[side]:
            for _ in range(22):
                shapes.append(ellipsoid(lung_point(patient, side, lobe, random), random.uniform(9, 19, size=3)))
                values.append(float(random.choice([-1.0, 1.2])) * 62 * factor**0.6)
    canvas.draw(shapes, values, within=IN_LUNG, how=ADD, finding=bit("Mosaic attenuation pattern"))
    return Detail("Mosaic attenuation pattern", "both", severity=severity)


def peribronchial_thickening(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Thick walls around bronchi of normal calibre, from the hila outwards."""
    severity, factor = draw_severity(random)
    walls, lumens = [], []
    for side in SIDES:
        for start, end, generation in branches(patient, side, random, 3, 40.0):
            lumen = 3.0 * 0.75**generation
            walls.append(tube(start, end, lumen + 2.2 + 1.3 * factor, lumen + 1.4 + factor))
            lumens.append(tube(start, end, lumen, lumen * 0.8))
    canvas.draw(walls, 10.0, within=IN_LUNG, finding=bit("Peribronchial thickening"))
    canvas.draw(lumens, -960.0)
    return Detail("Peribronchial thickening", "both", severity=severity)


def consolidation(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Airspace filled to soft-tissue density, bronchi still holding air."""
    severity, factor = draw_severity(random)
    side, lobe = _place(random)
    centre = lung_point(patient, side, lobe, random, peripheral=True)
    radius = 15.0 * factor**0.6
    shapes = [ellipsoid(centre, radius * random.uniform(0.8, 1.25, size=3))]
    shapes += [
        ellipsoid(centre + random.normal(0, 0.6, size=3) * radius, radius * random.uniform(0.35, 0.7, size=3))
        for _ in range(6)
    ]
    canvas.draw(shapes, 220.0, within=IN_LUNG, how=ADD, softness=4.0)
    canvas.draw(shapes, float(random.uniform(15, 45)), within=IN_LUNG, softness=1.0, finding=bit("Consolidation"))
    bronchi = []
    for _ in range(3):
        heading = random.normal(0, 1, size=3)
        bronchi.append(tube(centre, centre + heading / np.linalg.norm(heading) * radius * 0.9, 1.8, 1.0))
    canvas.draw(bronchi, -800.0)
    return Detail("Consolidation", side, lobe, severity=severity)


def bronchiectasis(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Bronchi wider than the artery beside them, tubes and rings of air in a wall, without tapering."""
    severity, factor = draw_severity(random)
    side, lobe = _place(random, ("lower", "middle"))
    both = random.random() < 0.5
    walls, lumens = [], []
    for where in SIDES if both else (side,):
        zone = lobe if lobe in LOBES[where] else "lower"
        for _ in range(int(5 + 5 * factor)):
            start = lung_point(patient, where, zone, random)
            heading = random.normal(0, 1, size=3) * np.array([0.7, 0.7, 1.2])
            end = start + heading / np.linalg.norm(heading) * random.uniform(14, 30)
            lumen = float(random.uniform(3.2, 5.5)) * factor**0.3
            walls.append(tube(start, end, lumen + 1.9))
            lumens.append(tube(start, end, lumen))
    canvas.draw(walls, 0.0, within=IN_LUNG, finding=bit("Bronchiectasis"))
    canvas.draw(lumens, -990.0, finding=bit("Bronchiectasis"))
    return Detail("Bronchiectasis", "both" if both else side, lobe, severity=severity)


def septal_thickening(canvas: Canvas, patient: Patient, random: np.random.Generator) -> Detail:
    """Thin lines that outline lobules and run to the pleura, at the bases and in the periphery."""
    severity, factor = draw_severity(random)
    shapes = []
    for side in SIDES:
        centre = np.array(patient.lung_centre(side))
        for _ in range(int(46 * factor)):
            lobe = "lower" if random.random() < 0.65 else "upper"
            point = lung_point(patient, side, lobe, random, peripheral=True)
            outward = (point - centre) / np.linalg.norm(point - centre)
            around = np.cross(outward, random.normal(0, 1, size=3))
            around /= np.linalg.norm(around) + 1e-6
            thick = float(random.uniform(1.0, 1.5))
            shapes.append(tube(point, point + outward * random.uniform(12, 22), thick))
            shapes.append(tube(point, point + (around + 0.3 * outward) * random.uniform(9, 15), thick))
    canvas.draw(shapes, -60.0, within=IN_LUNG, finding=bit("Interlobular septal thickening"))
    return Detail("Interlobular septal thickening", "both", severity=severity)
