"""One training step as one module, so that ZeRO's hooks see every parameter it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctclip import losses
from ctclip.config import ObjectiveConfig
from ctclip.distributed import gather, rank
from ctclip.inference.detector import pair_vectors
from ctclip.inference.prompts import PromptSet
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.words import LONGEST, WordPredictor, captioning, masked_words
from ctclip.training.memory import TextMemory


class ContrastiveStep(nn.Module):
    """The dual encoder with its objectives. ``stage`` chooses a part of the step:

    ``features``: encode this rank's volumes and texts; ``loss``: contrast the features of all ranks;
    ``step``: both. A rank's loss is that of its rows against the whole global batch; the mean over ranks is the loss.
    Objectives on words (``ctclip/models/words.py``) need no other rank: they come with the features.
    """

    def __init__(
        self,
        model: DualEncoder,
        objectives: ObjectiveConfig,
        labels: Sequence[str] = (),
        prompts: PromptSet | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        # A parameter that no loss uses has no gradient and no moments; the optimizer must not know it.
        model.similarity.logit_bias.requires_grad_(objectives.siglip > 0)
        # What the text encoder has places for.
        self.longest = min(LONGEST, model.text_encoder.max_tokens)
        self.memory = TextMemory(objectives.memory, model.config.dim) if objectives.memory else None
        self.label_head = nn.Linear(model.config.dim, len(labels)) if objectives.labels else None
        self.labels, self.prompts = tuple(labels), prompts if objectives.prompts else None
        # Encoders in bfloat16, losses never. In here, not around DeepSpeed's engine, which takes a card out of an
        # autocast that it was not told of.
        self.bf16 = False
        self.pairs: Tensor | None = None
        self.writer = self._predictor(None) if objectives.captioning else None
        self.filler = self._predictor(model.text_encoder.width) if objectives.mlm else None

    def forward(self, stage: str, **inputs: Any) -> Any:
        if stage == "features":
            return self._features(**inputs)
        if stage == "loss":
            return self._loss(**inputs)
        features = ("volumes", "tokens", "words")
        volume_features, text_features, read = self._features(**{n: inputs.pop(n) for n in features if n in inputs})
        loss, parts = self._loss(volume_features, text_features, **inputs)
        return sum(read.values(), loss), parts | {name: part.detach() for name, part in read.items()}

    def words(self, texts: list[str]) -> dict[str, Tensor] | None:
        """Ids of whole texts for the objectives on words; None where there are none."""
        if self.writer is None and self.filler is None:
            return None
        found = self.model.text_encoder.tokenizer(
            texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def _features(
        self, volumes: Tensor, tokens: dict[str, Tensor], words: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """volumes (b, 1, D, H, W); tokens of b * views texts; words of the first view of each -> features (b, dim) and
        (b * views, dim), and the weighted objectives on words."""
        with torch.autocast(volumes.device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self.model.volume_encoder(volumes, None)
            read = {} if words is None else self.read(words, encoded.tokens)
            return self.model.volume_projection(encoded.pooled), self.model.text_features(tokens), read

    def read(self, words: dict[str, Tensor], volume: Tensor) -> dict[str, Tensor]:
        """The weighted objectives on words: ids of whole texts (b, L), the volumes' tokens (b, N, C)."""
        ids, mask, text = words["input_ids"], words["attention_mask"], self.model.text_encoder
        read: dict[str, Tensor] = {}
        if self.writer is not None:
            read["captioning"] = self.objectives.captioning * captioning(self.writer, ids, mask, volume)
        if self.filler is not None:
            found = masked_words(self.filler, text.bert, ids, mask, volume, text.tokenizer)
            read["mlm"] = self.objectives.mlm * found
        return read

    def _remembered(self, scans: Tensor, identities: Tensor, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Texts of earlier steps (size, dim), and which of them each row is not contrasted with (rows, size)."""
        if self.memory is None:
            return None
        if not self.objectives.by_identity:
            # Nobody's: places that are empty are left out, and no other.
            scans, identities = torch.full_like(scans, -1), torch.full_like(identities, -1)
        return self.memory.texts.clone(), self.memory.left_out(scans[rows], identities[rows])

    def _same(self, scans: Tensor, identities: Tensor, rows: slice) -> Tensor:
        """(rows, B) bool: pairs that are no negatives of each other."""
        found = losses.same_identity(scans, identities, rows)
        return found if self.objectives.by_identity else torch.zeros_like(found)

    def _predictor(self, inside: int | None) -> WordPredictor:
        text = self.model.text_encoder
        return WordPredictor(text.bert.config.vocab_size, self.model.volume_encoder.token_width, inside, text.width, 2)

    def _loss(
        self,
        volume_features: Tensor,
        text_features: Tensor,
        scans: Tensor,
        text_identities: Tensor,
        labels: Tensor | None = None,
        labels_alone: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features and identities of this rank -> the loss of the global batch, and what to log of it."""
        similarity, objectives = self.model.similarity, self.objectives
        share = len(scans)
        rows = slice(rank() * share, (rank() + 1) * share)
        volume_features, text_features = gather(volume_features.float()), gather(text_features.float())
        scans, text_identities = gather(scans), gather(text_identities)
        volumes, texts = similarity.volume(volume_features), similarity.text(text_features)
        views = len(texts) // len(volumes)
        scale = similarity.scale()
        parts: dict[str, Tensor] = {}
        for view in range(views):
            of_view = texts[view::views]
            same = self._same(scans, text_identities[view::views], rows)
            if objectives.negatives is not None:
                same = same | _apart(len(volumes), objectives.negatives, rows, same.device)
            further = self._remembered(scans, text_identities[view::views], rows)
            found: dict[str, Any] = {
                "clip": lambda texts=of_view, same=same, further=further: losses.clip(
                    volumes, texts, scale, same, rows, further=further
                ),
                "convirt": lambda texts=of_view, same=same: losses.convirt(volumes, texts, scale, same, rows),
                "siglip": lambda texts=of_view, same=same: losses.siglip(
                    volumes, texts, scale, similarity.logit_bias, same, rows
                ),
            }
            for name, loss in found.items():
                if weight := getattr(objectives, name):
                    parts[name] = parts.get(name, 0.0) + weight / views * loss()
        if self.memory is not None and torch.is_grad_enabled():
            self.memory.remember(texts.detach(), scans.repeat_interleave(views), text_identities)
        if labels_alone:
            # Weighed by nothing, not left out: every parameter keeps a gradient, as ZeRO wants it.
            parts = {name: 0.0 * part for name, part in parts.items()}
        if objectives.reads_labels:
            if labels is None:
                raise ValueError("objectives.labels or prompts is set, but the batch has no labels")
            every = gather(labels)
        if self.label_head is not None:
            of_volumes = losses.multi_label(self.label_head(volumes * scale), every)
            of_texts = losses.multi_label(self.label_head(texts * scale), every.repeat_interleave(views, dim=0))
            parts["labels"] = objectives.labels * (of_volumes + of_texts) / 2
        if self.prompts is not None:
            margins = self.model.logits(volumes, self._between_prompts())
            parts["prompts"] = objectives.prompts * losses.multi_label(margins, every)
        total = torch.stack([part.reshape(()) for part in parts.values()]).sum()
        return total, {name: part.detach() for name, part in parts.items()} | {"logit_scale": scale.detach()}

    def _between_prompts(self) -> Tensor:
        """(labels, dim): what detection multiplies volumes with, from one side of each label's prompts to the other. No
        gradient flows into it: the prompts say where volumes should go, and learn from the reports alone."""
        assert self.prompts is not None
        if self.pairs is None or not self.model.text_locked:
            training = self.model.training
            self.model.eval()
            positive, negative = pair_vectors(self.model, self.prompts, self.labels)
            self.model.train(training)
            self.pairs = positive - negative
        return self.pairs


def _apart(batch: int, group: int, rows: slice, device: torch.device) -> Tensor:
    """(rows, B) bool: pairs of different groups of ``group`` neighbours."""
    number = torch.arange(batch, device=device) // group
    return number[rows, None] != number[None, :]
