"""Constrained decoding of JSON: a causal model may only generate tokens that continue a valid answer.

A schema has fixed keys and values from short lists, so an answer is a fixed text with choices. In fixed text, only the
longest matching token is allowed; at a choice, the model chooses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ctclip.errors import CheckpointError

# Each segment is a choice of texts; a segment of one text is fixed.
Segments = tuple[tuple[str, ...], ...]
# Positions of an answer: segment, text and offset. There are several if texts share a beginning.
States = frozenset[tuple[int, str, int]]


class Choices:
    """The answers that take one text of each segment, in order."""

    def __init__(self, segments: Sequence[Sequence[str]]) -> None:
        self.segments: Segments = tuple(tuple(segment) for segment in segments)
        self.upcoming = lru_cache(maxsize=4096)(self._upcoming)

    def start(self) -> States:
        return frozenset((0, text, 0) for text in self.segments[0])

    def advance(self, states: States, written: str) -> States:
        """The positions after appending ``written``; empty if no valid answer continues like this."""
        for character in written:
            going = set()
            for number, text, place in self._opened(states):
                if text[place : place + 1] == character:
                    going.add((number, text, place + 1))
            states = frozenset(going)
        return states

    def ended(self, states: States) -> bool:
        """Whether an answer may end here."""
        last = len(self.segments) - 1
        return any(number == last and place == len(text) for number, text, place in states)

    def _opened(self, states: States) -> States:
        """Add to positions at the end of a text the beginnings of the next segment."""
        opened: set[tuple[int, str, int]] = set()
        waiting = list(states)
        while waiting:
            number, text, place = waiting.pop()
            if place < len(text):
                opened.add((number, text, place))
            elif number + 1 < len(self.segments):
                waiting += [(number + 1, other, 0) for other in self.segments[number + 1]]
        return frozenset(opened)

    def _upcoming(self, states: States, length: int) -> frozenset[str]:
        """Every text of up to ``length`` characters that may follow."""
        texts = set()
        for number, text, place in self._opened(states):
            here = text[place : place + length]
            rest = length - len(here)
            if rest and number + 1 < len(self.segments):
                after = self.upcoming(frozenset((number + 1, other, 0) for other in self.segments[number + 1]), rest)
                texts |= {here + other for other in after}
            else:
                texts.add(here)
        return frozenset(texts)


class Vocabulary:
    """The text of each token of a tokenizer, and the tokens of each text."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises CheckpointError for a tokenizer without an end-of-text token."""
        if tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer has no end-of-text token, which has to end an answer")
        self.end = int(tokenizer.eos_token_id)
        # After another token, because some tokenizers drop the space before the first one.
        before = tokenizer.encode("a", add_special_tokens=False)
        texts = tokenizer.batch_decode(
            [[*before, number] for number in range(len(tokenizer))], clean_up_tokenization_spaces=False
        )
        start = len(tokenizer.decode(before, clean_up_tokenization_spaces=False))
        special = set(tokenizer.all_special_ids)
        # Part of a character decodes to the replacement character.
        self.texts = [
            "" if number in special or "\ufffd" in text else text[start:] for number, text in enumerate(texts)
        ]
        self.tokens: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            if text:
                self.tokens.setdefault(text, number)
        self.longest = max(map(len, self.tokens), default=0)

    def allowed(self, choices: Choices, states: States) -> list[int]:
        """The tokens that continue a valid answer. Raises CheckpointError if the tokenizer has none."""
        if choices.ended(states):
            return [self.end]
        texts = sorted(choices.upcoming(states, self.longest))
        fixed = _common(texts)
        if fixed:
            fits = [self.tokens[fixed[:n]] for n in range(len(fixed), 0, -1) if fixed[:n] in self.tokens][:1]
        else:
            beginnings = {text[:n] for text in texts for n in range(1, len(text) + 1)}
            fits = sorted(self.tokens[part] for part in beginnings if part in self.tokens)
        if not fits:
            raise CheckpointError(f"the tokenizer has no token that writes {texts[0][:1]!r}, which the answer needs")
        return fits


class OnlyValid:
    """A logits processor for Transformers' ``generate``: row i writes one of ``choices[i]``."""

    def __init__(self, vocabulary: Vocabulary, choices: Sequence[Choices], prompt_length: int) -> None:
        self.vocabulary, self.choices, self.prompt_length = vocabulary, choices, prompt_length
        self.states = [one.start() for one in choices]
        self.done = [False] * len(choices)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` (rows, length); ``scores`` (rows, vocabulary) -> the scores, minus infinity where not allowed."""
        if input_ids.shape[1] > self.prompt_length:
            self._take(input_ids[:, -1].tolist())
        allowed = torch.full_like(scores, float("-inf"))
        for row, (choices, states) in enumerate(zip(self.choices, self.states, strict=True)):
            tokens = [self.vocabulary.end] if self.done[row] else self.vocabulary.allowed(choices, states)
            # A model may give NaN scores; the answer has to be valid all the same.
            allowed[row, tokens] = torch.nan_to_num(scores[row, tokens])
        return allowed

    def _take(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            if self.done[row] or self.choices[row].ended(self.states[row]):
                self.done[row] = True
            else:
                self.states[row] = self.choices[row].advance(self.states[row], self.vocabulary.texts[token])


def object_of(fields: Sequence[tuple[str, Sequence[tuple[str, Sequence[Any]]]]]) -> Choices:
    """The JSON object of ``fields``, each an object of keys with the values to choose from."""
    segments: list[list[str]] = [["{"]]
    for number, (name, inner) in enumerate(fields):
        segments.append([("," if number else "") + json.dumps(name) + ":{"])
        for place, (key, values) in enumerate(inner):
            segments.append([("," if place else "") + json.dumps(key) + ":"])
            segments.append([json.dumps(value) for value in values])
        segments.append(["}"])
    return Choices([*segments, ["}"]])


def most_tokens(vocabulary: Vocabulary, choices: Choices) -> int:
    """The maximum number of tokens of an answer, including the end-of-text token."""
    count = 1
    for texts in choices.segments:
        if len(texts) > 1:
            count += max(map(len, texts))
            continue
        left = texts[0]
        while left:
            step = next(
                (n for n in range(min(len(left), vocabulary.longest), 0, -1) if left[:n] in vocabulary.tokens), 1
            )
            left, count = left[step:], count + 1
    # A token may end inside a fixed text that began with a choice.
    return count + 2 * len(choices.segments)


def _common(texts: Sequence[str]) -> str:
    """The common beginning of sorted texts."""
    first, last = texts[0], texts[-1]
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
