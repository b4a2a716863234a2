"""Convert CT files to model-ready voxels, independently of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctclip.preprocessing.errors import PreprocessingError

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Prepared, prepare
    from ctclip.preprocessing.spec import PreprocessingSpec

__all__ = ["Prepared", "PreprocessingError", "PreprocessingSpec", "prepare"]

_WHERE = {"Prepared": "pipeline", "prepare": "pipeline", "PreprocessingSpec": "spec"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that printing help does not wait for readers and compilers.
    if name not in _WHERE:
        raise AttributeError(f"module 'ctclip.preprocessing' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ctclip.preprocessing.{_WHERE[name]}"), name)
