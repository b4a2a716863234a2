"""What an evaluation declares before it looks at a score: which labels, which volumes, which thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from ctclip.config import Section, find_config, read_mapping, validated
from ctclip.errors import EvaluationError


class Protocol(Section):
    """A file of ``configs/protocols``."""

    name: str
    describes: str
    labels: tuple[str, ...]
    volumes: Literal["all", "one-per-scan"] = "all"
    bootstrap: int = 1000
    thresholds: Literal["published"] = "published"


def load_protocol(name: str) -> Protocol:
    """A protocol by path, or by the name of one in ``configs/protocols``."""
    path = find_config(name, "protocols")
    return validated(Protocol, read_mapping(Path(path)), str(path))


def align(
    predictions: pd.DataFrame, labels: pd.DataFrame, protocol: Protocol
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Rows that the protocol scores, their labels and their scores (n, labels)."""
    rows = predictions
    if protocol.volumes == "one-per-scan":
        rows = rows.sort_values("volume").groupby("scan", as_index=False).first()
    without = rows["volume"][~rows["volume"].isin(labels.index)]
    if len(without):
        raise EvaluationError(
            f"{len(without)} predicted volumes have no labels, the first {without.iloc[0]!r}: give the label table of "
            f"these volumes, or predict only those that have labels"
        )
    truth = labels.loc[rows["volume"], list(protocol.labels)].to_numpy(dtype=float)
    return rows.reset_index(drop=True), truth, rows[list(protocol.labels)].to_numpy(dtype=float)
