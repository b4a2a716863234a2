"""Predict the report from the volume, token by token."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ctclip.config import ObjectiveConfig
from ctclip.data.batch import Tokens
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import Context, Objective
from ctclip.objectives.words import WordDecoder, WordsConfig


class Captioning(Objective):
    """Predicts the next word of the report (VirTex, Desai & Johnson 2021; CoCa, Yu et al. 2022) to train the volume
    encoder; the decoder can also be kept as a head (``ctclip.heads.caption``)."""

    Config: ClassVar[type[ObjectiveConfig]] = WordsConfig
    needs = ("tokens", "words")

    def __init__(self, config: WordsConfig, context: Context) -> None:
        super().__init__(config, context)
        text, volume = context.model.text_encoder, context.model.volume_encoder
        self.decoder = WordDecoder(
            text.bert.config.vocab_size, volume.token_width, text.width, depth=config.depth, heads=config.heads
        )

    def forward(self, tokens: Encoded, words: Tokens) -> Tensor:
        return captioning(self.decoder, words["input_ids"], words["attention_mask"], tokens)


def captioning(decoder: WordDecoder, ids: Tensor, mask: Tensor, tokens: Encoded) -> Tensor:
    """Mean cross-entropy (nats per word) of the next words of ``ids`` (B, L), with ``mask`` (B, L) 1 for words and 0
    for padding."""
    scores = decoder(ids[:, :-1], mask[:, :-1], tokens)
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)
