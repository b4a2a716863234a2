"""From a file to voxels: geometry, Hounsfield units, the store, cohorts, and what is refused."""

from __future__ import annotations

import itertools
import os
import shutil
import zlib

import blosc2
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.cohort_run import preprocess_cohort, quarantine_damaged
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.facts import TableFacts, table_facts
from ctclip.preprocessing.geometry import orient, resample, resampled_affine
from ctclip.preprocessing.hounsfield import to_hu
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return make_scan(1, 1, scale=8.0).reconstructions[0].hu


def save(path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    """[slice, row, column] LPS+ as NIfTI."""
    affine = np.diag([-4.0, -4.0, 5.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return str(path)


def test_all_48_orientations_give_the_same_voxels(tmp_path, hu) -> None:
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0]))
    expected = prepare(save(tmp_path / "a.nii.gz", hu), SPEC).voxels
    count = 0
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = image.as_reoriented(np.array(list(zip(axes, flips, strict=True))))
            nib.save(turned, tmp_path / "b.nii")
            assert np.allclose(prepare(tmp_path / "b.nii", SPEC).voxels, expected, atol=1e-5)
            count += 1
    assert count == 48


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"])
def test_nrrd_and_metaimage_are_the_nifti_they_were_made_of(tmp_path, hu, name: str) -> None:
    """Written by ITK, which supports both: rotated about an axis, with an offset, compressed and not."""
    sine, cosine = np.sin(0.2), np.cos(0.2)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]) @ np.diag([-4.0, -4.0, 5.0])
    affine[:3, 3] = 31, -7, 55
    expected = read(save(tmp_path / "scan.nii", hu, affine))
    sitk.WriteImage(sitk.ReadImage(tmp_path / "scan.nii"), tmp_path / name, useCompression=name != "scan.mhd")
    found = read(tmp_path / name)
    assert np.array_equal(found.array, expected.array.transpose(2, 1, 0))
    assert np.allclose(found.affine, expected.affine[:, [2, 1, 0, 3]], atol=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(*[st.floats(0.7, 6.0)] * 3),
    st.tuples(*[st.integers(12, 40)] * 3),
    st.tuples(*[st.floats(-3, 3)] * 3),
    st.floats(-200, 200),
)
def test_a_ramp_is_resampled_exactly_inside(spacing, shape, slope, level) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[:, ::-1] @ np.eye(3)
    affine[:3, :3] = np.array([[0, 0, spacing[2]], [0, spacing[1], 0], [spacing[0], 0, 0]])
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T
    values = (level + world @ np.array(slope)).astype(np.float32)
    if np.abs(values).max() > 1000:
        return
    ramp = Volume(values, affine, "ramp")
    found, moved = resample(ramp, SPEC), resampled_affine(ramp, SPEC)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SPEC.shape], indexing="ij"), axis=-1)
    back = index @ moved[:3, :3].T + moved[:3, 3]
    expected = level + back @ np.array(slope)
    source = back @ np.linalg.inv(affine[:3, :3]).T
    margin = np.maximum(1, np.ceil(np.array(SPEC.spacing) / np.array(spacing)))
    inside = ((source >= margin) & (source <= np.array(shape) - 1 - margin)).all(axis=-1)
    assert np.abs(found - expected)[inside].max(initial=0) < 0.05


