"""The limits of each rule for Hounsfield units, tested with values just inside and outside."""

from __future__ import annotations

import numpy as np
import pytest

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import TableFacts
from ctclip.preprocessing.hounsfield import ALREADY_HU, filled, not_hu, to_hu
from ctclip.preprocessing.volume import Volume

MASK, PICTURE, SCALED = "a few distinct values", "8-bit", "already scaled"
DUE, TISSUE, WARM = "intercept of -1024 not yet applied", "in the range of soft tissue", "none as low as air or fat"
WINDOW, NEAR, BONE, TWICE = "display window", "instead of -1000", "as dense as bone", "applied twice"
TABLE = TableFacts(2.0, -1024.0)


def thousand(*parts: tuple[int, float, float], rest: tuple[float, float] = (-150, 150)) -> np.ndarray:
    """1000 values: (count, from, to) of each part, all different; the others are within ``rest``."""
    values = [np.linspace(low, high, count) for count, low, high in parts]
    left = 1000 - sum(map(len, values))
    return np.concatenate([*values, np.linspace(*rest, left)]).astype(np.float32)


AIR = (300, -1000, -900)


def chest(*parts: tuple[int, float, float]) -> np.ndarray:
    return thousand(AIR, *parts)


def check(sample: np.ndarray, reason: str | None) -> None:
    told = not_hu(sample)
    assert told is None if reason is None else (told is not None and reason in told), told


def test_a_chest_is_in_hounsfield_units() -> None:
    check(chest(), None)


@pytest.mark.parametrize(("padding", "distinct", "reason"), [
    (-1020, 15, MASK), (-1020, 16, None), (-1019, 15, None), (-1019, 14, MASK), (-3024, 15, MASK), (-3024, 16, None),
])  # fmt: skip
def test_fewer_than_16_values_above_padding_are_a_mask(padding: float, distinct: int, reason: str | None) -> None:
    """All values up to -1020 are padding; a value above counts, wherever it is."""
    sample = np.concatenate([[-1000], np.linspace(-150, 150, distinct - 1), [padding] * 500])
    check(sample, reason)
    if reason == MASK:
        assert f"in [{padding}, 150]" in str(not_hu(sample))


def test_all_of_a_small_sample_is_looked_at_for_distinct_values() -> None:
    values = np.zeros(1000)
    values[1::50] = np.linspace(-1000, 100, 20)
    check(np.where(values == 0, 40, values), None)
    # In 60,000 values every third one is sufficient.
    check(np.tile(np.concatenate([np.linspace(-1000, -900, 20), np.linspace(-100, 100, 40)]), 1001), None)


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [(0, 255, PICTURE), (1, 255, PICTURE), (0, 255.5, WARM), (-0.5, 255, None), (0, 100, PICTURE)],
)
def test_eight_bits(low: float, high: float, reason: str | None) -> None:
    check(np.linspace(low, high, 1000), reason)


@pytest.mark.parametrize(("low", "high", "reason"), [(-100, 99.5, SCALED), (-100, 100, None), (-1, 1, SCALED)])
def test_less_than_200_hu_apart(low: float, high: float, reason: str | None) -> None:
    check(np.linspace(low, high, 1000), reason)


def test_raw_numbers_have_tissue_near_1024() -> None:
    """More than 5 % between 850 and 1300, and less than 0.5 % of air."""
    air = (5, -700, -600)
    check(thousand((51, 900, 1200), (4, -700, -600)), DUE)
    check(thousand((51, 900, 1200), air), None)
    check(thousand((50, 900, 1200), (4, -700, -600)), None)


@pytest.mark.parametrize(
    ("value", "counts"), [(850, False), (850.5, True), (1299.5, True), (1300, False), (1300.5, False)]
)
def test_near_1024(value: float, counts: bool) -> None:
    check(thousand((51, value, value)), DUE if counts else None)


@pytest.mark.parametrize(("value", "counts"), [(-500.5, True), (-500, False), (-499.5, False), (-1019, True)])
def test_air(value: float, counts: bool) -> None:
    check(thousand((51, 900, 1200), (5, value, value)), None if counts else DUE)


@pytest.mark.parametrize("value", [-200.5, -200, -199.5, 249.5, 250, 250.5])
def test_two_of_a_hundred_are_soft_tissue(value: float) -> None:
    """Together with air, and with fat and bone of other densities."""
    rest = (-450, -250)
    counts = -200 < value < 250
    check(thousand((600, -1000, -900), (20, value, value), rest=rest), None if counts else TISSUE)
    check(thousand((600, -1000, -900), (19, value, value), rest=rest), TISSUE)


