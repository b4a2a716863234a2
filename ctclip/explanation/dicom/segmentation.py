"""The mask of an explanation as a DICOM Segmentation (PS3.3, A.51), with one binary segment per finding, on the planes
of the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ctclip.explanation.dicom.source import plane, refer_to_frames
from ctclip.explanation.dicom.words import RESEARCH, algorithm, code, equipment, plain
from ctclip.preprocessing.volume import FileGrid

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from pydicom import Dataset

    from ctclip.explanation.explain import Explanation

SAME_PLACE_MM = 0.01


def mask_on(explanation: Explanation, images: Sequence[Dataset]) -> np.ndarray:
    """uint8 [image, row, column]: the label of each pixel of the source images, from ``Explanation.mask`` on the file's
    grid. If the reader has resampled that grid (tilted gantry, uneven gaps), the mask is sampled in the plane of each
    image."""
    grid, planes = explanation.prepared.file_grid, [plane(image) for image in images]
    shape = (int(images[0].Rows), int(images[0].Columns))
    if grid.shape == (len(images), *shape) and all(
        _same(grid.affine @ _step(index), affine, shape) for index, affine in enumerate(planes)
    ):
        return explanation.mask()[0]
    return np.concatenate([explanation.mask(FileGrid((1, *shape), affine))[0] for affine in planes])


def segmentation(explanation: Explanation, images: Sequence[Dataset], mask: np.ndarray) -> Segmentation:
    """The Segmentation of ``mask``; label k is the k-th finding of the explanation, counted from 1."""
    from highdicom import UID, AlgorithmIdentificationSequence
    from highdicom.content import PlanePositionSequence
    from highdicom.enum import CoordinateSystemNames
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    name, version = algorithm(explanation)
    made_by = AlgorithmIdentificationSequence(name, codes.cid7162.ArtificialIntelligence, version)
    segments = [
        SegmentDescription(
            number, plain(finding) or f"finding {number}", codes.cid7150.MorphologicallyAbnormalStructure, code(finding),
            "AUTOMATIC", made_by, tracking_uid=UID(), tracking_id=plain(finding),
        )
        for number, finding in enumerate(explanation.places, start=1)
    ]  # fmt: skip
    derived = Segmentation(
        source_images=images, pixel_array=mask, segmentation_type="BINARY", segment_descriptions=segments,
        plane_positions=[PlanePositionSequence(CoordinateSystemNames.PATIENT, i.ImagePositionPatient) for i in images],
        series_instance_uid=UID(), series_number=9001, sop_instance_uid=UID(), instance_number=1,
        series_description=f"{RESEARCH}: ctclip regions", content_label="RESEARCH",
        content_description=f"{RESEARCH}: regions that moved a score", **equipment(explanation),
    )  # fmt: skip
    refer_to_frames(derived, images)
    return derived


def _step(index: int) -> np.ndarray:
    """The translation (4, 4) to the ``index``-th slice of a grid."""
    matrix = np.eye(4)
    matrix[0, 3] = index
    return matrix


def _same(one: np.ndarray, other: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether the corners of two planes coincide."""
    corners = np.array([[0, row, column, 1] for row in (0, shape[0] - 1) for column in (0, shape[1] - 1)]).T
    return bool(np.abs((one - other) @ corners).max() < SAME_PLACE_MM)
