"""Learned prompts (CoOp, Zhou et al. 2022): vectors that replace word embeddings and are encoded by the frozen text
encoder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctclip.errors import CheckpointError, ConfigError
from ctclip.heads.head import Head, reading
from ctclip.heads.prompts import shares_length, unit_pair
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.plain_yaml import read_yaml


@dataclass(frozen=True)
class Contexts:
    """P prompts. ids, mask (P, L) int64: tokens for the encoder; slot (P, L): -1 for a token with its own embedding,
    else the row of ``vectors`` (V, width of the word embeddings) that replaces it; side (P,): 2 x label for a prompt
    that states the label, 2 x label + 1 for one that denies it; weight (P,): weight of the prompt in the mean of its
    side."""

    ids: Tensor
    mask: Tensor
    slot: Tensor
    side: Tensor
    weight: Tensor
    vectors: Tensor

    def to(self, device: torch.device) -> Contexts:
        return Contexts(*(getattr(self, part.name).to(device) for part in fields(self)))


class ContextHead(Head):
    """Scores labels by the difference of the two sides of their learned prompts, as for written prompts."""

    kind = "contexts"
    supervision = "label-supervised"

    def __init__(
        self, model: DualEncoder, names: Sequence[str], contexts: Contexts, ensemble: str = "embeddings"
    ) -> None:
        super().__init__(model)
        self.names, self.ensemble = tuple(names), ensemble
        _check(contexts, len(self.names), model)
        self.contexts = contexts.to(model.device)
        digest = hashlib.sha256(self.contexts.vectors.detach().float().cpu().numpy().tobytes()).hexdigest()[:8]
        self.source = f"learned prompts {digest}"
        with torch.no_grad():
            self.directions = directions(model, self.contexts, len(self.names), ensemble)

    def score(self, encoded: Encoded) -> Tensor:
        if encoded.embedding is None:
            raise ValueError("these volumes were encoded without their embedding; call DualEncoder.encode")
        return self.model.logits(encoded.embedding, self.directions)

    def fingerprint(self, probe: Tensor) -> bytes:
        return self.directions.float().cpu().numpy().tobytes()

    def save(self, folder: Path) -> None:
        tensors = {
            part.name: getattr(self.contexts, part.name).detach().cpu().contiguous() for part in fields(Contexts)
        }
        save_file(tensors, folder / "contexts.safetensors")
        facts = {"names": list(self.names), "ensemble": self.ensemble}
        (folder / "contexts.yaml").write_text(
            yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> ContextHead:
        with reading(folder, "its learned prompts are"):
            facts = read_yaml(folder / "contexts.yaml")
            tensors = load_file(folder / "contexts.safetensors")
            contexts = Contexts(**{part.name: tensors[part.name] for part in fields(Contexts)})
            names, ensemble = [str(name) for name in facts["names"]], str(facts["ensemble"])
        return cls(model, names, contexts, ensemble)


def directions(model: DualEncoder, contexts: Contexts, labels: int, ensemble: str) -> Tensor:
    """(labels, dim): the vector from the negative to the positive side of each label; differentiable in
    ``contexts.vectors``."""
    encoder = model.text_encoder
    with replaced_words(encoder.bert, contexts.slot, contexts.vectors):
        hidden = encoder.bert(input_ids=contexts.ids, attention_mask=contexts.mask).last_hidden_state
    features = model.text_projection(encoder.pool(hidden, contexts.mask)).float()
    shared = shares_length(model, ensemble)
    vectors = model.similarity.text_standard(features) if shared else model.similarity.text(features)
    sides = vectors.new_zeros(2 * labels, vectors.shape[1])
    sides = sides.index_add(0, contexts.side, vectors * contexts.weight[:, None].to(vectors))
    positive, negative = unit_pair(sides[0::2], sides[1::2], ensemble, shared=shared)
    return positive - negative


@contextlib.contextmanager
def replaced_words(bert: Any, slot: Tensor, vectors: Tensor) -> Iterator[None]:
    """Context manager in which tokens with a ``slot`` (P, L) other than -1 have that row of ``vectors`` (V, width) as
    embedding.

    Hooks the embedding layer instead of passing ``inputs_embeds``, which some encoders (CLIP's) do not accept and with
    which others (RoBERTa's) count positions differently. Raises ConfigError if the encoder has no single embedding
    layer.
    """
    words = word_embedding(bert)
    looked_up = 0

    def replacing(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        nonlocal looked_up
        looked_up += 1
        # Longformer pads texts beyond the given length.
        places = nn.functional.pad(slot, (0, output.shape[1] - slot.shape[1]), value=-1)
        return torch.where((places >= 0)[..., None], vectors[places.clamp(min=0)].to(output), output)

    # Encoders with tied embeddings have several modules with one weight.
    tables = [part for part in bert.modules() if isinstance(part, nn.Embedding) and part.weight is words.weight]
    handles = [part.register_forward_hook(replacing) for part in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if looked_up != 1:
        raise ConfigError(
            f"learned prompts: the {bert.config.model_type} encoder looks up its word vectors {looked_up} times instead of once; use another text encoder"
        )


def word_embedding(bert: Any) -> nn.Embedding:
    """The table of word vectors of a text encoder."""
    words: nn.Embedding = bert.get_input_embeddings()
    return words


def word_vectors_of(bert: Any, ids: Tensor) -> Tensor:
    """ids (n,) -> embeddings (n, width), with the scale that the encoder applies."""
    with torch.no_grad():
        return word_embedding(bert)(ids[None])[0].float()


def nearest_words(model: DualEncoder, vectors: Tensor, count: int = 1) -> list[list[tuple[str, float]]]:
    """The ``count`` tokens with the nearest embeddings to each of ``vectors`` (V, width), with their distances
    (Euclidean, as in CoOp's table 4)."""
    tokenizer = model.text_encoder.tokenizer
    ids = torch.arange(len(tokenizer), device=model.device)
    table = word_vectors_of(model.text_encoder.bert, ids[: word_embedding(model.text_encoder.bert).num_embeddings])
    distance, index = torch.cdist(vectors.float(), table).topk(min(count, len(table)), largest=False)
    words = [tokenizer.convert_ids_to_tokens(row) for row in index.tolist()]
    return [list(zip(some, far, strict=True)) for some, far in zip(words, distance.tolist(), strict=True)]


def prompts_in_words(head: ContextHead) -> list[str]:
    """Each prompt as the words nearest to its learned vectors; tokens with their own embedding are in brackets."""
    contexts, tokenizer = head.contexts, head.model.text_encoder.tokenizer
    nearest = [words[0][0] for words in nearest_words(head.model, contexts.vectors)]
    around = head.model.text_encoder.reading
    texts = []
    for ids, mask, slot, side in zip(contexts.ids, contexts.mask, contexts.slot, contexts.side, strict=True):
        last = int(mask.sum()) - len(around.suffix)
        kept = tokenizer.convert_ids_to_tokens(ids.tolist())
        words = [
            nearest[slot[place]] if slot[place] >= 0 else f"[{kept[place]}]"
            for place in range(len(around.prefix), last)
        ]
        sign = "+" if int(side) % 2 == 0 else "-"
        texts.append(f"{sign} {head.names[int(side) // 2]}: {' '.join(words)}")
    return texts


def with_vectors(contexts: Contexts, vectors: Tensor) -> Contexts:
    """The prompts with ``vectors`` instead of their own vectors."""
    return replace(contexts, vectors=vectors)


def _check(contexts: Contexts, labels: int, model: DualEncoder) -> None:
    """Raise CheckpointError unless contexts are consistent and fit the labels and the model's text encoder."""
    words = word_embedding(model.text_encoder.bert)
    shape = contexts.ids.shape
    fits = (
        contexts.mask.shape == contexts.slot.shape == shape and len(contexts.side) == len(contexts.weight) == len(contexts.ids)
        and contexts.vectors.ndim == 2 and contexts.vectors.shape[1] == words.embedding_dim
        and int(contexts.slot.max()) < len(contexts.vectors) and int(contexts.ids.max()) < words.num_embeddings
        and int(contexts.ids.min()) >= 0 and set(contexts.side.tolist()) == set(range(2 * labels))
    )  # fmt: skip
    if not fits:
        raise CheckpointError(
            f"learned prompts of {len(contexts.vectors)} vectors of width {contexts.vectors.shape[-1]} do not fit {labels} "
            f"labels and a text encoder of width {words.embedding_dim}: they belong to another model or label set"
        )
