"""Temporary folders of killed processes are removed, those of running processes are kept."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from ctclip.preprocessing import files, scratch
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.scratch import scratch_folder


def killed_in_a_file(path: Path) -> None:
    with written_beside(path, suffix=".png") as partial:
        partial.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_folder(parent: Path) -> None:
    with scratch_folder(".model.", ".partial", parent) as folder:
        (folder / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def run(target, path: Path) -> None:  # type: ignore[no-untyped-def]
    process = multiprocessing.get_context("fork").Process(target=target, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_file_is_rid_of_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    run(killed_in_a_file, path)
    run(killed_in_a_file, tmp_path / "other.png")
    assert len(list(tmp_path.iterdir())) == 2
    with written_beside(path) as held:
        files.sweep(path)
        assert held.exists(), "what a living process is writing stays"
        held.write_text("whole")
    names = [entry.name for entry in tmp_path.iterdir()]
    assert len(names) == 2
    assert "figure.png" in names
    assert any(name.startswith(".other.png.") for name in names), "only its own"


def test_a_folder_is_rid_of_what_a_killed_process_left(tmp_path: Path) -> None:
    run(killed_in_a_folder, tmp_path)
    mine = tmp_path / ".model.thesis.partial"
    mine.mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    with (
        scratch_folder(".model.", ".partial", tmp_path) as first,
        scratch_folder(".model.", ".partial", tmp_path) as second,
    ):
        assert first.is_dir()
        assert second.is_dir()
        assert sorted(tmp_path.iterdir()) == sorted([first, second, mine])
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("before_open", [False, True])
def test_what_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_open: bool
) -> None:
    """Another process looks for abandoned folders after one has been created and before it is locked."""
    swept = []
    real_hold, real_open = files.hold, os.open

    def hold(descriptor: int, path: Path) -> bool:
        if not before_open and not swept:
            swept.append(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return real_hold(descriptor, path)

    def opened(path, *rest, **given):  # type: ignore[no-untyped-def]
        if before_open and not swept and "held-" in str(path):
            swept.append(path)
            shutil.rmtree(path)
        return real_open(path, *rest, **given)

    monkeypatch.setattr(scratch, "hold", hold)
    monkeypatch.setattr(files, "hold", hold)
    monkeypatch.setattr(os, "open", opened)
    with scratch_folder("held-", "", tmp_path) as folder:
        (folder / "a").write_text("a")
    assert len(swept) == 1
    swept.clear()
    write_text(tmp_path / "table.csv", "whole")
    assert (tmp_path / "table.csv").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
