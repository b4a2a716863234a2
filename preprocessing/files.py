"""Atomic writing: a file appears complete or not at all, and is never written through a link."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ctclip.preprocessing.errors import PreprocessingError

KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"),
)  # fmt: skip
# Settings, records and figures; the largest are vocabularies of some ten megabytes.
LARGEST_TEXT = 1 << 28


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of file at ``path`` itself, in words ("a symbolic link", "a folder", "a file", ...); None if there is
    nothing."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((words for test, words in KINDS if test(mode)), "a special file")


def regular(path: Path) -> Path:
    """``path``, if it is a regular file or a link to one. Raises OSError otherwise, because reading a FIFO or a
    terminal would block."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = next((words for test, words in KINDS if test(mode)), "a special file")
        raise OSError(errno.EINVAL, f"is {what}, not a file", str(path))
    return path


def text_of(path: Path) -> str:
    """The UTF-8 text of a regular file of at most ``LARGEST_TEXT`` bytes, with line ends converted to line feeds. Raises
    OSError and UnicodeDecodeError."""
    if regular(path).stat().st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"is larger than {LARGEST_TEXT >> 20} MiB", str(path))
    return path.read_text(encoding="utf-8")


def as_path(path: object, what: str) -> Path:
    """Convert a path given from Python: text, bytes or path-like. Raises PreprocessingError for anything else, and for
    an empty path, which would mean the current folder; ``what`` describes the expected value."""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | os.PathLike):
        raise PreprocessingError(f"expected {what}, found {type(path).__name__}")
    if path == "":
        raise PreprocessingError(f"expected {what}, found an empty one")
    return Path(path)


@contextlib.contextmanager
def written_beside(
    path: str | os.PathLike[str], *, suffix: str = "", mode: int | None = None, once: bool = False
) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; flush it to disk and rename it over ``path`` on success.

    ``suffix`` is appended to the temporary name for writers that read the format off the name (``.nii.gz``). ``mode``:
    the file's permissions; by default those of the user's umask. ``once``: keep a file that another process has written
    in the meantime. On any exception the temporary file is removed and ``path`` is unchanged; temporary files that
    killed processes left beside ``path`` are removed first. Raises PreprocessingError if ``path`` is anything but a
    regular file or a new name.
    """
    refuse_special(Path(path))
    # Absolute, because pandas and pyarrow expand a path that begins with ~.
    final = Path(path).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    if not once:
        _remove_abandoned(final, _partials(final.parent))
    descriptor, partial = _new_partial(final, suffix)
    try:
        yield partial
        flush(partial)
        os.chmod(partial, permissions() if mode is None else mode)
        # Check again: the caller may have taken hours, and renaming would replace a link or a device.
        refuse_special(Path(path))
        if once:
            _put_once(partial, final)
        else:
            os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


def _new_partial(final: Path, suffix: str) -> tuple[int, Path]:
    """A new temporary file beside ``final``, and the open descriptor that locks it."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name[:60]}.", suffix=f".partial{suffix}", dir=final.parent)
        if hold(descriptor, Path(name)):
            return descriptor, Path(name)
        os.close(descriptor)


def hold(descriptor: int, path: Path) -> bool:
    """Lock the new file or folder at ``path`` until the descriptor is closed or this process ends in any way.

    Returns False if another process removed it as abandoned before it was locked.
    """
    # On a file system without locks, no file can be recognised as abandoned.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return path.exists()


@contextlib.contextmanager
def in_turn(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock ``folder`` during a change to it; other processes wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # On a file system without locks, nobody waits.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_if_abandoned(path: Path, kind: str) -> None:
    """Remove a temporary file or folder (``kind_of``) that no living process holds (see ``hold``)."""
    if kind_of(path) != kind:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if kind == "a folder":
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove temporary files that killed processes left beside ``path``."""
    final = Path(path)
    if final.parent.is_dir():
        _remove_abandoned(final, _partials.__wrapped__(final.parent))


@cache
def _partials(folder: Path) -> tuple[str, ...]:
    """Names of temporary files in a folder, cached because a store holds tens of thousands of files."""
    return tuple(name for name in os.listdir(folder) if ".partial" in name)


def _remove_abandoned(final: Path, names: tuple[str, ...]) -> None:
    left = re.compile(rf"\.{re.escape(final.name[:60])}\.[a-z0-9_]{{8}}\.partial(\.\w+)*")
    for name in names:
        if left.fullmatch(name):
            remove_if_abandoned(final.with_name(name), "a file")


def _put_once(partial: Path, final: Path) -> None:
    try:
        os.link(partial, final)
    except FileExistsError:
        return
    except OSError:
        # A file system without hard links.
        if not final.exists():
            os.replace(partial, final)


def refuse_special(path: Path) -> None:
    """Raise PreprocessingError if a link, a folder, a device or a FIFO lies where a file is to be written."""
    kind = kind_of(path)
    if kind not in (None, "a file"):
        raise PreprocessingError(f"{path}: is {kind}, and a file would be written there; give another name")


def write_text(path: str | os.PathLike[str], text: str, *, once: bool = False) -> None:
    """Write ``text`` (UTF-8) atomically; see ``written_beside``."""
    with written_beside(path, once=once) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Flush written data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def permissions() -> int:
    """The permissions of a new file by the user's umask."""
    # The umask can be read only by setting it; mkstemp has made the file private to its owner.
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
