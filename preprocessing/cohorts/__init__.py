"""Cohorts of any layout on disk, read into one table.

A layout is one module here with ``recognised(tree)`` and ``read(tree) -> Cohort``; a new module is found without
registration.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ctclip.preprocessing.cohorts.folder import scan_id
from ctclip.preprocessing.cohorts.table import (
    COLUMNS,
    FILES,
    Cohort,
    check_table,
    cohort_table,
    hold_out,
    identity,
    label_names,
)
from ctclip.preprocessing.cohorts.walk import Tree, walk
from ctclip.preprocessing.errors import PreprocessingError

__all__ = [
    "COLUMNS",
    "FILES",
    "Cohort",
    "check_table",
    "cohort_table",
    "hold_out",
    "identity",
    "label_names",
    "layouts",
    "read_cohort",
    "scan_id",
]

PARTS = ("dicom_folders", "table", "walk")


def layouts() -> list[str]:
    """Names of the known layouts."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in PARTS]


def read_cohort(
    root: str | os.PathLike[str],
    layout: str = "auto",
    *,
    labels: Sequence[str] | None = None,
    keep_no_chest: bool = False,
) -> Cohort:
    """The cohort of ``root``: a folder of a known layout, a table of paths, or a single scan.

    ``layout``: one of ``layouts()``, or auto: the first that recognises the folder, else a plain folder; or the user's
    own reader, ``module:function`` or the name of an entry point of the group ``ctclip.cohorts``. ``labels`` names the
    label columns of a table of paths. ``keep_no_chest`` keeps the volumes that CT-RATE lists as showing no chest, and is
    refused for other layouts.
    """
    folder, chosen = Path(root), layout.replace("-", "_")
    if not folder.exists():
        raise PreprocessingError(f"{folder}: no such cohort")
    if (reader := _reader(layout)) is not None:
        _check_no_chest(keep_no_chest, layout)
        own = reader(folder)
        if not isinstance(own, Cohort):
            raise PreprocessingError(f"--layout {layout}: returned {type(own).__name__}, not a Cohort")
        check_table(own.table, folder)
        return own
    if chosen != "auto" and chosen not in layouts():
        raise PreprocessingError(f"no cohort layout {layout!r}; there are auto, {', '.join(layouts())}")
    tree = walk(folder) if folder.is_dir() else Tree(folder, [folder])
    if chosen == "auto":
        names = (name for name in layouts() if import_module(f"{__name__}.{name}").recognised(tree))
        chosen = next(names, "folder")
    _check_no_chest(keep_no_chest, chosen)
    options: dict[str, dict[str, Any]] = {"ct_rate": {"keep_no_chest": keep_no_chest}, "folder": {"labels": labels}}
    cohort: Cohort = import_module(f"{__name__}.{chosen}").read(tree, **options.get(chosen, {}))
    check_table(cohort.table, folder)
    return cohort


def _check_no_chest(keep: bool, layout: str) -> None:
    if keep and layout != "ct_rate":
        raise PreprocessingError(
            f"--keep-no-chest applies only to the layout ct-rate, which lists such volumes; the layout of this cohort is "
            f"{layout.replace('_', '-')}"
        )


def _reader(name: str) -> Callable[[Path], Cohort] | None:
    """The user's own reader, or None if ``name`` is not one."""
    for entry in metadata.entry_points(group="ctclip.cohorts"):
        if entry.name == name:
            loaded: Callable[[Path], Cohort] = entry.load()
            return loaded
    module, colon, function = name.partition(":")
    if not colon:
        return None
    if not module or not function:
        raise PreprocessingError(f"--layout {name}: write your own reader as module:function")
    if "" not in sys.path:
        sys.path.append("")
    try:
        reader: Callable[[Path], Cohort] = getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise PreprocessingError(f"--layout {name}: {error}; name a function of a module in this folder") from error
    if not callable(reader):
        raise PreprocessingError(f"--layout {name}: is {type(reader).__name__}, not a function")
    return reader
