"""Find the DICOM series of a folder tree that are scans. A series spread over folders is one scan; copies and
localizers are not scans."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctclip.preprocessing.dicom.kinds import alteration, image_types, in_hu
from ctclip.preprocessing.identifiers import TAGS, is_directory_record, read_header
from ctclip.preprocessing.whole_numbers import whole_number

FEWEST_SLICES = 3
# Three images of a large folder are read to see whether it contains one series.
ALL_READ = 24
MORE = [
    "StudyInstanceUID",
    "SOPInstanceUID",
    "ImageType",
    "Rows",
    "NumberOfFrames",
    "Modality",
    "SeriesDescription",
    "RescaleType",
]
DUMMY_IDS = (
    "",
    "anonymous",
    "anonymized",
    "anonymised",
    "anon",
    "unknown",
    "none",
    "na",
    "n/a",
    "patient",
    "test",
    "0",
)


@dataclass
class Series:
    """One series in one folder: the ``files`` that were read (all, or a sample), and one of their headers."""

    uid: str
    header: Any
    files: list[Path] = field(default_factory=list)
    frames: int = 0
    localizers: int = 0


@dataclass
class Scan:
    """One scan: ``series`` in ``folder``; ``name_folder`` determines its name. ``headers``: one header of each series
    in its folders, that of the scan's series first."""

    folder: Path
    name_folder: Path
    headers: list[Any]
    series: str | None
    study: str
    patient: str


def dicom_scans(files: list[Path], alone: bool) -> tuple[list[Scan], set[Path], Counter[str]]:
    """The scans among files that are not volume files, the files that they use, and a count of unused images.

    ``alone``: the cohort contains nothing else. Series that cannot be scans are then kept, so that reading them gives
    the reason.
    """
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    by_folder = {folder: series for folder, members in folders.items() if (series := _series(members))}
    unused: Counter[str] = Counter()
    scans = {folder: [s for s in series if _is_scan(s)] for folder, series in by_folder.items()}
    few = _too_few(by_folder, scans)
    if alone and by_folder and not any(scans.values()):
        scans = by_folder
    owners = _owners({folder: series for folder, series in scans.items() if series}, unused)
    merged, used = [], set()
    for folder, series, places in owners:
        main = max(series, key=lambda one: _rank(one, series))
        rest = few.get(main.uid, {})
        common = Path(os.path.commonpath([*places, *rest]))
        # Reading a folder includes subfolders and links, so the series is named if these may contain more than this
        # scan.
        named = any(other not in places and common in (other, *other.parents) for other in by_folder)
        named = named or _has_links(common)
        headers = [main.header, *(one.header for one in series if one is not main)]
        merged.append(Scan(common, folder, headers, main.uid if named and main.uid else None, *_whose(main.header)))
        used |= {path for one in [*series, *rest.values()] for path in one.files}
        if others := sum(len(one.files) for one in series if one.uid != main.uid):
            unused["DICOM images of other series of a scan's folder"] += others
    for folder, series in by_folder.items():
        for one in series:
            if one not in scans[folder] and not used.issuperset(one.files):
                kind = "localizers" if one.localizers else "DICOM files that are too few for a scan"
                unused[kind] += len(one.files)
    known = used | {path for series in by_folder.values() for one in series for path in one.files}
    return merged, known, unused


def _too_few(by_folder: dict[Path, list[Series]], scans: dict[Path, list[Series]]) -> dict[str, dict[Path, Series]]:
    """By UID, the parts of a series with too few images in their folder for a scan, such as the last part of a series
    spread over folders. If all parts of a series are too small, they are added to ``scans`` if they suffice
    together."""
    few: dict[str, dict[Path, Series]] = {}
    for folder, series in by_folder.items():
        for one in series:
            if one.uid and one.frames > one.localizers and one not in scans[folder]:
                few.setdefault(one.uid, {})[folder] = one
    whole = {one.uid for series in scans.values() for one in series}
    for uid in [uid for uid in few if uid not in whole]:
        parts = few.pop(uid)
        if len(_instances(list(parts.values()))) >= FEWEST_SLICES:
            for folder, one in parts.items():
                scans[folder].append(one)
    return few


