"""A decoder that attends to the tokens of a volume, shared by the objectives on words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.models.encoded import Encoded

# Tokens of a report that are looked at; the phantom's have some 150, real ones 291 in the median.
LONGEST = 256


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

    def forward(self, words: Tensor, padding: Tensor, tokens: Encoded) -> Tensor:
        """words (B, L) ids or (B, L, inside); padding (B, L) bool, true where there is no word; tokens of B volumes.
        Returns (B, L, vocabulary)."""
        length = padding.shape[1]
        places = self.places(torch.arange(length, device=padding.device))
        mask = None
        if self.causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=padding.device).triu(1)
        hidden = self.layers(
            self.embed(words) + places,
            self.memory(tokens.tokens),
            tgt_mask=mask,
            # Said, or torch asks the device whether the mask is one.
            tgt_is_causal=self.causal,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=None if tokens.real is None else ~tokens.real,
        )
        return self.score(hidden)
