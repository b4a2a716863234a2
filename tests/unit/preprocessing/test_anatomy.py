"""Lungs of a scan: kept in the grid, distinguished from masks and fillings, and recognised upside down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.anatomy import NOT_A_CHEST, find_lungs, no_chest, orientation_doubt
from ctclip.preprocessing.geometry import orient, resample
from ctclip.preprocessing.hounsfield import to_hu
from ctclip.preprocessing.quality import quality_page
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume

STEP = (5.0, 4.0, 4.0)
# As high as a chest, as wide and deep as a patient.
GRID = PreprocessingSpec("grid", (5.0, 4.0, 4.0), (64, 70, 96))


@pytest.fixture(scope="module")
def made() -> Volume:
    phantom = make_scan(3, 1, scale=6.0).reconstructions[0]
    spacing = phantom.acquisition.grid.spacing
    return Volume(phantom.hu, lps(spacing), "phantom")


def lps(spacing: tuple[float, ...]) -> np.ndarray:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1.0
    return affine


def saved(path: Path, volume: Volume, array: np.ndarray | None = None) -> Path:
    dz, dy, dx = volume.spacing
    values = volume.array if array is None else array
    nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), np.diag([-dx, -dy, dz, 1.0])), path)
    return path


def noise(shape: tuple[int, ...], level: float) -> np.ndarray:
    return np.random.default_rng(0).normal(level, 12, shape).astype(np.int16)


def tall(volume: Volume, above: int, below: int) -> np.ndarray:
    """The chest with a neck and an abdomen of soft tissue, each with this many slices."""
    parts = [noise((below, *volume.array.shape[1:]), 45), volume.array, noise((above, *volume.array.shape[1:]), 45)]
    for part in (parts[0], parts[2]):
        part[:, :4] = part[:, -4:] = part[..., :4] = part[..., -4:] = -1000
    return np.concatenate(parts)


def wide(volume: Volume, left: int) -> np.ndarray:
    """The patient at the right edge of a wide field of view."""
    d, h, _ = volume.array.shape
    return np.concatenate([volume.array, np.clip(noise((d, h, left), -1000), -1024, None)], axis=2)


@pytest.mark.parametrize(
    ("make", "moved"),
    [
        (lambda v: v.array, False),
        (lambda v: tall(v, 0, 90), True),
        (lambda v: tall(v, 90, 0), True),
        (lambda v: tall(v, 20, 90), True),
        (lambda v: tall(v, 60, 60), False),
        (lambda v: wide(v, 60), True),
    ],
    ids=["a chest", "with an abdomen", "with head and neck", "both", "in the middle already", "off centre"],
)
def test_lungs_are_kept_in_the_grid(
    tmp_path: Path, made: Volume, make: Callable[[Volume], np.ndarray], moved: bool
) -> None:
    """Voxels and positions: a few voxels of the grid are looked up in the scan by its affine."""
    whole = Volume(make(made), made.affine, "x")
    ready = prepare(saved(tmp_path / "a.nii", whole), GRID)
    assert (ready.centre is not None) == moved
    assert any("it is centred on the lungs" in warning for warning in ready.warnings) == moved
    lungs = find_lungs(ready.scan)
    assert lungs.is_chest
    # As much lung as fits into the grid around the chest without the additions.
    alone = prepare(saved(tmp_path / "b.nii", made), GRID)
    kept = int(((ready.hu < -600) & (ready.hu > -950)).sum())
    assert kept > 0.95 * int(((alone.hu < -600) & (alone.hu > -950)).sum())
    back = np.linalg.inv(ready.scan.affine) @ ready.affine
    index = np.array([[20, 30, 40, 1], [40, 35, 50, 1], [33, 20, 60, 1]]).T
    for place, grid in zip((back @ index).T, index.T, strict=True):
        low = np.floor(place[:3]).astype(int)
        corner = ready.scan.array[tuple(slice(a - 2, a + 4) for a in low)]
        assert corner.min() - 1 <= ready.hu[tuple(grid[:3])] <= corner.max() + 1


def test_a_lung_full_of_fluid_does_not_move_the_midline(made: Volume) -> None:
    middle = find_lungs(made).midline()
    array = made.array.copy()
    body = array.shape[2] // 2
    lung = (array[:, :, body:] > -990) & (array[:, :, body:] < -500)
    array[:, :, body:][lung] = 20
    drowned = find_lungs(Volume(array, made.affine, "one lung"))
    mm = made.spacing[2]
    assert abs(drowned.middle(2) - middle) * mm > 40
    assert abs(drowned.midline() - middle) * mm < 6
    # The middle of the phantom itself is at x = 0 of its frame.
    truth = -make_scan(3, 1, scale=6.0).reconstructions[0].acquisition.grid.origin[2] / mm
    assert abs(middle - truth) * mm < 6


def test_the_published_geometry_keeps_its_centre_and_warns(tmp_path: Path, made: Volume) -> None:
    spec = PreprocessingSpec("published", GRID.spacing, GRID.shape, published_geometry=True)
    path = saved(tmp_path / "a.nii", made, tall(made, 0, 90))
    ready = prepare(path, spec)
    assert ready.centre is None
    assert any("lie outside the grid" in warning for warning in ready.warnings)
    assert np.array_equal(ready.hu, resample(ready.scan, spec))
    with pytest.raises(PreprocessingError, match="of the lungs fit into the grid"):
        prepare(path, spec, expect="chest")


def test_a_grid_too_small_for_the_lungs_is_told_and_refused_for_a_chest(tmp_path: Path, made: Volume) -> None:
    spec = PreprocessingSpec("small", GRID.spacing, (20, 30, 40))
    path = saved(tmp_path / "a.nii", made)
    assert any("of the lungs" in warning for warning in prepare(path, spec).warnings)
    with pytest.raises(PreprocessingError, match="of the lungs fit into the grid of spec 'small'"):
        prepare(path, spec, expect="chest")


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [(0, np.int16, True), (50, np.int16, True), (-500, np.int16, True), (0, np.float32, True), (3071, np.int16, True),
     (-1000, np.int16, False), (-1024, np.int16, False), (-960, np.float32, False), (-3024, np.int16, False)],
)  # fmt: skip
def test_everything_outside_the_lungs_set_to_one_value(made: Volume, value: int, kind: type, told: bool) -> None:
    lungs = (made.array < -600) & (made.array > -950)
    # A mask leaves the lungs, and enough around them to be recognised as a CT.
    inside = np.roll(lungs, 2, 1) | np.roll(lungs, -2, 1) | np.roll(lungs, 3, 2) | np.roll(lungs, -3, 2) | lungs
    array = np.where(inside, made.array, value).astype(kind)
    try:
        warnings = to_hu(Volume(array, made.affine, "x")).warnings
    except PreprocessingError:
        assert value == 3071
        return
    assert any("masked or filled" in warning for warning in warnings) == told
    if told:
        assert f"exactly {value} HU" in warnings[-1]


FLIPS = {"about x": (0, 1), "about y": (0, 2), "about z": (1, 2)}


def test_an_upright_chest_is_not_doubted_and_one_turned_by_180_degrees_is() -> None:
    """Chests of many patients, by size, findings and spacing. The figures for 300 are in RESULTS."""
    doubted = dict.fromkeys(FLIPS, 0)
    for seed in range(8):
        phantom = make_scan(100 + seed, 1, scale=8.0).reconstructions[0]
        volume = Volume(phantom.hu, lps(phantom.acquisition.grid.spacing), "x")
        assert orientation_doubt(find_lungs(volume)) is None
        for name, axes in FLIPS.items():
            turned = Volume(np.flip(phantom.hu, axes), volume.affine, "x")
            doubted[name] += "orientation doubtful" in (orientation_doubt(find_lungs(turned)) or "")
    assert min(doubted.values()) >= 7, doubted


def test_a_header_that_lies_is_told_in_the_warnings(tmp_path: Path, made: Volume) -> None:
    dz, dy, dx = made.spacing
    image = nib.Nifti1Image(made.array.transpose(2, 1, 0), np.diag([-dx, dy, -dz, 1.0]))
    nib.save(image, tmp_path / "lies.nii")
    assert any("the spine lies in front of the lungs" in w for w in prepare(tmp_path / "lies.nii", GRID).warnings)


def test_real_scans_upright_and_turned(shared: Path) -> None:
    for name in ("lungdx_A0001_philips_B_5mm_64", "lungdx_A0002_siemens_B40f_8mm_30"):
        volume = orient(to_hu(read(shared / "ct" / "dicom" / name)))
        assert orientation_doubt(find_lungs(volume)) is None
        for axes in FLIPS.values():
            turned = Volume(np.flip(volume.array, axes), volume.affine, "x")
            assert "orientation doubtful" in (orientation_doubt(find_lungs(turned)) or ""), (name, axes)
    for path in (shared / "ct" / "nifti").glob("ts_*.nii.gz"):
        assert orientation_doubt(find_lungs(orient(to_hu(read(path))))) is None


def test_the_quality_page_asks_for_a_chest_only_where_there_should_be_one(tmp_path: Path) -> None:
    store = VolumeStore.create(tmp_path / "s", GRID)
    store.write("abdomen", noise(GRID.shape, 45))
    from ctclip.preprocessing.cohorts.table import cohort_table

    cohort_table([{"volume": "abdomen", "path": "a.nii"}]).to_parquet(tmp_path / "s" / "cohort.parquet")
    quality_page(store, tmp_path / "any.html")
    quality_page(store, tmp_path / "chest.html", expect="chest")
    assert "not a chest" not in (tmp_path / "any.html").read_text()
    assert "not a chest" in (tmp_path / "chest.html").read_text()
    assert no_chest(find_lungs(Volume(noise(GRID.shape, 45), lps(STEP), "x")))


def test_what_shows_no_chest_is_told_unless_it_is_expected(tmp_path: Path) -> None:
    """A head-sized ball of water with air around it: read with a warning, refused, or read without a check."""
    place = np.indices((40, 60, 60)) - np.array([20, 30, 30])[:, None, None, None]
    noise = np.random.default_rng(0).normal(0, 15, place.shape[1:])
    hu = (np.where((place**2).sum(0) < 18**2, 40, -1000) + noise).astype(np.int16)
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 4.0, 1.0])), tmp_path / "head.nii.gz")
    spec = PreprocessingSpec("test", spacing=(4.0, 4.0, 4.0), shape=(40, 60, 60))
    told = prepare(tmp_path / "head.nii.gz", spec).warnings
    assert [NOT_A_CHEST in warning for warning in told] == [True], told
    assert not prepare(tmp_path / "head.nii.gz", spec, expect="any").warnings
    with pytest.raises(PreprocessingError, match=NOT_A_CHEST):
        prepare(tmp_path / "head.nii.gz", spec, expect="chest")


@pytest.mark.parametrize(("apart", "told"), [(8.0, True), (5.0, False)])
def test_slices_far_apart_are_told(apart: float, told: bool, tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 300, (30, 30, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-2, -2, apart, 1.0])), tmp_path / "s.nii")
    spec = PreprocessingSpec("test", spacing=(3.0, 1.5, 1.5), shape=(32, 32, 32))
    warnings = prepare(tmp_path / "s.nii", spec, expect="any", hu="trust-file").warnings
    assert any(f"slices are {apart:.1f} mm apart" in warning for warning in warnings) == told
