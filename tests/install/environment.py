"""New environments that contain the wheel and, linked from this environment, exactly the packages that it declares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def checked(command: Iterable[object], **options: object) -> str:
    """Standard output of a command that must succeed."""
    words = [str(word) for word in command]
    # With a path to the checkout, pip would take the wheel for installed.
    settings = {"env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}} | options
    done = subprocess.run(words, capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The wheel of the checkout, its sdist, and the wheel of the sdist, built from a copy of the checkout's files."""
    source = folder / "source"
    names = checked(["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]).splitlines()
    for name in names:
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    checked([sys.executable, *wheel, folder / "wheel", "."], cwd=source)
    (folder / "sdist").mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    checked([sys.executable, "-c", code, folder / "sdist"], cwd=source)
    (sdist,) = (folder / "sdist").iterdir()
    checked([sys.executable, *wheel, folder / "again", sdist], cwd=folder)
    shutil.rmtree(source)
    return next((folder / "wheel").iterdir()), sdist, next((folder / "again").iterdir())


def new_environment(folder: Path, wheel: Path, extras: tuple[str, ...] = ()) -> Path:
    """A virtual environment with the wheel and its declared packages only; returns its ``bin``."""
    checked([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    checked([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (wheel_metadata,) = metadata.distributions(name="ctclip", path=[str(site)])
    for distribution in _declared(wheel_metadata, extras):
        for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))).resolve())
    return folder / "bin"


def _declared(root: metadata.Distribution, extras: tuple[str, ...]) -> list[metadata.Distribution]:
    """The distributions that ``root`` requires with ``extras``, and their requirements."""
    seen: dict[tuple[str, tuple[str, ...]], metadata.Distribution] = {}
    waiting = [(root, extras)]
    while waiting:
        distribution, chosen = waiting.pop()
        for line in distribution.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in (*chosen, "")):
                continue
            key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
            if key not in seen:
                seen[key] = metadata.distribution(requirement.name)
                waiting.append((seen[key], key[1]))
    return list(seen.values())
