"""Identify the scan of a stored volume, so that a resumed run detects if another scan now has its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctclip.preprocessing.facts import TableFacts

BLOCK = 4096
# Options that change the voxels of a scan.
OPTIONS = {"hu": "auto", "series": None, "geometry": "auto"}


def source_digest(path: Path, facts: TableFacts, reading: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a scan's name, size and some of its bytes, its ``facts``, and how it is read.

    Folders and times are ignored, because a cohort may be moved or copied. Empty if the scan cannot be read, for
    example after the user has deleted it.
    """
    try:
        content = _folder(path) if path.is_dir() else _file(path)
    except OSError:
        return ""
    options = {name: reading.get(name) or default for name, default in OPTIONS.items()}
    stated = {name: None if value is None else [float(one) for one in value] if isinstance(value, tuple) else float(value)
              for name, value in dataclasses.asdict(facts).items()}  # fmt: skip
    values = json.dumps([path.name, content, stated, options], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def _file(path: Path) -> list[Any]:
    """Size, and a digest of the first bytes and of some in the middle, in which uncompressed scans of the same shape
    differ."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        block = stream.read(BLOCK)
        stream.seek(size // 2)
        return [size, hashlib.sha256(block + stream.read(BLOCK)).hexdigest()]


def _folder(path: Path) -> list[Any]:
    """Number and sizes of the files below a folder, and the bytes of the first of them."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [len(files), sum(file.stat().st_size for file in files), *(_file(files[0]) if files else ())]
