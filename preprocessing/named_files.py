"""Find files by name: first the user's own, then those installed with ctclip.

Configurations, model sizes, preprocessing specs, prompt sets and protocols are all found here.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ctclip.preprocessing.errors import PreprocessingError

SUFFIXES = (".yaml", ".yml")
KINDS = {
    "": "configuration",
    "models": "model size",
    "preprocessing": "preprocessing spec",
    "prompts": "prompt set",
    "protocols": "protocol",
    "labels": "label set",
    "languages": "language",
    "terms": "file of terms",
    "adapt": "recipe of `ctclip adapt`",
}


def installed_folder() -> Path:
    """The folder of YAML files of ctclip, in a checkout or an installation."""
    return Path(__file__).parents[1] / "configs"


def installed_names(folder: str = "") -> list[str]:
    """Names of the files installed in ``configs/<folder>``, sorted."""
    return sorted(path.stem for path in (installed_folder() / folder).glob("*.yaml"))


def installed_file(name: str, folder: str = "") -> Path:
    """An installed file, regardless of files in the working directory, for defaults of commands."""
    return installed_folder() / folder / f"{name}.yaml"


def find_file(name: str | os.PathLike[str], folder: str = "") -> Path:
    """The YAML file called ``name``.

    In this order: the path itself, ``name.yaml`` or ``name.yml`` as a path (so that a file of the working directory comes
    before an installed one of the same name), and ``configs/<folder>/name.yaml`` of the installation. Raises
    PreprocessingError listing the installed names.
    """
    text = os.fspath(name)
    for candidate in (text, *(text + suffix for suffix in SUFFIXES if text)):
        # Unlike Path.is_file, this treats names that are too long as missing files.
        if os.path.isfile(candidate):
            return Path(candidate)
    names = installed_names(folder)
    # Only bare names are looked up; a path that does not exist must not become another file.
    if text in names:
        return installed_file(text, folder)
    kind = KINDS.get(folder, folder)
    if os.path.isdir(text):
        raise PreprocessingError(f"{text}: a folder, but a {kind} is one YAML file; {_choices(names)}")
    near = difflib.get_close_matches(Path(text).stem, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise PreprocessingError(f"no {kind} {text!r}{hint}: give the path of a YAML file, or {_choices(names)}")


def _choices(names: list[str]) -> str:
    return f"one of the installed: {', '.join(names)}" if names else "a path: none is installed"
