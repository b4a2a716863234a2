"""Draft reports for the volumes of a store, in a table that `ctclip evaluate --reports` scores."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctclip.drafting.drafter import Drafter
from ctclip.drafting.writers import SECTIONS, Detected
from ctclip.errors import DataError
from ctclip.explanation.place import stored_by_side
from ctclip.heads.locator import LocateHead
from ctclip.inference.run import batches
from ctclip.inference.scans import StoredScans
from ctclip.inference.sides import certain_sides
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_file, claimed_file, file_holds

COLUMNS = ("volume", "patient", "scan", *SECTIONS, "detected", "method", "model")
HEADER = ",".join(COLUMNS).encode()


def draft_store(
    drafter: Drafter, scans: StoredScans, refused: dict[str, str], *, count: int | None = None, batch: int = 8
) -> pd.DataFrame:
    """One row with ``COLUMNS`` for each volume of ``scans`` (at most ``count``). ``detected``: the findings that the
    detector calls, joined by "; ". Volumes that cannot be read are added to ``refused``."""
    model, rows = drafter.folder.model, []
    places = list(range(len(scans.table)))[:count]
    for indices, voxels, _ in batches(scans, places, batch, refused, "drafting"):
        with torch.inference_mode():
            encoded = model.encode(torch.from_numpy(voxels).to(model.device))
        every = Detected.by(drafter.detector, encoded)
        if drafter.located is not None:
            every = [
                replace(one, sides=_sides(drafter.located, volume, scans))
                for one, volume in zip(every, voxels, strict=True)
            ]
        for number, written, detected in zip(indices, drafter.writer.write_all(encoded, every), every, strict=True):
            identity = scans.table.iloc[number][["volume", "patient", "scan"]]
            rows.append(
                [*identity, *_texts(written), "; ".join(detected.findings()), drafter.words, drafter.folder.hash]
            )
    if not rows:
        raise DataError(next(iter(refused.values()), f"{scans.store.path}: no volume to draft"))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _sides(located: LocateHead, voxels: np.ndarray, scans: StoredScans) -> dict[str, str]:
    """The certain sides of the findings in a stored volume (1, D, H, W)."""
    halves = partial(stored_by_side, voxels=voxels[0], spec=scans.store.spec)
    return certain_sides(located, torch.from_numpy(voxels)[None], halves)


def write_drafts(table: pd.DataFrame, output: Path, *, force: bool = False) -> None:
    """Write the table. Raises PreprocessingError if ``output`` is a file of another kind."""
    with claimed_file(output):
        check_drafts(output, force=force)
        with written_beside(output) as partial:
            write_csv(partial, table)


def check_drafts(output: Path, *, force: bool = False) -> None:
    """Raise unless drafts may be written to ``output``."""
    if output.suffix != ".csv":
        raise DataError(f"{output}: end the name in .csv")
    check_file(output, file_holds(HEADER), force=force)


def _texts(sections: dict[str, str]) -> list[str]:
    return [sections.get(section, "") for section in SECTIONS]
