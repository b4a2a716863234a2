"""A real Chromium, and a service with a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import run, trained  # noqa: F401
from tests.end_to_end.test_serve import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# WebGL without a GPU.
GRAPHICS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=GRAPHICS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def looked_at(trained: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:  # noqa: F811
    """A service with a store and an index."""
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("looked_at")
    model = trained / "model"
    assert run("index", "--model", model, "--store", store, "--output", folder / "index").returncode == 0
    service = Served("--model", model, "--store", store, "--index", folder / "index", folder=folder / "tmp")
    yield service
    service.stop()
