"""Altered copies are found among similar volumes, and so are recurring reports."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

from ctclip.audit.doubles import copied_pairs, find_doubles
from ctclip.audit.doubles_page import write_doubles
from ctclip.audit.fingerprints import candidates, correlation, detail, fingerprint, slice_vectors
from ctclip.audit.pictures import _computed, pictures
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.doubles import double_notes, recurring_reports, same_voxels
from ctclip.preprocessing.store import VolumeStore
from tests.unit.audit.conftest import SPEC, texture


def test_a_changed_copy_is_found_and_nothing_else(textures: VolumeStore, tmp_path: Path) -> None:
    doubles = find_doubles(textures, tmp_path)
    assert len(doubles.pairs) == 1
    pair = doubles.pairs.iloc[0]
    assert {pair["first"], pair["second"]} == {"volume_3", "volume_29"}
    assert pair["reversed"] == 1
    assert pair["is"] == "one scan under two splits and two patients"
    assert doubles.reports["scans"].tolist() == ["volume_29; volume_3"]
    assert doubles.reports["splits"].tolist() == ["train; valid"]
    assert find_doubles(textures, tmp_path).pairs.equals(doubles.pairs)


def test_voxels_are_read_once_for_all_commands(textures: VolumeStore, tmp_path: Path) -> None:
    names = textures.volumes
    first = pictures(textures, names[:20], tmp_path)
    with mock.patch("ctclip.audit.pictures._computed", side_effect=_computed) as read:
        both = pictures(textures, names[::-1], tmp_path)
        assert sorted(read.call_args.args[1]) == names[20:]
        # A damaged part is computed again, and volumes that were stored again are read again.
        damaged = next(path for path in tmp_path.rglob("prints.npy") if len(np.load(path)) == 10)
        half = damaged.read_bytes()[:200]
        damaged.unlink()
        damaged.write_bytes(half)
        again = pictures(textures, names, tmp_path)
        assert sorted(read.call_args.args[1]) == names[20:]
        for kept in tmp_path.rglob("volumes.json"):
            if "volume_29" in kept.read_text():
                kept.write_text("false")
        again = pictures(textures, names, tmp_path)
        assert sorted(read.call_args.args[1]) == names[20:]
    for kind in ("measures", "histograms", "prints", "middles"):
        np.testing.assert_array_equal(getattr(both, kind).whole()[::-1], getattr(again, kind).whole())
        np.testing.assert_array_equal(getattr(first, kind).whole(), getattr(again, kind).whole()[:20])
    np.testing.assert_array_equal(first.prints[3], fingerprint(textures.read(names[3]), SPEC))


def test_embeddings_bring_pairs_of_their_own(textures: VolumeStore, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = {name: vector for name, vector in zip(textures.volumes, random.normal(0, 1, (30, 8)), strict=True)}
    vectors["volume_29"] = vectors["volume_3"]
    doubles = find_doubles(textures, tmp_path, embeddings=vectors)
    assert len(doubles.pairs) == 1
    assert doubles.compared > find_doubles(textures, tmp_path).compared


def test_the_correlation_is_pearsons_where_they_overlap() -> None:
    hu = texture(0)
    moved = np.full_like(hu, -1000)
    moved[2:, :-3, 1:] = hu[:-2, 3:, :-1]
    value, is_reversed = correlation(hu, moved)
    assert value == pytest.approx(1, abs=0.02)
    assert not is_reversed
    value, is_reversed = correlation(hu, moved[::-1])
    assert value == pytest.approx(1, abs=0.02)
    assert is_reversed
    noise = np.random.default_rng(0).normal(0, 80, hu.shape)
    (one, box), (other, _) = detail(hu), detail(hu + noise)
    inside = tuple(slice(*ends) for ends in box)
    expected = np.corrcoef(one[inside].ravel(), other[inside].ravel())[0, 1]
    assert correlation(hu, hu + noise)[0] == pytest.approx(expected, abs=1e-4)
    assert correlation(hu, texture(1))[0] < 0.6


def test_a_copied_pair_is_told_from_a_report_that_recurs(textures: VolumeStore) -> None:
    # Volumes 5 and 7 have the report of 3 and 29, but other voxels.
    table = textures.cohort.copy()
    report = table["findings"][table["volume"] == "volume_3"].item()
    table.loc[table["volume"].isin(["volume_5", "volume_7"]), "findings"] = report
    vectors = np.random.default_rng(0).normal(0, 1, (len(table), 8))
    assert copied_pairs(textures, table, vectors) in ({"volume_3": "volume_29"}, {"volume_29": "volume_3"})
    assert copied_pairs(textures, textures.cohort.assign(findings="Normal."), vectors) == {}


def test_volumes_of_one_scan_are_not_compared() -> None:
    prints = np.stack([texture(seed) for seed in (0, 0, 1, 2)]).astype(np.float16)
    vectors = slice_vectors(prints)
    assert (0, 1) in candidates(vectors, np.array([0, 1, 2, 3]), 1)
    assert (0, 1) not in candidates(vectors, np.array([0, 0, 2, 3]), 1)


def test_the_page_and_the_tables(textures: VolumeStore, tmp_path: Path) -> None:
    write_doubles(textures, tmp_path / "doubles")
    assert "one scan under two splits" in (tmp_path / "doubles" / "doubles.csv").read_text()
    page = (tmp_path / "doubles" / "doubles.html").read_text()
    assert "data:image/png;base64" in page
    assert "<script>" in page


def test_preprocessing_notices_the_cheap_ones(textures: VolumeStore, tmp_path: Path) -> None:
    store = VolumeStore.create(tmp_path / "store", textures.spec)
    for number in range(3):
        store.write(f"volume_{number}", texture(0 if number == 2 else number))
    table = textures.cohort[textures.cohort["volume"].isin(["volume_0", "volume_1", "volume_2"])]
    assert same_voxels(store, store.volumes) == [["volume_0", "volume_2"]]
    notes = double_notes(store, table)
    assert len(notes) == 1
    assert notes[0].startswith("2 volumes of different scans have the same voxels")
    assert double_notes(store, table.assign(scan="s", patient="p")) == []
    assert recurring_reports(textures.cohort) == [["volume_3", "volume_29"]]
    assert recurring_reports(textures.cohort.assign(patient="p")) == []
    assert recurring_reports(textures.cohort.assign(findings="Normal chest.")) == []


def test_a_cohort_with_one_scan_under_two_names_is_noted(tmp_path: Path) -> None:
    affine = np.array([[-9.0, 0, 0, 50], [0, -9, 0, 40], [0, 0, 9, 30], [0, 0, 0, 1]])
    (tmp_path / "cohort").mkdir()
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        image = nib.Nifti1Image(texture(seed).astype(np.int16).transpose(2, 1, 0), affine)
        nib.save(image, tmp_path / "cohort" / f"{name}.nii.gz")
    report = preprocess_cohort(tmp_path / "cohort", tmp_path / "store", SPEC, workers=1, reading={"expect": "any"})
    assert [outcome.word for outcome in report.outcomes] == ["done"] * 3
    assert any(
        "2 volumes of different scans have the same voxels (the first: a and c)" in note for note in report.notes
    )


def test_candidates_are_the_nearest_volumes_of_different_scans() -> None:
    """Three reconstructions of one scan do not displace the next scan, whose own nearest scans are others."""
    base = np.random.default_rng(0).normal(size=(6, 4, 16))
    scans = np.array([0, 1, 1, 1, 2, 3, 4])
    reconstructions = [base[0] + noise * base[1] for noise in (0.3, 0.1, 0.2)]
    farther = [base[0] + base[2] + 0.01 * one for one in base[3:]]
    volumes = np.stack([base[0], *reconstructions, *farther])
    vectors = (volumes / np.linalg.norm(volumes, axis=2, keepdims=True)).astype(np.float32)
    of_the_first = {other for one, other in candidates(vectors, scans, 2) if one == 0}
    assert 2 in of_the_first
    assert of_the_first & {4, 5, 6}
