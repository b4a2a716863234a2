"""Records the patients whose labels a head or model was adapted to, so that none of them is scored as a test
patient."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation.calibration import digest
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text

FILE = "adaptation.json"
# Column of a prediction table: 1 if the labels of the volume's patient were used for adaptation, else 0.
COLUMN = "adapted_on"


@dataclass(frozen=True)
class Adaptation:
    """``method`` (probe, coop, lora ...), a description of the data, the hash of the starting ``model``, and salted
    digests of the patients whose labels were used. Without digests, as in a published folder, the patients are
    unknown."""

    method: str
    fitted_on: str
    model: str
    patients: tuple[str, ...] = field(default=(), repr=False)
    salt: str = field(default="", repr=False)

    @classmethod
    def to(cls, method: str, fitted_on: str, model: str, patients: Iterable[str]) -> Adaptation:
        """The record of an adaptation to the labels of ``patients`` (ids, may repeat)."""
        salt = secrets.token_hex(16)
        return cls(method, fitted_on, model, tuple(sorted({digest(str(one), salt) for one in patients})), salt)

    def saw(self, patients: Iterable[str]) -> list[str]:
        """The ``patients`` whose labels were used."""
        seen = set(self.patients)
        return [patient for patient in patients if digest(str(patient), self.salt) in seen]

    def without_patients(self) -> Adaptation:
        """A copy without the digests of patients, for publication."""
        return replace(self, patients=(), salt="")

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Adaptation:
        """Load a record. Raises EvaluationError if the file is not one."""
        try:
            values = plain_json.read(path)
            kept = cls(**(values | {"patients": tuple(values.get("patients", ()))}))
            if not all(
                isinstance(part, str) for part in (kept.method, kept.fitted_on, kept.model, kept.salt, *kept.patients)
            ):
                raise ValueError("a value is not a text")
            return kept
        except UNFIT as error:
            raise EvaluationError(
                f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); copy the model folder again"
            ) from error


def refuse_adapted(table: pd.DataFrame, path: Path, use: str) -> None:
    """Raise EvaluationError if a prediction table has volumes of patients whose labels the model or head was fitted to.
    ``use``: the purpose they must not serve."""
    if COLUMN not in table.columns:
        return
    seen = table["patient"][pd.to_numeric(table[COLUMN], errors="coerce") == 1].drop_duplicates()
    if len(seen):
        raise EvaluationError(
            f"{path}: {len(seen)} of its patients, the first {seen.iloc[0]!r}, are among those whose labels the model or "
            f"head was fitted to; {use} must come from other patients"
        )