def test_the_share_of_soft_tissue_is_told() -> None:
    told = not_hu(thousand((600, -1000, -900), (10, 0, 100), rest=(-450, -250)))
    assert told == "values in [-1000, 100], 1% in the range of soft tissue"


@pytest.mark.parametrize(("least", "reason"), [(0, WARM), (1, WARM), (-0.5, None)])
def test_something_is_as_low_as_fat(least: float, reason: str | None) -> None:
    check(np.linspace(least, 400, 1000), reason)


@pytest.mark.parametrize(("least", "count", "reason"), [
    (-899.5, 51, WINDOW), (-899.5, 50, None), (-900, 51, None), (-160, 60, WINDOW), (-900.5, 400, None),
])  # fmt: skip
def test_a_display_window_heaps_values_at_its_lower_end(least: float, count: int, reason: str | None) -> None:
    check(thousand((count, least, least)), reason)


def test_the_heap_is_told() -> None:
    assert not_hu(thousand((60, -160, -160))) == (
        "values in [-160, 150] with 6% at -160 (clipped to a display window?)"
    )


@pytest.mark.parametrize(("low", "high", "count", "reason"), [
    (-749.5, -400, 51, NEAR), (-749.5, -400, 50, None), (-750, -400, 60, None), (-400, -300.5, 51, NEAR),
    (-400, -300, 51, None), (-750.5, -400, 200, None),
])  # fmt: skip
def test_air_is_not_as_dense_as_foam(low: float, high: float, count: int, reason: str | None) -> None:
    check(thousand((count, low, high)), reason)


@pytest.mark.parametrize(("value", "count", "reason"), [(700.5, 251, BONE), (700.5, 250, None), (700, 251, None)])
def test_a_quarter_is_not_bone(value: float, count: int, reason: str | None) -> None:
    check(chest((count, value, value)), reason)


def test_the_share_of_bone_is_told() -> None:
    assert not_hu(chest((300, 700.5, 700.5))) == "values in [-1000, 700.5], 30% as dense as bone (inverted?)"


@pytest.mark.parametrize(("lowest", "value", "count", "reason"), [
    (-1500.5, -1400, 50, TWICE), (-1500.5, -1400, 49, None), (-1500, -1400, 50, None), (-1600, -1200.5, 50, TWICE),
    (-1600, -1200, 50, None), (-1999.5, -1999.5, 50, TWICE), (-2000, -2000, 50, None), (-2000.5, -2000.5, 50, None),
])  # fmt: skip
def test_an_intercept_applied_twice(lowest: float, value: float, count: int, reason: str | None) -> None:
    check(chest((1, lowest, lowest), (count, value, value)), reason)


def box(values: np.ndarray, kind: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).permutation(values).reshape(10, 10, -1).astype(kind)


@pytest.mark.parametrize(("value", "count", "told"), [
    (0, 201, "20% of the voxels hold exactly 0 HU"), (0, 200, None), (-950, 900, None), (-949.5, 300, "exactly -949.5 HU"),
    (-1000, 999, None), (-1000, 1000, None), (40, 700, "70% of the voxels hold exactly 40 HU"),
])  # fmt: skip
def test_one_value_in_a_fifth_of_the_voxels_was_put_there(value: float, count: int, told: str | None) -> None:
    warning = filled(box(thousand((count, value, value), rest=(-901, 901))))
    assert warning is None if told is None else (warning is not None and told in warning), warning


def test_all_voxels_of_a_small_volume_are_looked_at_and_many_of_a_large_one() -> None:
    array = np.linspace(-900, 900, 1000, dtype=np.float32).reshape(10, 10, 10)
    array[1::2, :, 1::2] = 0
    assert "25% of the voxels" in str(filled(array))
    large = np.linspace(-900, 900, 140**3).reshape(140, 140, 140).round(2)
    assert filled(large) is None
    large[np.random.default_rng(0).random(large.shape) < 0.4] = 0
    assert "40% of the voxels" in str(filled(large))


def volume(array: np.ndarray) -> Volume:
    return Volume(array, np.diag([1.0, 2.0, 3.0, 1.0]), "x.nii", ["told before"])


