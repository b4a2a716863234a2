"""Keep patient identifiers from DICOM headers and folder names out of messages and stores.

Exports of hospital archives name folders after the patient. Volume ids, paths in tables, and messages contain these
names, so they are compared with the headers, and matches are replaced by ``***``, regardless of case, separators,
order, accents (composed, decomposed, written out or dropped) and script.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from ctclip.preprocessing.dicom.headers import MOST_FILES, files_below, is_directory_record, read_header
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import archive
from ctclip.preprocessing.formats.streams import DAMAGE

__all__ = [
    "TAGS",
    "Mask",
    "all_headers",
    "anonymous_id",
    "first_header",
    "is_directory_record",
    "masked",
    "read_header",
    "series_header",
]

NAMES = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord",
    "RequestingPhysician", "ConsultingPhysicianName", "OperatorsName", "ScheduledPerformingPhysicianName",
)  # fmt: skip
NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "IssuerOfPatientID", "AdmissionID")
# Short values are counts and codes, not identifiers.
CODES = (
    "StudyID", "DeviceSerialNumber", "StationName", "PatientTelephoneNumbers", "ReferringPhysicianTelephoneNumbers",
    "MedicalRecordLocator", "RequestedProcedureID", "PerformedProcedureStepID", "ScheduledProcedureStepID",
    "FillerOrderNumberImagingServiceRequest", "PlacerOrderNumberImagingServiceRequest", "DetectorID", "GantryID",
)  # fmt: skip
PLACES = (
    "InstitutionName", "InstitutionAddress", "PatientAddress", "InstitutionalDepartmentName", "CurrentPatientLocation",
)  # fmt: skip
DATES = (
    "PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate",
    "AcquisitionDateTime", "PerformedProcedureStepStartDate", "AdmittingDate",
)  # fmt: skip
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "DeviceUID")
SHORTEST = {
    **dict.fromkeys(NAMES, 2),
    **dict.fromkeys(NUMBERS, 2),
    **dict.fromkeys(CODES, 3),
    **dict.fromkeys(PLACES, 4),
}
TAGS = ["PatientIdentityRemoved", "SpecificCharacterSet", *SHORTEST, *DATES, *UIDS]
WRITTEN_OUT = {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae", "œ": "oe", "ß": "ss", "þ": "th"}
GAP = r"[\W_]*"


class Mask:
    """Masks in a text the patient identifiers of any of several headers; headers marked de-identified are ignored."""

    def __init__(self, headers: Iterable[Any]) -> None:
        self._values: dict[str, set[str]] = {}
        for header in headers:
            if header is None or str(header.get("PatientIdentityRemoved", "") or "").strip().upper() == "YES":
                continue
            for keyword in (*SHORTEST, *DATES, *UIDS):
                value = header.get(keyword, None)
                if value:
                    self._values.setdefault(keyword, set()).update(_texts(value))
        self._pattern: re.Pattern[str] | None = None

    def __call__(self, text: str) -> str:
        if not self._values:
            return text
        if self._pattern is None:
            self._pattern = re.compile("|".join(dict.fromkeys(self._patterns())) or r"(?!)")
        spans = []
        for write_out in (False,) if text.isascii() else (False, True):
            folded, places = _folded(text, write_out)
            spans += [(places[m.start()], places[m.end() - 1] + 1) for m in self._pattern.finditer(folded) if m.group()]
            for uid in self._uids():
                start = folded.find(uid)
                spans += [(places[start], places[start + len(uid) - 1] + 1)] if start >= 0 else []
        return _without(text, spans)

    def _uids(self) -> Iterator[str]:
        return (value.lower() for keyword in UIDS for value in self._values.get(keyword, ()) if len(value) > 6)

    def _patterns(self) -> Iterator[str]:
        for keyword in DATES:
            for value in self._values.get(keyword, ()):
                yield from _date(value)
        for keyword, shortest in SHORTEST.items():
            for value in self._values.get(keyword, ()):
                for folded in {_folded(value, False)[0], _folded(value, True)[0]}:
                    yield from _spellings(folded, shortest, keyword in NAMES)


def all_headers(path: Path) -> list[Any]:
    """One header of each set of identifiers among the DICOM files of a path (a file, a folder or an archive)."""
    distinct: dict[str, Any] = {}
    for header in _headers(path):
        key = str([header.get(keyword) for keyword in TAGS if keyword != "SOPInstanceUID"])
        distinct.setdefault(key, header)
    return list(distinct.values())


def first_header(path: Path) -> Any:
    """Header of a DICOM slice: a file's own, or the first of a folder or an archive; None if there is none."""
    return next(_headers(path), None)


def series_header(path: Path, uid: str | None) -> Any:
    """Header of a slice of the series ``uid`` (SeriesInstanceUID) of a path; of any series if None."""
    return next((one for one in _headers(path) if uid in (None, str(one.get("SeriesInstanceUID", "")))), None)


def masked(text: str, header: Any) -> str:
    """``text`` with every identifier of a header, or of a list of headers, replaced by ``***``."""
    return Mask(header if isinstance(header, list) else [header])(text)


def anonymous_id(header: Any, place: str) -> str:
    """An id computed from the series alone. It is the same in every run and does not reveal the name."""
    first = next(iter(header), None) if isinstance(header, list) else header
    uid = "" if first is None else first.get("SeriesInstanceUID", "")
    return "scan-" + hashlib.sha256(f"{uid} {place}".encode()).hexdigest()[:12]


