"""For every orientation of a file's axes, the peak of a map lies within one token of the lesion."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.explanation.explain import Explanation, explain
from ctclip.explanation.place import by_side, stored_by_side
from ctclip.preprocessing import prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.explanation.known import SPEC, TURNED, known_model, token_mm, write_scan
from tests.unit.small import spec_of

SPACING = np.array([1.9, 2.6, 3.1])
SHAPE = (52, 38, 30)
CENTRE = np.array([21.0, -130.0, 240.0])
LESION = np.array([13.0, -11.0, 16.0])
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
OBLIQUE = np.linalg.qr(np.array([[1, 0.2, -0.15], [-0.2, 1, 0.25], [0.15, -0.25, 1]]))[0]
OBLIQUE = OBLIQUE * np.sign(np.diag(OBLIQUE))


def file_affine(order: tuple[int, ...], signs: tuple[int, ...], turn: np.ndarray | None = None) -> np.ndarray:
    """Index axis i of the file runs along world axis ``order[i]`` in the direction ``signs[i]``; the scan's middle lies at
    ``CENTRE`` mm RAS+."""
    axes = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        axes[world, axis] = sign * SPACING[axis]
    affine = np.eye(4)
    affine[:3, :3] = axes if turn is None else turn @ axes
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def explained(path: Path, spec: PreprocessingSpec, by: str) -> Explanation:
    model, head = known_model(spec)
    return explain(model, head, prepare(path, spec), ["Lesion"], scan=path.name, model_hash="known", by=by, budget=4000)


def check(path: Path, spec: PreprocessingSpec, lesion: np.ndarray, by: str = "similarity") -> Explanation:
    """Peak in RAS, in LPS and as a voxel of the file, and the map on the file's grid, all within one token of the lesion."""
    found = explained(path, spec, by)
    place = found["Lesion"]
    reach = token_mm(spec) if by == "similarity" else np.full(3, 24.0)
    assert (np.abs(np.array(place.peak_ras) - lesion) <= reach).all()
    np.testing.assert_allclose(place.peak_lps, np.array(place.peak_ras) * [-1, -1, 1])
    affine = nib.load(path).affine
    voxel_ras = (affine @ [*place.peak_voxel, 1])[:3]
    assert (np.abs(voxel_ras - place.peak_ras) <= np.abs(affine[:3, :3]).sum(axis=1) / 2 + 1e-3).all()
    np.testing.assert_allclose(place.prepared.file_grid.nifti_affine, affine, atol=1e-3)
    values = place.map().transpose(2, 1, 0)
    assert values.shape == nib.load(path).shape
    highest = np.argwhere(values >= values.max() - 1e-6).mean(axis=0)
    assert (np.abs((affine @ [*highest, 1])[:3] - lesion) <= reach).all()
    return found


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_in_every_orientation(order: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path) -> None:
    affine = file_affine(order, signs)
    lesion = CENTRE + LESION
    write_scan(tmp_path / "scan.nii.gz", affine, lesion, SHAPE)
    check(tmp_path / "scan.nii.gz", SPEC, lesion)


@pytest.mark.parametrize("by", ["similarity", "occlusion"])
@pytest.mark.parametrize("spec", [SPEC, TURNED], ids=["ours", "published geometry"])
@pytest.mark.parametrize("turn", [None, OBLIQUE], ids=["straight", "oblique"])
def test_oblique_and_published(turn: np.ndarray | None, spec: PreprocessingSpec, by: str, tmp_path: Path) -> None:
    for number, offset in enumerate(([13.0, -11.0, 16.0], [-14.0, 9.0, -12.0])):
        affine = file_affine((0, 1, 2), (-1, 1, 1), turn)
        write_scan(tmp_path / f"{number}.nii.gz", affine, CENTRE + offset, SHAPE)
        check(tmp_path / f"{number}.nii.gz", spec, CENTRE + offset, by)


