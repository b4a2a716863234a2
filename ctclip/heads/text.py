"""Scores of arbitrary texts, without a prompt set or negative prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head, reading
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.plain_yaml import read_yaml


class TextHead(Head):
    """Scores each of ``texts`` by how much closer a volume is to the text than to the mean of ``others``."""

    kind = "text"
    source = "text"

    def __init__(self, model: DualEncoder, texts: Sequence[str], others: Sequence[str]) -> None:
        super().__init__(model)
        self.names, self.others = tuple(texts), tuple(others)
        with torch.no_grad():
            vectors = model.encode_prompts([*texts, *others])
            asked, known = vectors[: len(texts)], vectors[len(texts) :]
            reference = known.mean(dim=0) if len(others) else torch.zeros_like(asked[0])
            self.vectors = asked
            self.directions = torch.nn.functional.normalize(asked - reference, dim=-1)

    def score(self, encoded: Encoded) -> Tensor:
        assert encoded.embedding is not None
        return self.model.logits(encoded.embedding, self.directions)

    def texts(self) -> Tensor:
        return self.vectors

    def fingerprint(self, probe: Tensor) -> bytes:
        return self.directions.float().cpu().numpy().tobytes()

    def save(self, folder: Path) -> None:
        facts = {"texts": list(self.names), "others": list(self.others)}
        (folder / "texts.yaml").write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> TextHead:
        with reading(folder, "its texts are"):
            facts = read_yaml(folder / "texts.yaml")
            texts, others = ([str(text) for text in facts[side]] for side in ("texts", "others"))
        if not texts:
            raise CheckpointError(f"{folder}: has no text to score; copy the model folder again")
        return cls(model, texts, others)
