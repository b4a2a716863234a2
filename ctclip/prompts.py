"""Prompt sets: for each abnormality, phrasings that state it and phrasings that rule it out, by report section."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ctclip.config_files import find_config, read_mapping
from ctclip.errors import ConfigError, PromptError
from ctclip.preprocessing.files import text_of
from ctclip.schema import Section, validated

Phrasings = dict[str, tuple[str, ...]]
Weights = dict[str, tuple[float, ...]]
# Fields excluded from the identity if empty, so that the identity of older sets does not change.
LATER = ("positive_weights", "negative_weights", "provenance")


class Pair(Section):
    """The positive and negative phrasings of one abnormality."""

    positive: Phrasings
    negative: Phrasings
    positive_weights: Weights = Field(
        default_factory=dict, description="weights of the phrasings, by section; equal if not given"
    )
    negative_weights: Weights = Field(
        default_factory=dict, description="weights of the phrasings, by section; equal if not given"
    )

    @model_validator(mode="after")
    def _a_weight_each(self) -> Pair:
        for phrasings, weights in ((self.positive, self.positive_weights), (self.negative, self.negative_weights)):
            for section, values in weights.items():
                if len(values) != len(phrasings.get(section, ())) or min(values, default=1) <= 0:
                    raise ValueError(f"the weights of the section {section!r} must be one positive number per phrasing")
        return self

    def weights(self, positive: bool, sections: Sequence[str]) -> list[tuple[float, ...]]:
        """Weights of the phrasings that ``groups`` gives."""
        phrasings, given = (
            (self.positive, self.positive_weights) if positive else (self.negative, self.negative_weights)
        )
        return [
            given.get(section, (1.0,) * len(texts))
            for section, texts in phrasings.items()
            if section in sections and texts
        ]

    def groups(self, positive: bool, sections: Sequence[str]) -> list[tuple[str, ...]]:
        """Phrasings of one side, section by section."""
        phrasings = self.positive if positive else self.negative
        return [texts for section, texts in phrasings.items() if section in sections and texts]


class Graded(Section):
    """A finding with a size: one prompt per value, which replaces {value} in the templates."""

    templates: tuple[str, ...] = Field(min_length=1)
    values: tuple[float, ...] = Field(min_length=2)
    unit: str = "mm"

    @model_validator(mode="after")
    def _with_value(self) -> Graded:
        for template in self.templates:
            if "{value}" not in template:
                raise ValueError(f"the template {template!r} has no {{value}}")
        return self


class PromptSet(Section):
    """A prompt file. ``templates`` give the prompts of abnormalities that are not listed; {x} is replaced by the
    name."""

    name: str = Field(description="name of the prompt set, as stated in prediction tables")
    ensemble: Literal["embeddings", "logits"] = Field(
        "embeddings", description="the quantity averaged over phrasings: text embeddings, or logits"
    )
    average: Literal["phrasing", "section"] = Field(
        "phrasing", description="whether every phrasing, or every section, has the same weight"
    )
    sections: tuple[str, ...] = Field(
        ("findings", "impression"), min_length=1, description="sections whose phrasings are used"
    )
    templates: Pair | None = Field(None, description="positive and negative phrasings with {x} for any name")
    abnormalities: dict[str, Pair] = Field(
        default_factory=dict, description="positive and negative phrasings of each abnormality, by section"
    )
    graded: dict[str, Graded] = Field(
        default_factory=dict, description="findings with a size: templates with {value}, and the values"
    )
    provenance: dict[str, str] = Field(
        default_factory=dict, description="for a mined prompt set: its source and how it was mined"
    )

    @model_validator(mode="after")
    def _nothing_empty(self) -> PromptSet:
        pairs = dict(self.abnormalities)
        if self.templates is not None:
            pairs["templates"] = self.templates
        if not pairs:
            raise ValueError("the prompt set is empty: give abnormalities, or templates with {x}")
        sides = () if self.templates is None else (self.templates.positive, self.templates.negative)
        for text in (text for side in sides for texts in side.values() for text in texts):
            if "{x}" not in text:
                raise ValueError(f"the template {text!r} has no {{x}} for the abnormality's name")
        for name, pair in pairs.items():
            for positive in (True, False):
                texts = [text for group in pair.groups(positive, self.sections) for text in group]
                if not texts or not all(text.strip() for text in texts):
                    side = "positive" if positive else "negative"
                    raise ValueError(f"{name}: no {side} phrasing for the sections {', '.join(self.sections)}")
        return self

    def identity(self) -> str:
        """Name and digest of the contents."""
        values = _without_later(self.model_dump(mode="json"))
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def pair(self, abnormality: str) -> Pair:
        """The phrasings of ``abnormality``; names that are not listed use the templates."""
        if abnormality in self.abnormalities:
            return self.abnormalities[abnormality]
        template = self.templates or FREE_TEXT
        fill = lambda phrasings: {  # noqa: E731
            section: tuple(text.replace("{x}", abnormality) for text in texts) for section, texts in phrasings.items()
        }
        return Pair(positive=fill(template.positive), negative=fill(template.negative))

    def groups(self, abnormality: str, positive: bool) -> list[tuple[str, ...]]:
        """Phrasings of one side in groups of equal weight: the sections, or all together."""
        groups = self.pair(abnormality).groups(positive, self.sections)
        return groups if self.average == "section" else [tuple(text for texts in groups for text in texts)]

    def weights(self, abnormality: str, positive: bool) -> list[tuple[float, ...]]:
        """Weights of the phrasings of ``groups``."""
        weights = self.pair(abnormality).weights(positive, self.sections)
        return weights if self.average == "section" else [tuple(value for values in weights for value in values)]

    def side(self, abnormality: str, positive: bool) -> list[str]:
        """Every phrasing of one side."""
        return [text for texts in self.groups(abnormality, positive) for text in texts]

    def names(self) -> tuple[str, ...]:
        """The listed abnormalities; none if the set has only templates."""
        return tuple(self.abnormalities)


def _without_later(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_later(value) for key, value in values.items() if value or key not in LATER}


FREE_TEXT = Pair(
    positive={"findings": ("{x} is seen.", "There is {x}."), "impression": ("{x}.",)},
    negative={"findings": ("No {x} is seen.", "There is no {x}."), "impression": ("No {x}.",)},
)


def load_prompts(source: str | Path | dict[str, Any]) -> PromptSet:
    """Load a prompt set from a file, by its name in ``configs/prompts``, or from a mapping (a model's own)."""
    try:
        if isinstance(source, dict):
            return validated(PromptSet, source, "the model's prompts.yaml")
        path = find_config(str(source), "prompts")
        if not text_of(path).strip():
            raise PromptError(f"{path}: the prompt set is empty: give abnormalities, or templates with {{x}}")
        return validated(PromptSet, read_mapping(path), str(path))
    except (ConfigError, UnicodeDecodeError) as error:
        message = f"{source}: not UTF-8 text ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PromptError(message) from error
