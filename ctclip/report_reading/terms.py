"""Terms: the phrases by which reports mention labels. One file of ``configs/terms`` for each label set."""

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
    """Phrases of one label, in the syntax of ``ctclip.report_reading.patterns``."""

    present: tuple[str, ...] = Field(
        min_length=1,
        description="phrases that mention the label: present, unless the sentence says otherwise; words after ! must not be in the clause",
    )
    absent: tuple[str, ...] = Field((), description="phrases that state its absence, such as: heart size .. normal")
    ignore: tuple[str, ...] = Field(
        (), description="phrases that are not about the label; mentions that overlap one are ignored"
    )
    unless: tuple[str, ...] = Field(
        (), description="phrases that rule the label out: mentions in the same clause are ignored"
    )


class Terms(Section):
    """A file of terms."""

    name: str
    labels: dict[str, LabelTerms] = Field(min_length=1)

    def identity(self) -> str:
        """Name and digest of the contents."""
        return f"{self.name} {hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]}"


def load_terms(labels: LabelSet, source: str | None = None) -> Terms:
    """The terms of a label set: those of ``source``, or else the installed file with the name of the set, or else its
    names and aliases.

    Raises ConfigError if a file names a label that the set does not have, or lacks one of its labels.
    """
    if source is None and labels.name not in installed_names("terms"):
        return names_as_terms(labels)
    path = find_config(source or labels.name, "terms")
    terms = validated(Terms, read_mapping(path), str(path))
    for name in terms.labels:
        if name not in labels.names:
            raise ConfigError(
                f"{path}: {name!r} is not a label of {labels.name!r} (it has {', '.join(labels.names[:6])} ...)"
            )
    if lacking := [name for name in labels.names if name not in terms.labels]:
        raise ConfigError(f"{path}: has no terms for {lacking[0]!r}; add them, or give another file with --terms")
    return terms


def names_as_terms(labels: LabelSet) -> Terms:
    """The names and aliases of labels, in the singular and the plural."""
    phrases = {
        label.name: LabelTerms(present=tuple({_phrase(word): None for word in (label.name, *label.aliases)}))
        for label in labels.labels
    }
    return Terms(name=f"{labels.name} names", labels=phrases)


def _phrase(name: str) -> str:
    words = re.findall(r"[^\W_]+", name.lower())
    return " ".join([*words[:-1], f"{words[-1]}|{words[-1]}s"]) if words else name
