"""The findings of an explanation as a DICOM Structured Report of TID 1500 (PS3.16), unverified and preliminary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctclip.explanation.dicom.source import instances, plane
from ctclip.explanation.dicom.words import RESEARCH, SCHEME, algorithm, code, equipment, plain

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from highdicom.sr import ComprehensiveSR
    from pydicom import Dataset

    from ctclip.explanation.explain import Explanation

NOTE = (
    f"{RESEARCH}. Made by software, seen by no physician. Probability is that of the model; one without a Threshold Value "
    f"is not calibrated. A segment shows what moved the model's score, which need not be the finding."
)


def report(
    explanation: Explanation, images: Sequence[Dataset], regions: Segmentation | None, mask: np.ndarray | None
) -> ComprehensiveSR:
    """The report: a group for each finding that the head scores, located ones first, with their segment of ``mask``."""
    import highdicom as hd
    from highdicom import sr
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    name, version = algorithm(explanation)
    # The same model has the same UID of a device in every report.
    device = generate_uid(prefix=None, entropy_srcs=[explanation.model, version])
    observer = sr.ObserverContext(
        codes.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(device, name, manufacturer_name="ctclip", model_name=name, serial_number=explanation.model),
    )  # fmt: skip
    ordered = dict.fromkeys([*explanation.places, *explanation.probabilities])
    groups = [_group(explanation, finding, images, regions, mask) for finding in ordered]
    content = sr.MeasurementReport(
        sr.ObservationContext(observer_device_context=observer), codes.cid100.CTUnspecifiedBodyRegion, groups,
        title=codes.DCM.ImagingMeasurementReport,
    )  # fmt: skip
    content[0].ContentSequence.append(sr.TextContentItem(codes.DCM.Comment, NOTE, sr.RelationshipTypeValues.CONTAINS))
    scheme = CodingSchemeIdentificationItem(
        SCHEME, name="Names of findings of ctclip", responsible_organization="ctclip"
    )
    made_by = equipment(explanation)
    return sr.ComprehensiveSR(
        evidence=[*instances(images), *([regions] if regions is not None else [])], content=content[0],
        series_instance_uid=hd.UID(), series_number=9002, sop_instance_uid=hd.UID(), instance_number=1, is_complete=True,
        series_description=f"{RESEARCH}: ctclip findings", coding_schemes=[scheme], **made_by,
    )  # fmt: skip


def _group(
    explanation: Explanation,
    finding: str,
    images: Sequence[Dataset],
    regions: Segmentation | None,
    mask: np.ndarray | None,
) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    percent = codes.UCUM.Percent
    measured = [sr.Measurement(codes.DCM.Probability, round(100 * explanation.probabilities[finding], 2), percent)]
    if (threshold := explanation.thresholds.get(finding)) is not None:
        measured.append(sr.Measurement(codes.DCM.ThresholdValue, round(100 * threshold, 2), percent))
    name, version = algorithm(explanation)
    common: dict[str, Any] = {
        "finding_type": code(finding),
        "algorithm_id": sr.AlgorithmIdentification(name, version, [f"method {explanation.method}"]),
        "tracking_identifier": sr.TrackingIdentifier(_uid(), plain(finding) or "finding"),
        "measurements": measured,
    }  # fmt: skip
    label = list(explanation.places).index(finding) + 1 if finding in explanation.places else 0
    if regions is None or mask is None or not label or not (count := int((mask == label).sum())):
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    measured.append(sr.Measurement(codes.SCT.Volume, round(count * _voxel_ml(images), 2), sr.CodedConcept("mL", "UCUM", "mL")))  # fmt: skip
    place = explanation.places[finding]
    side = {"left": codes.SCT.Left, "right": codes.SCT.Right, "midline": codes.SCT.Midline}.get(place.side)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            regions.SOPClassUID,
            regions.SOPInstanceUID,
            label,
            source_series=sr.SourceSeriesForSegmentation(images[0].SeriesInstanceUID),
        ),
        finding_sites=[sr.FindingSite(codes.SCT.Chest, side)] if side is not None else None,
        **common,
    )


def _voxel_ml(images: Sequence[Dataset]) -> float:
    first, last = plane(images[0]), plane(images[-1])
    apart = abs(float((last[:3, 3] - first[:3, 3]) @ first[:3, 0])) / max(1, len(images) - 1)
    return apart * float(images[0].PixelSpacing[0]) * float(images[0].PixelSpacing[1]) / 1000


def _uid() -> str:
    from highdicom import UID

    return UID()
