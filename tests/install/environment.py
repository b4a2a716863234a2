"""New environments that hold the wheel and, linked from this environment, exactly the packages it declares."""

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
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The wheel of the checkout, its sdist, and the wheel of that, built from a copy of the checkout's own files."""
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
    """A virtual environment with the wheel and what it declares, and nothing else; returns its ``bin``."""
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
    """The distributions that ``root`` requires with ``extras``, and what those require."""
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


class Stranger:
    """Runs commands as a user that exists nowhere else, owns nothing but ``folder`` and has no home.

    Without root's rights it runs them as the present user, and ``created`` cannot tell its files from others.
    """

    number = 61234

    def __init__(self, folder: Path, python: Path) -> None:
        self.root = os.getuid() == 0
        self.cwd, self.tmp, self.output = folder / "cwd", folder / "tmp", folder / "output"
        for path in (self.cwd, self.tmp, self.output):
            path.mkdir(parents=True)
            if self.root:
                os.chown(path, self.number, self.number)
        self.prefix: list[str] = []
        if self.root:
            self.prefix = ["setpriv", f"--reuid={self.number}", f"--regid={self.number}", "--clear-groups"]
            probe = subprocess.run([*self.prefix, str(python), "--version"], capture_output=True, check=False)
            if probe.returncode != 0:
                # The interpreter lies in root's home: to read everything is allowed, to write is not.
                self.prefix += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "TMPDIR": str(self.tmp),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }
        words = [*self.prefix, *(str(word) for word in command)]
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=self.cwd, env=environment)

    def created(self) -> list[str]:
        """Files of this user anywhere but in its output and its TMPDIR. It can write nowhere that is pruned here."""
        pruned = ["/proc", "/sys", "/usr", "/lib", "/opt", str(self.output), str(self.tmp), "*/site-packages"]
        conditions = [word for path in pruned for word in ("-o", "-path", path)][1:]
        command = ["find", "/", "/dev/shm", "-xdev", "(", *conditions, ")", "-prune", "-o"]
        found = subprocess.run(
            [*command, "-uid", str(self.number), "-print"], capture_output=True, text=True, check=False
        )
        return sorted(set(found.stdout.splitlines()) - {str(self.cwd)})
