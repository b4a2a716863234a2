"""Choose the series to read from a folder.

All DICOM images below the folder are grouped by SeriesInstanceUID. ``--series`` selects one. Otherwise the best by the
following order is read, with a warning if there are several:

1. it has at least three CT slices at different positions (PET, localizers, screenshots and reports are excluded); 2. it
is not short (60 mm, as in bolus tracking) if another series is at least twice as long; 3. its values are those of a
plain reconstruction, not a MIP or other projection, virtual non-contrast, material map, mono-energetic, subtracted or
parameter images, by ImageType and SeriesDescription; 4. RescaleType is HU or missing; 5. it is not a reformation (MPR),
and its slices are axial; 6. it is original rather than derived; 7. it has the most positions; among equals, the last by
path.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctclip.preprocessing.dicom import groups, missing, stack
from ctclip.preprocessing.dicom.headers import STUDY, Image, damaged_files, images
from ctclip.preprocessing.dicom.kinds import ALTERED, DERIVED, REFORMATTED, alteration, altered_as, in_hu
from ctclip.preprocessing.dicom.pixels import UndecodableSlices
from ctclip.preprocessing.dicom.slices import Slice, modality, placed
from ctclip.preprocessing.errors import PreprocessingError, counted
from ctclip.preprocessing.identifiers import TAGS, Mask
from ctclip.preprocessing.volume import Volume

FEWEST = 3
SHORT_MM = 60.0


@dataclass
class Candidate:
    """A series: its images, the slices of its best acquisition, and why its other images are not slices."""

    images: list[Image]
    slices: list[Slice]
    reasons: Counter[str]
    warnings: list[str]

    @property
    def length(self) -> float:
        """Distance in mm from the first to the last slice."""
        return float(np.ptp(groups.depths(self.slices))) if self.slices else 0.0


def read(folder: Path, series: str | None, only: Path | None, name: Path | None, largest: int) -> Volume:
    """See ``dicom.read_series``."""
    known, dicom = images(folder, [*TAGS, *STUDY])
    mask = Mask(image.header for image in known)
    source = mask(str(name or only or folder))
    if not known:
        damaged = damaged_files(folder, [], dicom)
        raise PreprocessingError(
            f"{source}: {damaged} DICOM files, none of which can be read: damaged, or nested too deep; export them again"
            if damaged
            else f"{source}: no DICOM slices found; name a DICOM folder, .nii.gz, .nrrd or .mha file"
        )
    by_uid: dict[str, list[Image]] = {}
    for image in known:
        by_uid.setdefault(str(image.header.get("SeriesInstanceUID", "")), []).append(image)
    if only is not None:
        by_uid = {uid: members for uid, members in by_uid.items() if any(image.path == only for image in members)}
        if not by_uid:
            raise PreprocessingError(f"{source}: not a DICOM slice or any other supported format")
    if series is not None and series not in by_uid:
        listed = ", ".join(f"{uid} ({len(members)} files)" for uid, members in sorted(by_uid.items()))
        raise PreprocessingError(f"{source}: has no series {series}; it has {listed}")
    chosen = _candidate(by_uid[series]) if series is not None else _first([_candidate(m) for m in by_uid.values()])
    _check(source, chosen)
    damaged = damaged_files(folder, [member.image for member in chosen.slices], dicom)
    missing.check_count(source, chosen.slices, chosen.images, known, damaged, chosen.warnings)
    numbers = missing.by_number(chosen.images, chosen.warnings)
    volume = _volume(source, chosen, numbers, largest)
    if len(by_uid) > 1 and series is None:
        volume.warnings.append(f"{len(by_uid)} series in the folder: used the best one (--series chooses another)")
    return volume


def _volume(source: str, chosen: Candidate, numbers: int, largest: int) -> Volume:
    """The volume of a series; slices whose pixels cannot be decoded count as missing."""
    slices, lost = chosen.slices, 0
    while True:
        warnings = list(chosen.warnings)
        if lost:
            warnings.append(f"{lost} of {counted(len(chosen.slices), 'slice')} cannot be decoded (damaged): left out")
        try:
            return stack.volume(source, slices, numbers, warnings, largest)
        except UndecodableSlices as error:
            undecodable = {id(image) for image in error.images}
            slices = [member for member in slices if id(member.image) not in undecodable]
            lost = len(chosen.slices) - len(slices)
            if lost > missing.MOST_MISSING * len(chosen.slices):
                raise


def _candidate(members: list[Image]) -> Candidate:
    slices, reasons = placed(members)
    warnings: list[str] = []
    return Candidate(members, groups.best(slices, warnings), reasons, warnings)


def _first(candidates: list[Candidate]) -> Candidate:
    """The best series, by the rule at the top of this file."""
    headers = [(c.length, c.slices[0].image.header) for c in candidates if c.slices]
    longest = max((length for length, head in headers if in_hu(head) and alteration(head) < REFORMATTED), default=0.0)

    def rank(candidate: Candidate) -> tuple[object, ...]:
        slices = candidate.slices
        count = groups.positions(slices)
        if count < FEWEST:
            # None of these can be read; the most informative refusal comes first.
            return (True, not slices, -count, -len(candidate.images))
        header = slices[0].image.header
        kind = alteration(header)
        short = candidate.length < SHORT_MM and longest > 2 * candidate.length
        reformatted = kind == REFORMATTED or abs(slices[0].normal[2]) < 0.7
        return (False, short, kind == ALTERED, not in_hu(header), reformatted, kind == DERIVED, -count)

    best = min(map(rank, candidates))
    return max((candidate for candidate in candidates if rank(candidate) == best), key=lambda c: str(c.images[0].path))


def _check(source: str, chosen: Candidate) -> None:
    """Raises PreprocessingError if the series is not a volume; warns of values that may not be HU."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.reasons.most_common())
    if len(chosen.slices) < FEWEST:
        kinds = {modality(image) for image in chosen.images}
        if "CT" not in kinds:
            named = ", ".join(sorted(kind for kind in kinds if re.fullmatch(r"[A-Z]{2,8}", kind)))
            raise PreprocessingError(f"{source}: its modality is not CT" + f" ({named})" * bool(named))
        raise PreprocessingError(
            f"{source}: {len(chosen.slices)} of {len(chosen.images)} images of the series are CT slices with a position"
            + f" ({'; '.join(filter(None, [reasons, *chosen.warnings]))})" * bool(reasons or chosen.warnings)
            + "; a localizer, screenshots or a derived series are not a volume"
        )
    if reasons:
        count = sum(chosen.reasons.values())
        images_left = counted(count, "image")
        verb = "has" if count == 1 else "have"
        chosen.warnings.insert(0, f"{images_left} of the series {verb} no place among its slices: left out ({reasons})")
    header = chosen.slices[0].image.header
    if not all(in_hu(member.image.header) for member in chosen.slices):
        quantity = re.sub(r"[^A-Z0-9_]", "", str(header.get("RescaleType", "")).upper())[:16]
        chosen.warnings.append(f"RescaleType is {quantity or 'unknown'}, not HU: values may be another quantity")
    if (kind := altered_as(header)) is not None:
        chosen.warnings.append(f"according to its header it is {kind}: values may not be those of a plain CT")
