"""What a DICOM header says of its patient, wherever a user's folder names repeat it: kept out of messages and stores.

Exports of hospital archives name folders after the patient. A volume's id, the paths in tables and the messages come
from those names, so they are compared with the header and what they share with it is replaced by ``***``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName", "ReferringPhysicianName", "PatientMotherBirthName")
NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "IssuerOfPatientID")
PLACES = ("InstitutionName", "InstitutionAddress", "PatientAddress")
TAGS = ["PatientIdentityRemoved", "SeriesInstanceUID", "PatientBirthDate", *NAMES, *NUMBERS, *PLACES]


def read_header(source: Path | BinaryIO, tags: list[str]) -> Any:
    """A pydicom header without pixels, or None if it is not one. Warnings of pydicom quote values: they are dropped."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(source, Path) and not source.is_file():
                return None
            header = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=tags)
        except Exception:
            # pydicom parses bytes of strangers, and raises whatever they make it raise.
            return None
        for part in (header, header.file_meta):
            # Values are converted when they are first asked for: here, where nobody hears what is wrong with them.
            for tag in list(part.keys()):
                with contextlib.suppress(Exception):
                    part[tag]
        return header


def is_directory_record(header: Any) -> bool:
    """Whether a header is that of a DICOMDIR, whatever its file is called."""
    return str(getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID", "")) == "1.2.840.10008.1.3.10"


def first_header(path: Path) -> Any:
    """Header of a DICOM slice: a file's own, or the first of a folder or a zip; None if there is none."""
    if path.is_dir():
        headers = (read_header(file, TAGS) for file in sorted(path.iterdir()))
        return next((header for header in headers if header is not None and not is_directory_record(header)), None)
    if path.suffix.lower() != ".zip":
        return read_header(path, TAGS)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as stream:
                    header = None if member.is_dir() else read_header(stream, TAGS)  # type: ignore[arg-type]
                if header is not None and not is_directory_record(header):
                    return header
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError):
        pass
    return None


def masked(text: str, header: Any) -> str:
    """``text`` with every identifier of ``header`` in it replaced by ``***``; headers marked de-identified have none."""
    if header is None or str(header.get("PatientIdentityRemoved", "")).strip().upper() == "YES":
        return text
    for pattern in _patterns(header):
        text = pattern.sub("***", text)
    return text


def anonymous_id(header: Any, shown: str) -> str:
    """An id that follows from the series alone: the same in every run, and no name can be read from it."""
    return "scan-" + hashlib.sha256(f"{header.get('SeriesInstanceUID', '')} {shown}".encode()).hexdigest()[:12]


def _patterns(header: Any) -> list[re.Pattern[str]]:
    found = [_date(str(header.get("PatientBirthDate", "") or ""))]
    for keywords, shortest in ((NUMBERS, 2), (NAMES, 2), (PLACES, 4)):
        for keyword in keywords:
            value = str(header.get(keyword, "") or "").strip()
            parts = [part for part in re.split(r"[\W_]+", value) if len(part) >= shortest]
            whole = re.sub(r"[\W_]+", r"[\\W_]*", value)
            found += [whole if len(parts) > 1 else "", *map(_word, parts)]
    return [re.compile(pattern, re.IGNORECASE) for pattern in found if pattern]


def _word(word: str) -> str:
    # Short words stand inside others by chance: they count where they stand alone.
    return re.escape(word) if len(word) >= 4 else rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"


def _date(date: str) -> str:
    if not re.fullmatch(r"\d{8}", date):
        return ""
    year, month, day = date[:4], date[4:6], date[6:]
    orders = ((year, month, day), (day, month, year), (month, day, year))
    return "|".join(r"[\W_]?".join(order) for order in orders)
