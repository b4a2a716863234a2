"""Evaluation protocols: labels, volumes and thresholds, declared before any score is seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from ctclip.config_files import find_config, read_mapping
from ctclip.errors import EvaluationError
from ctclip.evaluation.tables import label_file, provenance, read_columns
from ctclip.labels import LabelSet, installed_sets, load_labels, store_labels
from ctclip.preprocessing.store import VolumeStore
from ctclip.schema import Section, validated

Thresholds = Literal["calibration", "published"]


class Protocol(Section):
    """A file of ``configs/protocols``."""

    name: str = Field(description="name of the protocol, stated with every figure")
    describes: str = Field(description="one sentence that describes what the protocol scores")
    cohort: str = Field("", description="name of the cohort in publications")
    size: int | None = Field(
        None, description="number of volumes in the whole set; if fewer are scored, the report says so"
    )
    labels: tuple[str, ...] = Field(min_length=1, description="label names, or the name of a label set")
    without: tuple[str, ...] = Field((), description="labels of the set that are not scored")
    columns_of: str = Field(
        "", description="cohort to whose columns the label set maps its labels; labels without a column are left out"
    )
    mapping: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="columns of the label table whose union is the label; default: the column with the label's name",
    )
    scores: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="predicted abnormalities whose largest score is the score of the label; default: the abnormality "
        "with the label's name",
    )
    volumes: Literal["all", "one-per-scan"] = Field("all", description="which reconstructions of a scan are scored")
    bootstrap: int = Field(1000, description="number of bootstrap resamples of patients for the intervals")
    thresholds: Thresholds = Field(
        "calibration",
        description="calibration: thresholds from the model's calibration split, or 0.5 without one; published: "
        "thresholds chosen on the test volumes themselves, as in most publications",
    )

    @model_validator(mode="before")
    @classmethod
    def _labels_of_a_set(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("labels"), str):
            return values
        label_set, cohort = load_labels(values["labels"]), values.get("columns_of", "")
        left_out = values.get("without", ())
        if unknown := [name for name in left_out if name not in label_set.names]:
            raise ValueError(f"without: {unknown[0]!r} is not a label of {label_set.name!r}")
        chosen = [one for one in label_set.labels if one.name not in left_out and (not cohort or cohort in one.columns)]
        mapping = {one.name: one.columns[cohort] for one in chosen} if cohort else {}
        return values | {"labels": [one.name for one in chosen], "mapping": mapping | values.get("mapping", {})}

    @model_validator(mode="after")
    def _mapped_labels_exist(self) -> Protocol:
        for name in (*self.mapping, *self.scores):
            if name not in self.labels:
                raise ValueError(f"mapping of {name!r}, which is not among the labels")
        return self

    def predicted(self) -> list[str]:
        """The abnormalities that the prediction table must have."""
        return list(dict.fromkeys(column for name in self.labels for column in self.scores.get(name, (name,))))

    def scored(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """The rows of a prediction table that count, with a column of scores for every label."""
        scored = predictions
        if self.volumes == "one-per-scan":
            scored = scored.sort_values("volume").groupby("scan", as_index=False).head(1)
        merged = {name: scored[list(parts)].max(axis=1) for name, parts in self.scores.items()}
        return scored.assign(**merged).reset_index(drop=True)

    def columns(self) -> list[str]:
        """The columns that the label table must have."""
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
    """Load a protocol by path, or by its name in ``configs/protocols``."""
    path = find_config(name, "protocols")
    return validated(Protocol, read_mapping(Path(path)), str(path))


def default_protocol(labels: LabelSet | None, identity: str, columns: Iterable[str], predicted: list[str]) -> Protocol:
    """The protocol used by default: the label set's own, else one with those of its labels that were predicted.

    ``labels``: the label set of the store, if any; ``identity``: identity of the label set in the prediction table;
    ``columns``: columns of the label table. Raises EvaluationError if no predicted name has a column.
    """
    known = labels or next((one for one in installed_sets() if one.identity == identity), None)
    if known is not None and known.protocol is not None:
        protocol = load_protocol(known.protocol)
        if set(protocol.predicted()) <= set(predicted):
            return protocol
    columns = list(columns)
    mapped = known.columns(columns) if known is not None else {name: (name,) for name in predicted if name in columns}
    scored = {name: parts for name, parts in mapped.items() if name in predicted}
    if not scored:
        raise EvaluationError(
            f"none of the predicted names ({', '.join(predicted[:4])} ...) has a column in the label table; name a "
            f"--protocol that maps them"
        )
    source = f"label set {known.name}" if known is not None else "columns of the label table"
    values = {
        "name": known.name if known is not None else "labels",
        "describes": f"{len(scored)} labels ({source}), all volumes that were predicted",
        "labels": list(scored),
        "mapping": {name: parts for name, parts in scored.items() if parts != (name,)},
    }
    return validated(Protocol, values, source)


def unnamed_protocol(table: pd.DataFrame, predicted: list[str], labels: Path | None, store: Path | None) -> Protocol:
    """``default_protocol`` for a prediction table and the label table or store that it is scored with."""
    label_set = store_labels(VolumeStore(store)) if store is not None else None
    columns = read_columns(label_file(labels, store))
    return default_protocol(label_set, provenance(table, "labels"), columns, predicted)


def align(
    predictions: pd.DataFrame, labels: pd.DataFrame, protocol: Protocol
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The rows that the protocol scores, with their labels and scores (n, labels)."""
    scored = protocol.scored(predictions)
    without = scored["volume"][~scored["volume"].isin(labels.index)]
    if len(without):
        raise EvaluationError(
            f"{len(without)} of {len(scored)} predicted volumes have no labels, the first {without.iloc[0]!r}: give "
            "the label "
            f"table of these volumes, or predict only those that have labels"
        )
    truth = labels.loc[scored["volume"], list(protocol.labels)].to_numpy(dtype=float)
    return scored, truth, scored[list(protocol.labels)].to_numpy(dtype=float)
