"""Predicting masked words of the report from its other words and the volume."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.data.batch import Tokens
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import Context, Objective
from ctclip.objectives.words import WordPredictor

# Devlin et al. 2019, section 3.1: of the words chosen 80 % are masked, 10 % exchanged, 10 % kept.
CHOSEN, MASKED, EXCHANGED = 0.15, 0.8, 0.1


class MaskedWords(Objective):
    """Masked language modelling with the volume in view (ALBEF, Li et al. 2021, section 3.2)."""

    needs = ("tokens", "words")

    def __init__(self, config: object, context: Context) -> None:
        super().__init__(config, context)
        text, volume = context.model.text_encoder, context.model.volume_encoder
        self.predictor = WordPredictor(text.bert.config.vocab_size, volume.token_width, text.width, text.width, 2)
        # Not submodules: the step has the model already.
        self.text = (text.bert, text.tokenizer)

    def forward(self, tokens: Encoded, words: Tokens) -> Tensor:
        bert, tokenizer = self.text
        return masked_words(self.predictor, bert, words["input_ids"], words["attention_mask"], tokens, tokenizer)


def masked_words(
    predictor: WordPredictor, bert: nn.Module, ids: Tensor, mask: Tensor, tokens: Encoded, tokenizer: Any
) -> Tensor:
    """Mean cross-entropy (nats a word) of the words of ids (B, L) that were hidden from ``bert``."""
    masked, target = hide(ids, mask, tokenizer.mask_token_id, tokenizer.all_special_ids, len(tokenizer))
    hidden = bert(input_ids=masked, attention_mask=mask).last_hidden_state
    scores = predictor(hidden, mask == 0, tokens)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def hide(ids: Tensor, mask: Tensor, blank: int, special: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """ids (B, L) with some words hidden, and what was there (-100 elsewhere). At least one word a text is hidden."""
    word = (mask == 1) & ~torch.isin(ids, torch.tensor(special, device=ids.device))
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(~word, 2.0)
    chosen = ((draw < CHOSEN) | (draw == draw.amin(dim=1, keepdim=True))) & word
    fate = torch.rand(ids.shape, device=ids.device)
    masked = torch.where(chosen & (fate < MASKED), blank, ids)
    other = torch.randint(vocabulary, ids.shape, device=ids.device)
    masked = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + EXCHANGED), other, masked)
    return masked, ids.masked_fill(~chosen, -100)
