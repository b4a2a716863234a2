"""The interface of an objective, and the inputs it can request.

An objective names its inputs and receives only these. An objective with ``features`` works on the global batch and is
called once per step; one with ``tokens`` works on what this rank has encoded and is called for each micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ctclip.config import ObjectiveConfig
from ctclip.labels import LabelSet
from ctclip.models.dual_encoder import DualEncoder
from ctclip.prompts import PromptSet


@dataclass(frozen=True)
class Features:
    """Embeddings of the global batch.

    volumes (B, dim), texts (B * views, dim) unit vectors, float32, with the views of a volume adjacent; scale (1,) and
    bias (1,) of the similarity; scans (B,) and text_identities (B * views,): equal numbers mean the same scan or the
    same wording; rows: this rank's volumes among the B. The loss is the mean over ranks of the values that an objective
    returns.
    """

    volumes: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor
    scans: Tensor
    text_identities: Tensor
    rows: slice

    @property
    def views(self) -> int:
        """Number of texts per volume."""
        return len(self.texts) // len(self.volumes)

    def view(self, number: int) -> Features:
        """The features with only the ``number``-th text of each volume."""
        return Features(
            self.volumes, self.texts[number :: self.views], self.scale, self.bias, self.scans,
            self.text_identities[number :: self.views], self.rows,
        )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What an objective receives when it is built. ``sentences``: the distinct sentences of the training reports, if an
    objective requests the column ``sentences``, which numbers them."""

    model: DualEncoder
    labels: LabelSet | None = None
    prompts: PromptSet | None = None
    sentences: tuple[str, ...] = ()


class Objective(nn.Module, ABC):
    """A loss term, which may have parameters.

    ``needs`` names the arguments of ``forward``: ``features`` (``Features``), ``tokens`` (``Encoded``, of this rank),
    ``words`` (ids and mask of whole reports), ``earlier_texts`` (``EarlierTexts`` or None), and any column of the
    batch by its name: ``labels`` (B, L) float32 of 0, 1 and NaN, ``sentences`` (B, S) int64 places in
    ``Context.sentences``, filled up with -1, ``masks``, or a user's column of the store. Columns cover the global batch
    together with ``features``, and this rank's micro-batch together with ``tokens``.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__()
        self.config = config

    @property
    def queue_size(self) -> int:
        """Number of texts of earlier steps that the objective needs; 0: none."""
        return 0

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar loss before weighting, from the arguments that ``needs`` names."""


GIVEN = ("features", "tokens", "words", "earlier_texts")


def columns_needed(objective: type[Objective] | Objective) -> tuple[str, ...]:
    """Columns of the batch that an objective requests."""
    return tuple(name for name in objective.needs if name not in GIVEN)


def same_identity(scans: Tensor, texts: Tensor, rows: slice) -> Tensor:
    """Pairs that must not be negatives of each other.

    ``scans`` (B,) and ``texts`` (B,) identify the scan and the wording -> (rows, B) bool.
    """
    return (scans[rows, None] == scans[None, :]) | (texts[rows, None] == texts[None, :])


def different_group(batch: int, size: int, rows: slice, device: torch.device) -> Tensor:
    """Pairs in different groups of ``size`` neighbours: (rows, B) bool."""
    number = torch.arange(batch, device=device) // size
    return number[rows, None] != number[None, :]
