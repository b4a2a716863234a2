"""Cached embeddings are reused by every command that needs some of the same volumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ctclip.adaptation import examples
from ctclip.errors import DataError
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.unit.adaptation.conftest import Clinic, clinic, clinic_files

__all__ = ["clinic", "clinic_files"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the volumes that were embedded, in order."""
    names: list[str] = []
    embed = examples.embed_scans

    def noted(loaded, scans, *rest, **options):  # type: ignore[no-untyped-def]
        names.extend(scans.table["volume"])
        return embed(loaded, scans, *rest, **options)

    monkeypatch.setattr(examples, "embed_scans", noted)
    return names


def test_only_what_is_missing_or_changed_is_embedded(
    clinic: Clinic, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "TOGETHER", 10)
    folder = tmp_path / "store"
    shutil.copytree(clinic.store, folder)
    store, loaded = VolumeStore(folder), load_model(clinic.model)
    valid = StoredScans(store, "valid", loaded.spec, loaded.path)
    first = examples.cached_embeddings(loaded, valid, tmp_path / "cache", 4)
    assert encoded == list(valid.table["volume"])
    encoded.clear()
    every = examples.cached_embeddings(
        loaded, StoredScans(store, None, loaded.spec, loaded.path), tmp_path / "cache", 4
    )
    assert len(encoded) == 56
    assert not set(encoded) & set(first)
    for name, vector in first.items():
        np.testing.assert_array_equal(every[name], vector)
    some = StoredScans(store, "train", loaded.spec, loaded.path)
    some.table = some.table.iloc[5:2:-1]
    encoded.clear()
    assert list(examples.cached_embeddings(loaded, some, tmp_path / "cache", 4)) == ["v05", "v04", "v03"]
    assert not encoded
    # Stored again: its file of ten is embedded again.
    store.write("v60", np.full(store.spec.shape, 100, np.int16))
    again = examples.cached_embeddings(loaded, valid, tmp_path / "cache", 4)
    assert "v60" in encoded
    assert len(encoded) == 10
    assert not np.allclose(again["v60"], first["v60"])


def test_damaged_volumes_are_left_out(clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "store"
    shutil.copytree(clinic.store, folder)
    store, loaded = VolumeStore(folder), load_model(clinic.model)
    scans = StoredScans(store, "valid", loaded.spec, loaded.path)
    for name in scans.table["volume"].iloc[:3]:
        (path,) = (folder / "volumes").glob(f"{name}*")
        path.write_bytes(b"nothing")
    assert len(examples.cached_embeddings(loaded, scans, tmp_path / "cache", 4)) == 21
    assert capsys.readouterr().out.count("refused: ") == 3
    # Now all missing files are damaged.
    assert len(examples.cached_embeddings(loaded, scans, tmp_path / "cache", 4)) == 21
    scans.table = scans.table.iloc[:3]
    with pytest.raises(DataError, match=str(scans.table["volume"].iloc[0])):
        examples.cached_embeddings(loaded, scans, tmp_path / "other", 4)