def _headers(path: Path) -> Iterator[Any]:
    headers: Iterator[Any]
    if path.is_dir():
        # A series may be any number of levels below the given folder.
        headers = (read_header(file, TAGS) for file in islice(files_below(path), MOST_FILES))
    elif path.suffix.lower() == ".zip":
        headers = _zipped_headers(path)
    elif path.name.lower().endswith(archive.SUFFIXES):
        headers = _unpacked_headers(path)
    else:
        headers = (read_header(file, TAGS) for file in [path])
    return (header for header in headers if header is not None and not is_directory_record(header))


def _zipped_headers(path: Path) -> Iterator[Any]:
    try:
        with zipfile.ZipFile(path) as zipped:
            for member in zipped.infolist():
                if member.is_dir():
                    continue
                with zipped.open(member) as stream:
                    head = stream.read(512)
                    if archive.may_hold_scans(member.filename, head):
                        yield from _unpacked_headers(path)
                        return
                    stream.seek(0)
                    yield read_header(stream, TAGS)  # type: ignore[arg-type]
    except DAMAGE:
        return


def _unpacked_headers(path: Path) -> Iterator[Any]:
    """The headers in an archive that must be unpacked; none if the archive is refused as a scan."""
    with (
        contextlib.suppress(PreprocessingError),
        archive.unpacked(path, str(path), int(archive.LARGEST_GB * 1e9)) as scan,
    ):
        yield from _headers(scan)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    several = value if type(value).__name__ in ("MultiValue", "list") else [value]
    return [str(one).strip() for one in several if str(one).strip()]


def _spellings(folded: str, shortest: int, name: bool) -> Iterator[str]:
    """Patterns of a value: the whole value with any or no separators, names also in other orders, and each long
    word."""
    words = [word for word in re.split(r"[\W_]+", folded) if len(word) >= shortest]
    if len(words) > 1:
        every = [word for word in re.split(r"[\W_]+", folded) if word]
        yield GAP.join(map(re.escape, every))
        if name and len(words) <= 4:
            yield from (GAP.join(map(re.escape, pair)) for pair in permutations(words, 2) if len("".join(pair)) >= 4)
    for word in words:
        for spelling in {word, word.lstrip("0"), re.sub("([aou])e", r"\1", word) if name else word}:
            if len(spelling) >= max(shortest, 4 if spelling != word else 0):
                # Short words may occur inside others by chance, so only whole words match.
                yield re.escape(spelling) if len(spelling) >= 4 else rf"(?<![^\W_]){re.escape(spelling)}(?![^\W_])"


def _date(value: str) -> Iterator[str]:
    """Patterns of a date (YYYYMMDD, or YYYY.MM.DD as before DICOM 3, and following characters) in all common orders,
    separators and month names."""
    date = re.match(r"(\d{4})\W?(\d{2})\W?(\d{2})", value)
    if date is None or date[1] == "0000":
        return
    year, month, day = date.groups()
    short = year[2:]
    for order in ((year, month, day), (day, month, year), (month, day, year)):
        yield r"[\W_]?".join(order)
    # Without leading zeros, only between separators or a few letters (2023y3m5d), and not before further digits.
    m, d = (rf"0?{number.lstrip('0')}" for number in (month, day))
    for between, orders in (
        (r"[\W_]?", ((short, month, day), (day, month, short), (month, day, short))),
        (r"[\W_]+", ((short, m, d), (d, m, short), (m, d, short))),
        (r"(?:[\W_]+|[^\W\d]{1,5})", ((year, m, d), (d, m, year), (m, d, year))),
    ):
        yield from (rf"(?<!\d){between.join(order)}(?!\d)" for order in orders)
    # A month's name in any language, among up to three words: 5 Mar 2023, March 5th 2023, 5 de marzo de 2023, 5.III.2023.
    words = rf"{GAP}[^\W\d_]+(?:{GAP}[^\W\d_]+){{0,2}}{GAP}"
    ordinal = rf"{d}(?:st|[nr]d|th)?"
    for written in (d + words + year, year + words + d, rf"[^\W\d_]{{3,12}}{GAP}{ordinal}{GAP}{year}"):
        yield rf"(?<!\d){written}(?!\d)"
    yield rf"(?<!\d){d}{GAP}[^\W\d_]{{3,12}}{GAP}{short}(?!\d)"


def _folded(text: str, write_out: bool) -> tuple[str, list[int]]:
    """``text`` in lower case without accents, in Latin script, and the position in ``text`` of each letter;
    ``write_out``: write ä as ae."""
    if text.isascii():
        return text.lower(), list(range(len(text)))
    from anyascii import anyascii

    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        small = letter.lower()
        if unicodedata.combining(letter):
            # Decomposed: the accent follows its letter.
            small = "e" if write_out and letter == "\u0308" and letters and letters[-1] in "aou" else ""
        elif write_out and small in WRITTEN_OUT:
            small = WRITTEN_OUT[small]
        elif not small.isascii():
            small = anyascii(small).lower() or "?"
        letters += list(small)
        places += [place] * len(small)
    return "".join(letters), places


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    masked_text, at = "", 0
    for start, end in sorted(spans):
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        if start >= at:
            masked_text += text[at:start] + "***"
        at = max(at, end)
    return masked_text + text[at:]
