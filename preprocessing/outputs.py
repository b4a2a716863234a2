"""The rule for where commands may write.

A command writes to a folder only if it is new, empty, or recognisably written by this package; existing output is
replaced only if it is from the same run or the user gives ``--force``. Nothing is written through a symbolic link.
While a command writes, it holds a lock, so that two commands cannot mix their tables.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import kind_of, permissions, refuse_special, sweep, write_text

LOCK, RUN = ".lock", "run.json"
HOLDER = b"process "
SEEN_BYTES = 1 << 20
# Errors of file systems without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
Recognised = Callable[[Path], bool]


def check_file(path: str | os.PathLike[str], is_ours: Recognised, *, force: bool = False) -> None:
    """Raise PreprocessingError unless a file may be written at ``path``: a new name, or a file that ``is_ours``
    recognises.

    ``force`` replaces any regular file, but never a link, a folder, a device or a FIFO.
    """
    final = Path(path)
    refuse_special(final)
    if kind_of(final) == "a file" and not force and not is_ours(final):
        raise PreprocessingError(
            f"{path}: exists and was not written by this command; give another --output, or delete it"
        )
    _check_writable(final.parent, path)


def check_same(path: Path, content: bytes, what: str, *, force: bool = False) -> None:
    """Raise PreprocessingError if a file at ``path`` has other content, unless ``force``: a command may be repeated, but not
    replace the result of another run. ``what``: the word for its content."""
    if not force and path.is_file() and path.read_bytes() != content:
        raise PreprocessingError(f"{path}: holds other {what}; give another --output, or replace it with --force")


def check_folder(path: str | os.PathLike[str], is_ours: Recognised, what: str) -> None:
    """Raise PreprocessingError unless a command may write to the folder ``path``: a new name, an empty folder, or one
    that ``is_ours`` recognises; ``what`` describes its expected contents."""
    folder = Path(os.path.abspath(path))
    kind = kind_of(folder)
    if kind == "a symbolic link":
        raise PreprocessingError(f"{path}: is a symbolic link; give the folder that it points to")
    if kind not in (None, "a folder"):
        raise PreprocessingError(f"{path}: is {kind}, not a folder; give another --output")
    _check_writable(folder, path)
    if kind == "a folder" and not _is_empty(folder) and not is_ours(folder):
        raise PreprocessingError(f"{path}: is not empty and holds no {what}; give another --output, or an empty folder")


def check_replaceable(path: str | os.PathLike[str], is_ours: Recognised, what: str) -> None:
    """``check_folder`` for a folder that will be replaced as a whole, which is impossible for the current folder."""
    check_folder(path, is_ours, what)
    final, here = os.path.abspath(path), os.getcwd()
    if here == final or here.startswith(final.rstrip("/") + "/"):
        raise PreprocessingError(
            f"{path}: is the current folder or contains it, and cannot be replaced; give another one"
        )
    _check_writable(Path(final).parent, path)


def put_in_place(partial: Path, final: Path, is_ours: Recognised, what: str) -> None:
    """Rename the folder ``partial`` to ``final``; an existing ``final`` is replaced if ``is_ours``. Its files get the
    permissions of the user's umask: safetensors, for one, writes for the owner alone.

    A folder cannot be renamed over another, so the old one is first renamed to a random name, and restored if the new
    one cannot be moved.
    """
    check_replaceable(final, is_ours, what)
    aside: Path | None = None
    try:
        if kind_of(final) is not None:
            aside = Path(tempfile.mkdtemp(prefix=f".{final.name[:60]}.", suffix=".replaced", dir=final.parent))
            final.rename(aside / final.name)
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(permissions())
        partial.rename(final)
    except OSError as error:
        if aside is not None:
            # Do not replace output that another command has written in the meantime.
            with contextlib.suppress(OSError):
                (aside / final.name).rename(final)
        raise PreprocessingError(
            f"{final}: could not be put in its place ({error.strerror}); if another command was writing it, run this one again"
        ) from error
    finally:
        if aside is not None and kind_of(final) is not None:
            shutil.rmtree(aside, ignore_errors=True)


def made_by_us(folder: Path, marks: Mapping[str, bytes] | None = None) -> bool:
    """Whether this package has written to ``folder``: it contains its lock file, its ``run.json``, or one of ``marks``
    (a file that contains the given bytes)."""
    return (
        _holds(folder / LOCK, HOLDER, 200) or bool(_runs(folder))
        or any(_holds(folder / name, content) for name, content in (marks or {}).items())
    )  # fmt: skip


def claim_folder(folder: Path) -> IO[bytes]:
    """Create and lock ``folder`` until the returned file is closed or this process ends in any way.

    The caller must have checked the folder. The lock file remains; it is harmless. Raises PreprocessingError if another
    process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(
        folder / LOCK,
        f"{folder}: another run is using this folder ({{holder}}); wait for it, stop it, or choose another --output",
    )


