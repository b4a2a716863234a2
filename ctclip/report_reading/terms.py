"""Terms: the phrases by which reports mention the labels of a set. Files of ``configs/terms``, one a label set."""

from __future__ import annotations

import hashlib
import re

from pydantic import Field

from ctclip.config_files import find_config, read_mapping
from ctclip.errors import ConfigError
from ctclip.labels import LabelSet
from ctclip.preprocessing.named_files import installed_names
from ctclip.schema import Section, validated


class LabelTerms(Section):
    """Phrases of one label, as ``ctclip.report_reading.patterns`` describes them."""

    present: tuple[str, ...] = Field(
        min_length=1,
        description="a mention: present, unless its sentence says otherwise; behind a ! stands what must not be in its clause",
    )
    absent: tuple[str, ...] = Field((), description="says that it is absent: heart size .. normal")
    ignore: tuple[str, ...] = Field((), description="a mention that overlaps one of these is of something else")
    unless: tuple[str, ...] = Field((), description="a mention is of something else where one stands in its clause")


class Terms(Section):
    """A file of terms."""

    name: str
    labels: dict[str, LabelTerms] = Field(min_length=1)

    def identity(self) -> str:
        """Name and digest of everything in it."""
        return f"{self.name} {hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]}"


def load_terms(labels: LabelSet, source: str | None = None) -> Terms:
    """The terms of a label set: of ``source``, else the installed file of the set's name, else its names and aliases.

    Raises ConfigError where a file names a label that the set does not have, or lacks one of its labels.
    """
    if source is None and labels.name not in installed_names("terms"):
        return names_as_terms(labels)
    path = find_config(source or labels.name, "terms")
    terms = validated(Terms, read_mapping(path), str(path))
    for name in terms.labels:
        if name not in labels.names:
            raise ConfigError(
                f"{path}: {name!r} is no label of {labels.name!r} (it has {', '.join(labels.names[:6])} ...)"
            )
    if lacking := [name for name in labels.names if name not in terms.labels]:
        raise ConfigError(f"{path}: has no terms for {lacking[0]!r}; add them, or name another file with --terms")
    return terms


def names_as_terms(labels: LabelSet) -> Terms:
    """Names and aliases of the labels, each word in the singular or plural."""
    phrases = {
        label.name: LabelTerms(present=tuple({_phrase(word): None for word in (label.name, *label.aliases)}))
        for label in labels.labels
    }
    return Terms(name=f"{labels.name} names", labels=phrases)


def _phrase(name: str) -> str:
    words = re.findall(r"[^\W_]+", name.lower())
    return " ".join([*words[:-1], f"{words[-1]}|{words[-1]}s"]) if words else name
