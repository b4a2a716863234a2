"""Alignment of the sentences of a report with the tokens of the volume that they describe.

A sentence is compared with every token of a volume, and the similarities are pooled over tokens. Among the volumes of
the micro-batch, the one with the report should have the highest value (GLoRIA, Huang et al. 2021, eq. 4 to 7, with
sentences in place of words as in LoVT, Mueller et al. 2022). ``pool: attention`` compares the sentence with the mean of
the tokens, weighted by the softmax of their similarities; ``max`` takes the most similar token (FILIP, Yao et al. 2022,
eq. 4). Tokens pass through the model's projection to the joint space, so that maps of similarity show what was learned.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ctclip.config import ObjectiveConfig
from ctclip.data.batch import Tokens
from ctclip.language import load_language
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import Context, Objective

STOPS = (".", "!", "?")


class AlignmentConfig(ObjectiveConfig):
    """Alignment of sentences with tokens."""

    pool: Literal["attention", "max"] = Field(
        "attention", description="how the similarities between a sentence and the tokens are pooled"
    )
    attention_temperature: float = Field(
        0.25,
        gt=0,
        le=100,
        description="temperature of the softmax over tokens (as in GLoRIA); if it is much lower, most tokens get no "
        "gradient",
    )
    temperature: float = Field(0.1, gt=0, le=100, description="temperature of the softmax over volumes")
    positive: bool = Field(True, description="leave out sentences that state that something is absent or normal")
    language: str = Field("english", description="language for detecting negation; see data.language")


class Alignment(Objective):
    """Contrasts the sentences of each report with the tokens of every volume of the micro-batch."""

    Config: ClassVar[type[ObjectiveConfig]] = AlignmentConfig
    needs = ("tokens", "words")
    config: AlignmentConfig

    def __init__(self, config: AlignmentConfig, context: Context) -> None:
        super().__init__(config, context)
        context.model.volume_encoder.check_lift()
        # Kept in a tuple, so that it is not a submodule, because the step already holds the model.
        self.model = (context.model,)
        self.language = load_language(config.language)
        self.negative: dict[tuple[int, ...], bool] = {}

    def forward(self, tokens: Encoded, words: Tokens) -> Tensor:
        (model,) = self.model
        cells = model.volume_projection(model.volume_encoder.lift(tokens.tokens)).float()
        sentences, owners = self._sentences(words, model.text_encoder)
        if not sentences or len(cells) < 2:
            # Nothing to contrast: return a zero that still gives every parameter a gradient.
            return cells.sum() * 0.0
        places = {sentence: number for number, sentence in enumerate(dict.fromkeys(sentences))}
        vectors = model.text_projection(model.text_encoder(**_padded(list(places), model.text_encoder))).float()
        kinds = torch.tensor([places[sentence] for sentence in sentences], device=cells.device)
        owner = torch.tensor(owners, device=cells.device)
        return alignment(cells, vectors, kinds, owner, tokens.real, self.config)

    def _sentences(self, words: Tokens, encoder: Any) -> tuple[list[tuple[int, ...]], list[int]]:
        """The token ids of the sentences to use, and the index of the report of each."""
        special = set(encoder.tokenizer.all_special_ids)
        stops = {encoder.tokenizer.convert_tokens_to_ids(stop) for stop in STOPS} - special
        token_ids, owners = [], []
        for number, (ids, mask) in enumerate(zip(words["input_ids"].tolist(), words["attention_mask"].tolist(), strict=True)):  # fmt: skip
            sentence: list[int] = []
            for token in (token for token, there in zip(ids, mask, strict=True) if there and token not in special):
                sentence.append(token)
                if token in stops:
                    token_ids.append(tuple(sentence))
                    owners.append(number)
                    sentence = []
        kept = [(one, owner) for one, owner in zip(token_ids, owners, strict=True) if not self._says_no(one, encoder)]
        return [one for one, _ in kept], [owner for _, owner in kept]

    def _says_no(self, sentence: tuple[int, ...], encoder: Any) -> bool:
        if not self.config.positive:
            return False
        if sentence not in self.negative:
            self.negative[sentence] = self.language.negates(encoder.tokenizer.decode(list(sentence)))
        return self.negative[sentence]


def alignment(
    cells: Tensor, vectors: Tensor, kinds: Tensor, owner: Tensor, real: Tensor | None, config: AlignmentConfig
) -> Tensor:
    """Mean cross-entropy (nats), over sentences, of identifying the right volume among B; chance is ln B.

    cells (B, N, dim); vectors (K, dim): the distinct wordings; kinds (S,): the wording of each sentence; owner (S,):
    its volume; real (B, N) bool. A volume with the same wording in its report is not a negative. Both sides are centred
    over the micro-batch, because the vectors of an untrained model are nearly parallel.
    """
    if real is not None:
        cells = cells * real[..., None]
    cells = F.normalize(cells - cells.mean(dim=(0, 1)), dim=-1)
    vectors = F.normalize(vectors - vectors.mean(dim=0) if len(vectors) > 1 else vectors, dim=-1)
    similar = torch.einsum("kd,bnd->kbn", vectors, cells)
    if real is not None:
        similar = similar.masked_fill(~real, -2.0)
    if config.pool == "max":
        pooled = similar.amax(dim=2)
    else:
        weights = (similar / config.attention_temperature).softmax(dim=2)
        drawn = F.normalize(torch.einsum("kbn,bnd->kbd", weights, cells), dim=-1)
        pooled = torch.einsum("kd,kbd->kb", vectors, drawn)
    says = torch.zeros(len(vectors), len(cells), dtype=torch.bool, device=cells.device)
    says[kinds, owner] = True
    logits = (pooled / config.temperature)[kinds]
    also = says[kinds]
    also[torch.arange(len(kinds), device=cells.device), owner] = False
    return F.cross_entropy(logits.masked_fill(also, float("-inf")), owner)


def _padded(sentences: list[tuple[int, ...]], encoder: Any) -> Tokens:
    """Ids and mask (K, L), on the host, of sentences, each tokenised as a separate text."""
    reading = encoder.reading
    room = encoder.max_tokens - reading.around
    whole = [[*reading.prefix, *sentence[:room], *reading.suffix] for sentence in sentences]
    length = max(map(len, whole))
    ids = torch.full((len(whole), length), reading.padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(whole):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
