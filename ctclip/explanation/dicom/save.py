"""Writing the DICOM objects of one explanation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctclip.errors import ExplanationError
from ctclip.explanation.dicom.source import quiet, source_images
from ctclip.preprocessing.files import written_beside

if TYPE_CHECKING:
    from ctclip.explanation.explain import Explanation

FOLDER = "dicom"
# They name the patient.
PRIVATE = 0o600


def save_dicom(explanation: Explanation, folder: str | Path, *, pictures: bool = True) -> list[Path]:
    """Write ``segmentation.dcm`` (if any region was found), ``report.dcm`` and, if ``pictures``, ``picture-NN.dcm`` into
    ``folder``, readable by their owner alone: they repeat the patient and study of the source series. Returns the paths.

    The scan must have been prepared with ``headers``. Raises ExplanationError in one line, in which no value of a header
    stands.
    """
    folder = Path(folder)
    images = source_images(explanation.prepared)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.dcm"):
        old.unlink()
    paths = []
    with quiet():
        try:
            for name, derived in list(_objects(explanation, images, pictures)):
                paths.append(folder / name)
                with written_beside(paths[-1], suffix=".dcm", mode=PRIVATE) as partial:
                    derived.save_as(partial, enforce_file_format=True)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            # What the libraries say may quote the header.
            raise ExplanationError(
                f"{explanation.scan}: no DICOM objects can be made of this series ({type(error).__name__}); please report "
                f"this as a fault"
            ) from error
    return paths


def _objects(explanation: Explanation, images: list[Any], pictures: bool) -> Iterator[tuple[str, Any]]:
    from highdicom import UID

    from ctclip.explanation.dicom.picture import capture
    from ctclip.explanation.dicom.report import report
    from ctclip.explanation.dicom.segmentation import mask_on, segmentation
    from ctclip.explanation.picture import rendered

    mask = mask_on(explanation, images) if explanation.places else None
    regions = segmentation(explanation, images, mask) if mask is not None and mask.any() else None
    if regions is not None:
        yield "segmentation.dcm", regions
    yield "report.dcm", report(explanation, images, regions, mask)
    series = UID()
    for number, place in enumerate(explanation.places.values() if pictures else (), start=1):
        yield f"picture-{number:02d}.dcm", capture(explanation, images[0], rendered(place), number, series)
