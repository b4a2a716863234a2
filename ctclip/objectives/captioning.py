"""Writing the report from the volume, word by word."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ctclip.data.batch import Tokens
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import Context, Objective
from ctclip.objectives.words import WordPredictor


class Captioning(Objective):
    """Next words of the report (VirTex, Desai & Johnson 2021; CoCa, Yu et al. 2022). The decoder is discarded
    after training; only its effect on the volume encoder remains."""

    needs = ("tokens", "words")

    def __init__(self, config: object, context: Context) -> None:
        super().__init__(config, context)
        text, volume = context.model.text_encoder, context.model.volume_encoder
        self.predictor = WordPredictor(text.bert.config.vocab_size, volume.token_width, None, text.width, 2)

    def forward(self, tokens: Encoded, words: Tokens) -> Tensor:
        return captioning(self.predictor, words["input_ids"], words["attention_mask"], tokens)


def captioning(predictor: WordPredictor, ids: Tensor, mask: Tensor, tokens: Encoded) -> Tensor:
    """Mean cross-entropy (nats a word) of each next word of ids (B, L), mask (B, L) 1 where there is one."""
    scores = predictor(ids[:, :-1], mask[:, :-1] == 0, tokens)
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=-100)
