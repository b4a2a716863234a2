"""One scan: a patient with abnormalities, its report, and its reconstructions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ctclip.phantom import anatomy, findings_chest, findings_lung
from ctclip.phantom.acquisition import Acquisition, draw_acquisition, draw_table, scan
from ctclip.phantom.canvas import Canvas
from ctclip.phantom.findings_lung import Detail
from ctclip.phantom.patient import SIDES, Patient, draw_patient
from ctclip.phantom.prevalence import FINDINGS, draw_findings
from ctclip.phantom.report import write_report

# Lung findings first, then findings that displace lung: an effusion covers the structures below it.
IN_LUNG = {
    "Emphysema": findings_lung.emphysema,
    "Mosaic attenuation pattern": findings_lung.mosaic_attenuation,
    "Lung opacity": findings_lung.lung_opacity,
    "Interlobular septal thickening": findings_lung.septal_thickening,
    "Pulmonary fibrotic sequela": findings_lung.fibrotic_sequela,
    "Peribronchial thickening": findings_lung.peribronchial_thickening,
    "Bronchiectasis": findings_lung.bronchiectasis,
    "Consolidation": findings_lung.consolidation,
    "Atelectasis": findings_lung.atelectasis,
    "Lung nodule": findings_lung.lung_nodule,
    "Pleural effusion": findings_lung.pleural_effusion,
}
IN_CHEST = {
    "Hiatal hernia": findings_chest.hiatal_hernia,
    "Lymphadenopathy": findings_chest.lymphadenopathy,
    "Arterial wall calcification": findings_chest.arterial_calcification,
    "Coronary artery wall calcification": findings_chest.coronary_calcification,
    "Medical material": findings_chest.medical_material,
}


@dataclass(frozen=True)
class Reconstruction:
    """``hu`` int16 [slice, row, column]; ``masks`` uint32, bit i for the i-th finding; how it was acquired."""

    hu: np.ndarray
    masks: np.ndarray
    acquisition: Acquisition


@dataclass(frozen=True)
class Scan:
    """One examination of a patient: all its reconstructions share one report."""

    patient: Patient
    present: frozenset[str]
    details: tuple[Detail, ...]
    report: dict[str, str]
    reconstructions: tuple[Reconstruction, ...]

    @property
    def labels(self) -> list[int]:
        return [int(name in self.present) for name in FINDINGS]


def draw_case(
    seed: int, patient_number: int, scan_number: int, rare_floor: float = 0.0
) -> tuple[Patient, frozenset[str], np.random.Generator]:
    """The patient, the abnormalities of one scan, and the generator for the rest of it. Patient and abnormalities
    are independent."""
    patient = draw_patient(np.random.default_rng([seed, patient_number]))
    # To NumPy [seed, patient] is [seed, patient, 0, 0]: a stream numbered 0 would be the patient's once more.
    random = np.random.default_rng([seed, patient_number, scan_number, 5])
    return patient, draw_findings(random, rare_floor), random


def make_scan(
    seed: int,
    patient_number: int,
    scan_number: int = 0,
    *,
    scale: float = 4.0,
    reconstructions: int = 1,
    rare_floor: float = 0.0,
    only: frozenset[str] | None = None,
) -> Scan:
    """Draw one scan. The result depends only on the three numbers, not on the machine or worker.

    ``scale`` multiplies the in-plane spacing; ``only`` sets the abnormalities instead of drawing them by their prevalence.
    """
    stream = [seed, patient_number, scan_number]
    patient, drawn, random = draw_case(seed, patient_number, scan_number, rare_floor)
    present = drawn if only is None else only
    contrast = bool(random.random() < 0.25)
    blood = float(random.uniform(150, 260)) if contrast else float(random.uniform(38, 52))
    heart_detail = None
    if "Cardiomegaly" in present:
        factor, heart_detail = findings_chest.enlarged_heart(random)
        patient = dataclasses.replace(patient, heart=patient.heart * factor)
    protocols = np.random.default_rng([*stream, 1])
    images: list[Reconstruction] = []
    details: list[Detail] = []
    for number in range(reconstructions):
        acquisition = draw_acquisition(patient, protocols, scale)
        # The same stream for each reconstruction: the same patient on another grid.
        canvas, details = _draw(patient, present, blood, acquisition, np.random.default_rng([*stream, 2]))
        noise = np.random.default_rng([*stream, 3, number])
        images.append(Reconstruction(scan(canvas, acquisition, noise), canvas.findings, acquisition))
    if heart_detail is not None:
        details.append(heart_detail)
    details.sort(key=lambda detail: FINDINGS.index(detail.finding))
    thickness = images[0].acquisition.grid.spacing[0]
    report = write_report(details, np.random.default_rng([*stream, 4]), contrast=contrast, slice_mm=thickness)
    return Scan(patient, present, tuple(details), report, tuple(images))


def _draw(
    patient: Patient,
    present: frozenset[str],
    blood: float,
    acquisition: Acquisition,
    random: np.random.Generator,
) -> tuple[Canvas, list[Detail]]:
    canvas = Canvas(acquisition.grid)
    details: list[Detail] = []
    draw_table(canvas, patient, acquisition.table_height)
    anatomy.draw_body(canvas, patient)
    anatomy.draw_lungs(canvas, patient)
    anatomy.draw_skeleton(canvas, patient, random)
    anatomy.draw_mediastinum(canvas, patient, blood)
    anatomy.draw_diaphragm(canvas, patient, {side: float(random.uniform(-8, 14)) for side in SIDES})
    if "Pericardial effusion" in present:
        details.append(findings_chest.pericardial_effusion(canvas, patient, random))
    anatomy.draw_heart(canvas, patient, blood)
    anatomy.draw_airways(canvas, patient)
    anatomy.draw_texture(canvas, patient, random)
    anatomy.draw_vessels(canvas, patient, random, blood)
    findings_chest.distractors(canvas, patient, random)
    if "Cardiomegaly" in present:
        findings_chest.mark_heart(canvas, patient)
    for draws in (IN_LUNG, IN_CHEST):
        details += [draw(canvas, patient, random) for name, draw in draws.items() if name in present]
    return canvas, details
