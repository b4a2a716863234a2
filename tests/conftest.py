"""Fixtures that several tests need: the shared reference data, a tiny cohort, and its store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Small tensors gain nothing from threads, and processes forked after OpenMP has started its threads hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="Run the tests that are marked slow, too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: pytest --slow runs it"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data in a folder beside the checkout; tests that need it are skipped, with the reason, if it is
    missing."""
    if not SHARED.is_dir():
        pytest.skip("the reference data is not beside the checkout")
    return SHARED


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of pytest-xdist's workers creates and all workers read: no test may change it."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = base / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (made := folder.with_name(f"{name}.made")).exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic cohort of 24 volumes."""
    from ctclip.phantom.cohort import Options, make_cohort

    options = Options(volumes=24, seed=5, scale=8.0, valid_fraction=0.3)
    return made_once(tmp_path_factory, "cohort", lambda folder: make_cohort(folder, options, workers=1))


@pytest.fixture(scope="session")
def store(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the cohort with the phantom's spec."""
    from ctclip.preprocessing.cohort_run import preprocess_cohort
    from ctclip.preprocessing.spec import PreprocessingSpec

    spec = PreprocessingSpec.load("phantom")
    return made_once(tmp_path_factory, "store", lambda folder: preprocess_cohort(cohort, folder, spec, workers=1))
