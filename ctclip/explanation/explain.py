"""Explain a scan: a map, a peak and a region for each finding, saved as NIfTI, mask, JSON and a page."""

from __future__ import annotations

import json
import os
import re
import reprlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.errors import ExplanationError
from ctclip.evaluation.pages import write_page
from ctclip.explanation.dicom.save import FOLDER as DICOM
from ctclip.explanation.dicom.save import holds_only_ours
from ctclip.explanation.method import Maps, Subject, method
from ctclip.explanation.picture import draw
from ctclip.explanation.place import LEVEL, Place, locate
from ctclip.explanation.shifts import check_shifts, maps_of
from ctclip.heads.head import Head
from ctclip.heads.locator import Locator
from ctclip.labels import named
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.outputs import check_replaceable, file_holds, put_in_place
from ctclip.preprocessing.pipeline import Prepared
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.volume import FileGrid

FACTS, PAGE, MASK = "findings.json", "page.html", "findings.seg.nii.gz"
KIND = b'"kind": "ctclip explanation"'
NOTE = "for research, not for diagnosis; a map shows what influenced the model's score, which need not be the finding"
# NIfTI header extensions: 6 is a comment (nifti1.h, NIFTI_ECODE_COMMENT).
COMMENT = 6


@dataclass(frozen=True)
class Explanation:
    """Where a model sees findings in one scan: ``places`` by finding, in the order of the request. Prints as a list.

    ``probabilities``: those of every finding that the head scores, located or not; ``thresholds``: those of calibrated
    findings.
    """

    scan: str
    model: str
    method: str
    seconds: float
    places: dict[str, Place]
    warnings: tuple[str, ...] = ()
    probabilities: dict[str, float] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    model_name: str = ""
    scanned: Prepared | None = field(default=None, repr=False)

    @property
    def prepared(self) -> Prepared:
        """The scan that was explained."""
        return self.scanned or next(iter(self.places.values())).prepared

    def __getitem__(self, finding: str) -> Place:
        """The place of a finding, by its name in any case and spacing. Raises KeyError that lists those located."""
        return self.places[named(self.places, finding)]

    def __str__(self) -> str:
        lines = [f"{self.scan} ({self.method}; {NOTE})", *map(str, self.places.values())]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    __repr__ = __str__

    def mask(self, grid: FileGrid | None = None) -> tuple[np.ndarray, dict[str, int]]:
        """A mask (uint8 [slice, row, column]) on the file's grid, or on another grid in the scan's space, and the label of each finding in it.

        The mask of a finding holds the voxels at or above ``level`` of its peak. Where two overlap, the voxel goes to
        the finding whose map is closer to its own peak.
        """
        labels = {finding: number for number, finding in enumerate(self.places, start=1)}
        nearest: np.ndarray | None = None
        mask: np.ndarray | None = None
        for finding, place in self.places.items():
            share = place.map(grid) / max(place.height, 1e-12)
            if mask is None or nearest is None:
                nearest, mask = np.zeros_like(share), np.zeros(share.shape, np.uint8)
            taken = (share >= place.level) & (share > nearest) & (place.height > 0)
            mask[taken], nearest[taken] = labels[finding], share[taken]
        assert mask is not None
        return mask, labels

    def save(self, folder: str | Path, write_more: Callable[[Path], None] | None = None) -> Path:
        """Write one map per finding, the mask, ``findings.json`` and ``page.html``; return the path of the page.

        The folder is written whole or not at all; an earlier explanation is replaced. ``write_more`` is called with the
        folder before it is moved to its final place. Raises PreprocessingError for any other non-empty folder.
        """
        final = Path(os.path.abspath(folder))
        check_output(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(f".{final.name[:60]}.", ".partial", final.parent) as partial:
            self._write(partial)
            if write_more is not None:
                write_more(partial)
            partial.chmod(0o755)
            put_in_place(partial, final, is_explanation_folder, "explanation")
        return Path(folder) / PAGE

    def _write(self, folder: Path) -> None:
        grid = self.prepared.file_grid
        files = _file_names(list(self.places))
        for finding, place in self.places.items():
            _write_map(folder / f"{files[finding]}.nii.gz", place.map(), grid, finding)
            draw(folder / f"{files[finding]}.png", place)
        mask, labels = self.mask()
        write_nifti(folder / MASK, mask, grid, {"labels": {str(label): name for name, label in labels.items()}})
        facts = {
            "kind": "ctclip explanation", "scan": self.scan, "model": self.model, "method": self.method, "note": NOTE,
            "findings": [
                {"label": labels[name], "map": f"{files[name]}.nii.gz", **place.facts()} for name, place in self.places.items()
            ],
            "warnings": list(self.warnings),
        }  # fmt: skip
        write_text(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))
        self._write_page(folder, files)

    def _write_page(self, folder: Path, files: dict[str, str]) -> None:
        head = ["finding", "probability", "side", "peak, mm LPS", "voxel [column, row, slice]", "right-left x front-back x foot-head, mm", "ml"]  # fmt: skip
        table = [head]
        for name, place in self.places.items():
            table.append([
                name, f"{place.probability:.0%}", place.side or "unknown", ", ".join(f"{v:.0f}" for v in place.peak_lps),
                ", ".join(map(str, place.peak_voxel)), " x ".join(f"{v:.0f}" for v in place.size_mm), f"{place.volume_ml:.0f}",
            ])  # fmt: skip
        pictures: list[dict[str, Any]] = [
            {"title": name, "figures": [(str(place), folder / f"{files[name]}.png")]}
            for name, place in self.places.items()
        ]
        notes = [{"title": "Warnings", "pre": "\n".join(self.warnings)}] if self.warnings else []
        write_page(
            folder / PAGE, title=f"Where: {self.scan}", subtitle=f"model {self.model}, method {self.method}; {NOTE}",
            headline=[(str(len(self.places)), "findings"), (f"{self.seconds:.1f} s", "for all maps")],
            sections=[{"title": "Findings", "table": table}, *pictures, *notes],
        )  # fmt: skip

    def _repr_html_(self) -> str:
        rows = "".join(f"<li>{escape(str(place))}</li>" for place in self.places.values())
        return f"<b>{escape(self.scan)}</b> ({escape(self.method)}; {escape(NOTE)})<ul>{rows}</ul>"


