"""The undisturbed run that other runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import command, losses, recorded, run


@pytest.fixture(scope="session")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, with a record of its batches in the same folder."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(store, output), recorded(output.with_name("batches")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(output)) >= 8
    output.with_name("said").write_text(done.stderr)
    return output