def test_an_oblique_point_keeps_its_place() -> None:
    angle = np.radians(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = (turn @ np.diag([2.0, 2.0, 2.0]))[:, ::-1]
    array = np.full((20, 30, 30), -1000, dtype=np.int16)
    array[9:12, 19:22, 7:10] = 500
    place = affine[:3, :3] @ np.array([10, 20, 8])
    straight = orient(Volume(array, affine, "oblique"))
    where = np.argwhere(straight.array > 0).mean(axis=0)
    assert np.linalg.norm(straight.affine[:3, :3] @ where + straight.affine[:3, 3] - place) < 1.0
    assert "oblique by 12.0" in straight.warnings[0]


def test_units_are_decided_from_evidence(hu) -> None:
    table = TableFacts(1.0, -1024.0)
    volume = lambda array: Volume(array, np.eye(4), "x.nii")  # noqa: E731
    kept = to_hu(volume(hu), table)
    assert np.array_equal(kept.array, hu), "the known trap: already in HU, the table says otherwise"
    assert "not applied again" in kept.warnings[0]
    raw = to_hu(volume((hu + 1024).astype(np.int16)), table)
    assert np.array_equal(raw.array, hu)
    with pytest.raises(PreprocessingError, match=r"As stored: .* With the table: "):
        to_hu(volume((hu + 1024).astype(np.int16)), TableFacts(1.0, 0.0))
    assert np.array_equal(to_hu(volume(hu), table, "trust-table").array, hu.astype(np.float32) - 1024)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda hu: (hu > 0).astype(np.int16), "mask"),
        (lambda hu: ((hu + 1024) // 17).clip(0, 255).astype(np.int16), "8-bit"),
        (lambda hu: np.where(hu > 0, np.nan, hu).astype(np.float32), "NaN"),
        (lambda hu: (hu - 1024).astype(np.int16), "Hounsfield"),
        (lambda hu: (hu.clip(-1000, 1000) / 1000).astype(np.float32), "already scaled"),
        (lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32), "already scaled"),
        (lambda hu: hu.clip(-160, 240), "display window"),
        (lambda hu: (hu // 2).astype(np.int16), "instead of -1000"),
        (lambda hu: (-hu).astype(np.int16), "Hounsfield"),
        (lambda hu: padded(hu + 1024, -2000), "intercept of -1024 not yet applied"),
        (lambda hu: np.random.default_rng(0).gamma(2, 150, hu.shape).astype(np.int16), "none as low as air"),
    ],
)
def test_what_is_no_ct_is_refused_with_the_reason(hu, make, said: str) -> None:
    with pytest.raises(PreprocessingError, match=said):
        to_hu(Volume(make(hu), np.eye(4), "x.nii"))


def padded(hu: np.ndarray, value: int) -> np.ndarray:
    """Everything outside a round field of view set to a scanner's padding."""
    rows, columns = np.ogrid[: hu.shape[1], : hu.shape[2]]
    middle = (np.array(hu.shape[1:]) - 1) / 2
    outside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 > middle.min() ** 2
    return np.where(outside, value, hu).astype(np.int16)


@pytest.mark.parametrize("value", [-1024, -2000, -3024])
def test_padding_is_no_evidence(hu, value: int) -> None:
    """A volume that is mostly padding is not taken for a mask, nor padded raw numbers for Hounsfield units."""
    wide = np.full((hu.shape[0], 256, 256), value, np.int16)
    wide[:, 90 : 90 + hu.shape[1], 60 : 60 + hu.shape[2]] = hu
    for axes in itertools.permutations(range(3)):
        assert to_hu(Volume(wide.transpose(axes), np.eye(4), "x")).warnings == []
    raw = to_hu(Volume(padded(hu + 1024, value), np.eye(4), "x"), TableFacts(1.0, -1024.0))
    assert raw.warnings == ["slope and intercept of the metadata table applied"]
    inside = padded(np.zeros_like(hu), 1) == 0
    assert np.array_equal(raw.array[inside], hu[inside])


def test_padding_outside_the_field_of_view_becomes_air(tmp_path, hu) -> None:
    padded = hu.copy()
    padded[:, :6] = -3024
    assert prepare(save(tmp_path / "p.nii", padded), SPEC).hu.min() >= -1024


def test_hostile_files_are_refused_before_they_cost_anything(tmp_path, hu) -> None:
    save(tmp_path / "good.nii", hu)
    whole = (tmp_path / "good.nii").read_bytes()
    header = bytearray(whole[:352])
    header[42:48] = np.array([32000, 32000, 32000], dtype="<i2").tobytes()
    cases = {
        "empty.nii": b"", "cut.nii": whole[:5000], "cut.nii.gz": b"\x1f\x8b\x08" + whole[:200], "text.nii": b"hello " * 200,
        "huge.nii": bytes(header), "zip.zip": b"PK nothing", "some.dcm": b"DICM" * 100, "x.nrrd": b"NRRD0004\nsizes: 9 9\n",
        "x.mha": b"ObjectType = Image\nNDims = 3\nDimSize = 9000 9000 9000\n",
    }  # fmt: skip
    for name, content in cases.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(PreprocessingError) as refused:
            read(folder / name)
        assert name.split(".")[0] in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(PreprocessingError, match="no such file"):
        read(tmp_path / "absent.nii.gz")


def test_a_store_is_whole_checked_and_mended(tmp_path, cohort, store) -> None:
    opened = VolumeStore(store)
    assert len(opened.volumes) == 24
    name = opened.volumes[0]
    region = (slice(3, 9), slice(10, 30), slice(0, 7))
    assert np.array_equal(opened.read(name, region), opened.read(name)[region])
    mine = tmp_path / "store"
    spec = PreprocessingSpec.load("phantom")
    preprocess_cohort(cohort, mine, spec, workers=1, shard=(1, 6))
    copy = VolumeStore(mine)
    damaged = copy.file(copy.volumes[0])
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(bytes(content))
    assert quarantine_damaged(mine) == [damaged.stem]
    preprocess_cohort(cohort, mine, spec, workers=1, shard=(1, 6))
    assert copy.intact(damaged.stem)
    assert np.array_equal(copy.read(damaged.stem), opened.read(damaged.stem))
    assert not [p for p in os.listdir(mine / "volumes") if "partial" in p]
    with pytest.raises(PreprocessingError, match="another --output"):
        VolumeStore.create(mine, SPEC)
    with pytest.raises(PreprocessingError, match="not a file name"):
        copy.read("../../etc/passwd")


@pytest.mark.parametrize("shape", [(20, 100, 500), (33, 96, 480), (5, 7, 9)])
@pytest.mark.parametrize("window", [(-1000.0, 1000.0), (-1350.0, 150.0)])
def test_a_training_sample_is_the_stored_volume_through_the_window(tmp_path, shape, window) -> None:
    """With whole chunks, and with chunks that a volume does not fill."""
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), shape, hu_window=window))
    hu = np.random.default_rng(0).integers(-2000, 3000, shape).astype(np.int16)
    store.write("a", hu)
    low, high = window
    expected = (np.clip(hu.astype(np.float64), low, high) - low) / (high - low) * 2 - 1
    assert np.abs(store.voxels("a") - expected).max() < 1e-6


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("spacing", [(5.0, 0.9, 0.8), (0.9, 2.1, 2.3), (1.0, 1.0, 1.0)])
def test_hu_stored_and_model_ready_voxels_are_one_volume(spacing, published) -> None:
    """Slices farther apart and closer than the grid's, margins of every width: the same values in all three forms."""
    hu = np.random.default_rng(0).integers(-1024, 1500, (30, 34, 38)).astype(np.int16)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1.0
    volume = Volume(hu, affine, "x")
    spec = PreprocessingSpec("t", (2.0, 1.5, 1.7), (40, 30, 52), published_geometry=published)
    found = resample(volume, spec)
    stored, voxels = resample(volume, spec, "stored"), resample(volume, spec, "voxels")
    assert stored.dtype == np.int16
    assert np.array_equal(stored, np.rint(found))
    assert np.abs(voxels - np.clip(found, -1000, 1000) / 1000).max() < 1e-6
    assert found.shape == ((40, 52, 30) if published else (40, 30, 52))