def explain(
    model: DualEncoder,
    head: Head,
    prepared: Prepared,
    findings: Sequence[str] | None = None,
    *,
    scan: str,
    model_hash: str,
    model_name: str = "",
    by: str = "similarity",
    level: float = LEVEL,
    budget: int = 600,
    shifts: int | None = None,
    locator: Locator | None = None,
    warnings: Sequence[str] = (),
) -> Explanation:
    """Locate findings in one prepared scan.

    ``findings``: names that ``head`` scores; by default, those at or above their threshold. ``by``: the method, see
    ``ctclip.explanation.method``. ``level``: a region extends down to this fraction of the peak of its map. ``budget``:
    the maximum number of encodings, for occlusion of all findings, for a counterfactual of each. ``locator``: for the
    method ``learned``. ``shifts``: see ``ctclip.explanation.shifts``. Raises ExplanationError.
    """
    _check_numbers(level, budget)
    check_shifts(shifts)
    began = time.perf_counter()
    volume = torch.from_numpy(prepared.voxels)[None, None].to(model.device)
    with torch.inference_mode():
        scores = head.score(model.encode(volume)).float()
        probabilities = head.probabilities(scores)[0].tolist()
    chosen = _chosen(head, probabilities, findings)
    # Not in inference mode: methods need gradients.
    places = {}
    relevance = (
        maps_of(method(by), Subject(model, head, chosen, volume, budget, locator), shifts, progress=True)
        if chosen
        else Maps(np.zeros((0, 1, 1, 1)), np.eye(4))
    )
    for values, index in zip(relevance.values, chosen, strict=True):
        name = head.names[index]
        places[name] = locate(
            name,
            probabilities[index],
            float(scores[0, index]),
            values,
            relevance.affine,
            prepared,
            method=by,
            level=level,
        )
    return Explanation(
        scan, model_hash, by, time.perf_counter() - began, places, (*warnings, *relevance.notes),
        probabilities=dict(zip(head.names, probabilities, strict=True)), thresholds=dict(head.thresholds()),
        model_name=model_name, scanned=prepared,
    )  # fmt: skip


