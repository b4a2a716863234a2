"""The source images that derived DICOM objects refer to, with the attributes they copy."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctclip.errors import ExplanationError
from ctclip.preprocessing.pipeline import Prepared

if TYPE_CHECKING:
    from pydicom import Dataset

UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
# Attributes of patient and study. Missing and invalid values are written as empty.
REPEATED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    "ReferringPhysicianName",
)  # fmt: skip
QUOTING = ("pydicom", "highdicom", "dicomweb_client")
OPTIONAL = ("PatientAge", "StudyDescription", "PositionReferenceIndicator", "LossyImageCompression")


def source_images(prepared: Prepared) -> list[Dataset]:
    """The slices of the series that a scan was read from, as data sets without pixels, in the order of ``file_grid``.
    Each frame of a multi-frame image is represented by a temporary single-frame image; see ``refer_to_frames``. Raises
    ExplanationError if the scan is not a DICOM series, or its images cannot be referred to."""
    # The message does not name the folder of an upload.
    name = Path(prepared.scan.source).name
    if not prepared.headers:
        raise ExplanationError(
            f"{name}: not a DICOM series, which DICOM output needs to refer to; give a DICOM folder, or an archive of "
            f"one"
        )
    with quiet():
        return [_image(header, name) for header in prepared.headers]


def plane(image: Dataset) -> np.ndarray:
    """The affine (4, 4) of an image from [slice, row, column], with slice 0, to LPS+ mm."""
    turn, spacing = np.array(image.ImageOrientationPatient, float), np.array(image.PixelSpacing, float)
    affine = np.eye(4)
    affine[:3, 0] = np.cross(turn[:3], turn[3:])
    affine[:3, 1], affine[:3, 2] = turn[3:] * spacing[0], turn[:3] * spacing[1]
    affine[:3, 3] = np.array(image.ImagePositionPatient, float)
    return affine


def instances(images: Sequence[Dataset]) -> list[Dataset]:
    """One data set for each SOP instance that contains the slices."""
    distinct = {}
    for image in images:
        if image.instance not in distinct:
            whole = copy.copy(image)
            whole.SOPClassUID, whole.SOPInstanceUID = image.instance
            distinct[image.instance] = whole
    return list(distinct.values())


def refer_to_frames(derived: Dataset, images: Sequence[Dataset]) -> None:
    """Replace references to the temporary single-frame images by references to frames of the multi-frame image. The
    detour is needed because highdicom reads the planes of a multi-frame image from its functional groups, which our
    reader does not keep."""
    frames = {image.SOPInstanceUID: image for image in images if image.frame}
    if not frames:
        return

    def refer(item: Dataset, element: Any) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value in frames:
            image = frames[element.value]
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.instance
            item.ReferencedFrameNumber = image.frame

    for group in derived.PerFrameFunctionalGroupsSequence:
        group.walk(refer)
    # List each instance once, without frame numbers.
    for holder, keyword in (
        (derived, "SourceImageSequence"),
        (derived.ReferencedSeriesSequence[0], "ReferencedInstanceSequence"),
    ):
        listed = {}
        for item in holder[keyword].value:
            known = frames.get(item.ReferencedSOPInstanceUID)
            if known is not None:
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = known.instance
            listed[item.ReferencedSOPInstanceUID] = item
        setattr(holder, keyword, list(listed.values()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log messages and warnings of the DICOM libraries, because they quote header values."""
    loggers = [logging.getLogger(name) for name in QUOTING]
    before = [logger.disabled for logger in loggers]
    children = [
        child for name, child in logging.root.manager.loggerDict.items()
        if isinstance(child, logging.Logger) and name.startswith(tuple(f"{one}." for one in QUOTING)) and not child.disabled
    ]  # fmt: skip
    try:
        for logger in [*loggers, *children]:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
        for child in children:
            child.disabled = False


def _image(header: dict[str, Any], source: str) -> Dataset:
    from pydicom import Dataset
    from pydicom.uid import CTImageStorage, generate_uid

    image = Dataset()
    for keyword in UIDS:
        value = _valid(keyword, header.get(keyword))
        if not value:
            raise ExplanationError(
                f"{source}: its images have no valid {keyword}, which DICOM output needs to refer to them; export the "
                f"series again"
            )
        setattr(image, keyword, value)
    for keyword in REPEATED:
        setattr(image, keyword, _valid(keyword, header.get(keyword)))
    if image.PatientSex not in ("M", "F", "O"):
        image.PatientSex = ""
    for keyword in OPTIONAL:
        if value := _valid(keyword, header.get(keyword)):
            setattr(image, keyword, value)
    # The reader has decoded all text.
    image.SpecificCharacterSet, image.Modality = "ISO_IR 192", "CT"
    image.Rows, image.Columns = int(header["Rows"]), int(header["Columns"])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        setattr(image, keyword, [float(value) for value in header[keyword]])
    with contextlib.suppress(TypeError, ValueError):
        image.SliceThickness = abs(float(header.get("SliceThickness") or ""))
    image.frame = header.get("frame")
    image.instance = (image.SOPClassUID, image.SOPInstanceUID)
    if image.frame:
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid(prefix=None)
    return image


def _valid(keyword: str, value: Any) -> Any:
    """A header value as text, or "" if it is missing or DICOM does not allow it, which is common in careless
    exports."""
    from pydicom.config import RAISE
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import validate_value

    if value is None or isinstance(value, bytes):
        return ""
    text = str(value).strip("\0 ")
    if not text.isprintable():
        return ""
    try:
        validate_value(dictionary_VR(keyword), text, RAISE)
    except Exception:  # pydicom raises many kinds of error
        return ""
    return text
