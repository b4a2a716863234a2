"""Temporary folders that do not outlive a killed process, so that no patient's scan remains in them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ctclip.preprocessing.files import hold, remove_if_abandoned


@contextlib.contextmanager
def scratch_folder(prefix: str, suffix: str = "", parent: Path | None = None) -> Iterator[Path]:
    """A new folder with a random name in ``parent`` (default: the temporary folder), removed at the end if it still
    exists.

    Such folders of killed processes are removed first.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    left = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}{re.escape(suffix)}")
    for name in os.listdir(parent):
        if left.fullmatch(name):
            remove_if_abandoned(parent / name, "a folder")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            # Another process removed it as abandoned.
            continue
        try:
            if hold(descriptor, folder):
                yield folder
                return
        finally:
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)
