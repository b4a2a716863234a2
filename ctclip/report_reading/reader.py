"""What every reader of reports answers, and the class that one's own derives from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from ctclip.labels import LabelSet


class Status(StrEnum):
    """What a report says of a label."""

    present = "present"
    absent = "absent"
    uncertain = "uncertain"
    not_mentioned = "not mentioned"


# What counts where a report says several things of one label: a finding that is stated, before one that is suspected.
PRECEDENCE = (Status.present, Status.uncertain, Status.absent)


@dataclass(frozen=True)
class Statement:
    """What a report says of one label, and the sentence that says it; "" where the reader names none.

    ``probability``: of presence, by a reader that gives one.
    """

    status: Status
    sentence: str = ""
    probability: float | None = None


NOTHING = Statement(Status.not_mentioned)
# Of each label that a report mentions, what it says.
Reading = Mapping[str, Statement]


@dataclass(frozen=True)
class Options:
    """What readers are made from; each takes what it needs.

    ``terms``: a file of ``configs/terms`` or a path, that named as the label set if None; ``model``: a folder; ``cache``:
    a folder in which answers are kept by the hash of their text.
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

    # Whether several processes may each have one, to share the reports.
    shared: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, labels: LabelSet, options: Options) -> Reader:
        """The reader that ``options`` ask for. Raises CtclipError in one line where something it needs is missing."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Its name and a digest of what it reads with, as tables and model cards state it."""

    @abstractmethod
    def read(self, texts: Sequence[str]) -> list[Reading]:
        """What each text says of the labels; a label without an entry is not mentioned. An empty text mentions none."""

    def is_foreign(self, text: str) -> bool:
        """Whether a text is in a language that this reader does not read."""
        return False


def strongest(statements: Sequence[Statement]) -> Statement:
    """The one that counts of what several sentences say of one label: the first of the highest status."""
    for status in PRECEDENCE:
        for statement in statements:
            if statement.status is status:
                return statement
    return NOTHING