def test_what_is_written_lies_over_the_scan(tmp_path: Path) -> None:
    """As nibabel reads it: the file's shape and affine, the mask's label at the peak, the names in the header's extension."""
    affine, folder = file_affine((1, 0, 2), (1, -1, -1), OBLIQUE), tmp_path / "out"
    write_scan(tmp_path / "scan.nii.gz", affine, CENTRE + LESION, SHAPE)
    place = check(tmp_path / "scan.nii.gz", SPEC, CENTRE + LESION).save(folder)
    assert place == folder / "page.html"
    facts = json.loads((folder / "findings.json").read_text())["findings"][0]
    scan = nib.load(tmp_path / "scan.nii.gz")
    for name in ("lesion.nii.gz", "findings.seg.nii.gz"):
        written = nib.load(folder / name)
        assert written.shape == scan.shape
        np.testing.assert_allclose(written.affine, scan.affine, atol=1e-3)
        np.testing.assert_allclose(written.get_qform(), scan.affine, atol=1e-3)
        assert written.header.get_xyzt_units()[0] == "mm"
    mask = nib.load(folder / "findings.seg.nii.gz")
    assert mask.header.extensions[0].get_code() == 6
    assert json.loads(mask.header.extensions[0].get_content())["labels"] == {"1": "Lesion"}
    assert np.asarray(mask.dataobj)[tuple(facts["peak_voxel_column_row_slice"])] == 1
    values = nib.load(folder / "lesion.nii.gz").get_fdata()
    assert values[tuple(facts["peak_voxel_column_row_slice"])] == pytest.approx(values.max(), rel=0.15)


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    """Written by SimpleITK, which also gives the position of the voxel."""
    lesion = CENTRE + LESION
    write_scan(tmp_path / "scan.nii.gz", file_affine((1, 0, 2), (1, -1, -1)), lesion, SHAPE)
    image = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
    found = explained(tmp_path / f"scan.{suffix}", SPEC, "similarity")
    place = found["Lesion"]
    said = np.array(image.TransformIndexToPhysicalPoint([int(v) for v in place.peak_voxel]))
    assert (np.abs(said - np.array(place.peak_lps)) <= SPACING.max() / 2 + 1e-3).all()
    assert (np.abs(said - lesion * [-1, -1, 1]) <= token_mm(SPEC)).all()
    found.save(tmp_path / "out")
    written = sitk.ReadImage(str(tmp_path / "out" / "lesion.nii.gz"))
    np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)
    assert written.GetSize() == image.GetSize()


def test_outside_of_what_the_model_was_given_a_map_is_nothing(tmp_path: Path) -> None:
    """The grid of the spec is smaller than the scan: the part that was cropped is 0, and no mask extends there."""
    small = PreprocessingSpec("small", spacing=(4.0, 2.5, 3.0), shape=(16, 24, 20))
    affine = file_affine((0, 1, 2), (-1, -1, 1))
    write_scan(tmp_path / "scan.nii.gz", affine, CENTRE, SHAPE)
    values = explained(tmp_path / "scan.nii.gz", small, "similarity")["Lesion"].map()
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    away = np.abs((index - (np.array(SHAPE) - 1) / 2) * SPACING)
    outside = (away > np.array([60, 60, 64]) / 2 + 0.01).any(axis=-1)
    assert not values.transpose(2, 1, 0)[outside].any()
    assert values.transpose(2, 1, 0)[~outside].any()


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_the_halves_of_the_body(signs: tuple[int, ...], tmp_path: Path) -> None:
    """A lesion in the patient's left half, which is -x in RAS: the map is higher there, however the file runs."""
    lesion = CENTRE + np.array([-14.0, 0.0, 0.0])
    write_scan(tmp_path / "scan.nii.gz", file_affine((0, 1, 2), signs), lesion, SHAPE)
    place = explained(tmp_path / "scan.nii.gz", SPEC, "similarity")["Lesion"]
    ready = place.prepared

    def halves(middle_ras: float, *, chest: bool = True) -> dict[str, float]:
        column = (-middle_ras - ready.scan.affine[0, 3]) / ready.scan.affine[0, 2]
        lungs = SimpleNamespace(is_chest=chest, midline=lambda: column)
        seen = SimpleNamespace(scan=ready.scan, file_grid=ready.file_grid, token_affine=ready.token_affine, lungs=lungs)
        return by_side(place.values, place.affine, seen)  # type: ignore[arg-type]

    found = halves(CENTRE[0])
    assert found["left"] == place.values.max()
    assert found["right"] < found["left"]
    assert halves(lesion[0] - 12)["right"] == place.values.max(), "the middle lies to the left of the lesion"
    assert halves(CENTRE[0] + 1000) == halves(CENTRE[0], chest=False) == {}


def test_the_halves_of_a_stored_chest_meet_at_its_own_midline() -> None:
    """The body lies to the right of the grid's middle (column 30), so that column 27 is on its left."""
    spec = spec_of((40, 50, 60), (4.0, 4.0, 4.0))
    hu = np.full(spec.shape, -1000.0)
    hu[:, 5:45, 2:48] = 40
    for first in (6, 28):
        hu[4:36, 10:40, first : first + 16] = -800
    low, high = spec.hu_window
    voxels = ((hu - low) / (high - low) * 2 - 1).astype(np.float32)
    values = np.zeros((10, 10, 20), np.float32)
    affine = np.diag([16.0, 20.0, 12.0, 1.0])
    affine[:3, 3] = [6, 8, 4]
    values[5, 5, 9], values[2, 2, 3] = 2.0, 1.0
    assert stored_by_side(values, affine, voxels, spec) == {"right": 1.0, "left": 2.0}
    assert stored_by_side(values, affine, np.full_like(voxels, -1), spec) == {}
