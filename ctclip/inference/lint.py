"""Check a prompt set with a model: pairs that it cannot distinguish, and phrasings closer to the wrong side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ctclip.heads.prompts import pair_vectors
from ctclip.models.dual_encoder import DualEncoder
from ctclip.prompts import PromptSet

TOO_CLOSE = 0.95


@dataclass(frozen=True)
class PairCheck:
    """Cosine similarity of the positive and negative prompts of an abnormality, and warnings about its phrasings."""

    abnormality: str
    cosine: float
    warnings: tuple[str, ...]


@torch.inference_mode()
def check_prompts(
    model: DualEncoder, prompts: PromptSet, too_close: float = TOO_CLOSE, names: Sequence[str] | None = None
) -> list[PairCheck]:
    """One check per abnormality (of ``names``; default: those listed in the set), the most similar pair first."""
    names = tuple(names or prompts.names())
    cosines = F.cosine_similarity(*pair_vectors(model, prompts, names)).tolist()
    unknown = model.text_encoder.tokenizer.unk_token
    checks = []
    for name, cosine in zip(names, cosines, strict=True):
        warnings = []
        if cosine > too_close:
            warnings.append(
                f"the model hardly distinguishes the positive from the negative prompts (cosine {cosine:.3f})"
            )
        sides = [prompts.side(name, stated) for stated in (True, False)]
        vectors = model.encode_prompts([text for texts in sides for text in texts]).split([len(side) for side in sides])
        positive, negative = (side.mean(dim=0) for side in vectors)
        direction = positive - negative
        middle = float((positive + negative) @ direction) / 2
        for stated, texts, side in zip((True, False), sides, vectors, strict=True):
            for text, value in zip(texts, (side @ direction).tolist(), strict=True):
                if (value > middle) != stated:
                    warnings.append(f"{text!r} is nearer to the {'negative' if stated else 'positive'} prompts")
                if unknown and unknown in model.text_encoder.tokenizer.tokenize(text):
                    warnings.append(f"{text!r} contains a word that the tokenizer does not know")
        twice = set(prompts.side(name, True)) & set(prompts.side(name, False))
        warnings += [f"{text!r} is both a positive and a negative prompt" for text in sorted(twice)]
        checks.append(PairCheck(name, cosine, tuple(warnings)))
    return sorted(checks, key=lambda check: -check.cosine)
