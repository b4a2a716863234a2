"""Write the DICOM objects of one explanation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctclip.errors import ExplanationError
from ctclip.explanation.dicom.source import quiet, source_images
from ctclip.preprocessing.dicom.headers import read_header
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_folder

if TYPE_CHECKING:
    from ctclip.explanation.explain import Explanation

FOLDER = "dicom"
# The files contain the patient's name.
PRIVATE = 0o600
NAMES = re.compile(r"(segmentation|report|picture-\d{2,})\.dcm")
# Temporary files of a killed command.
LEFT = re.compile(rf"\.{NAMES.pattern}\.[a-z0-9_]{{8}}\.partial\.dcm")


def holds_only_ours(folder: Path) -> bool:
    """Whether every file in a folder is a DICOM object that ``save_dicom`` wrote, or its temporary file."""
    return all(_is_ours(path) for path in folder.iterdir())


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if LEFT.fullmatch(path.name):
        return True
    header = read_header(path, ["Manufacturer"]) if NAMES.fullmatch(path.name) else None
    return header is not None and header.get("Manufacturer") == "ctclip"


def save_dicom(explanation: Explanation, folder: str | Path, *, pictures: bool = True) -> list[Path]:
    """Write ``segmentation.dcm`` (if any region was found), ``report.dcm`` and, if ``pictures``, ``picture-NN.dcm``
    into ``folder``, readable only by the owner, because they contain the patient and study of the source series.
    Objects of an earlier explanation are replaced. Returns the paths.

    The scan must have been prepared with ``headers``. Raises PreprocessingError for a folder that holds other files,
    and ExplanationError with one line that quotes no header value.
    """
    folder = Path(folder)
    check_folder(folder, holds_only_ours, "DICOM objects of an explanation alone")
    images = source_images(explanation.prepared)
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.iterdir()):
        old.unlink()
    paths = []
    with quiet():
        try:
            for name, derived in list(_objects(explanation, images, pictures)):
                paths.append(folder / name)
                with written_beside(paths[-1], suffix=".dcm", mode=PRIVATE) as partial:
                    derived.save_as(partial, enforce_file_format=True)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            # The libraries' messages may quote the header.
            raise ExplanationError(
                f"{explanation.scan}: no DICOM objects can be created from this series ({type(error).__name__}); "
                f"please report "
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
