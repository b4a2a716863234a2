"""Contrast of single sentences with the volumes of the batch.

A report has many sentences, so the one that states a small finding contributes little to the embedding of the report.
Here every sentence is contrasted by itself. Volumes whose reports contain a sentence of the same meaning, judged by the
embeddings, are its positives (supervised contrast, Khosla et al. 2020, eq. 3, with the texts' similarities in place of
labels as in MedCLIP, Wang et al. 2022). The sentences have no gradient: the text encoder learns from whole reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ctclip.config import ObjectiveConfig
from ctclip.models.dual_encoder import DualEncoder
from ctclip.objectives.objective import Context, Features, Objective

# Number of sentences encoded at a time.
AT_ONCE = 256


class SentencesConfig(ObjectiveConfig):
    """Contrast of sentences with volumes."""

    same: float = Field(
        0.75,
        gt=-1,
        le=1,
        description="minimum cosine of two sentences with the same meaning (their embeddings are centred over the batch)",
    )
    other: float = Field(
        0.75,
        gt=-1,
        le=1,
        description="a volume is a negative of a sentence if the cosines of all sentences of its report are below this; "
        "between other and same, it is neither",
    )
    temperature: float = Field(0.1, gt=0, le=100, description="temperature of the softmax over volumes")

    @model_validator(mode="after")
    def _in_order(self) -> SentencesConfig:
        if self.other > self.same:
            raise ValueError(f"other={self.other:g} must not be above same={self.same:g}")
        return self


class Sentences(Objective):
    """Finds, for each sentence of the batch, the volumes whose reports state it.

    The sentences are those of the whole reports, whichever views of them are drawn.
    """

    Config: ClassVar[type[ObjectiveConfig]] = SentencesConfig
    needs = ("features", "sentences")
    config: SentencesConfig

    def __init__(self, config: SentencesConfig, context: Context) -> None:
        super().__init__(config, context)
        # Kept in a tuple, so that it is not a submodule, because the step already holds the model.
        self.model = (context.model,)
        self.texts = context.sentences
        self.table: Tensor | None = None

    def forward(self, features: Features, sentences: Tensor) -> Tensor:
        """``sentences`` (B, S) int64: the places of each report's sentences in ``Context.sentences``, filled up with
        -1."""
        return sentence_contrast(features.volumes, self._vectors(sentences), sentences, self.config)

    def _vectors(self, sentences: Tensor) -> Tensor:
        """Embeddings (B, S, dim) of sentences; any vector where there is none. If the text encoder is not locked, this
        waits for the device."""
        (model,) = self.model
        places = sentences.clamp(min=0)
        if not model.text_locked:
            distinct, inverse = places.unique(return_inverse=True)
            return encoded(model, [self.texts[place] for place in distinct.tolist()])[inverse]
        if self.table is None:
            # Without the vectors that the text encoder remembers, because their rounding, and their precision, depend
            # on the step that encoded them first: a resumed run would have others.
            encoder = model.text_encoder
            known, encoder.known = encoder.known, {}
            self.table = encoded(model, self.texts)
            encoder.known = known
        return self.table[places]


@torch.no_grad()
def encoded(model: DualEncoder, texts: Sequence[str]) -> Tensor:
    """Embeddings (n, dim) of single sentences, encoded like prompts: without dropout, and without changing the running
    statistics."""
    training = model.training
    model.eval()
    parts = [model.encode_prompts(texts[first : first + AT_ONCE]) for first in range(0, len(texts), AT_ONCE)]
    model.train(training)
    return torch.cat(parts)


def sentence_contrast(volumes: Tensor, vectors: Tensor, sentences: Tensor, config: SentencesConfig) -> Tensor:
    """Mean cross-entropy (nats), over sentences, of finding one of their positive volumes among these and the negative
    ones.

    volumes (B, dim) unit vectors; vectors (B, S, dim): sentences of their reports, of any norm, centred here; sentences
    (B, S): their numbers, equal for the same wording, -1 for none. A sentence without a negative is left out. Every
    rank computes the whole loss.
    """
    real = sentences >= 0
    centre = (vectors * real[..., None]).sum(dim=(0, 1)) / real.sum().clamp(min=1)
    vectors = F.normalize(vectors - centre, dim=-1)
    every, numbers = vectors.flatten(0, 1), sentences.flatten()
    # The highest cosine (B * S, B) of each sentence with the sentences of each report.
    alike = every.new_full((len(every), len(volumes)), -1.0)
    for place in range(vectors.shape[1]):
        cosines = (every @ vectors[:, place].T).masked_fill(~real[:, place], -1.0)
        alike = torch.maximum(alike, cosines)
        # The same wording has the same meaning, even where the centred vectors are zero. Thus every row has a positive.
        alike = alike.masked_fill(numbers[:, None] == sentences[:, place], 1.0)
    positive, negative = alike >= config.same, alike < config.other
    used = real.flatten() & negative.any(dim=1)
    logits = (every @ volumes.float().T / config.temperature).masked_fill(~(positive | negative), float("-inf"))
    losses = logits.logsumexp(dim=1) - logits.masked_fill(~positive, float("-inf")).logsumexp(dim=1)
    return (losses * used).sum() / used.sum().clamp(min=1)
