"""Versions and revision of the code that produced a result, and the command."""

from __future__ import annotations

import platform
import subprocess
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path

from ctclip import __version__

# The arguments of `ctclip.cli.main`, preceded by "ctclip"; None in Python code that calls no command. ``sys.argv`` is
# not used, because in a notebook it is the command line of the kernel.
COMMAND: ContextVar[list[str] | None] = ContextVar("command", default=None)
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "monai",
    "numpy",
    "nibabel",
    "SimpleITK",
    "blosc2",
    "einops",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of its main dependencies."""
    installed = {"python": platform.python_version(), "ctclip": __version__}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def revision() -> str:
    """The git revision of this code, or "unknown" if it was installed without its history."""
    folder = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