def test_a_crop_reads_its_chunks_alone(tmp_path) -> None:
    """The chunks next to a crop are destroyed on disk: the crop can still be read, a larger one cannot."""
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), (128, 128, 128)))
    hu = np.random.default_rng(0).integers(-1000, 1000, (128, 128, 128)).astype(np.int16)
    store.write("a", hu)
    content = store.file("a").read_bytes()
    opened = blosc2.ndarray_from_cframe(content)
    chunks = opened.schunk
    assert chunks.nchunks == 2
    chunk = chunks.get_chunk(1)
    assert content.count(chunk) == 1
    store.file("a").write_bytes(content.replace(chunk, chunk[:32] + b"\xff" * (len(chunk) - 32)))
    first = slice(3, 64), slice(3, 96), slice(3, 64)
    assert np.array_equal(store.read("a", first), hu[first])
    for damaged in (
        lambda: store.read("a", (slice(3, 65), *first[1:])),
        lambda: store.read_into("a", np.empty_like(hu)),
    ):
        with pytest.raises(PreprocessingError, match="damaged"):
            damaged()


@pytest.mark.parametrize("chunks", [None, (16, 48, 60), (16, 96, 60), (7, 96, 60)])
def test_a_volume_is_read_into_a_batch_whatever_its_chunks(tmp_path, chunks) -> None:
    """``None``: as stores are written now; the others as earlier versions or other programs wrote them."""
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), (75, 96, 60)))
    hu = np.random.default_rng(0).integers(-1000, 1000, (75, 96, 60)).astype(np.int16)
    store.write("a", hu)
    if chunks:
        packed = blosc2.asarray(hu, chunks=chunks)
        packed.schunk.vlmeta["crc32"] = zlib.crc32(hu.tobytes())
        store.file("a").write_bytes(packed.to_cframe())
    batch = np.full((2, *hu.shape), 7, np.int16)
    store.read_into("a", batch[1])
    assert np.array_equal(batch[1], hu)
    assert (batch[0] == 7).all()
    assert np.abs(store.voxels("a") - np.clip(hu / 1000, -1, 1)).max() < 1e-6


