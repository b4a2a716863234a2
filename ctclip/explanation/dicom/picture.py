"""The image of one finding (three slices through the peak, overlaid with the map) as a DICOM Secondary Capture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ctclip.explanation.dicom.words import RESEARCH, equipment

if TYPE_CHECKING:
    from highdicom.sc import SCImage
    from pydicom import Dataset

    from ctclip.explanation.explain import Explanation


def capture(explanation: Explanation, image: Dataset, picture: np.ndarray, number: int, series: str) -> SCImage:
    """The Secondary Capture of a ``picture`` (uint8, [row, column, RGB]) in the study of ``image``."""
    from highdicom import UID
    from highdicom.sc import SCImage
    from pydicom.uid import ExplicitVRLittleEndian

    secondary_capture: Any = SCImage.from_ref_dataset(
        image, picture, "RGB", 8, "PATIENT", series, 9003, UID(), number, patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian, series_description=f"{RESEARCH}: ctclip pictures",
        **equipment(explanation),
    )  # fmt: skip
    # The image holds three planes, so it has no single orientation; letters at the edges give the orientation of each.
    # It has no burned-in patient name.
    secondary_capture.PatientOrientation, secondary_capture.BurnedInAnnotation = None, "NO"
    return secondary_capture
