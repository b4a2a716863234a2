"""Regions of a stored volume contain the right voxels and are checked chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest

from ctclip.preprocessing import PreprocessingError, PreprocessingSpec
from ctclip.preprocessing.store import CHUNKS, VolumeStore

SPEC = PreprocessingSpec("test", spacing=(2.0, 2.0, 2.0), shape=(70, 200, 160))
REGIONS = [
    (slice(0, 70), slice(0, 200), slice(0, 160)), (slice(3, 4), slice(5, 9), slice(0, 7)), (slice(30, 64), slice(None), slice(-9, None)),
    (slice(66, 99), slice(0, 3), slice(0, 3)), (slice(40, 40), slice(0, 3), slice(0, 3)),
]  # fmt: skip


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, SPEC.shape).astype(np.int16)


@pytest.fixture
def store(hu: np.ndarray, tmp_path: Path) -> VolumeStore:
    store = VolumeStore.create(tmp_path / "store", SPEC)
    store.write("v", hu)
    return store


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_what_numpy_cuts(store: VolumeStore, hu: np.ndarray, region: tuple[slice, slice, slice]) -> None:
    np.testing.assert_array_equal(store.read("v", region), hu[region])


def test_steps_are_refused(store: VolumeStore) -> None:
    with pytest.raises(ValueError, match="step 1"):
        store.read("v", (slice(0, 9, 2), slice(0, 3), slice(0, 3)))


def test_a_spoiled_byte_never_gives_other_voxels(store: VolumeStore, hu: np.ndarray) -> None:
    content = store.file("v").read_bytes()
    random, refused = np.random.default_rng(1), 0
    region = (slice(25, 45), slice(50, 150), slice(20, 120))
    for place in random.integers(0, len(content), 120):
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << random.integers(8)
        store.file("v").write_bytes(spoiled)
        try:
            np.testing.assert_array_equal(store.read("v", region), hu[region])
        except PreprocessingError:
            refused += 1
    assert refused > 20


def test_a_volume_of_an_earlier_version_is_read_whole_and_checked(store: VolumeStore, hu: np.ndarray) -> None:
    packed = blosc2.open(str(store.file("v")), mode="a")
    del packed.schunk.vlmeta[CHUNKS]
    np.testing.assert_array_equal(store.read("v", REGIONS[2]), hu[REGIONS[2]])
    packed.schunk.vlmeta["crc32"] = 1
    with pytest.raises(PreprocessingError, match="damaged"):
        store.read("v", REGIONS[2])
    assert not store.intact("v")
