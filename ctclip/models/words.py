"""Words of a report from what the volume encoder saw: auxiliary objectives that ask for more than a matching pair.

``captioning`` writes the report word by word (VirTex, Desai & Johnson 2021; CoCa, Yu et al. 2022); ``mlm`` fills words in
that were masked, reading the others and the volume (ALBEF, Li et al. 2021, section 3.2). Both are thrown away after
training: what stays is what they taught the encoders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens of a report that are looked at; the phantom's have some 150, real ones 291 in the median.
LONGEST = 256
# Devlin et al. 2019, section 3.1: of the words chosen 80 % are masked, 10 % exchanged, 10 % kept.
CHOSEN, MASKED, EXCHANGED = 0.15, 0.8, 0.1


class WordPredictor(nn.Module):
    """A small transformer decoder over words that attends to volume tokens, and a score for each word."""

    def __init__(self, vocabulary: int, token_width: int, inside: int | None, width: int, depth: int) -> None:
        """``inside``: width of the word vectors it is given; None: it embeds word ids itself and reads left to right."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width) if inside is None else nn.Linear(inside, width)
        self.places = nn.Embedding(LONGEST, width)
        self.memory = nn.Linear(token_width, width)
        layer = nn.TransformerDecoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))
        self.score = nn.Linear(width, vocabulary)
        self.causal = inside is None

    def forward(self, words: Tensor, padding: Tensor, tokens: Tensor) -> Tensor:
        """words (B, L) ids or (B, L, inside); padding (B, L) bool, true where there is no word; tokens (B, N, C), zeros
        where the volume encoder dropped one. Returns (B, L, vocabulary)."""
        length = padding.shape[1]
        places = self.places(torch.arange(length, device=padding.device))
        mask = None
        if self.causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=padding.device).triu(1)
        seen = self.layers(
            self.embed(words) + places,
            self.memory(tokens),
            tgt_mask=mask,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=(tokens == 0).all(dim=-1),
        )
        return self.score(seen)


def captioning(predictor: WordPredictor, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (nats a word) of each next word of ids (B, L), mask (B, L) 1 where there is one."""
    scores = predictor(ids[:, :-1], mask[:, :-1] == 0, tokens)
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def masked_words(
    predictor: WordPredictor, bert: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor, tokenizer: Any
) -> Tensor:
    """Mean cross-entropy (nats a word) of the words of ids (B, L) that were hidden from ``bert``."""
    shown, target = hide(ids, mask, tokenizer.mask_token_id, tokenizer.all_special_ids, len(tokenizer))
    hidden = bert(input_ids=shown, attention_mask=mask).last_hidden_state
    scores = predictor(hidden, mask == 0, tokens)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def hide(ids: Tensor, mask: Tensor, blank: int, special: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """ids (B, L) with some words hidden, and what was there (-100 elsewhere). At least one word a text is hidden."""
    word = (mask == 1) & ~torch.isin(ids, torch.tensor(special, device=ids.device))
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(~word, 2.0)
    chosen = (draw < CHOSEN) | (draw == draw.amin(dim=1, keepdim=True))
    chosen = chosen & word
    fate = torch.rand(ids.shape, device=ids.device)
    shown = torch.where(chosen & (fate < MASKED), blank, ids)
    other = torch.randint(vocabulary, ids.shape, device=ids.device)
    shown = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + EXCHANGED), other, shown)
    return shown, ids.masked_fill(~chosen, -100)