HU = box(np.random.default_rng(0).permutation(chest((200, 300, 800))).repeat(27)[:8000], np.int16)
RAW = ((HU + 1024) // 2).astype(np.int16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_no_number(value: float) -> None:
    array = HU.astype(np.float32)
    array[1, 1, 1] = value
    for trust in ("auto", "trust-file", "trust-table"):
        with pytest.raises(PreprocessingError, match=r"^x\.nii: contains NaN or infinite values"):
            to_hu(volume(array), TABLE, trust)


def test_a_large_volume_is_decided_on_like_a_small_one() -> None:
    large = np.random.default_rng(0).choice(chest(), (140, 140, 140)).astype(np.int16)
    assert np.array_equal(to_hu(volume(large)).array, large)
    with pytest.raises(PreprocessingError, match="8-bit"):
        to_hu(volume(((large + 1024) // 10).astype(np.int16)))


def test_an_empty_volume_is_not_one_with_a_voxel_in_it() -> None:
    array = np.full((9, 9, 9), 12, np.int16)
    with pytest.raises(PreprocessingError, match="every voxel is 12: an empty volume"):
        to_hu(volume(array), None, "trust-file")
    array[1, 1, 1] = 13
    assert np.array_equal(to_hu(volume(array), None, "trust-file").array, array)
    with pytest.raises(PreprocessingError, match="As stored: only a few distinct values"):
        to_hu(volume(array))


@pytest.mark.parametrize("table", [None, TableFacts(1.0, 0.0)])
def test_without_a_table_values_stand_for_themselves(table: TableFacts | None) -> None:
    kept = to_hu(volume(HU), table)
    assert np.array_equal(kept.array, HU)
    assert kept.warnings == ["told before"]
    assert np.array_equal(kept.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert kept.source == "x.nii"
    with pytest.raises(PreprocessingError, match=r"With the table: no slope .* use --hu trust-file$"):
        to_hu(volume(RAW), table)
    with pytest.raises(PreprocessingError, match="no table lists a slope"):
        to_hu(volume(HU), table, "trust-table")
    assert np.array_equal(to_hu(volume(RAW), table, "trust-file").array, RAW)


@pytest.mark.parametrize("table", [TABLE, TableFacts(1.0, -1024.0), TableFacts(2.0, 0.0)])
def test_a_table_is_applied_where_it_makes_values_hounsfield_units(table: TableFacts) -> None:
    raw = ((HU - np.float32(table.intercept)) / np.float32(table.slope)).astype(np.float32)
    given = volume(raw)
    if not_hu(raw.ravel()) is not None:
        applied = to_hu(given, table)
        assert np.abs(applied.array - HU).max() < 1e-3
        assert applied.warnings == ["told before", "slope and intercept of the metadata table applied"]
        assert given.warnings == ["told before"]
        assert np.array_equal(given.array, raw)
    already = to_hu(volume(HU), table)
    assert np.array_equal(already.array, HU)
    assert already.warnings == ["told before", ALREADY_HU]
    trusted = to_hu(volume(HU), table, "trust-table")
    assert np.allclose(trusted.array, HU * table.slope + table.intercept)
    assert trusted.warnings == ["told before"]
    assert np.array_equal(to_hu(volume(raw), table, "trust-file").array, raw)


def test_both_readings_are_told_where_neither_is_a_ct() -> None:
    with pytest.raises(PreprocessingError, match=r"As stored: .*8-bit.* With the table: .*8-bit.*trust-table$"):
        to_hu(volume(box(np.arange(1000) % 200, np.int16)), TableFacts(1.0, 10.0))


@pytest.mark.parametrize(("kind", "stored", "least", "most"), [
    (np.int16, np.int16, -1000, 3000), (np.float32, np.float32, -40000, 40000), (np.int32, np.int16, -32768, 32767),
    (np.int64, np.int16, -32768, 32767), (np.float64, np.float32, -32768, 32767), (np.uint16, np.int16, 0, 32767),
])  # fmt: skip
def test_volumes_are_int16_or_float32(kind: type, stored: type, least: float, most: float) -> None:
    values = HU.copy() if np.dtype(kind).kind != "u" else np.abs(HU)
    values = values.astype(kind)
    wide = np.dtype(kind) != np.int16
    values[0, 0, :2] = (0 if kind is np.uint16 else -40000, 40000) if wide else (-1000, 3000)
    array = to_hu(volume(values), None, "trust-file").array
    assert array.dtype == stored
    assert (array.min(), array.max()) == (least, most)
    assert np.array_equal(array[1:], values[1:])


def test_a_masked_volume_is_told_of() -> None:
    array = HU.copy()
    array[:4] = 0
    (before, warning) = to_hu(volume(array)).warnings
    assert before == "told before"
    assert warning.startswith("masked or filled: 40% of the voxels hold exactly 0 HU")
