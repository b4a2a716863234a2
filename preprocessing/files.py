"""Writing that never leaves half a file under a final name."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str], *, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; flush it to disk and rename it over ``path`` on success.

    ``suffix`` is appended to the temporary name for writers that read the format off the name
    (``.nii.gz``). On any exception the temporary file is removed and ``path`` is left as it was.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=f".partial{suffix}", dir=final.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        flush(partial)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) whole or not at all."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Make sure that what was written is on the disk, not in a cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # There is no way to read the mask but to set it; mkstemp made the file private to its owner.
    mask = os.umask(0)
    os.umask(mask)
    return mask