def _series(files: list[Path]) -> list[Series]:
    """The series of one folder; other files are ignored."""
    images = _images(sorted(files))
    if not images:
        return []
    every = list(images)
    probes = every if len(every) <= ALL_READ else [every[0], every[len(every) // 2], every[-1]]
    headers = {path: read_header(path, [*TAGS, *MORE]) for path in probes}
    if len(probes) < len(every) and len({_uid(header) for header in headers.values()}) > 1:
        headers = {path: read_header(path, [*TAGS, *MORE]) for path in every}
    series: dict[str, Series] = {}
    for path, header in headers.items():
        if header is None or is_directory_record(header):
            continue
        one = series.setdefault(_uid(header), Series(_uid(header), header))
        one.files.append(path)
        if "Rows" not in header:
            continue
        one.localizers += "LOCALIZER" in image_types(header)
        frames = whole_number(str(header.get("NumberOfFrames", "")))
        one.frames += 1 if frames is None else frames
    if len(headers) < len(every) and len(series) == 1:
        only = next(iter(series.values()))
        only.files, only.frames = every, max(only.frames, len(every)) if only.frames else 0
    return list(series.values())


def _images(files: list[Path]) -> dict[Path, None]:
    """Files with a DICOM preamble, or with a suffix of such a file; if none has a preamble, the files that pydicom can
    read."""
    images: dict[Path, None] = {}
    suffixes: set[str] = set()
    unmarked = []
    for path in files:
        if path.suffix.lower() in suffixes or _marked(path):
            suffixes.add(path.suffix.lower() if not path.suffix[1:].isdigit() else "")
            images[path] = None
        else:
            unmarked.append(path)
    if not images:
        # Rare files without a preamble are recognised only by reading them.
        images = {path: None for path in unmarked if read_header(path, TAGS) is not None}
    return images


def _marked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_scan(series: Series) -> bool:
    return series.frames - series.localizers >= FEWEST_SLICES


def _is_ct(series: Series) -> bool:
    kind = str(series.header.get("Modality", "CT") or "CT")
    return kind == "CT" and "LOCALIZER" not in image_types(series.header)


def _has_links(folder: Path) -> bool:
    """Whether a link to a folder lies below a folder."""
    return any(os.path.islink(os.path.join(root, name)) for root, names, _ in os.walk(folder) for name in names)


def _rank(one: Series, among: list[Series]) -> tuple[bool, int, bool, int]:
    """Rank of a series, larger is better: a CT, close to the measurement, in HU, with many images in all of its
    folders."""
    images = sum(other.frames or len(other.files) for other in among if other.uid == one.uid)
    return _is_ct(one), -alteration(one.header), in_hu(one.header), images


def _uid(header: Any) -> str:
    return "" if header is None else str(header.get("SeriesInstanceUID", "") or "")


def _owners(scans: dict[Path, list[Series]], unused: Counter[str]) -> list[tuple[Path, list[Series], list[Path]]]:
    """The first folder of each scan, its series there, and all of its folders. Folders that share a series are one
    scan; a folder whose images are also in another is a copy."""
    by_uid: dict[str, list[Path]] = {}
    for folder, series in scans.items():
        for one in series:
            if one.uid:
                by_uid.setdefault(one.uid, []).append(folder)
    shared = {folder: folders for folders in by_uid.values() if len(folders) > 1 for folder in folders}
    gathered, done = [], set()
    for folder in scans:
        if folder in done:
            continue
        group = shared.get(folder, [folder])
        group = [place for place in group if place not in done]
        if len(group) == 1:
            gathered.append((folder, scans[folder], [folder]))
            done.add(folder)
            continue
        places: list[Path] = []
        covered: set[str] = set()
        # Start with the folder with the most images; the same images in other folders are copies.
        instances = {place: _instances(scans[place]) for place in group}
        for place in sorted(group, key=lambda place: (-len(instances[place]), group.index(place))):
            if places and instances[place] <= covered:
                unused["copies of DICOM images"] += sum(len(one.files) for one in scans[place])
            else:
                places.append(place)
                covered |= instances[place]
        places.sort(key=group.index)
        gathered.append((places[0], [one for place in places for one in scans[place]], places))
        done.update(group)
    return gathered


def _instances(series: list[Series]) -> set[str]:
    """Identifiers of images: their instance UIDs, or their files if they have none."""
    headers = ((path, read_header(path, ["SOPInstanceUID"])) for one in series for path in one.files)
    return {str(header.get("SOPInstanceUID", "") or path) for path, header in headers if header is not None}


def _whose(header: Any) -> tuple[str, str]:
    """Study and patient of a header, only for comparison."""
    patient = str(header.get("PatientID", "") or "").strip().casefold()
    return str(header.get("StudyInstanceUID", "") or ""), "" if patient in DUMMY_IDS else patient