@contextlib.contextmanager
def claimed_folder(
    folder: Path, command: str, key: str, tables: Sequence[str], is_ours: Recognised, *, force: bool = False
) -> Iterator[None]:
    """Check ``folder`` and lock it while ``command`` writes its ``tables`` (file names) there.

    ``key`` is saved in ``run.json``. Tables with another key belong to another run and are refused unless ``force``;
    the same run may be resumed or repeated. Raises PreprocessingError.
    """
    check_run(folder, command, key, tables, is_ours, force=force)
    with contextlib.closing(claim_folder(folder)):
        # Check again: another command may have finished in the meantime.
        check_run(folder, command, key, tables, is_ours, force=force)
        for name in (*tables, RUN):
            sweep(folder / name)
        write_text(folder / RUN, json.dumps({"runs": {**_runs(folder), command: key}}, indent=2))
        yield


def check_run(
    folder: Path, command: str, key: str, tables: Sequence[str], is_ours: Recognised, *, force: bool = False
) -> None:
    """Raise PreprocessingError in the same cases as ``claimed_folder``, except for a lock that is held."""
    check_folder(folder, is_ours, f"output of `ctclip {command}`")
    for name in (*tables, RUN):
        refuse_special(folder / name)
    existing = [name for name in tables if (folder / name).exists()]
    if existing and _runs(folder).get(command) != key and not force:
        raise PreprocessingError(
            f"{folder}: {existing[0]} belongs to another run of `ctclip {command}` (other scans, model or options); "
            f"give another "
            f"--output, or replace it with --force"
        )


@contextlib.contextmanager
def claimed_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the file ``path`` while it is written, with a lock file beside it that is removed at the end.

    Raises PreprocessingError if another process is writing it.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = final.with_name(f".{final.name[:200]}.lock")
    stream = _lock(lock, f"{path}: another command is writing it ({{holder}}); wait for it, or choose another --output")
    try:
        sweep(final)
        yield
    finally:
        lock.unlink(missing_ok=True)
        stream.close()


def _lock(path: Path, busy: str) -> IO[bytes]:
    """An exclusive lock on ``path``, which is created if missing; links are not followed. ``busy``: the error, with a
    placeholder for the holder."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            kind = kind_of(path)
            if kind in (None, "a file"):
                raise PreprocessingError(
                    f"{path}: cannot be written ({error.strerror}); give another --output"
                ) from error
            raise PreprocessingError(f"{path}: is {kind}, where a lock file should be; remove it") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PreprocessingError(f"{path}: is {kind_of(path)}, where a lock file should be; remove it")
        stream = os.fdopen(descriptor, "r+b")
        content = stream.read(200)
        if content and not content.startswith(HOLDER):
            stream.close()
            raise PreprocessingError(f"{path}: is not a lock file of ctclip; give another --output, or remove it")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                stream.close()
                holder = content.decode(errors="replace").strip() or "another process"
                raise PreprocessingError(busy.format(holder=holder)) from error
            print(
                f"note: {path.parent}: this file system has no locks: run only one command here at a time",
                file=sys.stderr,
            )
        # The previous holder may have removed it since it was opened; the lock is then on an unlinked file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                break
        stream.close()
    # Overwritten in place, so that it is never empty.
    stream.seek(0)
    stream.write(HOLDER + f"{os.getpid()} on {socket.gethostname()}".encode())
    stream.truncate()
    stream.flush()
    return stream


def _is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from a lock file that another command has just created."""
    names = [path.name for path in folder.iterdir()]
    return not names or (names == [LOCK] and kind_of(folder / LOCK) == "a file" and not (folder / LOCK).stat().st_size)


def _runs(folder: Path) -> dict[str, Any]:
    """The key of each command that has written to ``folder``, from ``run.json``; empty if there is none."""
    path = folder / RUN
    if kind_of(path) != "a file" or path.stat().st_size > SEEN_BYTES:
        return {}
    try:
        values = plain_json.read(path)
    except (OSError, ValueError):
        return {}
    runs = values.get("runs") if isinstance(values, dict) else None
    return runs if isinstance(runs, dict) else {}


def _holds(path: Path, content: bytes, most: int = SEEN_BYTES) -> bool:
    """Whether a regular file has ``content`` in its first ``most`` bytes."""
    if kind_of(path) != "a file":
        return False
    try:
        with path.open("rb") as stream:
            return content in stream.read(most)
    except OSError:
        return False


def file_holds(content: bytes) -> Recognised:
    """A function that recognises files with ``content`` near their beginning."""
    return lambda path: _holds(path, content)


def _check_writable(folder: Path, path: str | os.PathLike[str]) -> None:
    """Raise if ``folder``, or the nearest one above it that exists, cannot be written into."""
    folder = Path(os.path.abspath(folder))
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise PreprocessingError(f"{path}: {folder} is {kind_of(folder)}, not a folder; give another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PreprocessingError(f"{path}: {folder} cannot be written into; give another --output")
