"""Packages that only some commands need, installed as extras: ``pip install "ctclip[train]"``.

Reading, preprocessing, detection, embedding and evaluation need none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ctclip.errors import CtclipError

# Import names; the names on the package index are in pyproject.toml.
EXTRAS = {
    "train": ("deepspeed", "tensorboard", "peft", "psutil"),
    "index": ("faiss",),
    "dicom": ("highdicom", "dicomweb_client"),
    "reports": ("sacrebleu", "rouge_score", "nltk"),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
}


class MissingExtra(CtclipError):
    """A package of an extra is not installed; the message names the extra."""


def require(module: str) -> Any:
    """Import ``module``, which belongs to an extra. Raises MissingExtra if the extra is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if absent in packages:
                raise _missing(extra, [absent]) from error
        raise


def check(extra: str) -> None:
    """Raise MissingExtra if a package of ``extra`` is not installed. Imports nothing."""
    absent = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    if absent:
        raise _missing(extra, absent)


def _missing(extra: str, packages: list[str]) -> MissingExtra:
    verb = "is" if len(packages) == 1 else "are"
    return MissingExtra(f'{", ".join(packages)} {verb} not installed: pip install "ctclip[{extra}]"')
