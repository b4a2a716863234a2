"""Mask folders in other layouts, and a model with known maps scored against them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctclip.errors import ConfigError, ExplanationError
from ctclip.explanation.masks import MaskLayout, Masks, load_layout
from ctclip.explanation.method import Maps
from ctclip.inference.locate import Asked, _means, chosen_volumes, locate_cohort
from ctclip.preprocessing import prepare
from ctclip.preprocessing.cohorts import Cohort, cohort_table
from ctclip.preprocessing.volume import FileGrid
from tests.unit.explanation.known import SPEC, known_model, write_scan

AFFINE = np.array([[-2.0, 0, 0, 60], [0, -2, 0, 50], [0, 0, 3, -40], [0, 0, 0, 1]])
SHAPE = (60, 50, 28)
GRID = FileGrid.of(SHAPE, np.diag([-1.0, -1, 1, 1]) @ AFFINE, True)
BITS = MaskLayout(name="b", describes="", file="{volume}_m.nii.gz", kind="bits", labels=("Dark", "Lesion"))


def drawn(centre: np.ndarray, radius: float = 8.0) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    return np.linalg.norm(index @ AFFINE[:3, :3].T + AFFINE[:3, 3] - centre, axis=-1) < radius


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def test_bits_and_labels(tmp_path: Path) -> None:
    first, second = drawn(np.zeros(3)), drawn(np.array([6.0, 0, 0]))
    save(tmp_path / "bits" / "a" / "x_1_m.nii.gz", (first.astype(np.uint32) | second.astype(np.uint32) << 1))
    masks = Masks(tmp_path / "bits", BITS)
    assert list(masks.volumes) == ["x_1"]
    found = dict(masks.of("x_1", GRID))
    np.testing.assert_array_equal(found["Dark"], first.transpose(2, 1, 0))
    np.testing.assert_array_equal(found["Lesion"], second.transpose(2, 1, 0))
    save(tmp_path / "labels" / "x_1_m.nii.gz", np.where(second, 2, 0).astype(np.uint8))
    masks = Masks(tmp_path / "labels", BITS.model_copy(update={"kind": "labels"}))
    assert list(dict(masks.of("x_1", GRID))) == ["Lesion"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("bits", (-1, 2), r"holds values from -1 to 2, but masks are whole numbers from 0; is it the scan"),
        ("bits", (0, 0.5), r"holds values from 0 to 0\.5, but masks"),
        ("labels", (0, np.nan), r"holds values from nan to nan, but masks"),
        ("labels", (0, np.inf), r"holds values from 0 to inf, but masks"),
        ("bits", (0, 4), r"holds the value 4, but the labels of the layout end at 3; give another --mask-layout"),
        ("labels", (0, 3), r"holds the value 3, but the labels of the layout end at 2"),
    ],
)
def test_values_that_are_no_masks_of_the_layout_are_refused(
    kind: str, values: tuple[float, float], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "x_m.nii.gz", np.where(drawn(np.zeros(3)), values[1], values[0]).astype(np.float32))
    with pytest.raises(ExplanationError, match=message):
        dict(Masks(tmp_path, BITS.model_copy(update={"kind": kind})).of("x", GRID))


@pytest.mark.parametrize("first", [True, False])
def test_channels_with_sentences(first: bool, tmp_path: Path) -> None:
    """As ReXGroundingCT is described: dataset.json in the same folder names the sentence of each channel."""
    channels = np.stack([drawn(np.zeros(3)), drawn(np.array([20.0, 0, 0]))], axis=-1).astype(np.uint8)
    save(tmp_path / "segmentations" / "x.nii.gz", np.moveaxis(channels, -1, 0) if first else channels)
    record = {
        "name": "x.nii.gz",
        "findings": {"1": "an effusion", "0": "a nodule"},
        "categories": {"0": "2b", "1": "1a"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps({"train": [], "val": [record]}))
    masks = Masks(tmp_path / "segmentations", load_layout("rexgroundingct"))
    assert masks.categories["x"] == ["2b", "1a"]
    found = dict(masks.of("x", GRID))
    np.testing.assert_array_equal(found["a nodule"], drawn(np.zeros(3)).transpose(2, 1, 0))
    np.testing.assert_array_equal(found["an effusion"], drawn(np.array([20.0, 0, 0])).transpose(2, 1, 0))
    save(tmp_path / "segmentations" / "x.nii.gz", channels * 0.5)
    with pytest.raises(ExplanationError, match=r"holds values from 0 to 0\.5"):
        dict(masks.of("x", GRID))


def test_what_cannot_be_scored_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExplanationError, match="no such folder of masks"):
        Masks(tmp_path / "none", BITS)
    with pytest.raises(ExplanationError, match=r"holds no file '\{volume\}_m.nii.gz'"):
        Masks(tmp_path, BITS)
    moved = AFFINE.copy()
    moved[0, 3] += 40
    save(tmp_path / "x_m.nii.gz", drawn(np.zeros(3)).astype(np.uint8), moved)
    with pytest.raises(ExplanationError, match=r"40.0 mm away .* another scan"):
        dict(Masks(tmp_path, BITS).of("x", GRID))
    (tmp_path / "bad.yaml").write_text("name: a\ndescribes: b\nfile: x.nii.gz\nkind: bits\nlabels: [A]\n")
    with pytest.raises(ConfigError, match=r"must hold \{volume\}"):
        load_layout(str(tmp_path / "bad.yaml"))


def cohort_of(folder: Path) -> Cohort:
    """Four scans of four patients with a lesion each, at four positions; the last has none."""
    records, files = [], {}
    for number, centre in enumerate(([20, -20, 10], [-20, 10, -10], [-16, -16, 14], [18, 14, -12], None)):
        name = f"p{number}"
        files[name] = folder / f"{name}.nii.gz"
        write_scan(files[name], AFFINE, np.array([500.0] * 3) if centre is None else np.array(centre, float), SHAPE)
        mask = np.zeros(SHAPE, bool) if centre is None else drawn(np.array(centre, float), 9.0)
        save(folder / "masks" / f"{name}_m.nii.gz", mask.astype(np.uint8) << 1)
        records.append({"volume": name, "patient": name, "split": "valid", "path": files[name].name})
    return Cohort(cohort_table(records), files)


def test_a_model_that_sees_the_lesion_points_at_it_and_the_controls_do_not(tmp_path: Path) -> None:
    cohort, (model, head) = cohort_of(tmp_path), known_model()
    masks = Masks(tmp_path / "masks", BITS)
    volumes = chosen_volumes(cohort, masks, "valid", None, 0)
    assert len(volumes) == 5
    assert len(chosen_volumes(cohort, masks, "valid", 3, 0)) == 3
    result = locate_cohort(model, head, cohort, masks, volumes)
    lesion = result["findings"]["Lesion"]
    # The centre of a token of 16 x 15 x 15 mm is at most 13 mm away from a ball within it.
    assert lesion["map"]["distance_mm"]["value"] <= 8
    assert lesion["map"]["auroc"]["value"] > 0.95
    assert lesion["mean map"]["distance_mm"]["value"] > 15
    assert lesion["map"]["auroc"]["value"] > lesion["other finding"]["auroc"]["value"] + 0.3
    assert lesion["map"]["scans"] == lesion["lesions"] == 4
    assert "Dark" not in result["findings"]
    json.dumps(result, allow_nan=False)
    with pytest.raises(ExplanationError, match="none of its 5 masks belongs to a volume"):
        chosen_volumes(cohort, masks, "train", None, 0)
    empty = next(name for name in volumes if not dict(masks.of(name, GRID)))
    with pytest.raises(ExplanationError, match="none of the 1 masks marks a finding that the head scores"):
        locate_cohort(model, head, cohort, masks, [empty])


def test_sentences_are_scored_by_category(tmp_path: Path) -> None:
    """Every sentence asks for its own map; figures are grouped by category, and lesions that no map finds are
    counted."""
    cohort, (model, head) = cohort_of(tmp_path), known_model()
    records = []
    for number in range(2):
        balls = [drawn(np.array([20.0 - 40 * number, 0, 0])), drawn(np.array([0.0, 15, 0]))]
        save(tmp_path / "segmentations" / f"p{number}.nii.gz", np.stack(balls, axis=-1).astype(np.uint8))
        records.append({"name": f"p{number}.nii.gz", "findings": ["The heart is enlarged.", "A nodule."], "categories": ["a", "b"]})  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(records))
    masks = Masks(tmp_path / "segmentations", load_layout("rexgroundingct"))
    result = locate_cohort(model, head, cohort, masks, chosen_volumes(cohort, masks, None, None, 0))
    assert set(result["findings"]) == {"a", "b"}
    assert result["findings"]["a"]["map"]["scans"] == result["findings"]["a"]["lesions"] == 2


def test_masks_lie_on_the_grid_that_prepare_reads(tmp_path: Path) -> None:
    write_scan(tmp_path / "s.nii.gz", AFFINE, np.zeros(3), SHAPE)
    own = prepare(tmp_path / "s.nii.gz", SPEC).file_grid
    assert own.shape == GRID.shape
    np.testing.assert_allclose(own.affine, GRID.affine, atol=1e-4)


def test_the_mean_of_maps_on_different_grids() -> None:
    """The blocks of occlusion depend on the scan. The same slope in mm has the same mean, on the grid of the first."""

    def slope(shape: tuple[int, int, int], step: float) -> Maps:
        affine = np.diag([step, step, step, 1.0])
        affine[:3, 3] = (step - 1) / 2
        mm = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * step + (step - 1) / 2
        return Maps((mm @ [1.0, 2.0, 4.0])[None].astype(np.float32), affine)

    _, head = known_model()
    asked = {name: Asked(head, {"Dark": "Dark"}) for name in "abcd"}
    kept = {
        "a": slope((8, 8, 8), 3.0),
        "b": slope((12, 12, 12), 2.0),
        "c": slope((8, 8, 8), 3.0),
        "d": slope((8, 8, 8), 2.0),
    }
    values, affine = _means(kept, asked)["Dark"]
    assert affine is kept["a"].affine
    # The last map ends at 15 mm, in the sixth cell.
    np.testing.assert_allclose(values[:5, :5, :5], kept["a"].values[0, :5, :5, :5], rtol=1e-5)
