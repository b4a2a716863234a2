"""Write synthetic volumes as NIfTI files in HU with geometry, marked as synthetic in name, header and page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.errors import DataError
from ctclip.evaluation.pages import write_page
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_file, claimed_file
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.spec import PreprocessingSpec

MARK, KIND = "synthetic", "ctclip synthetic volume"
NOTE = "synthetic, not a scan of a patient; for research, not for diagnosis"
# The description field of a NIfTI header holds 80 bytes.
DESCRIPTION = f"{KIND}, {NOTE}"[:79]
COMMENT = 6  # NIFTI_ECODE_COMMENT of nifti1.h
SUFFIXES = (".nii.gz", ".nii")
WINDOWS = (("lung window", -1350.0, 150.0), ("soft tissue window", -160.0, 240.0))


@dataclass(frozen=True)
class Synthetic:
    """One volume: ``hu`` (D, H, W) float32 in the model's index order; its text and method; probabilities of the
    model's own detector, which the volume was optimised for."""

    hu: np.ndarray = field(repr=False)
    text: str
    method: str
    model: str
    seed: int
    words: str = ""
    probabilities: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Everything except the voxels, for JSON."""
        return {"kind": KIND, "note": NOTE, **{k: v for k, v in asdict(self).items() if k != "hu"}}


def to_hu(voxels: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    """Voxels in [-1, 1] -> HU, float32: the inverse of ``PreprocessingSpec.normalise``."""
    low, high, middle, gain = spec.window
    hu: np.ndarray = (voxels.astype(np.float32) / gain + middle).clip(low, high)
    return hu


def volume_files(output: Path, count: int) -> list[Path]:
    """The files of ``count`` volumes: ``output`` with the word synthetic in its name, and a number if there are several.

    Raises DataError if ``output`` does not end in .nii.gz or .nii.
    """
    suffix = next((one for one in SUFFIXES if output.name.endswith(one)), None)
    if suffix is None:
        raise DataError(f"{output}: end the name in .nii.gz (or .nii)")
    stem = output.name.removesuffix(suffix)
    stem = stem if MARK in stem.lower() else f"{stem}_{MARK}"
    if count == 1:
        return [output.with_name(f"{stem}{suffix}")]
    width = len(str(count))
    return [output.with_name(f"{stem}_{number:0{width}d}{suffix}") for number in range(1, count + 1)]


def page_file(output: Path) -> Path:
    """The page that belongs to the volumes written to ``output``."""
    first = volume_files(output, 1)[0]
    return first.with_name(first.name.removesuffix(".gz").removesuffix(".nii") + ".html")


def check_output(output: Path, count: int, *, force: bool = False) -> None:
    """Raise unless synthetic volumes may be written: the names must be new, or belong to earlier synthetic volumes."""
    for path in volume_files(output, count):
        check_file(path, is_synthetic, force=force)
    check_file(page_file(output), lambda path: KIND in path.read_text(encoding="utf-8", errors="replace"), force=force)


def is_synthetic(path: Path) -> bool:
    """Whether a file is a NIfTI whose header marks it as a synthetic volume of ctclip."""
    import nibabel as nib

    try:
        header: Any = nib.load(path).header
        return bytes(header["descrip"].tobytes()).startswith(KIND.encode())
    except Exception:  # nibabel raises many kinds of error for other files
        return False


def write_volume(path: Path, synthetic: Synthetic, spec: PreprocessingSpec) -> None:
    """Write one volume as int16 HU with its centre at the origin; columns run to the patient's left, rows to the back,
    slices to the head."""
    import nibabel as nib
    from isal import igzip

    hu = synthetic.hu.transpose(0, 2, 1) if spec.published_geometry else synthetic.hu
    array = np.rint(hu).astype(np.int16).transpose(2, 1, 0)
    dz, dy, dx = spec.spacing
    # NIfTI uses RAS: x and y have the opposite sign to LPS.
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(array.shape) - 1) / 2)
    image = nib.Nifti1Image(array, affine, dtype=np.int16)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION.encode()
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    note = json.dumps(synthetic.facts(), ensure_ascii=False).encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, note))
    with claimed_file(path), written_beside(path, suffix=".nii.gz" if path.name.endswith(".gz") else ".nii") as partial:
        content = image.to_bytes()
        partial.write_bytes(igzip.compress(content, 1, mtime=0) if path.name.endswith(".gz") else content)


def write_volumes(
    output: Path, volumes: Iterable[Synthetic], count: int, spec: PreprocessingSpec, *, force: bool = False
) -> Iterator[tuple[Path, Synthetic]]:
    """Write each of ``count`` volumes as soon as it is generated, so that only one is in memory, and yield its file; at
    the end, write one page with their slices (``page_file``)."""
    page = page_file(output)
    # One lock for all files, so that the files of two commands are not mixed.
    with claimed_file(page), scratch_folder("ctclip-synthetic-") as folder:
        # Check again: another command may have finished in the meantime.
        check_output(output, count, force=force)
        sections, about = [], ""
        for number, (path, one) in enumerate(zip(volume_files(output, count), volumes, strict=True)):
            write_volume(path, one, spec)
            picture = folder / f"{number}.png"
            _draw(picture, one, spec)
            likeliest = sorted(one.probabilities.items(), key=lambda item: -item[1])[:5]
            words = "; ".join(f"{name} {value:.0%}" for name, value in likeliest)
            caption = f"{one.words}. The model's own detector: {words}." if words else one.words
            sections.append({"title": f"{path.name}: {one.text}", "figures": [(caption, picture)]})
            about = f"model {one.model}, method {one.method}"
            yield path, one
        write_page(
            page, title="Synthetic volumes", subtitle=f"{KIND}: {NOTE}; {about}",
            headline=[(str(count), "synthetic volumes")], sections=sections,
        )  # fmt: skip


def _draw(path: Path, one: Synthetic, spec: PreprocessingSpec) -> None:
    """Draw the middle slices in two windows in radiological convention: the patient's right on the left, the head at
    the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    hu = one.hu.transpose(0, 2, 1) if spec.published_geometry else one.hu
    dz, dy, dx = spec.spacing
    z, y, x = (extent // 2 for extent in hu.shape)
    views = (
        ("axial", hu[z], dy / dx, "RL"), ("coronal", hu[::-1, y], dz / dx, "RL"), ("sagittal", hu[::-1, :, x], dz / dy, "AP"),
    )  # fmt: skip
    outlined = [withStroke(linewidth=2, foreground="black")]
    figure = Figure(figsize=(12, 7.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for row, (window, low, high) in zip(figure.subplots(2, 3), WINDOWS, strict=True):
        for panel, (name, plane, aspect, ends) in zip(row, views, strict=True):
            panel.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
            panel.set_title(f"{name}, middle, {window}", fontsize=9)
            for mark, across in zip(ends, (0.02, 0.95), strict=True):
                panel.text(
                    across, 0.5, mark, transform=panel.transAxes, color="#ffd23f", fontsize=11, path_effects=outlined
                )
            panel.axis("off")
    figure.suptitle(f"SYNTHETIC ({one.method}): {one.text}", fontsize=11)
    figure.savefig(path, format="png")