def test_a_file_of_the_store_that_changed_is_found(tmp_path) -> None:
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), (70, 70, 70)))
    random = np.random.default_rng(0)
    hu = random.integers(-1000, 1000, (70, 70, 70)).astype(np.int16)
    store.write("a", hu)
    content = store.file("a").read_bytes()
    for length in (0, 1, 100, 500, len(content) // 2, len(content) - 1):
        store.file("a").write_bytes(content[:length])
        assert not store.intact("a")
    for place in [*range(0, 250), *random.integers(250, len(content), 150)]:
        changed = bytearray(content)
        changed[place] ^= int(random.integers(1, 256))
        store.file("a").write_bytes(bytes(changed))
        if store.intact("a"):
            assert np.array_equal(store.read("a"), hu)
        else:
            for read in (store.read, store.voxels, lambda name: store.read_into(name, np.empty_like(hu))):
                with pytest.raises(PreprocessingError, match=r"a\.b2nd: damaged; `ctclip preprocess --verify`"):
                    read("a")


def test_a_column_of_the_store_that_changed_is_found(tmp_path) -> None:
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), (8, 9, 10)))
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, (8, 9, 10)).astype(np.uint8)
    store.write_column("masks", "a", masks)
    assert np.array_equal(VolumeStore(tmp_path / "s").read_column("masks", "a"), masks)
    path = store.path / "columns" / "masks" / "a.npz"
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(random.integers(1, 256))
        path.write_bytes(bytes(changed))
        try:
            assert np.array_equal(store.read_column("masks", "a"), masks), place
        except PreprocessingError:
            refused += 1
    assert refused > masks.nbytes
    np.save(tmp_path / "array.npy", masks)
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(PreprocessingError, match=r"a\.npz: no array 'masks'"):
        store.read_column("masks", "a")


