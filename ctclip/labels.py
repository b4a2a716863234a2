"""Label sets: the findings for which a cohort has labels and which a model scores. They are data, not code.

A label set is a YAML file (in ``configs/labels``, or the user's own). It is named in a configuration, saved in the
store and the model folder, and stated in every prediction table. Label sets that are used together are compared.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from ctclip.config_files import configs_folder, find_config, read_mapping
from ctclip.errors import ConfigError, DataError
from ctclip.preprocessing.cohorts import label_names
from ctclip.preprocessing.csv_files import CONTROL
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import read_table
from ctclip.schema import Section, validated

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Expect

BodyPart = Literal["chest", "abdomen", "head", "any"]
FILE = "labels.yaml"
TABLES = (".csv", ".tsv", ".txt", ".parquet")


def folded(name: str) -> str:
    """A name normalised in case and spacing, for comparison."""
    return " ".join(name.split()).casefold()


def named(known: Iterable[str], name: object) -> str:
    """The entry of ``known`` that equals ``name`` up to case and spacing. Raises KeyError that lists them."""
    names = list(known)
    if name in names:
        return str(name)
    alike = [each for each in names if isinstance(name, str) and folded(each) == folded(name)]
    if not alike:
        raise KeyError(f"{reprlib.repr(name)}: not one of {', '.join(names)}")
    return alike[0]


class Label(Section):
    """One finding."""

    name: str = Field(min_length=1, description="name of the label in tables and on pages")
    aliases: tuple[str, ...] = Field((), description="other names of the label, in tables and in text")
    columns: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="for each cohort, the label columns whose union is this label; default: the column of its name",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class LabelSet(Section):
    """A YAML file of labels and related settings."""

    name: str = Field(description="name of the label set, saved with everything derived from it")
    description: str = Field("", description="one-line description")
    body_part: BodyPart = Field("any", description="body part that the scans show")
    prompts: str | None = Field(None, description="prompt set for these labels")
    protocol: str | None = Field(None, description="default evaluation protocol")
    windows: dict[str, tuple[float, float]] = Field(
        default={"lung window": (-1350.0, 150.0), "soft-tissue window": (-160.0, 240.0)},
        description="HU windows for images of scans, by name",
    )
    labels: tuple[Label, ...] = Field(
        min_length=1, description="label names, or mappings with name, aliases and columns"
    )

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[Label, ...]) -> tuple[Label, ...]:
        known: dict[str, str] = {}
        for label in labels:
            for word in (label.name, *label.aliases):
                if CONTROL.search(word):
                    raise ValueError(f"{word!r} contains control characters")
                owner = known.setdefault(folded(word), label.name)
                if owner != label.name:
                    raise ValueError(f"{word!r} names both {owner!r} and {label.name!r}")
        if len({label.name for label in labels}) < len(labels):
            raise ValueError("a label is listed twice")
        return labels

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels, in their order."""
        return tuple(label.name for label in self.labels)

    @property
    def identity(self) -> str:
        """Name and a digest of the label names, as stated in tables."""
        return f"{self.name} {hashlib.sha256(chr(10).join(self.names).encode()).hexdigest()[:8]}"

    def resolve(self, word: str) -> str | None:
        """The label whose name or alias is ``word``, ignoring case and spacing; None if there is none."""
        for label in self.labels:
            if folded(word) in {folded(label.name), *map(folded, label.aliases)}:
                return label.name
        return None

    def columns(self, table: Iterable[str], cohort: str = "") -> dict[str, tuple[str, ...]]:
        """For each label, the columns of a table whose union is the label; labels without a column are left out.

        ``table``: names of the table's columns; ``cohort``: the cohort whose columns are tried first. Without an entry
        for the cohort a column is found by the label's name, in any case and spacing, then by its aliases.
        """
        present = {folded(str(column)): str(column) for column in ([table] if isinstance(table, str) else table)}
        columns: dict[str, tuple[str, ...]] = {}
        for label in self.labels:
            if cohort in label.columns:
                parts = tuple(present[folded(c)] for c in label.columns[cohort] if folded(c) in present)
            else:
                words = (label.name, *label.aliases)
                parts = tuple(present[folded(word)] for word in words if folded(word) in present)[:1]
            if parts:
                columns[label.name] = parts
        return columns

    def text(self) -> str:
        """The label set as YAML."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        write_text(path, self.text())


def load_labels(source: str | Path | dict[str, Any]) -> LabelSet:
    """Load a label set from a file, by its name in ``configs/labels``, or from a mapping. Raises ConfigError."""
    if isinstance(source, dict):
        return validated(LabelSet, source, "label set")
    path = find_config(str(source), "labels")
    return validated(LabelSet, read_mapping(path), str(path))


def expected(body_part: str, asked: Expect) -> Expect:
    """The value of --expect: chests are not checked for if the scans show another part of the body, unless the user
    requests it."""
    return "any" if asked == "auto" and body_part in ("abdomen", "head") else asked


def labels_of_columns(name: str, columns: Sequence[str], body_part: BodyPart = "any") -> LabelSet:
    """The label set of a table whose label columns are ``columns``."""
    if not columns:
        raise DataError(f"{name}: has no label column (one of 0, 1 and empty cells)")
    return validated(LabelSet, {"name": name, "body_part": body_part, "labels": list(columns)}, name)


def require_same(ours: LabelSet | str, theirs: LabelSet | str, where: str) -> None:
    """Raise ConfigError unless two label sets (or their identities) are the same; an empty identity matches any."""
    mine, other = (value if isinstance(value, str) else value.identity for value in (ours, theirs))
    if mine and other and mine != other:
        raise ConfigError(f"{where}: has the label set {other!r}, not {mine!r}")


def installed_sets() -> list[LabelSet]:
    """The label sets that come with the package."""
    return [load_labels(path) for path in sorted((configs_folder() / "labels").glob("*.yaml"))]


def store_labels(store: VolumeStore) -> LabelSet | None:
    """The label set saved in a store; in a store of version 0.2, the set formed by its label columns; None if it has no
    labels."""
    path = store.path / FILE
    if path.is_file():
        return load_labels(path)
    columns = label_names(store.cohort)
    return labels_that_are(store.path.resolve().name, columns) if columns else None


def labels_that_are(name: str, columns: Sequence[str]) -> LabelSet:
    """The installed label set whose names are ``columns``, or a new one called ``name`` with these labels."""
    known = (labels for labels in installed_sets() if set(labels.names) == set(columns))
    return next(known, None) or labels_of_columns(name, columns)


def label_columns_of(cohort: Path, labels: LabelSet) -> list[str] | None:
    """Columns of a cohort's table that hold the labels of a set; None if the cohort is a folder, whose layout defines
    them. Raises DataError if the table has none of them."""
    if not cohort.is_file() or cohort.suffix.lower() not in TABLES:
        return None
    columns = [str(column) for column in read_table(cohort).columns]
    known = [part for parts in labels.columns(columns).values() for part in parts]
    if not known:
        raise DataError(
            f"{cohort}: has no column of the label set {labels.name!r} (it has {', '.join(columns[:8])}); name its "
            "columns "
            f"as aliases in the set"
        )
    return known


def keep_labels(store: VolumeStore, source: str | None) -> LabelSet | None:
    """Save a label set in a store: ``source`` (a file, or the name of one), or by default the set that its label
    columns form.

    Raises DataError if the cohort table has none of the set's labels.
    """
    columns = label_names(store.cohort)
    if source is not None:
        labels = load_labels(source)
        if columns and not labels.columns(columns):
            raise DataError(
                f"{store.path}: the cohort table has no column of the label set {labels.name!r} (it has "
                f"{', '.join(columns[:6])}); name its columns as aliases in the set"
            )
    elif columns:
        labels = labels_that_are(store.path.resolve().name, columns)
    else:
        return None
    labels.save(store.path / FILE)
    return labels
