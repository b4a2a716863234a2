"""The base class of readers, and what a reader returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from ctclip.labels import LabelSet


class Status(StrEnum):
    """The status of a label in a report."""

    present = "present"
    absent = "absent"
    uncertain = "uncertain"
    not_mentioned = "not mentioned"


# If a report makes several statements about a label, the first of these counts.
PRECEDENCE = (Status.present, Status.uncertain, Status.absent)


@dataclass(frozen=True)
class Statement:
    """The status of one label, and the sentence that states it ("" if the reader gives none).

    ``probability``: that the label is present, if the reader gives one.
    """

    status: Status
    sentence: str = ""
    probability: float | None = None


NOTHING = Statement(Status.not_mentioned)
# The statement about each label that a report mentions.
Reading = Mapping[str, Statement]


@dataclass(frozen=True)
class Options:
    """Options of readers; each reader uses those it needs.

    ``terms``: a path, or a name in ``configs/terms``; None: the file named as the label set. ``model``: the folder of a
    text model. ``cache``: a folder for answers, keyed by the hash of the text.
    """

    terms: str | None = None
    language: str = "english"
    model: Path | None = None
    batch: int = 16
    threshold: float = 0.5
    cache: Path | None = None
    device: str = "cpu"


class Reader(ABC):
    """Reads reports for the labels of a set."""

    # Whether several processes may each build one and share the reports.
    shared: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, labels: LabelSet, options: Options) -> Reader:
        """Build the reader. Raises CtclipError if something that it needs is missing."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The name of the reader and a digest of its rules or weights, as stated in tables and model cards."""

    @abstractmethod
    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Read texts. A label without an entry is not mentioned; an empty text mentions none."""

    def is_foreign(self, text: str) -> bool:
        """Whether a text is in a language that this reader cannot read."""
        return False


def strongest(statements: Sequence[Statement]) -> Statement:
    """The statement that counts among several about one label: the first of the highest status."""
    for status in PRECEDENCE:
        for statement in statements:
            if statement.status is status:
                return statement
    return NOTHING