def test_sizes_in_a_file_of_the_store_are_checked_before_anything_is_decompressed(tmp_path, monkeypatch) -> None:
    """Chunks and blocks that do not match the shape: a decoder allocates memory according to the stated sizes."""
    store = VolumeStore.create(tmp_path / "s", PreprocessingSpec("t", (3.0, 3.0, 3.0), (70, 70, 70)))
    store.write("a", np.arange(70**3, dtype=np.int32).reshape(70, 70, 70).astype(np.int16))
    content = store.file("a").read_bytes()
    packed = store._open("a")
    sizes = [packed.schunk.chunksize, packed.schunk.blocksize]
    places = [
        (place, form)
        for size in sizes
        for form in ("<i4", ">i4")
        for place in range(len(content) - 4)
        if content[place : place + 4] == np.array(size, form).tobytes()
    ]
    assert len(places) > 2
    monkeypatch.setattr(blosc2.SChunk, "decompress_chunk", lambda *given, **named: pytest.fail("decompressed"))
    for place, form in places:
        for other in (1, sizes[0] // 2, 2**31 - 1):
            store.file("a").write_bytes(content[:place] + np.array(other, form).tobytes() + content[place + 4 :])
            with pytest.raises(PreprocessingError, match="damaged"):
                store.read("a")


def test_what_killed_runs_left_is_swept_away(tmp_path) -> None:
    store = VolumeStore.create(tmp_path / "s", SPEC)
    old, young = (store.path / "volumes" / f".{name}.b2nd.abcd_123.partial" for name in ("old", "young"))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.sweep()
    assert not old.exists()
    assert young.exists()
    assert store.volumes == []


def test_interpolation_is_part_of_the_spec(hu) -> None:
    coarse = {"spacing": (15.0, 12.0, 12.0), "shape": (6, 8, 8)}
    specs = [PreprocessingSpec("a", **coarse), PreprocessingSpec("a", **coarse, interpolation="linear")]
    assert specs[0].interpolation == "antialiased"
    assert specs[0].hash != specs[1].hash
    noise = np.random.default_rng(0).normal(0, 100, (40, 60, 60)).astype(np.float32)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 3.0, 2.0, 2.0, 1.0
    smooth, sharp = (resample(Volume(noise, affine, "x"), spec).std() for spec in specs)
    assert smooth < sharp / 3
    assert PreprocessingSpec.load("ct_clip").interpolation == "linear"
    with pytest.raises(PreprocessingError, match="antialiased or linear"):
        PreprocessingSpec("a", **coarse, interpolation="cubic")


def test_the_stored_volume_is_the_prepared_one(cohort, store) -> None:
    opened = VolumeStore(store)
    row = opened.cohort.iloc[0]
    ready = prepare(cohort / row["path"], opened.spec, table=table_facts(row))
    assert np.abs(opened.read(row["volume"]) - ready.hu).max() <= 0.5
    assert "not applied again" in ready.warnings[0]


def test_the_cohort_table_of_ct_rate(cohort) -> None:
    found = read_cohort(cohort)
    table = found.table
    assert found.warnings == found.unmatched == []
    assert len(table) == 24
    assert set(table["split"]) == {"train", "valid"}
    assert not table["findings"].str.fullmatch("(?i)not given.?").any()
    assert set(table["Lung nodule"].unique()) <= {0, 1}


def test_bad_tables_are_named(tmp_path, cohort) -> None:
    source = cohort / "dataset"
    (tmp_path / "dataset").mkdir()
    for name in ("train", "valid"):
        shutil.copytree(source / name, tmp_path / "dataset" / name)
    reports = pd.read_csv(source / "radiology_text_reports" / "train_reports.csv")
    reports.head(-2).to_csv(tmp_path / "train_reports.csv", index=False)
    assert "volumes have no report" in read_cohort(tmp_path).unmatched[0]
    reports.drop(columns="Findings_EN").to_csv(tmp_path / "train_reports.csv", index=False)
    with pytest.raises(PreprocessingError, match=r"train_reports\.csv: column 'Findings_EN' is missing"):
        read_cohort(tmp_path)


def test_real_scans(shared) -> None:
    folder = shared / "ct"
    spec = PreprocessingSpec.load("ct_224")
    for name in (
        "dicom/lungdx_A0001_philips_B_5mm_64",
        "dicom/ts_abd_contrast_siemens_20",
        "nifti/ts_abdpelvis_3mm_RAS.nii.gz",
    ):
        assert prepare(folder / name, spec).voxels.shape == spec.shape
    tilted = prepare(folder / "dicom" / "dcm_qa_ct" / "gantry_tilt_ge", spec)
    assert any("gantry tilt of 18.5" in w for w in tilted.warnings)
    assert any("gaps of 1.08 to 7.00" in w for w in tilted.warnings)
    for name in ("dicom/dcm_qa_ct/localizer", "dicom/dcm_qa_ct/derived_screenshots", "nifti/CT_pitch.nii.gz"):
        with pytest.raises(PreprocessingError):
            prepare(folder / name, spec)
    with pytest.raises(PreprocessingError, match="not a chest"):
        prepare(folder / "nifti" / "ts_abdpelvis_3mm_RAS.nii.gz", spec, expect="chest")
    assert prepare(folder / "dicom" / "lungdx_A0001_philips_B_5mm_64", spec, expect="chest").warnings == []
