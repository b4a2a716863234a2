"""Predict masked words of the report from its other words and the volume."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.config import ObjectiveConfig
from ctclip.data.batch import Tokens
from ctclip.errors import ConfigError
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import Context, Objective
from ctclip.objectives.words import WordDecoder, WordsConfig

# Of the chosen words, 80 % are masked, 10 % replaced and 10 % kept (Devlin et al. 2019, section 3.1).
CHOSEN, MASKED, EXCHANGED = 0.15, 0.8, 0.1


class MaskedWords(Objective):
    """Masked language modelling conditioned on the volume (ALBEF, Li et al. 2021, section 3.2)."""

    Config: ClassVar[type[ObjectiveConfig]] = WordsConfig
    needs = ("tokens", "words")

    def __init__(self, config: WordsConfig, context: Context) -> None:
        super().__init__(config, context)
        text, volume = context.model.text_encoder, context.model.volume_encoder
        if text.tokenizer.mask_token_id is None:
            raise ConfigError(
                f"objectives.mlm: the tokenizer of the {text.bert.config.model_type} text encoder has no mask token to hide "
                f"words with; leave the objective out (objectives.mlm=0), or take an encoder that was trained with one"
            )
        self.decoder = WordDecoder(
            text.bert.config.vocab_size, volume.token_width, text.width, depth=config.depth, heads=config.heads
        )
        # Not submodules, because the step already contains the model.
        self.text = (text.bert, text.tokenizer)

    def forward(self, tokens: Encoded, words: Tokens) -> Tensor:
        bert, tokenizer = self.text
        return masked_words(self.decoder, bert, words["input_ids"], words["attention_mask"], tokens, tokenizer)


def masked_words(
    decoder: WordDecoder, bert: nn.Module, ids: Tensor, mask: Tensor, tokens: Encoded, tokenizer: Any
) -> Tensor:
    """Mean cross-entropy (nats per word) of the words of ``ids`` (B, L) that were hidden from ``bert``."""
    masked, target = hide(ids, mask, tokenizer.mask_token_id, tokenizer.all_special_ids, len(tokenizer))
    hidden = bert(input_ids=masked, attention_mask=mask).last_hidden_state
    scores = decoder(hidden, mask, tokens)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def hide(ids: Tensor, mask: Tensor, blank: int, special: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """``ids`` (B, L) with some words hidden, and the targets (-100 elsewhere). At least one word per text is hidden.

    Transformers' DataCollatorForLanguageModeling takes the same time but may hide no word (in 61 % of texts with three
    words), and the loss of a micro-batch without a hidden word is NaN. It also draws on the host, so that the step
    would wait for it."""
    word = (mask == 1) & ~torch.isin(ids, torch.tensor(special, device=ids.device))
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(~word, 2.0)
    chosen = ((draw < CHOSEN) | (draw == draw.amin(dim=1, keepdim=True))) & word
    fate = torch.rand(ids.shape, device=ids.device)
    masked = torch.where(chosen & (fate < MASKED), blank, ids)
    other = torch.randint(vocabulary, ids.shape, device=ids.device)
    masked = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + EXCHANGED), other, masked)
    return masked, ids.masked_fill(~chosen, -100)