def _check_numbers(level: float, budget: int) -> None:
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
        raise ExplanationError(f"level={reprlib.repr(level)}: give a number between 0 and 1")
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1:
        raise ExplanationError(f"budget={reprlib.repr(budget)}: give a positive whole number")


def check_output(folder: Path) -> None:
    """Raise PreprocessingError unless an explanation may be written to ``folder``."""
    check_replaceable(folder, is_explanation_folder, "explanation")


def is_explanation_folder(folder: Path) -> bool:
    """Whether a folder holds an explanation and nothing else."""
    if not file_holds(KIND)(folder / FACTS):
        return False
    try:
        kept = plain_json.read(folder / FACTS)
        maps = [str(entry["map"]) for entry in kept["findings"]]
    except UNFIT:
        return False
    known = {FACTS, PAGE, MASK, *maps, *(f"{name.removesuffix('.nii.gz')}.png" for name in maps)}
    names = {path.name for path in folder.iterdir() if path.name != DICOM}
    below = folder / DICOM
    return names <= known and (not below.exists() or (below.is_dir() and holds_only_ours(below)))


def _chosen(head: Head, probabilities: Sequence[float], findings: Sequence[str] | None) -> list[int]:
    """The indices of findings among the names of the head."""
    if findings is not None:
        if unknown := [name for name in findings if name not in head.names]:
            raise ExplanationError(f"the head does not score {unknown[0]!r}: it scores {', '.join(head.names)}")
        return [head.names.index(name) for name in dict.fromkeys(findings)]
    thresholds = head.thresholds()
    above = [
        (index, p) for index, (name, p) in enumerate(zip(head.names, probabilities, strict=True))
        if p >= thresholds.get(name, 0.5)
    ]  # fmt: skip
    if not above:
        likeliest = head.names[int(np.argmax(probabilities))]
        raise ExplanationError(
            f"no finding reaches its threshold in this scan; name one to locate, such as --abnormality {likeliest!r}"
        )
    return [index for index, _ in sorted(above, key=lambda pair: -pair[1])]


def _file_names(findings: Sequence[str]) -> dict[str, str]:
    """A unique file name for each finding, with characters that every file system accepts."""
    names: dict[str, str] = {}
    for finding in findings:
        stem = re.sub(r"[^a-z0-9]+", "_", finding.lower()).strip("_")[:60] or "finding"
        while stem in (*names.values(), "findings"):
            stem += "_"
        names[finding] = stem
    return names


def _write_map(path: Path, values: np.ndarray, grid: FileGrid, finding: str) -> None:
    """Write a map as 8-bit steps from the lowest to the highest value, with 0 kept at 0. A map is no more precise than
    that, and float32 would take four times the space."""
    top = float(np.abs(values).max()) or 1.0
    steps = np.rint(np.clip(values, 0, None) * (255 / top)).astype(np.uint8)
    write_nifti(path, steps, grid, {"finding": finding}, slope=top / 255)


def write_nifti(path: Path, array: np.ndarray, grid: FileGrid, note: dict[str, Any], slope: float = 1.0) -> None:
    """Write an array [slice, row, column] in the file's order as NIfTI [column, row, slice] with the file's affine."""
    import nibabel as nib
    from isal import igzip

    image = nib.Nifti1Image(array.transpose(2, 1, 0), grid.nifti_affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_slope_inter(slope, 0.0)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, json.dumps(note, ensure_ascii=False).encode()))
    with written_beside(path, suffix=".nii.gz") as partial:
        partial.write_bytes(igzip.compress(image.to_bytes(), 1, mtime=0))
