"""What several tests need: the shared reference data, a tiny cohort, and its store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

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
    """Reference data that lies beside the checkout; tests that need it skip, saying so, where it does not."""
    if not SHARED.is_dir():
        pytest.skip("the reference data is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic cohort of 24 volumes."""
    from ctclip.phantom.cohort import Options, make_cohort

    root = tmp_path_factory.mktemp("cohort") / "cohort"
    make_cohort(root, Options(volumes=24, seed=5, scale=8.0, valid_fraction=0.3), workers=1)
    return root


@pytest.fixture(scope="session")
def store(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's store under the phantom's spec."""
    from ctclip.preprocessing.pipeline import preprocess_cohort
    from ctclip.preprocessing.spec import PreprocessingSpec

    folder = tmp_path_factory.mktemp("store") / "store"
    preprocess_cohort(cohort, folder, PreprocessingSpec.load("phantom"), workers=1)
    return folder
