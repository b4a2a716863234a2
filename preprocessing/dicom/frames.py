"""Split multi-frame files into one image per frame (PS3.3, C.7.6.16), with the attributes from their functional
groups."""

from __future__ import annotations

from functools import cache

from ctclip.preprocessing.dicom.elements import Encoding, Parsed, elements, items
from ctclip.preprocessing.dicom.headers import FUNCTIONAL_GROUPS, Header, Image, converted

MOST_FRAMES = 20000
# Functional group: keyword inside it, and the keyword of a single-frame image that means the same.
GROUPS = {
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing", "SliceThickness": "SliceThickness"},
    "PixelValueTransformationSequence": {
        "RescaleSlope": "RescaleSlope", "RescaleIntercept": "RescaleIntercept", "RescaleType": "RescaleType",
    },
    "FrameContentSequence": {
        "FrameAcquisitionNumber": "AcquisitionNumber", "TemporalPositionIndex": "TemporalPositionIndex",
    },
    "CTImageFrameTypeSequence": {"FrameType": "ImageType"},
    "CTReconstructionSequence": {"ConvolutionKernel": "ConvolutionKernel"},
}  # fmt: skip


def expanded(image: Image, parsed: Parsed) -> list[Image]:
    """The frames of a multi-frame image as separate images, or the image itself.

    Frames of a file without per-frame functional groups have no position in the patient.
    """
    count = _count(image)
    if count == 1 and not parsed.sequences:
        return [image]
    count = min(count, MOST_FRAMES)
    shared, each = (parsed.sequences.get(tag, b"") for tag in FUNCTIONAL_GROUPS)
    common = next((_values(item, parsed.encoding) for item in items(shared, parsed.encoding)), {})
    single = [_values(item, parsed.encoding) for item in items(each, parsed.encoding)]
    frames = []
    offset = int(image.header.get("ConcatenationFrameOffsetNumber", 0) or 0)
    for number in range(count):
        header = Header(image.header)
        if number >= len(single):
            header.pop("ImagePositionPatient", None)
        own = single[number] if number < len(single) else {}
        header.update({**common, **own})
        if count > 1:
            header["InstanceNumber"] = offset + number + 1
        frames.append(Image(image.path, header, image.syntax, image.little, image.pixels, frame=number, frames=count))
    return frames


def _count(image: Image) -> int:
    try:
        return max(1, int(image.header.get("NumberOfFrames", 1) or 1))
    except (TypeError, ValueError):
        return 1


def _values(item: bytes, encoding: Encoding) -> dict[str, object]:
    """Values of one item of functional groups, by the keyword of a single-frame image."""
    known: dict[str, object] = {}
    for element in elements(item, 0, encoding):
        group = _tags().get(element.tag)
        if group is None:
            continue
        first = next(items(item[element.start :][: element.length], encoding), b"")
        raw = {
            inner.tag: (inner.vr, first[inner.start : inner.start + inner.length])
            for inner in elements(first, 0, encoding)
        }
        known |= {group[word]: value for word, value in converted(raw, encoding).items() if word in group}
    return known


@cache
def _tags() -> dict[int, dict[str, str]]:
    from pydicom.datadict import tag_for_keyword

    return {int(tag_for_keyword(sequence) or 0): words for sequence, words in GROUPS.items()}
