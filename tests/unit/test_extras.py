"""A missing extra is reported in one line with its name; only its own commands need it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctclip import extras
from ctclip.config import TextConfig

ROOT = Path(__file__).parents[2]


def test_every_package_is_declared_in_its_extra() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = metadata.packages_distributions()
    for extra, packages in extras.EXTRAS.items():
        names = {name.split(">")[0] for name in declared[extra]}
        assert {distributions[package][0].lower().replace("_", "-") for package in packages} == names


def test_what_is_imported_outside_training_comes_with_the_package() -> None:
    """Everything except training works without an extra, whatever packages are installed here."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    base = {re.split("[^A-Za-z0-9-]", name)[0].lower() for name in declared}
    distributions = metadata.packages_distributions()
    files = [*(ROOT / "ctclip").glob("**/*.py"), *(ROOT / "preprocessing").glob("**/*.py")]
    assert len(files) > 150
    foreign: dict[str, set[str]] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ctclip"}:
                if base.isdisjoint(found.lower().replace("_", "-") for found in distributions.get(name, [])):
                    foreign.setdefault(name, set()).add(path.parent.name)
    serving = {"fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client", "dicomweb_client"}
    # dicomweb_client requires requests and exposes its sessions and errors.
    serving |= {"requests"}
    words = {"sacrebleu", "rouge_score", "nltk"}
    owners = {
        "deepspeed": "training",
        "wandb": "training",
        "highdicom": "dicom",
        **dict.fromkeys(serving, "serve"),
        **dict.fromkeys(words, "evaluation"),
    }
    assert all(folders == {owners.get(name)} for name, folders in foreign.items()), foreign


@pytest.mark.parametrize(("extra", "package"), [(e, p) for e, packages in extras.EXTRAS.items() for p in packages])
def test_the_line_names_the_extra(extra: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = f'{package} is not installed: pip install "ctclip[{extra}]"'
    with pytest.raises(extras.MissingExtra) as missing:
        extras.check(extra)
    assert str(missing.value) == line
    with pytest.raises(extras.MissingExtra) as missing:
        extras.require(package)
    assert str(missing.value) == line


def test_a_module_that_needs_a_package_of_an_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(extras.MissingExtra, match=r"^tensorboard is not installed: .*ctclip\[train\]"):
        extras.require("torch.utils.tensorboard")


def test_any_other_missing_package_is_not_taken_for_one() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        extras.require("no_such_package")


def test_the_python_interface_says_the_same_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ctclip.config_files import load_config
    from ctclip.inference.index import Index
    from ctclip.models.text import with_lora
    from ctclip.training.loop import train

    for package in ("faiss", "peft", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    rows = pd.DataFrame({name: ["a"] for name in ("volume", "patient", "scan", "findings", "impression")})
    with pytest.raises(extras.MissingExtra, match=r"faiss .*ctclip\[index\]"):
        Index.build(rows, np.ones((1, 4), np.float32), None, "model")
    with pytest.raises(extras.MissingExtra, match=r"peft .*ctclip\[train\]"):
        with_lora(None, TextConfig())
    with pytest.raises(
        extras.MissingExtra, match=r"tensorboard, peft are not installed: pip install \"ctclip\[train\]"
    ):
        train(load_config("phantom_tiny", [f"data.store={tmp_path}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_importing_ctclip_is_cheap_and_its_modules_need_no_extra() -> None:
    code = f"""
import sys
for package in {sum(extras.EXTRAS.values(), ())!r}: sys.modules[package] = None
import ctclip, ctclip.cli
heavy = {{"torch", "numba", "pandas", "transformers"}} & set(sys.modules)
assert not heavy, heavy
import importlib, pkgutil
for module in pkgutil.walk_packages(ctclip.__path__, "ctclip."):
    # What serves is imported by `ctclip serve` alone.
    if not module.name.endswith("__main__") and not module.name.startswith("ctclip.serve."): importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
