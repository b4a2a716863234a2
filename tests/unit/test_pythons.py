"""Every file is read by every Python that the package declares, without a warning; `make test PYTHON=python3.13` runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

DECLARED = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())


def interpreter(version: str) -> str:
    """A Python of that version; the test is skipped if none can be started."""
    beside = Path.home() / ".pyenv" / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(beside.glob(f"{version}.*/bin/python")))]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, found):
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return path
    pytest.skip(f"Python {version} is not installed")


@pytest.mark.parametrize("version", DECLARED)
def test_every_declared_python_reads_the_files(version: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [interpreter(version), "-W", "error", "-m", "compileall", "-q", "ctclip", "preprocessing", "tests"],
        cwd=ROOT, env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_versions_are_those_that_may_be_installed() -> None:
    assert DECLARED == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["pythons"]["strategy"]["matrix"]["python"] == DECLARED
