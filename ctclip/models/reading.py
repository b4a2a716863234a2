"""Determine the input that a text encoder needs, and whether it can be used, from its parts and by tests.

Families differ in special tokens, in the number of positions, and in the direction of attention. A list of families
would become outdated; these tests apply to any family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.errors import CheckpointError
from ctclip.models.huggingface import freeze_unused

# Names of absolute position tables in Transformers.
POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
# Allowed change of a vector by padding, relative to its largest component; kernels differ by a thousandth of that
# limit.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Reading:
    """How an encoder reads. ``prefix`` and ``suffix``: ids around each text; ``positions``: maximum number of tokens of
    a text including these, None if unlimited; ``left_to_right``: a token does not attend to later tokens."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    positions: int | None
    padding: int
    left_to_right: bool

    @property
    def around(self) -> int:
        return len(self.prefix) + len(self.suffix)


def reading_of(bert: Any, tokenizer: Any) -> Reading:
    """How ``bert`` reads the ids of ``tokenizer``; parameters that do not affect its output are frozen. Without a
    tokenizer, it gets ids alone, starting with the token that represents the text, as for BERT.

    Raises CheckpointError if the two do not belong together, or if the encoder cannot serve: it does not return one
    vector per token, or the vectors depend on padding.
    """
    if tokenizer is None:
        return Reading((), (), positions_of(bert), 0, False)
    kind = bert.config.model_type
    rows = word_vectors(bert)
    prefix, suffix = special_tokens(tokenizer)
    special = set(tokenizer.all_special_ids)
    words = sorted(set(tokenizer.get_vocab().values()) - special)
    beyond = [number for number in {*words, *prefix, *suffix} if rows is not None and number >= rows]
    if beyond:
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(sorted(beyond)[:3]))
        raise CheckpointError(
            f"model.text: the tokenizer has {len(beyond)} tokens that the {kind} encoder has no embeddings for ({names}); "
            f"use the tokenizer that belongs to it, or set model.text.tuning=full to learn them"
        )
    padding = tokenizer.pad_token_id
    padding = padding if padding is not None and (rows is None or padding < rows) else 0
    left_to_right = False
    if not any(parameter.is_meta for parameter in bert.parameters()):
        left_to_right = _tried(bert, prefix, suffix, words[:2], padding)
    return Reading(prefix, suffix, positions_of(bert), padding, left_to_right)


def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that ``tokenizer`` puts before and after a text."""
    for text in _short_texts(tokenizer):
        bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise CheckpointError(f"model.text: a {type(tokenizer).__name__} writes a text differently with special tokens")


def _short_texts(tokenizer: Any) -> Iterator[str]:
    yield from ("a", "1", ".")
    special = set(tokenizer.all_special_tokens)
    yield from (token for token in sorted(tokenizer.get_vocab())[:1000] if token not in special)


def positions_of(bert: Any) -> int | None:
    """Maximum number of tokens of a text, including special tokens."""
    limits = []
    declared = getattr(bert.config, "max_position_embeddings", None)
    if isinstance(declared, int) and declared > 0:
        limits.append(declared)
    for name, table in bert.named_modules():
        weight = getattr(table, "weight", None)
        if name.rsplit(".", 1)[-1] in POSITIONS and isinstance(weight, Tensor) and weight.ndim == 2:
            # RoBERTa and its variants count positions from the padding index + 1.
            padding = getattr(table, "padding_idx", None)
            limits.append(len(weight) - (0 if padding is None else padding + 1))
    return min(limits, default=None)


def word_vectors(bert: Any) -> int | None:
    """Number of word vectors of ``bert``; None if it has no table of word vectors."""
    try:
        table = bert.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _tried(bert: Any, prefix: tuple[int, ...], suffix: tuple[int, ...], words: list[int], padding: int) -> bool:
    """Test ``bert`` with two texts that differ in their last word; return whether it reads left to right."""
    one, two = words
    texts = [[*prefix, one, two, one, *suffix], [*prefix, one, two, two, *suffix], [*prefix, one, *suffix]]
    length = len(texts[0])
    device = next(bert.parameters()).device
    ids = torch.tensor([[*text, *[padding] * (length - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    kind, width = bert.config.model_type, getattr(bert.config, "hidden_size", None)
    training = bert.training
    bert.eval()
    try:
        with torch.enable_grad():
            hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
            alone = bert(input_ids=ids[2:, : len(texts[2])], attention_mask=mask[2:, : len(texts[2])]).last_hidden_state
    except Exception as error:  # unsuitable architectures raise any kind of error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"model.text: the architecture {kind} cannot serve as text encoder ({reason})") from error
    finally:
        bert.train(training)
    if hidden.shape != (*ids.shape, width):
        raise CheckpointError(
            f"model.text: the architecture {kind} cannot serve as text encoder: from {tuple(ids.shape)} tokens it returns "
            f"{tuple(hidden.shape)} numbers, not one vector of {width} each"
        )
    freeze_unused(bert, hidden)
    hidden, alone = hidden.detach(), alone.detach()
    if not hidden.isfinite().all():
        raise CheckpointError(f"model.text: the {kind} encoder's vectors are not finite; its weights are damaged")
    size = hidden.abs().max()
    if (hidden[2, : alone.shape[1]] - alone[0]).abs().max() > TOLERANCE * size:
        raise CheckpointError(
            f"model.text: the architecture {kind} cannot serve as text encoder: a text's vectors depend on the padding beside it"
        )
    return bool((hidden[0, 0] - hidden[1, 0]).abs().max() <= 1e-6 * size)
