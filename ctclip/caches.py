"""Set cache folders of libraries on machines where the usual location is not writable.

In a container that is read-only, or runs as a user without a home, neither the ``__pycache__`` of this package nor
``~/.cache`` is writable: numba would refuse to start, and matplotlib would rebuild its list of fonts in every process.
They get a private folder in TMPDIR instead. Variables that are already set are not changed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent


def use_writable_caches() -> None:
    """Set the cache variables whose usual location is not writable; child processes inherit them."""
    # Without HOME and an entry in /etc/passwd, this remains "~", which libraries would create as a folder.
    home = Path.home() if os.path.isabs(os.path.expanduser("~")) else None
    usual = {
        "MPLCONFIGDIR": home and home / ".config" / "matplotlib",
        "HF_HOME": home and home / ".cache" / "huggingface",
        "TORCH_HOME": home and home / ".cache" / "torch",
        "TRITON_HOME": home,
    }
    unset = {name for name, folder in usual.items() if folder is None or not _writable(folder)}
    if any(not _writable(folder / "__pycache__") for folder in (PACKAGE, *_subpackages())):
        unset.add("NUMBA_CACHE_DIR")
    unset = {name for name in unset if name not in os.environ}
    # Models downloaded earlier are read from there even if it is not writable.
    if home is not None and os.path.isdir(home / ".cache" / "huggingface"):
        unset.discard("HF_HOME")
    if not unset:
        return
    try:
        folder = _private_folder()
    except OSError:
        # There is no writable folder; each library reports this when it is used.
        return
    for name in unset:
        os.environ[name] = str(folder / name.partition("_")[0].lower())


def _subpackages() -> list[Path]:
    return [path.parent for path in PACKAGE.glob("*/__init__.py")]


def _writable(folder: Path) -> bool:
    """Whether ``folder`` is writable, or can be created."""
    # pathlib's `exists` raises for a folder inside one that may not be entered, such as root's home.
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """The folder in TMPDIR that this user's processes share, or a new one for this process and its children.

    Compiled code is loaded from it, so a folder that belongs to another user, or that others can write to, is not
    used.
    """
    folder = Path(tempfile.gettempdir()) / f"ctclip-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="ctclip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
