"""Caches of libraries move to TMPDIR only if their usual location is not writable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ctclip import caches

VARIABLES = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME", "TORCH_HOME", "TRITON_HOME")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a TMPDIR for the test, with no cache variable set; the name of a folder decides whether it is
    writable."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Make ``os.access`` report that these folders, and everything in them, cannot be written (root can write
    anywhere)."""
    usual = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not any(Path(path).is_relative_to(f) for f in folders) and usual(path, mode)
    )


def test_nothing_is_set_where_the_usual_places_can_be_written(environment: Path) -> None:
    caches.use_writable_caches()
    assert not set(VARIABLES) & set(os.environ)
    assert not list((environment / "tmp").iterdir())


def test_a_read_only_installation(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, caches.PACKAGE)
    caches.use_writable_caches()
    assert set(VARIABLES) & set(os.environ) == {"NUMBA_CACHE_DIR"}
    folder = environment / "tmp" / f"ctclip-{os.getuid()}"
    assert Path(os.environ["NUMBA_CACHE_DIR"]).is_relative_to(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_subpackage_that_cannot_be_written_is_enough(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, caches.PACKAGE / "phantom")
    caches.use_writable_caches()
    assert "NUMBA_CACHE_DIR" in os.environ


def test_no_writable_home(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, environment / "home")
    monkeypatch.setenv("TORCH_HOME", "/mine")
    caches.use_writable_caches()
    assert set(VARIABLES) & set(os.environ) == set(VARIABLES) - {"NUMBA_CACHE_DIR"}
    assert os.environ["TORCH_HOME"] == "/mine"
    places = {os.environ[name] for name in ("MPLCONFIGDIR", "HF_HOME", "TRITON_HOME")}
    assert len(places) == 3
    assert all(Path(place).is_relative_to(environment / "tmp") for place in places)


def test_models_fetched_before_are_still_found_in_a_home_that_cannot_be_written(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (environment / "home" / ".cache" / "huggingface").mkdir(parents=True)
    refuse(monkeypatch, environment / "home")
    caches.use_writable_caches()
    assert "HF_HOME" not in os.environ
    assert "MPLCONFIGDIR" in os.environ


def test_the_home_of_another_user_that_may_not_be_entered(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``docker --user``, which keeps the image's HOME=/root."""
    home, usual = environment / "home", os.stat
    refuse(monkeypatch, home)

    def stat(path: object, *args: object, **options: object) -> os.stat_result:
        if isinstance(path, str | Path) and home in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    caches.use_writable_caches()
    assert set(VARIABLES) & set(os.environ) == set(VARIABLES) - {"NUMBA_CACHE_DIR"}


@pytest.mark.parametrize("planted", ["link", "group", "file", "stranger"])
def test_a_folder_that_others_can_write_is_not_used(
    planted: str, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, caches.PACKAGE)
    shared = environment / "tmp" / f"ctclip-{os.getuid()}"
    if planted == "link":
        (environment / "elsewhere").mkdir(mode=0o700)
        shared.symlink_to(environment / "elsewhere")
    elif planted == "file":
        shared.write_text("")
    else:
        shared.mkdir(mode=0o700)
        if planted == "group":
            shared.chmod(0o770)
        elif os.getuid() == 0:
            os.chown(shared, 12345, 12345)
        else:
            pytest.skip("only root can give a folder away")
    caches.use_writable_caches()
    place = Path(os.environ["NUMBA_CACHE_DIR"])
    assert not place.is_relative_to(shared)
    assert place.parent.parent == environment / "tmp"
    assert place.parent.stat().st_mode & 0o777 == 0o700


def test_no_place_at_all_does_not_stop_the_import(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, caches.PACKAGE)
    monkeypatch.setattr(tempfile, "tempdir", str(environment / "absent"))
    caches.use_writable_caches()
    assert "NUMBA_CACHE_DIR" not in os.environ
