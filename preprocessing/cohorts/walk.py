"""List all files below a folder, following links, from which a layout chooses the scans."""

from __future__ import annotations

import os
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from ctclip.preprocessing.errors import PreprocessingError

# Files and folders that operating systems create: macOS, Windows, Synology.
SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")


@dataclass
class Tree:
    """``files`` by folder and name; ``unused`` counts entries that cannot be scans, by kind."""

    root: Path
    files: list[Path] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def named(self, end: str) -> list[Path]:
        """Files whose name ends in ``end``, in any case."""
        return [path for path in self.files if path.name.lower().endswith(end)]

    def others(self, used: set[Path]) -> Counter[str]:
        """``unused``, plus counts of the files that are not in ``used``, by suffix."""
        kinds = (path.suffix.lower() or "no suffix" for path in self.files if path not in used)
        return self.unused + Counter(f"other files ({kind})" for kind in kinds)


def walk(root: Path) -> Tree:
    """The files below ``root``.

    Links to files and folders are followed and each folder is read once; inside a linked folder outside ``root``,
    further links to other folders are not followed. Hidden files and folders, and those of operating systems, are
    counted and skipped.
    """
    tree = Tree(root)
    top = os.path.realpath(root)
    if not os.access(root, os.R_OK | os.X_OK):
        raise PreprocessingError(f"{root}: cannot be listed (no permission)")
    seen: set[str] = set()
    # Folders before links, so that files reachable both ways get their own path.
    links: deque[tuple[Path, str]] = deque()
    _descend(root, top, tree, seen, links)
    while links:
        link, base = links.popleft()
        target = os.path.realpath(link)
        within = _inside(target, top)
        if target in seen or _inside(top, target):
            tree.unused["links to a folder that is read anyway"] += 1
        elif not within and base != top and not _inside(target, base):
            tree.unused["links that lead on from a linked folder"] += 1
        else:
            _descend(link, top if within else (base if _inside(target, base) else target), tree, seen, links)
    tree.files.sort(key=lambda path: (path.parent.parts, path.name))
    return tree


def _descend(folder: Path, base: str, tree: Tree, seen: set[str], links: deque[tuple[Path, str]]) -> None:
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            tree.unused["folders that cannot be listed"] += 1
            continue
        for entry in entries:
            name, path = entry.name.lower(), Path(entry.path)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                # A link to itself.
                is_folder = is_file = False
            if name.startswith("._"):
                tree.unused["files of macOS (._)"] += 1
            elif name.startswith(".") or name in SYSTEM_FILES or (is_folder and name in SYSTEM_FOLDERS):
                tree.unused["hidden or system " + ("folders" if is_folder else "files")] += 1
            elif is_folder and entry.is_symlink():
                links.append((path, base))
            elif is_folder:
                waiting.append(path)
            elif is_file:
                tree.files.append(path)
            else:
                tree.unused["broken links" if entry.is_symlink() else "neither files nor folders"] += 1


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
