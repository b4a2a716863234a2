"""What an evaluation declares before it looks at a score: which labels, which volumes, which thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from ctclip.config import Section
from ctclip.config_files import find_config, read_mapping, validated
from ctclip.errors import EvaluationError

Thresholds = Literal["calibration", "published"]


class Protocol(Section):
    """A file of ``configs/protocols``."""

    name: str
    describes: str
    cohort: str = Field("", description="whose volumes, as published figures name them")
    size: int | None = Field(None, description="volumes of the whole set; fewer are said to be a part of it")
    labels: tuple[str, ...] = Field(min_length=1)
    mapping: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="columns of the label table a label is the union of; itself where not listed"
    )
    scores: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="predicted abnormalities a label's score is the largest of; itself where not listed",
    )
    volumes: Literal["all", "one-per-scan"] = "all"
    bootstrap: int = 1000
    thresholds: Thresholds = Field(
        "calibration",
        description="calibration: those of the model's calibration split, or 0.5 without one; "
        "published: picked on the test volumes themselves, as is common",
    )

    @model_validator(mode="after")
    def _mapped_labels_exist(self) -> Protocol:
        for name in (*self.mapping, *self.scores):
            if name not in self.labels:
                raise ValueError(f"mapping of {name!r}, which is not among the labels")
        return self

    def predicted(self) -> list[str]:
        """Abnormalities the prediction table must have."""
        return list(dict.fromkeys(column for name in self.labels for column in self.scores.get(name, (name,))))

    def scored(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """The rows of a prediction table that count, with a column of scores for every label."""
        rows = predictions
        if self.volumes == "one-per-scan":
            rows = rows.sort_values("volume").groupby("scan", as_index=False).head(1)
        merged = {name: rows[list(parts)].max(axis=1) for name, parts in self.scores.items()}
        return rows.assign(**merged).reset_index(drop=True)

    def columns(self) -> list[str]:
        """Columns the label table must have."""
        return list(dict.fromkeys(column for name in self.labels for column in self.mapping.get(name, (name,))))

    def merged(self, table: pd.DataFrame) -> pd.DataFrame:
        """Labels of the protocol from a table of ``columns()``: 1 if any of a label's columns is 1, 0 if all are 0,
        else unknown."""
        merged = {}
        for name in self.labels:
            parts = table[list(self.mapping.get(name, (name,)))]
            merged[name] = parts.max(axis=1).where((parts == 1).any(axis=1) | parts.notna().all(axis=1))
        return pd.DataFrame(merged, index=table.index)


def load_protocol(name: str) -> Protocol:
    """A protocol by path, or by the name of one in ``configs/protocols``."""
    path = find_config(name, "protocols")
    return validated(Protocol, read_mapping(Path(path)), str(path))


def align(
    predictions: pd.DataFrame, labels: pd.DataFrame, protocol: Protocol
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Rows that the protocol scores, their labels and their scores (n, labels)."""
    rows = protocol.scored(predictions)
    without = rows["volume"][~rows["volume"].isin(labels.index)]
    if len(without):
        raise EvaluationError(
            f"{len(without)} of {len(rows)} predicted volumes have no labels, the first {without.iloc[0]!r}: give the label "
            f"table of these volumes, or predict only those that have labels"
        )
    truth = labels.loc[rows["volume"], list(protocol.labels)].to_numpy(dtype=float)
    return rows, truth, rows[list(protocol.labels)].to_numpy(dtype=float)
