"""Concepts given by prompts: score how well each volume matches them in the model's embedding space. The score of a
concept is the margin of its prompts, as in MONET (Kim et al. 2024), which annotates images with concepts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ctclip.config_files import find_config, read_mapping
from ctclip.heads.prompts import pair_vectors
from ctclip.models.dual_encoder import DualEncoder
from ctclip.prompts import FREE_TEXT, Pair, PromptSet
from ctclip.schema import Section, validated

Kind = Literal["device", "contrast", "motion", "noise", "kernel", "position", "anatomy cut", "patient", "finding"]
DEFAULT = "chest"


class Concept(Section):
    """One concept."""

    kind: Kind = Field(description="kind of the concept; findings are not compared with labels")
    present: tuple[str, ...] = Field((), description="prompts that state the concept; empty: derived from its name")
    absent: tuple[str, ...] = Field((), description="prompts that exclude the concept; empty: derived from its name")


class Concepts(Section):
    """A file of ``configs/concepts``."""

    name: str = Field(description="name of the list")
    concepts: dict[str, Concept] = Field(min_length=1, description="concepts by name")

    def prompts(self) -> PromptSet:
        """The concepts as a prompt set."""
        pairs = {}
        for name, concept in self.concepts.items():
            sides = [
                {"findings": given or tuple(text.replace("{x}", name) for text in usual["findings"])}
                for given, usual in ((concept.present, FREE_TEXT.positive), (concept.absent, FREE_TEXT.negative))
            ]
            pairs[name] = Pair(positive=sides[0], negative=sides[1])
        return PromptSet(name=self.name, sections=("findings",), abnormalities=pairs)


def load_concepts(name: str = DEFAULT) -> Concepts:
    """Load a list of concepts from a file, or by its name in ``configs/concepts``. Raises ConfigError."""
    path = find_config(name, "concepts")
    return validated(Concepts, read_mapping(path), str(path))


def concept_scores(model: DualEncoder, concepts: Concepts, volumes: np.ndarray) -> np.ndarray:
    """Margins (n, concepts) float32 of unit vectors (n, dim), in logits. They compare volumes, not concepts."""
    positive, negative = pair_vectors(model, concepts.prompts(), list(concepts.concepts))
    scale = float(model.similarity.scale().detach())
    margins: np.ndarray = scale * volumes @ (positive - negative).float().cpu().numpy().T
    return margins
